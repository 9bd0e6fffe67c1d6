"""Decoding on a CPU as machine code, where `phicore.native` has it, and to the same bits by torch's operators.

As in codec.decode_blocks both levels of a byte are looked up at once, but what follows stays in registers; absmax that
are double-quantised are decoded on the way. The code is scalar loops that a C++ compiler unrolls and then puts together
to vectors. For that it must know that storing a weight changes nothing that is still to be read, which C++ tells by
types: all that is read is integers of other sizes than those that are written.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from phicore.native import Formula
from phicore.nf4 import codec
from phicore.nf4.codebook import dynamic_map, table
from phicore.nf4.pages import empty

WORD = 8  # weights in four bytes, which are read as one int32 or two int16
PIECE = 1 << 22  # weights, after which other threads of Python may have their turn
PAYS = 1 << 32  # weights that torch's operators decode in about a quarter of the time that compiling takes
GROUP = codec.NESTED_BLOCK_SIZE  # blocks whose absmax share a nested absmax
ABSMAX: tuple[dict[int, str], ...] = ({0: "blocks"},)
NESTED: tuple[dict[int, str], ...] = ({0: "blocks"}, {0: "groups"}, {})
Views = tuple[Tensor, ...]

# ===== the formulas: of the tables, words [blocks, k, 1 or 2], scales as below, to out [blocks, k, 4, 2] =====


def _to_float32(pairs: Tensor, places: Tensor, code_map: Tensor, words: Tensor, absmax: Tensor, out: Tensor) -> None:
    """From int16 words and absmax int32 [blocks]."""
    # If it were known that pairs go side by side, they would be put together to one vector before they are multiplied,
    # a level at a time. So each is loaded, multiplied and stored as a vector of two.
    out[:, :, places] = _products(pairs, words, absmax)


def _to_bfloat16(pairs: Tensor, places: Tensor, code_map: Tensor, words: Tensor, absmax: Tensor, out: Tensor) -> None:
    """From int32 words and absmax int32 [blocks] to the bits of bfloat16, int16, rounded with ties to even: that takes
    vectors of eight."""
    is_nan = (absmax & 0x7FFFFFFF) > 0x7F800000
    absmax = torch.where(is_nan, 0x7FC00000, absmax)  # the NaN whose bits rounding leaves one
    bits = _products(pairs, words, absmax).view(torch.int32)
    out.copy_(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(torch.int16))


def _products(pairs: Tensor, words: Tensor, absmax: Tensor) -> Tensor:
    """[256, 2], [blocks, k, words of four bytes] and [blocks], all integers, to float32 [blocks, k, 4, 2]."""
    shifts = torch.arange(0, 8 * words.dtype.itemsize, 8, dtype=torch.int32, device="cpu")
    byte = ((words.to(torch.int32).unsqueeze(-1) >> shifts) & 0xFF).flatten(2)
    # The factors in this order: the other way round g++ 12 takes one of eight products as a different one.
    return absmax.view(torch.float32).view(-1, 1, 1, 1) * pairs[byte.to(torch.int64)].view(torch.float32)


def _nested(decode: Callable[..., None]) -> Callable[..., None]:
    """decode, of what codec.decode_absmax gives: codes int32 [blocks]; nested_absmax and offset, their bits as int32
    [groups] and []."""

    def formula(pairs, places, code_map, words, codes, nested_absmax, offset, out):
        # A shift, since torch divides with a branch, which would keep this within the loops over a block. Masks tell
        # that no index is negative, which torch would turn to one from the end.
        group = (torch.arange(codes.shape[0], device="cpu") >> (GROUP.bit_length() - 1)) & 0xFFFFFFFF
        values, scales = code_map[(codes & 0xFF).to(torch.int64)], nested_absmax[group]
        absmax = values.view(torch.float32) * scales.view(torch.float32) + offset.view(torch.float32)
        decode(pairs, places, code_map, words, absmax.view(torch.int32), out)

    return formula


# ===== what they take =====


@table
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The levels of each byte, the places of a word's pairs among its results (in order), and the map of absmax."""
    pairs = codec.pair_table(device).view(torch.int32).view(256, 2)
    return pairs, torch.arange(4, device=device), dynamic_map(device).view(torch.int32)


