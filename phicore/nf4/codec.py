"""NF4 encode and decode as functions of flat tensors: the reference that every kernel is compared with.

Work goes through cache-sized chunks, so that no temporary is as large as the weight. Formats and rounding follow
bitsandbytes: blocks run over the row-major flattened weight, codes are chosen in float32 by midpoint with a tie to the
lower code, the earlier weight of a pair sits in the high nibble. A short last block is coded as the others; only
bitsandbytes' code for CPUs, not that for GPUs, divides there by absmax instead of multiplying by 1 / absmax (which
moves a code in some ten million, of float32 weights), and stores 1e-38 where the block is zero.
"""

import torch
from torch import Tensor

from phicore.nf4.codebook import dynamic_map, levels, midpoints, table
from phicore.nf4.pages import empty

NESTED_BLOCK_SIZE = 256  # absmax values that share one nested absmax
CHUNK = 1 << 18  # weights a step: 1 MiB in float32, so that its temporaries stay in cache
DECODE_CHUNK = 1 << 18  # the same when decoding, where a step may be half as large again
GATHER_ROW = 1 << 12  # bytes that one thread looks up at once
TINY = 1e-38  # a block whose absmax is smaller is scaled as if it were this, so that 1 / absmax stays finite


def pad_to_blocks(flat: Tensor, block_size: int) -> Tensor:
    """Views flat [n] as [ceil(n / block_size), block_size], with zeros after the end where the last block is short."""
    remainder = flat.numel() % block_size
    if remainder:
        flat = torch.nn.functional.pad(flat, (0, block_size - remainder))
    return flat.view(-1, block_size)


