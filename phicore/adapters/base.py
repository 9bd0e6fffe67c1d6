"""What an adapter asks of its base layer.

An adapter calls its base, and beyond that only these functions, so that it works alike over nn.Linear, NF4Linear,
transformers' Conv1D or another adapter; over an embedding; over a convolution. A base with a method of the same name
answers by it; a plain layer, by its weight.

Whatever the layer, its weight is thought of as a matrix [out, in] with one row an output feature: a linear layer's W;
an embedding's table transposed, since an embedding is a linear layer of one-hot rows; a convolution's kernels, one row
[in_channels * kernel] an output channel.
"""

import copy
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from phicore.adapters.dense import dense_low_rank
from phicore.adapters.step import Frozen
from phicore.modules import has_own_forward, unwrap
from phicore.nf4.linear import autocast, autocast_dtype
from phicore.products import emulated, matmul
from phicore.transforms import transformed

Base: TypeAlias = Any  # an nn.Module as described above; nn.Module's own typing would hide its attributes


def transposed_kinds() -> tuple[type[nn.Module], ...]:
    """Linear layers that hold their weight as [in, out]: transformers' Conv1D, if transformers has been imported."""
    module = sys.modules.get("transformers.pytorch_utils")
    return (module.Conv1D,) if module is not None else ()


def features(base: Base) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if isinstance(base, transposed_kinds()):
        return int(base.weight.shape[0]), int(base.weight.shape[1])  # type: ignore[index]
    return int(base.in_features), int(base.out_features)


def project(base: Base, x: Tensor) -> Tensor:
    """x @ W^T, without the bias: [..., in] -> [..., out]. A base with hooks is called, so that they run."""
    if has_hooks(base):
        y, bias = base(x), base.bias
        return y if bias is None else y - bias.to(y.dtype)
    method = getattr(base, "project", None)
    if method is not None:
        return method(x)
    if _emulated(base, x):
        return _dense(base, x, None, None, 1.0, None)[0]
    return nn.functional.linear(x, _matrix(base))


def project_with_rows(base: Base, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Both x @ W^T and rows @ W^T, decoding W once if it is coded.

    Args:
        x: [..., in], differentiable.
        rows: [r, in] in x's dtype; no gradient flows into them.

    Returns:
        [..., out] in x's dtype and [r, out] in x's or a wider one.
    """
    if has_hooks(base):  # which are for x alone
        y = project(base, x)
        with torch.no_grad():
            return y, matmul(rows, dense_weight(base, rows.dtype).t())
    method = getattr(base, "project_with_rows", None)
    if method is not None:
        return method(x, rows)
    if _emulated(base, x):
        return _dense(base, x, rows.detach(), None, 1.0, None, with_rows=True)
    y = project(base, x)
    with torch.no_grad():
        return y, project(base, rows)


def fuses_low_rank(base: Base, x: Tensor) -> bool:
    """Whether `low_rank` is there for this base and gains for this x. A base with hooks is called, so that they run."""
    fuses = getattr(base, "fuses_low_rank", None)
    return fuses_dense(base, x) if fuses is None else fuses(x) and not has_hooks(base)


def fuses_dense(base: Base, x: Tensor) -> bool:
    """Whether `dense_linear` may take the place of calling this base, and gains for this x."""
    return _emulated(base, x) and not has_hooks(base)


def dense_linear(base: Base, x: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias: [..., in] -> [..., out]; only where `fuses_dense`."""
    return _dense(base, x, None, None, 1.0, bias)[0]


def low_rank(
    base: Base, x: Tensor, A: Tensor, B: Tensor, scale: float, bias: Tensor | None = None, *, with_rows: bool = False
) -> tuple[Tensor, Tensor]:
    """x W^T + bias + scale * (x A^T) B^T by one operator; only where `fuses_low_rank`.

    Args:
        x: [..., in], differentiable, as are A, B and bias.
        A: [rank, in].
        B: [out, rank].
        scale: factor of the product.
        bias: [out], or None.
        with_rows: return A W^T beside it, [rank, out], without a gradient; takes no bias.

    Returns:
        [..., out], and A W^T or an empty tensor.
    """
    method = getattr(base, "low_rank", None)
    if method is not None:
        return method(x, A, B, scale, bias, with_rows=with_rows)
    return _dense(base, x, A, B, scale, bias, with_rows=with_rows)


def frozen_weight(base: Base, x: Tensor) -> Frozen | None:
    """The base's weight as `low_rank_step` takes it for x, or None where that is not for this base or this x."""
    plain = x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter)  # and not, say, one that has no numbers
    if not plain or torch.compiler.is_compiling() or transformed():
        return None
    if emulated(x, autocast_dtype(x)) or has_hooks(base):
        return None
    method = getattr(base, "frozen_weight", None)
    if method is not None:
        found = method(x)
        return None if found is None else Frozen(*found)
    return Frozen((_matrix(base),), _cast) if _is_plain(base, x) else None


def _cast(weight: Tensor, *, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype)


def has_hooks(base: Base) -> bool:
    """Whether code of others runs where a base is called: hooks, or what stands in its forward's place."""
    hooks = (base._forward_pre_hooks, base._forward_hooks, base._backward_pre_hooks, base._backward_hooks)
    return any(hooks) or "forward" in vars(base)


def _emulated(base: Base, x: Tensor) -> bool:
    """Whether a base is a plain frozen layer with a dense weight, and its product with x is one of 16 bits that this
    CPU has not (phicore.products)."""
    return emulated(x, autocast_dtype(x)) and _is_plain(base, x)


