"""DoRA's column scaling with the norm of V' = W + scaling * B A computed inside, from its factored form.

y = (m / ||V'||) * z + bias, where z = x V'^T, and ||V'||^2 = ||W||^2 + 2 scaling rowsum((W A^T) o B) +
scaling^2 rowsum((B A A^T) o B) (Liu et al. 2024, section 4.3, for the constant norm). In torch that is about ten
launches with several passes over z; here z is read once and y written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from phicore_kernels.decode import round_to
from phicore_kernels.device import gpu_of
from phicore_kernels.launch import Launch

__all__ = ["naive_scale_columns", "scale_columns", "scale_columns_launch"]

BLOCK_M, BLOCK_N, RANK_STEP = 32, 64, 16


@triton.jit
def _rank_tile(pointer, n, N, r, rank, stride_n, stride_r):
    """float32 [BLOCK_N, RANK_STEP] of a matrix [N, rank], with zeros beyond its edges."""
    mask = (n < N)[:, None] & (r < rank)[None, :]
    at = n.to(tl.int64)[:, None] * stride_n + r.to(tl.int64)[None, :] * stride_r
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _scale_columns(
    z, base_norm_squared, WA, gram, B, magnitude, bias, y, norm_squared, scaling,
    M, N, rank, stride_zm, stride_zn, stride_wn, stride_wr, stride_bn, stride_br,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = n < N
    cross = tl.zeros((BLOCK_N,), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for j in range(0, rank, RANK_STEP):
        rj = j + tl.arange(0, RANK_STEP)
        b_j = _rank_tile(B, n, N, rj, rank, stride_bn, stride_br)
        cross += tl.sum(_rank_tile(WA, n, N, rj, rank, stride_wn, stride_wr) * b_j, axis=1)
        product = tl.zeros((BLOCK_N, RANK_STEP), tl.float32)
        for i in range(0, rank, RANK_STEP):
            ri = i + tl.arange(0, RANK_STEP)
            b_i = _rank_tile(B, n, N, ri, rank, stride_bn, stride_br)
            product = tl.dot(b_i, _rank_tile(gram, ri, rank, rj, rank, rank, 1), product, input_precision="ieee")
        square += tl.sum(product * b_j, axis=1)
    base = tl.load(base_norm_squared + n, mask=inside_n, other=0.0)
    squared = tl.maximum(base + 2 * scaling * cross + scaling * scaling * square, 0.0)
    if tl.program_id(1) == 0:
        tl.store(norm_squared + n, squared, mask=inside_n)
    m = tl.load(magnitude + n, mask=inside_n, other=0.0).to(tl.float32)
    # sqrt_rn, since NVIDIA's plain root takes a norm below float32's normal range for zero.
    scale = tl.where(squared > 0, m / tl.sqrt_rn(tl.where(squared > 0, squared, 1.0)), 0.0)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    if bias is not None:
        shift = tl.load(bias + n, mask=inside_n, other=0.0).to(tl.float32)
    for start in range(tl.program_id(1) * BLOCK_M, M, tl.num_programs(1) * BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (row < M)[:, None] & inside_n[None, :]
        z_at = z + row[:, None] * stride_zm + n.to(tl.int64)[None, :] * stride_zn
        value = tl.load(z_at, mask=inside, other=0.0).to(tl.float32)
        value = value * scale[None, :] + shift[None, :]
        tl.store(y + row[:, None] * N + n[None, :], round_to(value, y.dtype.element_ty), mask=inside)


def scale_columns_launch(
    z: Tensor,
    base_norm_squared: Tensor,
    WA: Tensor,
    gram: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None,
    y: Tensor,
    norm_squared: Tensor,
) -> Launch:
    """The launch of `scale_columns` into y [M, N] and norm_squared [N]."""
    m, n = z.shape
    tiles = triton.cdiv(n, BLOCK_N)
    # Each program works out its columns' norms again, so there are only as many as keep the GPU busy.
    programs = min(triton.cdiv(m, BLOCK_M), max(1, 4 * gpu_of(z.device).processors // tiles)) or 1
    return Launch(
        kernel=_scale_columns,
        grid=(tiles, programs),
        arguments={
            **{"z": z, "base_norm_squared": base_norm_squared, "WA": WA, "gram": gram, "B": B},
            **{"magnitude": magnitude, "bias": bias, "y": y, "norm_squared": norm_squared},
            **{"scaling": float(scaling), "M": m, "N": n, "rank": B.shape[1]},
            **dict(zip(("stride_zm", "stride_zn"), z.stride(), strict=True)),
            **dict(zip(("stride_wn", "stride_wr"), WA.stride(), strict=True)),
            **dict(zip(("stride_bn", "stride_br"), B.stride(), strict=True)),
        },
        constants={"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "RANK_STEP": RANK_STEP},
        options={"num_warps": 4, "num_stages": 2},
    )


def scale_columns(
    z: Tensor,
    base_norm_squared: Tensor,
    WA: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = (m / ||V'||) * z + bias, in float32 and rounded once; a zero row of V' gives a zero column.

    Args:
        z: x V'^T, float32, bfloat16 or float16 [M, N], any strides.
        base_norm_squared: rowsum(W o W), float32 [N].
        WA: W A^T [N, rank], any strides.
        A: [rank, K].
        B: [N, rank], any strides.
        magnitude: m, [N].
        scaling: factor of B A.
        bias: [N], or None.

    Returns:
        y [M, N] in z's dtype, and ||V'||^2 float32 [N]: where it is a small part of base_norm_squared the terms
        cancelled, and the caller should sum that row densely.
    """
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    norm_squared = torch.empty(z.shape[1], dtype=torch.float32, device=z.device)
    if z.shape[1]:
        gram = A.float() @ A.float().T  # [rank, rank]
        magnitude, bias = magnitude.contiguous(), None if bias is None else bias.contiguous()
        scale_columns_launch(z, base_norm_squared, WA, gram, B, magnitude, scaling, bias, y, norm_squared).run()
    return y, norm_squared


def naive_scale_columns(
    z: Tensor,
    base_norm_squared: Tensor,
    WA: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`scale_columns` term by term, in base_norm_squared's dtype but for y."""
    WA, A, B, m = (t.to(base_norm_squared.dtype) for t in (WA, A, B, magnitude))
    squared = base_norm_squared + 2 * scaling * (WA * B).sum(1) + scaling**2 * ((B @ (A @ A.T)) * B).sum(1)
    squared = squared.clamp(min=0)
    scale = torch.where(squared > 0, m / squared.sqrt(), 0)
    y = z.to(squared.dtype) * scale + (0 if bias is None else bias.to(squared.dtype))
    return y.to(z.dtype), squared