def encode_blocks(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Encodes weights to 4-bit codes.

    Args:
        flat: float weights, any float dtype, [n].
        block_size: weights that share one absmax; even.

    Returns:
        packed uint8 [ceil(n / 2)] and absmax float32 [ceil(n / block_size)]. A NaN or Inf weight shows as a NaN or Inf
        absmax of its block; the caller decides.
    """
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=flat.device)
    below, bound = cell_tables(flat.device)
    step = max(CHUNK // block_size, 1) * block_size
    for start in range(0, n, step):
        blocks = pad_to_blocks(flat[start : start + step].float(), block_size)  # [blocks, block_size]
        scale = blocks.abs().amax(dim=1)  # ten times as fast as vector_norm's
        absmax[start // block_size : start // block_size + len(scale)] = scale
        scaled = (blocks * (1.0 / scale.clamp(min=TINY)).unsqueeze(1)).view(-1)
        # The code is the number of midpoints below the weight. Its cell says which those are, but for one at most, with
        # which it is compared. Two lookups beat fifteen comparisons about four times, and torch.bucketize by far more.
        cell = cells(scaled)
        codes = below.index_select(0, cell)
        codes += torch.gt(scaled, bound.index_select(0, cell), out=scaled).to(torch.int16)  # float to bool is slow
        # What pads a short block is zero and has code 7, as the format wants behind an odd count.
        pairs = torch.add(codes[1::2], codes[::2], alpha=16)[: (min(step, n - start) + 1) // 2]
        packed[start // 2 : start // 2 + len(pairs)] = pairs
    return packed, absmax


CELLS = 4096  # over [-1, 1]; two midpoints are never in one


def cells(scaled: Tensor) -> Tensor:
    """The cell of each value, int32: a step function that rises from 0 to CELLS - 1. NaN falls into some cell."""
    return (scaled * (CELLS / 2 - 1)).add_(CELLS / 2).to(torch.int32).clamp_(0, CELLS - 1)


@table
def cell_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell, how many midpoints lie in lower ones, int16, and the midpoint that it holds, or inf, float32."""
    bounds = midpoints(levels(device))
    held_by = cells(bounds)
    below = (torch.arange(CELLS, device=device)[:, None] > held_by).sum(dim=1).to(torch.int16)
    bound = torch.full((CELLS,), float("inf"), dtype=torch.float32, device=device)
    bound[held_by.long()] = bounds
    return below, bound


@table
def pair_table(device: torch.device) -> Tensor:
    """Both levels of each byte as one 64-bit word, int64 [256]: a lookup then moves two float32 at once."""
    byte = torch.arange(256, device=device)
    pair = torch.stack([levels(device)[byte >> 4], levels(device)[byte & 15]], dim=1)  # [256, 2]
    return pair.view(torch.int64).view(256)


def decode_blocks(packed: Tensor, absmax: Tensor, n: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """Decodes 4-bit codes: level * absmax in float32, rounded once to dtype.

    Args:
        packed: uint8 [ceil(n / 2)].
        absmax: float32 [ceil(n / block_size)].
        n: number of weights.
        block_size: weights that share one absmax; even.
        dtype: of the result.

    Returns:
        Weights in dtype, [n].
    """
    device = packed.device
    out = empty(n, dtype, device)
    whole = n // block_size * block_size
    steps = max(round(whole / DECODE_CHUNK), 1)  # of one size, as nearly as blocks let them be
    blocks = max(-(-whole // (steps * block_size)), 1)  # a step
    step = blocks * block_size
    # Temporaries and views of them are made once, and stay in cache; float32 is looked up where it shall stand.
    lookup = _Lookup(step // 2, device)
    decoded = (
        None if dtype == torch.float32 else _Target(torch.empty(step, dtype=torch.float32, device=device), block_size)
    )
    scales = absmax[: whole // block_size].unsqueeze(1)
    parts = zip(out[:whole].split(step), packed[: whole // 2].split(step // 2), scales.split(blocks), strict=True)
    for part, codes, scale in parts:
        target = _Target(part, block_size) if decoded is None else decoded
        if len(part) < step and decoded is not None:
            target = _Target(decoded.weights[: len(part)], block_size)
        lookup(codes, target.pairs)
        target.blocks.mul_(scale)
        if decoded is not None:
            part.copy_(target.weights)
    if whole < n:  # the short last block
        last = pair_table(device).index_select(0, packed[whole // 2 :].to(torch.int32)).view(torch.float32)
        out[whole:].copy_(last[: n - whole] * absmax[-1])
    return out


class _Target:
    """Where levels are looked up to: weights float32 [m], and as pairs int64 [m / 2] and as blocks."""

    def __init__(self, weights: Tensor, block_size: int) -> None:
        self.weights = weights
        self.pairs = weights.view(torch.int64)
        self.blocks = weights.view(-1, block_size)


class _Lookup:
    """Looks both levels of each byte up, of at most n bytes at once.

    Of torch's lookups index_select is the cheapest, but runs on one thread; gather runs on all, and wants int64.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self.parallel = device.type == "cpu" and torch.get_num_threads() > 1
        self.index = torch.empty(n, dtype=torch.int64 if self.parallel else torch.int32, device=device)
        self.table = pair_table(device)
        if self.parallel and n:
            self.rows = self.index.view(-1, min(n & -n, GATHER_ROW))  # a power of two that divides n
            self.tables = self.table.expand(len(self.rows), 256)

    def __call__(self, packed: Tensor, pairs: Tensor) -> None:
        """packed uint8 [m] -> pairs int64 [m]."""
        index = (self.index if len(packed) == len(self.index) else self.index[: len(packed)]).copy_(packed)
        if not self.parallel:
            torch.index_select(self.table, 0, index, out=pairs)
        elif index is self.index:
            torch.gather(self.tables, 1, self.rows, out=pairs.view_as(self.rows))
        else:
            torch.gather(self.table, 0, index, out=pairs)


def encode_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: absmax float32 [n_blocks] to 8-bit codes.

    Returns:
        codes uint8 [n_blocks], nested_absmax float32 [ceil(n_blocks / 256)] and offset float32 [] (the mean, which is
        taken off before coding, since absmax are positive and the map is symmetric). Beyond 32,768 blocks the last bit
        of the mean, and so of what is coded after it, hangs on the number of threads, as bitsandbytes' does.
    """
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    blocks = pad_to_blocks(absmax - offset, NESTED_BLOCK_SIZE)
    nested_absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / nested_absmax.clamp(min=TINY)).unsqueeze(1)).clamp_(-1, 1)
    codes = torch.bucketize(scaled, midpoints(dynamic_map(absmax.device)), out_int32=True)
    return codes.view(-1)[: absmax.numel()].to(torch.uint8), nested_absmax, offset


def decode_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Inverse of encode_absmax: map[code] * nested_absmax + offset, float32 [n_blocks]."""
    values = dynamic_map(codes.device).index_select(0, codes.to(torch.int32))
    whole = len(values) // NESTED_BLOCK_SIZE * NESTED_BLOCK_SIZE
    if whole:
        values[:whole].view(-1, NESTED_BLOCK_SIZE).mul_(nested_absmax[: whole // NESTED_BLOCK_SIZE, None])
    if whole < len(values):
        values[whole:].mul_(nested_absmax[-1])
    return values.add_(offset)
