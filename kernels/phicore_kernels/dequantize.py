"""NF4 to a dense tensor in one launch, the double quantisation of the scales decoded inside."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from phicore_kernels.decode import GROUP, decode_any, decode_groups
from phicore_kernels.launch import Launch
from phicore_kernels.weight import Weight, block_shift, decode_mode
from phicore_kernels.weight import naive_decode as naive_dequantize

__all__ = ["dequantize", "dequantize_launch", "naive_dequantize"]

GROUPS = 256  # of 32 weights a program: 64 weights a thread, so that two loads are in flight


@triton.jit
def _dequantize(
    packed, absmax, nested_absmax, offset, code_map, levels, out, n,
    BLOCK_SHIFT: tl.constexpr, MODE: tl.constexpr, TAIL: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out.dtype.element_ty
    if nested_absmax is not None:
        offset = tl.load(offset)
    whole = n // GROUP  # groups
    pid = tl.program_id(0).to(tl.int64)
    group = pid * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, GROUP)
    if MODE != "any":
        inside = group < whole
        # Outside, the last group is decoded and thrown away: cheaper than a mask on each load.
        safe = tl.maximum(tl.minimum(group, whole - 1), 0)
        values = decode_groups(
            safe, packed, absmax, nested_absmax, offset, code_map, levels, BLOCK_SHIFT, MODE, DTYPE, GROUPS
        )
        tl.store(out + group[:, None] * GROUP + column[None, :], values, mask=inside[:, None])
        if TAIL:  # fewer than 32 weights after the last whole group
            if pid == tl.num_programs(0) - 1:
                index = whole * GROUP + column
                safe_index = tl.minimum(index, n - 1)
                tail = decode_any(
                    safe_index, packed, absmax, nested_absmax, offset, code_map, levels, BLOCK_SHIFT, DTYPE
                )
                tl.store(out + index, tail, mask=index < n)
    else:
        index = group[:, None] * GROUP + column[None, :]
        values = decode_any(
            tl.minimum(index, n - 1), packed, absmax, nested_absmax, offset, code_map, levels, BLOCK_SHIFT, DTYPE
        )
        tl.store(out + index, values, mask=index < n)


def dequantize_launch(weight: Weight, out: Tensor, permute: bool | None = None) -> Launch:
    """The launch that fills `out`, contiguous of weight's size, at least one element; see decode_mode for permute."""
    n = weight.rows * weight.columns
    mode = decode_mode(weight.packed, n - n % 32, out.dtype, permute)
    return Launch(
        kernel=_dequantize,
        grid=(triton.cdiv(n, GROUPS * 32),),
        arguments={**weight.kernel_arguments(), "out": out, "n": n},
        constants={
            "BLOCK_SHIFT": block_shift(weight),
            "MODE": mode,
            "TAIL": n % 32 > 0,
            "GROUPS": GROUPS,
        },
        options={"num_warps": 4, "num_stages": 1},
    )


def dequantize(weight: Weight, dtype: torch.dtype, permute: bool | None = None) -> Tensor:
    """Decodes a weight: level * absmax in float32, rounded once.

    Args:
        weight: NF4, any size.
        dtype: float32, bfloat16 or float16.
        permute: see `decode_mode`.

    Returns:
        [rows, columns] in dtype, contiguous; equal to naive_dequantize bit for bit.
    """
    out = torch.empty(weight.rows, weight.columns, dtype=dtype, device=weight.packed.device)
    if out.numel():
        dequantize_launch(weight, out, permute).run()
    return out
