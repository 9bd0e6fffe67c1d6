"""NF4 codes to weights inside a kernel, bit for bit level * absmax in float32 rounded once to the compute dtype.

A group of 32 codes is 16 bytes, one load of a thread, and always lies in one block of scales. Three ways to decode it:

"permute" (NVIDIA, 16 bits). The 16 values that the group can take, level * absmax rounded, are made once and kept as
    bytes in eight registers. PRMT picks four bytes out of eight by four 4-bit selectors, so the packed codes themselves
    are the selectors: for four codes one PRMT each for the low and the high bytes of the values of codes 0-7 and of
    codes 8-15, then bit 3 of each code chooses between the two. About 2.6 instructions a weight with no memory access;
    the table costs 32 instructions a group, 1 a weight.
"table" (other GPUs, float32). The level of each code is loaded from a table of 16.
"any" (columns not a multiple of 32: groups straddle rows, an odd row starts inside a byte). Each weight on its own.

In Triton's interpreter, bfloat16 is bits without arithmetic and inline assembly is missing; `INTERPRET` selects the
same steps in integer arithmetic there.
"""

import triton
import triton.language as tl

from phicore_kernels.weight import GROUP as _GROUP
from phicore_kernels.weight import LEVELS as _LEVELS

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
GROUP = tl.constexpr(_GROUP)
LEVELS = tl.constexpr(_LEVELS)


@triton.jit
def rounded_bits(value, DTYPE: tl.constexpr):
    """The bits of a float32 rounded to nearest, ties to even, in DTYPE (16 bits wide), as int32 below 2^16."""
    if INTERPRET and DTYPE == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    else:
        return value.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def round_to(value, DTYPE: tl.constexpr):
    """A float32 rounded to DTYPE."""
    if INTERPRET and DTYPE == tl.bfloat16:
        return rounded_bits(value, DTYPE).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        return value.to(DTYPE)


@triton.jit
def operand(value):
    """A tile as an operand of tl.dot."""
    if INTERPRET:
        return value.to(tl.float32)
    else:
        return value


@triton.jit
def round_pair(low, high, DTYPE: tl.constexpr):
    """Two float32 rounded to DTYPE in one int32, the first in the low half."""
    if INTERPRET:
        return rounded_bits(low, DTYPE) | (rounded_bits(high, DTYPE) << 16)
    elif DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def permute_bytes(a, b, selector):
    """PTX prmt: four bytes out of the eight of a (0-3) and b (4-7), by the four low nibbles of the selector.

    Bit 3 of a nibble asks for the sign of the byte in all eight bits instead.
    """
    if INTERPRET:
        result = a & 0
        for i in tl.static_range(4):
            nibble = (selector >> (4 * i)) & 15
            word = tl.where((nibble & 4) == 0, a, b)
            byte = (word >> ((nibble & 3) * 8)) & 255
            byte = tl.where((nibble & 8) == 0, byte, (byte >> 7) * 255)
            result = result | (byte << (8 * i))
        return result
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def two_values(scale, i: tl.constexpr, DTYPE: tl.constexpr):
    return round_pair(scale * LEVELS[i], scale * LEVELS[i + 1], DTYPE)


@triton.jit
def choose(codes, upper, t0, t1, t2, t3):
    """One byte for each of four codes out of a table of 16 bytes t0..t3; `upper` is 0xFF where a code is above 7."""
    below = permute_bytes(t0, t1, codes)
    above = permute_bytes(t2, t3, codes)
    return (above & upper) | (below & ~upper)


