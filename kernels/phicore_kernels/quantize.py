"""NF4 encoding: codes and absmax of a weight in one launch, and the 8-bit coding of the absmax in another."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from phicore_kernels.launch import Launch
from phicore_kernels.weight import LEVELS, NESTED_BLOCK_SIZE

__all__ = ["encode_absmax", "encode_blocks", "naive_encode_absmax", "naive_encode_blocks"]

TINY = 1e-38  # a smaller absmax scales as this, so that its inverse stays finite
VALUES = 4096  # weights a program: 32 a thread


def _float32(values: float | tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


# The float32 bounds between neighbouring levels; a weight on a bound takes the lower code.
BOUNDS: tuple[float, ...] = tuple(
    ((_float32(LEVELS[:-1]) + _float32(LEVELS[1:])) / 2).tolist()  # float32, as the levels are
)
_TINY_BITS = tl.constexpr(_float32(TINY).view(torch.int32).item())


@triton.jit
def _largest(values, axis: tl.constexpr):
    """max |values| along an axis, and the factor that scales by it, both float32.

    The bits of floats without a sign are ordered as the floats are, with NaN on top, which a float maximum would drop.
    """
    bits = tl.max(tl.abs(values).to(tl.int32, bitcast=True), axis=axis)
    # div_rn is 1 / x rounded to nearest, as torch divides; Triton's plain division may be off by two units.
    factor = tl.div_rn(1.0, tl.maximum(bits, _TINY_BITS).to(tl.float32, bitcast=True))
    return bits.to(tl.float32, bitcast=True), factor


@lru_cache(maxsize=32)
def code_table(device: torch.device) -> Tensor:
    """Where the search for a code ends, int64 [64]: a float32 bound in the low half, a code in the high half.

    Bin k in -16..16 holds the weights that 16 w rounds to; it stands at k mod 64. Bins are narrower than neighbouring
    bounds are apart, so a bin has one bound or none (infinity), and the code is that below it or the next.
    """
    table = torch.zeros(64, 2, dtype=torch.float32, device="cpu")
    for k in range(-16, 17):
        low, high = (k - 0.5) / 16, (k + 0.5) / 16
        inside = [bound for bound in BOUNDS if low <= bound < high]
        table[k % 64, 0] = inside[0] if inside else float("inf")
        table[k % 64, 1] = torch.tensor(sum(bound < low for bound in BOUNDS), dtype=torch.int32).view(torch.float32)
    return table.view(torch.int64).view(64).to(device)


@triton.jit
def _code(x, table):
    """The codes of scaled weights in [-1, 1], int32: one lookup and one comparison."""
    # 1.5 * 2^23 has its unit in the last place at 1: adding it rounds 16 x to a whole number in the lowest bits.
    bin = (x * 16 + 12582912.0).to(tl.int32, bitcast=True) & 63
    entry = tl.load(table + bin)
    bound = entry.to(tl.int32).to(tl.float32, bitcast=True)
    return (entry >> 32).to(tl.int32) + (x > bound).to(tl.int32)


@triton.jit
def _encode_blocks(x, table, packed, absmax, n, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]  # [BLOCKS, BLOCK_SIZE]
    if EVEN:
        values = tl.load(x + at).to(tl.float32)
    else:
        values = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    scale, factor = _largest(values, 1)
    # Beyond +-1 the code is that of +-1 anyway, and NaN belongs to a block that the caller refuses.
    code = _code(values * factor[:, None], table)
    even, odd = tl.split(tl.reshape(code, (BLOCKS, BLOCK_SIZE // 2, 2)))
    byte = ((even << 4) | odd).to(tl.uint8)
    byte_at = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    if EVEN:
        tl.store(packed + byte_at, byte)
        tl.store(absmax + block, scale)
    else:
        tl.store(packed + byte_at, byte, mask=byte_at * 2 < n)
        tl.store(absmax + block, scale, mask=block * BLOCK_SIZE < n)


@triton.jit
def _encode_absmax(absmax, offset, bounds, codes, nested_absmax, n, BLOCK: tl.constexpr):
    """One program a nested block of 256: the same in 8 bits, the code found by eight halvings of the 255 bounds."""
    pid = tl.program_id(0).to(tl.int64)
    at = pid * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    values = tl.where(inside, tl.load(absmax + at, mask=inside, other=0.0) - tl.load(offset), 0.0)
    scale, factor = _largest(values, 0)
    values = values * factor
    code = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(8):
        step = 128 >> i
        code = tl.where(values > tl.load(bounds + code + (step - 1)), code + step, code)
    tl.store(codes + at, code.to(tl.uint8), mask=inside)
    tl.store(nested_absmax + pid, scale)


def encode_blocks_launch(flat: Tensor, packed: Tensor, absmax: Tensor, block_size: int) -> Launch:
    """The launch of `encode_blocks` into packed and absmax; flat is contiguous and not empty."""
    n, blocks = flat.numel(), max(VALUES // block_size, 1)
    return Launch(
        kernel=_encode_blocks,
        grid=(triton.cdiv(n, blocks * block_size),),
        arguments={"x": flat, "table": code_table(flat.device), "packed": packed, "absmax": absmax, "n": n},
        constants={"BLOCK_SIZE": block_size, "BLOCKS": blocks, "EVEN": n % (blocks * block_size) == 0},
        options={"num_warps": 4, "num_stages": 1},
    )


def encode_blocks(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Encodes weights to 4-bit codes.

    Args:
        flat: float32, bfloat16 or float16 [n], contiguous.
        block_size: weights that share one absmax: a power of two, 32 to 4096.

    Returns:
        packed uint8 [ceil(n / 2)], two codes a byte, the earlier in the high nibble (an odd count pads the code of
        zero), and absmax float32 [ceil(n / block_size)]; a NaN or Inf shows as such in the absmax of its block.
    """
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(triton.cdiv(n, block_size), dtype=torch.float32, device=flat.device)
    if n:
        encode_blocks_launch(flat, packed, absmax, block_size).run()
    return packed, absmax


