"""Decoding on a CPU as machine code, where `phicore.native` has it, and to the same bits by torch's operators.

torch has no operator that looks levels up in registers, so codec.decode_blocks looks them up in memory. Here a level is
chosen among the 16 by the bits of its code: a compiler keeps all of that in vector registers, and writes pairs of
weights as one word.
"""

from functools import partial

import torch
from torch import Tensor

from phicore.native import Formula
from phicore.nf4 import codec
from phicore.nf4.codebook import LEVELS
from phicore.nf4.pages import empty

GROUP = 16  # bytes that the inner loop takes: all block sizes are multiples of them
PIECE = 1 << 22  # weights, after which other threads of Python may have their turn
PAYS = 1 << 32  # weights that torch's operators decode in about a quarter of the time that compiling takes


def _level(byte: Tensor, shift: int) -> Tensor:
    """The level of the 4 bits of each byte, int32, from `shift` on: float32."""
    choices = [torch.scalar_tensor(level, dtype=torch.float32, device="cpu") for level in LEVELS]
    for bit in (3, 2, 1, 0):
        is_set, half = (byte & (1 << shift + bit)) != 0, len(choices) // 2
        choices = [torch.where(is_set, choices[half + i], choices[i]) for i in range(half)]
    return choices[0]


def _weights(packed: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes [blocks, k, 16] and absmax [blocks, 1, 1] to the bits of their two weights in float32, int32."""
    byte = packed.to(torch.int32)
    return (_level(byte, 4) * absmax).view(torch.int32), (_level(byte, 0) * absmax).view(torch.int32)


def _to_float32(packed: Tensor, absmax: Tensor, out: Tensor) -> None:
    """The float32 weights of each byte as one int64, in out [blocks, k, 16]."""
    first, second = _weights(packed, absmax)
    out.copy_((first.to(torch.int64) & 0xFFFFFFFF) | (second.to(torch.int64) << 32))


def _to_bfloat16(packed: Tensor, absmax: Tensor, out: Tensor) -> None:
    """The bfloat16 weights of each byte as one int32, in out [blocks, k, 16]."""
    absmax = torch.where(absmax.isnan(), float("nan"), absmax)  # the NaN whose bits rounding leaves one
    first, second = (bits + 0x7FFF + ((bits >> 16) & 1) for bits in _weights(packed, absmax))  # ties to even
    out.copy_(((first >> 16) & 0xFFFF) | (second & -0x10000))


def _views(packed: Tensor, absmax: Tensor, out: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole blocks as the formulas take them: uint8 [n / 2], float32 [n / block_size], weights [n]."""
    blocks = packed.contiguous().view(-1, block_size // (2 * GROUP), GROUP)
    words = out.view(torch.int64 if out.dtype == torch.float32 else torch.int32)
    return blocks, absmax.contiguous().view(-1, 1, 1), words.view_as(blocks)


def _sample(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Every byte under small, usual and large absmax."""
    scales = [0.0, 1e-42, 3e-39, 0.3, 1.0, 1.7, 1234.5, 3.4e38]
    packed = torch.arange(256, dtype=torch.uint8, device="cpu").repeat(len(scales))
    absmax = torch.tensor(scales, dtype=torch.float32, device="cpu").repeat_interleave(8)
    return _views(packed, absmax, torch.empty(2 * len(packed), dtype=dtype, device="cpu"), 64)


_BLOCKS = {0: "blocks", 1: "groups"}
BFLOAT16, FLOAT32 = (
    Formula(f"{__name__}:{name}", function, partial(_sample, dtype), (_BLOCKS, {0: "blocks"}, _BLOCKS), PAYS)
    for name, function, dtype in (
        ("BFLOAT16", _to_bfloat16, torch.bfloat16),
        ("FLOAT32", _to_float32, torch.float32),
    )
)


def decode_blocks(packed: Tensor, absmax: Tensor, n: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """codec.decode_blocks, as machine code where there is some; the same bits."""
    whole = n // block_size * block_size
    formula = {torch.bfloat16: BFLOAT16, torch.float32: FLOAT32}.get(dtype)
    if formula is None or not whole or block_size % (2 * GROUP):
        run = None
    else:
        run = formula.ready(n, packed, absmax)
    if run is None:
        return codec.decode_blocks(packed, absmax, n, block_size, dtype)
    out = empty(n, dtype, packed.device)
    views = _views(packed[: whole // 2], absmax[: whole // block_size], out[:whole], block_size)
    for piece in zip(*(view.split(max(1, PIECE // block_size)) for view in views), strict=True):
        run(*piece)
    if whole < n:  # the short last block
        out[whole:] = codec.decode_blocks(packed[whole // 2 :], absmax[-1:], n - whole, block_size, dtype)
    return out
