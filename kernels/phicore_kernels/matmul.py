"""Products with an NF4 weight that is decoded inside the kernel: y = x W^T + b, and its backward dx = g W.

One kernel serves both. Each step decodes a tile of W to the compute dtype, bit for bit as `dequantize` does, and gives
it to the tensor cores; W never lies dense in memory. Few rows leave most of a GPU idle, so the sum is then split over
several programs, whose float32 parts a second launch adds in a fixed order: two runs agree bit for bit.

The low-rank term scaling * left @ right of an adapter starts the float32 accumulator, so it costs no launch of its own
and no rounding.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from phicore_kernels.autotune import Product, config_of
from phicore_kernels.configs import Config
from phicore_kernels.decode import GROUP, INTERPRET, decode_any, decode_groups, operand, round_to
from phicore_kernels.device import gpu_of
from phicore_kernels.launch import Launch
from phicore_kernels.weight import Weight, block_shift, decode_mode, naive_decode

__all__ = ["LowRank", "linear", "linear_dx", "matmul_launches", "naive_linear", "naive_linear_dx"]

RANK_STEP = 16  # of the low-rank term at a time, the least that tensor cores take


class LowRank(NamedTuple):
    """scaling * left @ right, added to a product of [M, out].

    Attributes:
        left: [M, rank], as x A^T, in the product's dtype.
        right: [rank, out], as B^T, any strides, in the product's dtype.
        scaling: factor.
    """

    left: Tensor
    right: Tensor
    scaling: float


@triton.jit
def _matmul(
    x, packed, absmax, nested_absmax, offset, code_map, levels, bias, left, right, scaling, out,
    M, N, K, rank, split_length, stride_xm, stride_xr, stride_lm, stride_lr, stride_rr, stride_ro,
    BACKWARD: tl.constexpr, SPLIT: tl.constexpr, BLOCK_SHIFT: tl.constexpr, MODE: tl.constexpr, HIDE: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, RANK_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    """out [M, columns of the result] = x [M, summed] times W [N, K] (BACKWARD) or its transpose."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    OUT = K if BACKWARD else N
    SUM = N if BACKWARD else K

    # Eight tiles of rows share a tile of W before the next: what they read stays in the L2 cache.
    pid = tl.program_id(0)
    tiles_m, tiles_out = tl.cdiv(M, BLOCK_M), tl.cdiv(OUT, BLOCK_OUT)
    first_m = pid // (8 * tiles_out) * 8
    band = tl.minimum(tiles_m - first_m, 8)
    start_m = (first_m + pid % (8 * tiles_out) % band) * BLOCK_M
    start_out = pid % (8 * tiles_out) // band * BLOCK_OUT

    # Rows and groups of W beyond the edge repeat the last: what they give is not stored, or meets zeros of x.
    row_m = tl.minimum(start_m + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
    step = tl.arange(0, BLOCK_SUM)
    start_sum, stop_sum = 0, SUM
    if SPLIT > 1:
        start_sum = tl.program_id(1) * split_length
        stop_sum = tl.minimum(start_sum + split_length, SUM)
    x_step = tl.full((), BLOCK_SUM, tl.int64) * stride_xr
    x_at = x + row_m[:, None] * stride_xm + (start_sum + step).to(tl.int64)[None, :] * stride_xr
    if nested_absmax is not None:
        offset = tl.load(offset)

    accumulator = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
    if left is not None:
        if SPLIT == 1 or tl.program_id(1) == 0:
            right_column = tl.minimum(start_out + tl.arange(0, BLOCK_OUT), OUT - 1).to(tl.int64)
            for r in range(0, rank, RANK_STEP):
                rank_at = r + tl.arange(0, RANK_STEP)
                a = tl.load(
                    left + row_m[:, None] * stride_lm + rank_at.to(tl.int64)[None, :] * stride_lr,
                    mask=(rank_at < rank)[None, :],
                    other=0.0,
                )
                b = tl.load(
                    right + rank_at.to(tl.int64)[:, None] * stride_rr + right_column[None, :] * stride_ro,
                    mask=(rank_at < rank)[:, None],
                    other=0.0,
                )
                accumulator = tl.dot(operand(a), operand(b), accumulator, input_precision=PRECISION)
            accumulator *= scaling

    ROWS: tl.constexpr = BLOCK_SUM if BACKWARD else BLOCK_OUT
    COLUMNS: tl.constexpr = BLOCK_OUT if BACKWARD else BLOCK_SUM
    TILE_GROUPS: tl.constexpr = COLUMNS // GROUP
    tile = tl.arange(0, ROWS * TILE_GROUPS)
    tile_row, tile_group = tile // TILE_GROUPS, tile % TILE_GROUPS
    for at in range(start_sum, stop_sum, BLOCK_SUM):
        if EVEN:
            x_tile = tl.load(x_at)
        else:
            x_tile = tl.load(x_at, mask=(step < SUM - at)[None, :], other=0.0)
        x_at += x_step
        first_row = at if BACKWARD else start_out
        first_column = start_out if BACKWARD else at
        if MODE == "any":
            row = tl.minimum(first_row + tl.arange(0, ROWS), N - 1).to(tl.int64)
            column = tl.minimum(first_column + tl.arange(0, COLUMNS), K - 1)
            w = decode_any(
                row[:, None] * K + column[None, :],
                packed, absmax, nested_absmax, offset, code_map, levels, BLOCK_SHIFT, DTYPE,
            )  # fmt: skip
        else:
            row = tl.minimum(first_row + tile_row, N - 1).to(tl.int64)
            group = row * (K // GROUP) + tl.minimum(first_column // GROUP + tile_group, K // GROUP - 1)
            w = decode_groups(
                group, packed, absmax, nested_absmax, offset, code_map, levels, BLOCK_SHIFT, MODE, DTYPE,
                ROWS * TILE_GROUPS,
            )  # fmt: skip
            w = tl.reshape(w, (ROWS, COLUMNS))
            if HIDE and not INTERPRET:
                # A move that the assembler drops. Being no plain arithmetic, it hides the narrow loads behind w from
                # Triton, which would otherwise choose a layout of HMMA's operands that suits 8-bit data and costs four
                # moves for each HMMA.
                w = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [w], dtype=w.dtype, is_pure=False, pack=2)
        if not BACKWARD:
            w = w.T
        accumulator = tl.dot(operand(x_tile), operand(w), accumulator, input_precision=PRECISION)

    row_m = start_m + tl.arange(0, BLOCK_M)
    column = start_out + tl.arange(0, BLOCK_OUT)
    inside = (row_m < M)[:, None] & (column < OUT)[None, :]
    if SPLIT > 1:
        out += tl.program_id(1).to(tl.int64) * M * OUT
    elif bias is not None:
        accumulator += tl.load(bias + column, mask=column < OUT, other=0.0).to(tl.float32)[None, :]
    at = row_m.to(tl.int64)[:, None] * OUT + column[None, :]
    tl.store(out + at, round_to(accumulator, out.dtype.element_ty), mask=inside)


@triton.jit
def _add_parts(parts, bias, out, size, OUT, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """out [size] = the sum of parts [SPLIT, size], in their order, plus bias [OUT] along the last axis."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(SPLIT):
        total += tl.load(parts + at, mask=inside, other=0.0)
        parts += size
    if bias is not None:
        total += tl.load(bias + at % OUT, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, round_to(total, out.dtype.element_ty), mask=inside)


def matmul_launches(
    x: Tensor,
    weight: Weight,
    out: Tensor,
    *,
    backward: bool,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    config: Config,
    permute: bool | None = None,
    precision: str = "tf32x3",
    shared_operands: bool = False,
) -> list[Launch]:
    """The launches that fill out [M, N] with x [M, K] @ W^T, or, backward, out [M, K] with x [M, N] @ W.

    One launch, or two if the config splits the sum. `out` is contiguous and not empty; see `linear` for the rest.
    precision is that of float32 products: "tf32x3" on NVIDIA's tensor cores, "ieee" elsewhere.
    shared_operands: whether the GPU multiplies 64 rows and more from shared memory (sm_90 and sm_100) and not from
    registers.
    """
    m, (n, k) = x.shape[0], (weight.rows, weight.columns)
    columns, summed = (k, n) if backward else (n, k)
    steps = triton.cdiv(summed, config.block_sum)
    split_length = triton.cdiv(steps, config.split) * config.block_sum if config.split > 1 else 0
    split = triton.cdiv(summed, split_length) if split_length else 1
    parts = torch.empty(split, m, columns, dtype=torch.float32, device=x.device) if split > 1 else None
    mode = decode_mode(weight.packed, k, x.dtype, permute)
    left, right, scaling = low_rank or (None, None, None)
    product = Launch(
        kernel=_matmul,
        grid=(triton.cdiv(m, config.block_m) * triton.cdiv(columns, config.block_out), split),
        arguments={
            "x": x,
            **weight.kernel_arguments(),
            "bias": bias if split == 1 else None,
            "left": left,
            "right": right,
            "scaling": None if scaling is None else float(scaling),
            "out": out if parts is None else parts,
            **{"M": m, "N": n, "K": k, "rank": 0 if left is None else left.shape[1], "split_length": split_length},
            **dict(zip(("stride_xm", "stride_xr"), x.stride(), strict=True)),
            **dict(zip(("stride_lm", "stride_lr"), (0, 0) if left is None else left.stride(), strict=True)),
            **dict(zip(("stride_rr", "stride_ro"), (0, 0) if right is None else right.stride(), strict=True)),
        },
        constants={
            "BACKWARD": backward,
            "SPLIT": split,
            "BLOCK_SHIFT": block_shift(weight),
            "MODE": mode,
            "HIDE": mode == "permute" and (config.block_m < 64 or not shared_operands),
            "PRECISION": precision if x.dtype == torch.float32 else None,
            "EVEN": summed % config.block_sum == 0,
            "RANK_STEP": RANK_STEP,
            "BLOCK_M": config.block_m,
            "BLOCK_OUT": config.block_out,
            "BLOCK_SUM": config.block_sum,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    if parts is None:
        return [product]
    size = m * columns
    addition = Launch(
        kernel=_add_parts,
        grid=(triton.cdiv(size, 1024),),
        arguments={"parts": parts, "bias": bias, "out": out, "size": size, "OUT": columns},
        constants={"SPLIT": split, "BLOCK": 1024},
        options={"num_warps": 4, "num_stages": 1},
    )
    return [product, addition]


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    config: Config | None = None,
    permute: bool | None = None,
) -> Tensor:
    """y = x W^T + bias + scaling * left @ right, summed in float32 and rounded once.

    Args:
        x: float32, bfloat16 or float16 [M, K], any strides.
        weight: NF4, N rows and K columns.
        bias: [N] in x's dtype, contiguous, or None.
        low_rank: of [M, N], or None.
        config: tile sizes; None takes those tuned for the product on this GPU, or the table's (see `autotune`).
        permute: see `weight.decode_mode`.

    Returns:
        [M, N] in x's dtype, contiguous.
    """
    return _run(x, weight, weight.rows, False, bias, low_rank, config, permute)


def linear_dx(
    grad: Tensor,
    weight: Weight,
    low_rank: LowRank | None = None,
    config: Config | None = None,
    permute: bool | None = None,
) -> Tensor:
    """dx = g W + scaling * left @ right: g [M, N] to [M, K] (left = g B, right = A); otherwise as `linear`."""
    return _run(grad, weight, weight.columns, True, None, low_rank, config, permute)


def _run(
    x: Tensor,
    weight: Weight,
    columns: int,
    backward: bool,
    bias: Tensor | None,
    low_rank: LowRank | None,
    config: Config | None,
    permute: bool | None,
) -> Tensor:
    out = torch.empty(x.shape[0], columns, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    gpu = gpu_of(x.device)

    def run(config: Config) -> None:
        for launch in matmul_launches(
            x,
            weight,
            out,
            backward=backward,
            bias=bias,
            low_rank=low_rank,
            config=config,
            permute=permute,
            precision="tf32x3" if gpu.kind == "nvidia" else "ieee",
            shared_operands=gpu.capability[0] in (9, 10),
        ):
            launch.run()

    if config is None:
        mode = decode_mode(weight.packed, weight.columns, x.dtype, permute)
        config = config_of(Product(backward, x.shape[0], columns, x.shape[1], mode, x.dtype), x.device, run)
    run(config)
    return out


def naive_linear(x: Tensor, weight: Weight, bias: Tensor | None = None, low_rank: LowRank | None = None) -> Tensor:
    """`linear` from a dense W, summed in x's dtype."""
    y = x @ naive_decode(weight, x.dtype).T
    if bias is not None:
        y = y + bias
    return y if low_rank is None else y + low_rank.scaling * (low_rank.left @ low_rank.right)


def naive_linear_dx(grad: Tensor, weight: Weight, low_rank: LowRank | None = None) -> Tensor:
    """`linear_dx` from a dense W, summed in grad's dtype."""
    dx = grad @ naive_decode(weight, grad.dtype)
    return dx if low_rank is None else dx + low_rank.scaling * (low_rank.left @ low_rank.right)