@triton.jit
def permute_words(words, scale, DTYPE: tl.constexpr):
    """Decodes eight codes a word.

    Args:
        words: int32 [E, W], codes as they are packed.
        scale: float32 [E, 1].

    Returns:
        four int32 [E, W], each two weights of DTYPE: (0, 1), (2, 3), (4, 5), (6, 7), the earlier in the low half.
    """
    v0, v1 = two_values(scale, 0, DTYPE), two_values(scale, 2, DTYPE)
    v2, v3 = two_values(scale, 4, DTYPE), two_values(scale, 6, DTYPE)
    v4, v5 = two_values(scale, 8, DTYPE), two_values(scale, 10, DTYPE)
    v6, v7 = two_values(scale, 12, DTYPE), two_values(scale, 14, DTYPE)
    low0, low1 = permute_bytes(v0, v1, 0x6420), permute_bytes(v2, v3, 0x6420)
    low2, low3 = permute_bytes(v4, v5, 0x6420), permute_bytes(v6, v7, 0x6420)
    high0, high1 = permute_bytes(v0, v1, 0x7531), permute_bytes(v2, v3, 0x7531)
    high2, high3 = permute_bytes(v4, v5, 0x7531), permute_bytes(v6, v7, 0x7531)

    # Nibble i of a word is a selector; bit 3 of it is the sign of a byte of the word, or of the word shifted by 4.
    codes = words & 0x77777777
    shifted = words << 4
    upper = permute_bytes(shifted, words, 0xD9C8)
    low_a = choose(codes, upper, low0, low1, low2, low3)
    high_a = choose(codes, upper, high0, high1, high2, high3)
    codes = codes >> 16
    upper = permute_bytes(shifted, words, 0xFBEA)
    low_b = choose(codes, upper, low0, low1, low2, low3)
    high_b = choose(codes, upper, high0, high1, high2, high3)
    # The earlier weight is the high nibble: byte 1 comes first, then byte 0, then 3 and 2.
    return (
        permute_bytes(low_a, high_a, 0x4051),
        permute_bytes(low_a, high_a, 0x6273),
        permute_bytes(low_b, high_b, 0x4051),
        permute_bytes(low_b, high_b, 0x6273),
    )


@triton.jit
def block_scale(block, absmax, nested_absmax, offset, code_map):
    """The absmax of blocks, float32; offset is a value here."""
    if nested_absmax is None:
        return tl.load(absmax + block)
    else:
        code = tl.load(absmax + block).to(tl.int32)
        return tl.load(code_map + code) * tl.load(nested_absmax + (block >> 8)) + offset


@triton.jit
def decode_groups(
    group, packed, absmax, nested_absmax, offset, code_map, levels,
    BLOCK_SHIFT: tl.constexpr, MODE: tl.constexpr, DTYPE: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Decodes groups of 32 weights by their indices int64 [E]: [E, 32] in DTYPE. BLOCK_SHIFT: log2(block_size / 32)."""
    words = tl.load(packed.to(tl.pointer_type(tl.int32)) + group[:, None] * 4 + tl.arange(0, 4)[None, :])
    scale = block_scale(group >> BLOCK_SHIFT, absmax, nested_absmax, offset, code_map)
    if MODE == "permute":
        v0, v1, v2, v3 = permute_words(words, scale[:, None], DTYPE)
        pairs = tl.join(tl.join(v0, v2), tl.join(v1, v3))  # [E, 4, 2, 2], in order
        low = (pairs & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        return tl.reshape(tl.join(low, high), (E, GROUP))
    else:
        shifts = (tl.arange(0, 8) ^ 1) * 4  # the earlier weight is the high nibble
        codes = (words[:, :, None] >> shifts[None, None, :]) & 15  # [E, 4, 8]
        values = tl.load(levels + codes) * scale[:, None, None]
        return tl.reshape(round_to(values, DTYPE), (E, GROUP))


@triton.jit
def decode_any(
    index, packed, absmax, nested_absmax, offset, code_map, levels, BLOCK_SHIFT: tl.constexpr, DTYPE: tl.constexpr
):
    """Decodes weights by their flat indices, int64 of any shape."""
    byte = tl.load(packed + (index >> 1)).to(tl.int32)
    code = (byte >> (((index & 1) ^ 1) * 4).to(tl.int32)) & 15
    scale = block_scale(index >> (BLOCK_SHIFT + 5), absmax, nested_absmax, offset, code_map)
    return round_to(tl.load(levels + code) * scale, DTYPE)