def encode_absmax_launch(
    absmax: Tensor, offset: Tensor, bounds: Tensor, codes: Tensor, nested_absmax: Tensor
) -> Launch:
    """The launch of `encode_absmax`, from the mean and the bounds between neighbouring values of the map."""
    return Launch(
        kernel=_encode_absmax,
        grid=(nested_absmax.numel(),),
        arguments={
            "absmax": absmax,
            "offset": offset,
            "bounds": bounds,
            "codes": codes,
            "nested_absmax": nested_absmax,
            "n": absmax.numel(),
        },
        constants={"BLOCK": NESTED_BLOCK_SIZE},
        options={"num_warps": 4, "num_stages": 1},
    )


def encode_absmax(absmax: Tensor, code_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation of the absmax.

    Args:
        absmax: float32 [n_blocks].
        code_map: float32 [256], ascending.

    Returns:
        codes uint8 [n_blocks], nested_absmax float32 [ceil(n_blocks / 256)] and offset float32 [], the mean.
    """
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    codes = torch.empty(absmax.numel(), dtype=torch.uint8, device=absmax.device)
    nested = torch.empty(triton.cdiv(absmax.numel(), NESTED_BLOCK_SIZE), dtype=torch.float32, device=absmax.device)
    if absmax.numel():
        bounds = (code_map[:-1] + code_map[1:]) / 2
        encode_absmax_launch(absmax, offset, bounds, codes, nested).run()
    return codes, nested, offset


def naive_encode_blocks(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """`encode_blocks` block by block."""
    codes, scales = [], []
    bounds = torch.tensor(BOUNDS, dtype=torch.float32, device=flat.device)
    for block in flat.float().split(block_size):
        scale = block.abs().max()
        scales.append(scale)
        codes.append(torch.bucketize(block * (1.0 / scale.clamp(min=TINY)), bounds))
    code = torch.cat(codes)
    if len(code) % 2:
        code = torch.cat([code, code.new_tensor([7])])
    return (code[::2] * 16 + code[1::2]).to(torch.uint8), torch.stack(scales)


def naive_encode_absmax(absmax: Tensor, code_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`encode_absmax` block by block."""
    offset = absmax.mean()
    codes, scales = [], []
    for block in (absmax - offset).split(NESTED_BLOCK_SIZE):
        scale = block.abs().max()
        scales.append(scale)
        codes.append(torch.bucketize(block * (1.0 / scale.clamp(min=TINY)), (code_map[:-1] + code_map[1:]) / 2))
    return torch.cat(codes).to(torch.uint8), torch.stack(scales), offset
