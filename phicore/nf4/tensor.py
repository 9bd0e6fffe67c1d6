"""NF4Tensor: a weight held as 4-bit codes and the scales of its blocks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from phicore.nf4 import kernels, ops
from phicore.nf4.codec import NESTED_BLOCK_SIZE

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, eq=False)
class NF4Tensor:
    """A weight in the NF4 format of bitsandbytes. Made by `quantize`; read by `dequantize` and `phicore.nf4.linear`.

    Attributes:
        packed: uint8 [ceil(n / 2)], two codes a byte, the earlier weight in the high nibble.
        absmax: float32 [n_blocks]; double-quantised, uint8 codes [n_blocks].
        nested_absmax: float32 [ceil(n_blocks / 256)] when double-quantised, else None.
        offset: float32 [] when double-quantised, else None.
        shape: of the weight.
        dtype: of the weight that was encoded; the default of `dequantize`.
        block_size: weights that share one absmax.

    Raises:
        ValueError: parts whose dtype or size does not fit shape and block_size.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    block_size: int

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        expected = parts_layout(self.shape, self.block_size, self.double_quant)
        for name, (size, dtype) in expected.items():
            part = getattr(self, name)
            if part is None or tuple(part.shape) != size or part.dtype != dtype:
                given = "None" if part is None else f"{part.dtype} {tuple(part.shape)}"
                raise ValueError(
                    f"{name} of an NF4 weight of shape {tuple(self.shape)}, block_size {self.block_size} must be "
                    f"{dtype} {size}, got {given}"
                )

    @property
    def double_quant(self) -> bool:
        """Whether the absmax are themselves coded in 8 bits."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts().values())

    def parts(self) -> dict[str, Tensor]:
        """The tensors that hold the weight, by name."""
        names = ("packed", "absmax", "nested_absmax", "offset")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, of the shape it had, in a float dtype (default: its own)."""
        dtype = dtype or self.dtype
        if not dtype.is_floating_point:
            raise TypeError(f"NF4 decodes to a float dtype, got {dtype}; decode to {self.dtype} and convert that")
        parts = self.packed, self.absmax, self.nested_absmax, self.offset
        return ops.dequantize(*parts, list(self.shape), self.block_size, dtype)


def parts_layout(
    shape: torch.Size, block_size: int, double_quant: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Size and dtype of each tensor that holds an NF4 weight of this shape."""
    n = math.prod(shape)
    n_blocks = -(-n // block_size)
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"packed": (((n + 1) // 2,), torch.uint8)}
    if not double_quant:
        return layout | {"absmax": ((n_blocks,), torch.float32)}
    return layout | {
        "absmax": ((n_blocks,), torch.uint8),
        "nested_absmax": ((-(-n_blocks // NESTED_BLOCK_SIZE),), torch.float32),
        "offset": ((), torch.float32),
    }


def check_block_size(block_size: int) -> None:
    """Raises ValueError unless block_size is one that the format knows."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size!r}")


def quantize(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Tensor:
    """Encodes a weight to NF4.

    Args:
        weight: float32, bfloat16 or float16, any shape, any strides.
        block_size: weights that share one absmax: a power of two, 32 to 4096. Blocks run over the flattened weight.
        double_quant: also code the absmax in 8 bits (0.127 bits a weight instead of 0.5 at block_size 64).

    Raises:
        TypeError: weight is not a tensor of one of these dtypes.
        ValueError: a NaN or Inf in weight, a block_size that the format does not know, or a double-quantised weight
            whose mean absmax overflows float32.

    Source: Dettmers et al. 2023, "QLoRA", section 3; bit for bit the format of bitsandbytes.
    """
    if not isinstance(weight, Tensor) or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        given = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"NF4 encodes float32, bfloat16 or float16 weights, got {given}; convert the weight first")
    check_block_size(block_size)
    if weight.is_meta:  # a plan of a model: there are no values to work through
        layout = parts_layout(weight.shape, block_size, double_quant)
        parts = {name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in layout.items()}
        return NF4Tensor(
            parts["packed"], parts["absmax"], parts.get("nested_absmax"), parts.get("offset"),
            weight.shape, weight.dtype, block_size,
        )  # fmt: skip
    packed, absmax = kernels.encode_blocks(weight.detach().reshape(-1), block_size)
    # NaN and Inf reach the absmax of their block, so one look at n / block_size values sees them all.
    if not absmax.isfinite().all():
        bad = int((~weight.isfinite()).sum())
        raise ValueError(f"weight of shape {tuple(weight.shape)} holds {bad} NaN or Inf; NF4 has no code for them")
    nested_absmax = offset = None
    if double_quant:
        absmax, nested_absmax, offset = kernels.encode_absmax(absmax)
        if not offset.isfinite():  # bitsandbytes stores it so, and decodes the weight to NaN
            raise ValueError(
                f"weight of shape {tuple(weight.shape)} is so large that the mean of its absmax is beyond float32; "
                f"use double_quant=False"
            )
    return NF4Tensor(packed, absmax, nested_absmax, offset, weight.shape, weight.dtype, block_size)
