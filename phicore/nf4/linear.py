"""The NF4 linear layer, as a function and as a module."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from phicore.lazy import lazy_weight
from phicore.modules import has_own_forward
from phicore.nf4 import kernels, ops
from phicore.nf4.low_rank import nf4_low_rank
from phicore.nf4.tensor import NF4Tensor, check_block_size, parts_layout, quantize
from phicore.products import emulated
from phicore.transforms import transformed


def linear(x: Tensor, weight: NF4Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ dequantize(weight).T + bias, differentiable in x and bias.

    Args:
        x: float [..., in]. The weight is decoded to x's dtype; under autocast, to autocast's; to float32 where this CPU
            has no products of that dtype (phicore.products).
        weight: NF4 of shape [out, in].
        bias: float [out], cast to x's dtype, or None.

    Returns:
        [..., out] in x's dtype (autocast's under autocast).

    Raises:
        TypeError: x is not floating-point, or weight is no NF4Tensor.
        ValueError: weight is not two-dimensional, or x's or bias's last dimension does not fit it.
    """
    if not isinstance(weight, NF4Tensor):
        raise TypeError(
            f"nf4.linear takes an NF4Tensor, got a {type(weight).__name__}; phicore.nf4.quantize(weight) makes one"
        )
    if len(weight.shape) != 2:
        raise ValueError(f"nf4.linear takes a weight of shape [out, in], got {tuple(weight.shape)}")
    return _linear(
        x,
        (weight.packed, weight.absmax, weight.nested_absmax, weight.offset),
        bias,
        (weight.shape[0], weight.shape[1]),
        weight.block_size,
    )


def _linear(
    x: Tensor,
    parts: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    bias: Tensor | None,
    shape: tuple[int, int],
    block_size: int,
) -> Tensor:
    if parts[0].is_meta and not x.is_meta:
        raise RuntimeError(
            f"x is on {x.device}, and the NF4 weight of shape {list(shape)} on meta: it was never loaded"
        )
    if not x.is_floating_point():  # to integers the weight would be decoded as 0 and a few +-1
        raise TypeError(f"x is {x.dtype}, and an NF4 weight is multiplied with floats; convert x first")
    if x.shape[-1] != shape[1]:
        raise ValueError(f"x of shape {tuple(x.shape)} does not fit an NF4 weight of shape [out, in] = {list(shape)}")
    if bias is not None and tuple(bias.shape) != (shape[0],):
        raise ValueError(f"bias must have shape [{shape[0]}], got {list(bias.shape)}")
    x = autocast(x)
    if bias is not None:
        bias = bias.to(x.dtype)
    if transformed():
        weight = ops.dequantize(*parts, list(shape), block_size, x.dtype)
        return nn.functional.linear(x, weight, bias)
    return ops.nf4_linear(x, *parts, bias, list(shape), block_size)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast would take a matrix product of x; x's own without it."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x.dtype  # the meta device knows no autocast, and autocast leaves float64 alone
    return torch.get_autocast_dtype(device)


def autocast(x: Tensor) -> Tensor:
    """x as autocast would give it to a matrix product. The dispatcher's own rule would cast the float32 scales too."""
    dtype = autocast_dtype(x)
    return x if x.dtype == dtype else x.to(dtype)


