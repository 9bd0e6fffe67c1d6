"""Decoding on a CPU as machine code, where `phicore.native` has it, and to the same bits by torch's operators.

As in codec.decode_blocks both levels of a byte are looked up at once, but what follows stays in registers. The code is
scalar loops that a C++ compiler unrolls and then puts together to vectors. For that it must know that storing a weight
changes nothing that is still to be read, which C++ tells by types: all that is read is integers of other sizes than
those that are written.
"""

from functools import partial

import torch
from torch import Tensor

from phicore.native import Formula
from phicore.nf4 import codec
from phicore.nf4.codebook import table
from phicore.nf4.pages import empty

WORD = 8  # weights in four bytes, which are read as one int32
PIECE = 1 << 22  # weights, after which other threads of Python may have their turn
PAYS = 1 << 32  # weights that torch's operators decode in about a quarter of the time that compiling takes


def _float32(pairs: Tensor, words: Tensor, absmax: Tensor) -> Tensor:
    """[256, 2], [blocks, k, words of four bytes] and [blocks], all integers, to float32 [blocks, k, 4, 2]."""
    shifts = torch.arange(0, 8 * words.dtype.itemsize, 8, dtype=torch.int32, device="cpu")
    byte = ((words.to(torch.int32).unsqueeze(-1) >> shifts) & 0xFF).flatten(2)
    # The factors in this order: the other way round g++ 12 takes one of eight products as a different one.
    return absmax.view(torch.float32).view(-1, 1, 1, 1) * pairs[byte.to(torch.int64)].view(torch.float32)


def _to_float32(pairs: Tensor, places: Tensor, words: Tensor, absmax: Tensor, out: Tensor) -> None:
    """From int16 words."""
    # If it were known that pairs go side by side, they would be put together to one vector before they are multiplied,
    # a level at a time. So each is loaded, multiplied and stored as a vector of two.
    out[:, :, places] = _float32(pairs, words, absmax)


def _to_bfloat16(pairs: Tensor, places: Tensor, words: Tensor, absmax: Tensor, out: Tensor) -> None:
    """From int32 words to the bits of bfloat16, int16, rounded with ties to even: that takes vectors of eight."""
    is_nan = (absmax & 0x7FFFFFFF) > 0x7F800000
    absmax = torch.where(is_nan, 0x7FC00000, absmax)  # the NaN whose bits rounding leaves one
    bits = _float32(pairs, words, absmax).view(torch.int32)
    out.copy_(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(torch.int16))


@table
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The levels of each byte, and the places of a word's pairs among its results, which are in order."""
    return codec.pair_table(device).view(torch.int32).view(256, 2), torch.arange(4, device=device)


def _views(packed: Tensor, absmax: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whole blocks as the formulas take them: uint8 [n / 2], float32 [n / block_size], weights [n]."""
    packed, absmax = packed.contiguous(), absmax.contiguous()
    if packed.storage_offset() % 4:  # torch views no int32 there
        packed = packed.clone()
    blocks = absmax.shape[0]
    if out.dtype == torch.float32:
        words = packed.view(torch.int16).view(blocks, -1, 2)
    else:
        words, out = packed.view(torch.int32).view(blocks, -1, 1), out.view(torch.int16)
    return words, absmax.view(torch.int32), out.view(blocks, -1, 4, 2)


def _sample(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Every byte under small, usual and large absmax."""
    scales = [0.0, 1e-42, 3e-39, 0.3, 1.0, 1.7, 1234.5, 3.4e38]
    packed = torch.arange(256, dtype=torch.uint8, device="cpu").repeat(len(scales))
    absmax = torch.tensor(scales, dtype=torch.float32, device="cpu").repeat_interleave(8)
    return *_tables(packed.device), *_views(packed, absmax, torch.empty(2 * len(packed), dtype=dtype, device="cpu"))


BFLOAT16, FLOAT32 = (
    Formula(
        f"{__name__}:{name}",
        function,
        partial(_sample, dtype),
        ({}, {}, {0: "blocks", 1: "words"}, {0: "blocks"}, {0: "blocks", 1: "words"}),
        PAYS,
        scalar=True,
    )
    for name, function, dtype in (
        ("BFLOAT16", _to_bfloat16, torch.bfloat16),
        ("FLOAT32", _to_float32, torch.float32),
    )
)


def decode_blocks(packed: Tensor, absmax: Tensor, n: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """codec.decode_blocks, as machine code where there is some; the same bits."""
    formula = FLOAT32 if dtype == torch.float32 else BFLOAT16 if dtype == torch.bfloat16 else None
    whole = n // block_size * block_size
    if formula is None or not whole or block_size % WORD or (run := formula.ready(n, packed, absmax)) is None:
        return codec.decode_blocks(packed, absmax, n, block_size, dtype)
    out = blocks = empty(n, dtype, packed.device)
    if whole < n:  # the short last block
        out[whole:] = codec.decode_blocks(packed[whole // 2 :], absmax[-1:], n - whole, block_size, dtype)
        packed, absmax, blocks = packed[: whole // 2], absmax[:-1], out[:whole]
    tables, views = _tables(packed.device), _views(packed, absmax, blocks)
    pieces = [views] if whole <= PIECE else zip(*(t.split(PIECE // block_size) for t in views), strict=True)
    for piece in pieces:
        run(*tables, *piece)
    return out