def _is_plain(base: Base, x: Tensor) -> bool:
    """Whether a base is a plain frozen layer with a dense weight of x's dtype, or of autocast's for both."""
    forward = type(base).forward
    if forward is not nn.Linear.forward and forward not in [kind.forward for kind in transposed_kinds()]:
        return False
    weight = base.weight
    fits = weight.dtype == x.dtype or weight.dtype == autocast_dtype(x)
    return fits and type(weight) in (Tensor, nn.Parameter) and not weight.requires_grad


def _dense(
    base: Base,
    x: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
    bias: Tensor | None,
    with_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """`low_rank` where `_emulated`; without B, of the base alone."""
    x, weight = autocast(x), _matrix(base)
    A = x.new_empty(0, x.shape[-1]) if A is None else A
    y, _, rows = dense_low_rank(x, A, B, scale, weight, bias, with_rows)
    return y, rows


def _matrix(base: Base) -> Tensor:
    """W [out, in] of a plain layer; Conv1D holds it as [in, out]."""
    plain = isinstance(base, nn.Linear) or isinstance(unwrap(base), nn.Linear)
    return base.weight if plain else base.weight.t()


def dense_weight(base: Base, dtype: torch.dtype) -> Tensor:
    """W [out, in] of a linear layer or an embedding as a dense tensor in dtype."""
    method = getattr(base, "dense_weight", None)
    if method is not None:
        return method(dtype)
    return _matrix(base).to(dtype)


class Held(NamedTuple):
    """A weight [out, in] as a layer holds it: W itself, and 0 for block_size; or the parts of an NF4 weight."""

    parts: list[Tensor | None]
    shape: list[int]
    block_size: int


def held(weight: Tensor) -> Held:
    """A dense weight [out, in]."""
    return Held([weight], list(weight.shape), 0)


def held_weight(base: Base, dtype: torch.dtype) -> Held:
    """W [out, in] of a linear layer or an embedding as it is held; in dtype, where the base must compute it."""
    method = getattr(base, "held_weight", None)
    if method is not None:
        return Held(*method())
    return held(dense_weight(base, dtype) if hasattr(base, "dense_weight") else _matrix(base))


def computes_weight(base: nn.Module) -> bool:
    """Whether W is no parameter of the base, but computed from some (a parametrization, weight norm or pruning)."""
    return "weight" not in base._parameters and not hasattr(base, "dense_weight")


def with_weight(base: Base, weight: Tensor) -> Base:
    """A layer like base, hooks and all, with another frozen weight; everything else is shared with base."""
    if has_own_forward(base):
        raise ValueError(
            f"a {type(base).__name__} has a forward of its own, and what that does with its weight it would do with a "
            f"merged one; keep the adapter as it is, or leave this layer out of it"
        )
    return with_parameter(base, "weight", nn.Parameter(weight, requires_grad=False))


def with_parameter(base: Base, name: str, parameter: nn.Parameter) -> Base:
    """A layer like base, hooks and all, with another parameter of this name; everything else is shared with base."""
    if name not in base._parameters:
        raise ValueError(
            f"{type(base).__name__} computes its {name} (a parametrization, weight norm or pruning), so nothing can be "
            f"merged into it; remove that first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    layer = shallow_copy(base)
    setattr(layer, name, parameter)
    return layer


def shallow_copy(base: Base) -> Base:
    """A module like base, hooks and all, that shares its tensors and modules until others are set."""
    check_forward(base)
    module = copy.copy(base)
    for registry in ("_parameters", "_buffers", "_modules"):
        module.__dict__[registry] = dict(base.__dict__[registry])
    return module


def check_forward(base: Base) -> None:
    """Raises ValueError for a layer that a merged one cannot stand for, since its forward was replaced."""
    if "forward" in vars(base):
        raise ValueError(
            f"the forward of a {type(base).__name__} was replaced, as accelerate does to offload, and runs with the "
            f"weights that it had then, so nothing can be merged; load the model without that"
        )


def rounding_error(stored: Tensor, exact: Tensor) -> float:
    """||stored - exact|| / ||exact||, the relative error of a merged weight; the numerator where exact is zero.

    Raises:
        ValueError: stored holds what is not finite.
    """
    norm = torch.linalg.vector_norm(exact)
    error = torch.linalg.vector_norm(stored.to(exact.dtype) - exact)
    error = error / norm if norm > 0 else error
    if error.isfinite():
        return float(error)
    largest, dtype = float(exact.abs().max()), stored.dtype
    if largest < float("inf"):
        raise ValueError(
            f"the merged weight reaches {largest:.3g}, and {dtype} ends at {torch.finfo(dtype).max:.3g}; cast the "
            f"model to bfloat16 or float32, and merge then"
        )
    raise ValueError("the merged weight is not finite: the base or the adapter holds NaN or infinity")


def compute_dtype(base: Base) -> torch.dtype:
    """The dtype that the base computes in when its input does not say otherwise."""
    dtype = getattr(base, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else base.weight.dtype


def device(base: Base) -> torch.device:
    """Where the base lies."""
    return next(tensor.device for tensors in (base.parameters(), base.buffers()) for tensor in tensors)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums over a row: float32, or float64 if dtype is."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context for sums that must keep their dtype: autocast would take their matrix products in 16 bits."""
    # The meta device knows no autocast.
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