def _views(packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None, out: Tensor) -> Views:
    """Whole blocks as the formulas take them: an NF4 weight's parts, and weights [n]."""
    packed, blocks = packed.contiguous(), absmax.shape[0]
    if packed.storage_offset() % 4:  # torch views no int32 there
        packed = packed.clone()
    if out.dtype == torch.float32:
        words = packed.view(torch.int16).view(blocks, -1, 2)
    else:
        words, out = packed.view(torch.int32).view(blocks, -1, 1), out.view(torch.int16)
    out = out.view(blocks, -1, 4, 2)
    if nested_absmax is None or offset is None:
        return words, absmax.contiguous().view(torch.int32), out
    return words, absmax.to(torch.int32), nested_absmax.contiguous().view(torch.int32), offset.view(torch.int32), out


def _sample(dtype: torch.dtype, nested: bool) -> Views:
    """Every byte under small, usual and large absmax; double-quantised, every byte under some of every code."""
    packed = torch.arange(256, dtype=torch.uint8, device="cpu").repeat(70 if nested else 8)
    out = torch.empty(2 * len(packed), dtype=dtype, device="cpu")
    tensor = partial(torch.tensor, dtype=torch.float32, device="cpu")
    if not nested:
        absmax = tensor([0.0, 1e-42, 3e-39, 0.3, 1.0, 1.7, 1234.5, 3.4e38]).repeat_interleave(8)
        return *_tables(packed.device), *_views(packed, absmax, None, None, out)
    codes = torch.arange(560, device="cpu").mul_(37).to(torch.uint8)
    return *_tables(packed.device), *_views(packed, codes, tensor([0.02, 1e-41, 3.7]), tensor(0.3), out)


BFLOAT16, FLOAT32, NESTED_BFLOAT16, NESTED_FLOAT32 = (
    Formula(
        f"{__name__}:{name}",
        function,
        partial(_sample, dtype, len(scales) > 1),
        ({}, {}, {}, {0: "blocks", 1: "words"}, *scales, {0: "blocks", 1: "words"}),
        PAYS,
        scalar=True,
    )
    for name, function, dtype, scales in (
        ("BFLOAT16", _to_bfloat16, torch.bfloat16, ABSMAX),
        ("FLOAT32", _to_float32, torch.float32, ABSMAX),
        ("NESTED_BFLOAT16", _nested(_to_bfloat16), torch.bfloat16, NESTED),
        ("NESTED_FLOAT32", _nested(_to_float32), torch.float32, NESTED),
    )
)


def decode(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    n: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """An NF4 weight's values from its parts, as machine code where there is some; the bits of codec's functions.

    Args:
        packed: uint8 [ceil(n / 2)].
        absmax: float32 [ceil(n / block_size)]; double-quantised, uint8 codes.
        nested_absmax, offset: float32 [ceil(blocks / 256)] and []; None where absmax are not double-quantised.

    Returns:
        [n] in dtype.
    """
    whole = n // block_size * block_size
    run = None
    if whole and block_size % WORD == 0 and dtype in (torch.bfloat16, torch.float32):
        if nested_absmax is None or offset is None:
            formula = FLOAT32 if dtype == torch.float32 else BFLOAT16
            run = formula.ready(n, packed, absmax)
        else:
            formula = NESTED_FLOAT32 if dtype == torch.float32 else NESTED_BFLOAT16
            run = formula.ready(n, packed, absmax, nested_absmax, offset)
    if run is None:
        return _by_operators(packed, absmax, nested_absmax, offset, n, block_size, dtype)
    out = empty(n, dtype, packed.device)
    tables = _tables(packed.device)
    if n == whole <= PIECE:
        run(*tables, *_views(packed, absmax, nested_absmax, offset, out))
        return out
    for first in range(0, whole, PIECE):
        last = min(first + PIECE, whole)
        blocks = slice(first // block_size, last // block_size)
        groups = slice(blocks.start // GROUP, -(-blocks.stop // GROUP))
        scales = absmax[blocks], None if nested_absmax is None else nested_absmax[groups], offset
        run(*tables, *_views(packed[first // 2 : last // 2], *scales, out[first:last]))
    if whole < n:  # the short last block
        nested_absmax = None if nested_absmax is None else nested_absmax[-1:]
        rest = packed[whole // 2 :], absmax[-1:], nested_absmax, offset
        out[whole:] = _by_operators(*rest, n - whole, block_size, dtype)
    return out


def _by_operators(packed, absmax, nested_absmax, offset, n, block_size, dtype):
    if nested_absmax is not None:
        absmax = codec.decode_absmax(absmax, nested_absmax, offset)
    return codec.decode_blocks(packed, absmax, n, block_size, dtype)