class NF4Linear(nn.Module):
    """A linear layer whose weight is held in NF4. The weight does not train; the bias can.

    The parts of the weight are buffers: `packed`, `absmax` and, double-quantised, `nested_absmax` and `offset`
    (see NF4Tensor). `.half()`, `.bfloat16()` and `.to(dtype)` change `dtype`, in which the bias is held and adapters
    are made, and leave the scales in float32.

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear. The weight starts undefined, so that a layer
            can be built on the meta device and filled by load_state_dict; use `from_linear` to encode one.
        block_size: weights that share one absmax.
        double_quant: whether the absmax are coded in 8 bits.

    Example:
        >>> layer = NF4Linear.from_linear(nn.Linear(64, 32))
        >>> layer(torch.randn(2, 64)).shape
        torch.Size([2, 32])
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_block_size(block_size)
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.double_quant = block_size, double_quant
        self.dtype = dtype or torch.get_default_dtype()
        layout = self._layout()
        for name in ("packed", "absmax", "nested_absmax", "offset"):
            size, part_dtype = layout.get(name, (None, None))
            self.register_buffer(name, None if size is None else torch.empty(size, dtype=part_dtype, device=device))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=self.dtype, device=device))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, block_size: int = 64, double_quant: bool = True) -> "NF4Linear":
        """Encodes an nn.Linear; the bias is shared with it. Raises TypeError for another layer, also for a subclass
        with a forward of its own, and else as `quantize` does."""
        if not isinstance(linear, nn.Linear) or has_own_forward(linear):
            raise TypeError(f"NF4Linear computes what nn.Linear does, and takes no {type(linear).__name__}")
        layer = cls.from_nf4(quantize(linear.weight, block_size, double_quant), linear.bias)
        return layer.train(linear.training)

    @classmethod
    def from_nf4(cls, weight: NF4Tensor, bias: Tensor | None = None) -> "NF4Linear":
        """Wraps an NF4 weight of shape [out, in] that already exists; parts and bias are shared, not copied."""
        if len(weight.shape) != 2:
            raise ValueError(f"NF4Linear takes a weight of shape [out, in], got {tuple(weight.shape)}")
        layer = cls(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            block_size=weight.block_size,
            double_quant=weight.double_quant,
            device="meta",
            dtype=weight.dtype,
        )
        for name, part in weight.parts().items():
            setattr(layer, name, part)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @property
    def nf4(self) -> NF4Tensor:
        """The weight, [out, in]; its parts are this layer's buffers."""
        shape = torch.Size((self.out_features, self.in_features))
        return NF4Tensor(*self._parts(), shape=shape, dtype=self.dtype, block_size=self.block_size)

    @property
    def weight(self) -> Tensor:
        """The decoded weight [out, in] in `dtype`, for code that reads a layer's weight: its dtype, shape and device
        cost nothing, and what computes with it decodes it. Writing to it raises RuntimeError (through .data it changes
        nothing)."""
        nf4 = self.nf4
        return lazy_weight(nf4.shape, nf4.dtype, nf4.device, nf4.dequantize)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise AttributeError(
                "the weight of an NF4Linear is coded, and no other can be set in its place or tied to it; put an "
                "nn.Linear in the layer's place, or leave it out of quantize_ (exclude_modules)"
            )
        super().register_parameter(name, param)

    def forward(self, x: Tensor) -> Tensor:
        """x @ W^T + bias: [..., in] -> [..., out]; dtypes and errors as `phicore.nf4.linear`."""
        return _linear(x, self._parts(), self.bias, (self.out_features, self.in_features), self.block_size)

    def project(self, x: Tensor) -> Tensor:
        """x @ W^T without the bias: [..., in] -> [..., out]. Part of the protocol that adapters call."""
        return _linear(x, self._parts(), None, (self.out_features, self.in_features), self.block_size)

    def project_with_rows(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """x @ W^T [..., out] and rows @ W^T [r, out] from one decoding of W; rows carry no gradient. Part of the
        protocol that adapters call."""
        if transformed():
            return self.project(x), self.project(rows)
        x = autocast(x)
        return ops.nf4_project_with_rows(
            x, rows.to(x.dtype), *self._parts(), [self.out_features, self.in_features], self.block_size
        )

    def fuses_low_rank(self, x: Tensor) -> bool:
        """Whether `low_rank` gains over a product and an update for this x. Part of the protocol that adapters call."""
        gains = (kernels.on_device(x) and not transformed()) or emulated(x, autocast_dtype(x))
        return gains and type(self).forward is NF4Linear.forward

    def low_rank(
        self, x: Tensor, A: Tensor, B: Tensor, scale: float, bias: Tensor | None, *, with_rows: bool
    ) -> tuple[Tensor, Tensor]:
        """x W^T + bias + scale * (x A^T) B^T, and with_rows A W^T [rank, out]. Part of the protocol that adapters
        call."""
        x = autocast(x)
        bias = None if bias is None else bias.to(x.dtype)
        y, _, rows = nf4_low_rank(
            x, A.to(x.dtype), B.to(x.dtype), scale, *self._parts(), bias,
            [self.out_features, self.in_features], self.block_size, with_rows,
        )  # fmt: skip
        return y, rows

    def frozen_weight(self, x: Tensor) -> tuple[tuple[Tensor | None, ...], Callable[..., Tensor]] | None:
        """The parts of the weight, and the function that decodes them: (*parts, dtype=...) -> [out, in]; None where a
        subclass or a kernel computes otherwise with x. Part of the protocol that adapters call."""
        if type(self).forward is not NF4Linear.forward or kernels.on_device(x) or self.packed.is_meta:
            return None
        shape = (self.out_features, self.in_features)
        return self._parts(), partial(ops.reference_dequantize, shape=shape, block_size=self.block_size)

    def held_weight(self) -> tuple[list[Tensor | None], list[int], int]:
        """The parts of the weight, its shape and its block size. Part of the protocol that adapters call."""
        return [*self._parts()], [self.out_features, self.in_features], self.block_size

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight [out, in] in dtype. Part of the protocol that adapters call."""
        return self.nf4.dequantize(dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}, dtype={self.dtype}"
        )

    def _layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return parts_layout(torch.Size((self.out_features, self.in_features)), self.block_size, self.double_quant)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.packed, self.absmax, self.nested_absmax, self.offset

    def _apply(self, fn: Any, recurse: bool = True) -> "NF4Linear":
        # fn moves or casts tensors. A cast means the compute dtype here: scales rounded to 16 bits would change the
        # weights, and .type() casts codes too, so they are put back, on the device that fn chose.
        parts = {name: getattr(self, name) for name in self._layout()}
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        for name, before in parts.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(
                    self,
                    name,
                    before.to(after.device) if not after.is_meta else torch.empty_like(before, device="meta"),
                )
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # In torch's place for what is no tensor: a weight and its transpose have parts of the same sizes.
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata["shape"] = [self.out_features, self.in_features]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        here = [self.out_features, self.in_features]
        if (given := local_metadata.get("shape", here)) != here:
            errors.append(f"size mismatch for {prefix}packed: of a weight of shape {given}, the layer's is {here}")
            return
        # copy_ would cast float absmax into 8-bit codes without a word.
        for name, (_, dtype) in self._layout().items():
            given = state_dict.get(prefix + name)
            if given is not None and given.dtype != dtype:
                errors.append(f"{prefix}{name} must be {dtype} (double_quant={self.double_quant}), got {given.dtype}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
