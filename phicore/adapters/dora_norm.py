"""The norm of DoRA's direction, ||V'|| with V' = W + scale * B A, without the dense product.

||V'||^2 is summed from its three terms. Where these cancel, which the sum itself tells, a row is summed densely. That
is a branch on data: torch.compile sees one operator in its place, since with torch.cond it would compile both ways of
every layer of a model anew.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from phicore.adapters.base import Held, without_autocast
from phicore.adapters.update import dense_product
from phicore.nf4.ops import dequantize

torch.library.define(
    "phicore::dora_norm_squared",
    "(Tensor base_norm_squared, Tensor WA, Tensor A, Tensor B, float scale, Tensor?[] weight, SymInt[] shape, "
    "int block_size) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # the branch waits for the device
)

# The factored norm subtracts numbers of the size of ||W||^2, so its relative error grows as (||W|| / ||V'||)^2. Rows
# whose ||V'||^2 falls below this fraction of ||W||^2 are summed densely instead. In 16 bits W A^T itself is rounded.
CANCELLATION = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 0.25, torch.float16: 0.05}


def factored_norm_squared(base_norm_squared: Tensor, WA: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """||W + scale * B A||^2 per row, without the dense product.

    ||W||^2 + 2 scale rowsum((W A^T) o B) + scale^2 rowsum((B A A^T) o B), which costs rank / out of the dense way.

    Args:
        base_norm_squared: rowsum(W o W), [out].
        WA: W A^T, [out, rank].
        A: [rank, in].
        B: [out, rank].
        scale: factor of B A.

    Returns:
        [out] in base_norm_squared's dtype, in which everything is summed; not below zero.
    """
    A, B, WA = (t.to(base_norm_squared.dtype) for t in (A, B, WA))
    with without_autocast(A.device):
        gram = A @ A.t()  # [rank, in] @ [in, rank] -> [rank, rank]
        both = torch.addmm(WA, B, gram, beta=2 * scale, alpha=scale**2)  # [out, rank]: 2 scale W A^T + scale^2 B A A^T
    return (base_norm_squared + (both * B).sum(1)).clamp_(min=0)


def cancelled(norm_squared: Tensor, base_norm_squared: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows, bool [out], whose factored norm lost too many digits, W A^T having been computed in dtype. A row of zeros
    under a row of zeros lost none."""
    return norm_squared < CANCELLATION[dtype] * base_norm_squared


def exact_norm_squared(
    base_norm_squared: Tensor, WA: Tensor, A: Tensor, B: Tensor, scale: float, dense: Callable[[], Tensor]
) -> Tensor:
    """factored_norm_squared, with the rows that it lost summed densely.

    Args:
        dense: makes W, [out, in] in base_norm_squared's dtype. Called where a row was lost.
    """
    squared = factored_norm_squared(base_norm_squared, WA, A, B, scale)
    lost = cancelled(squared, base_norm_squared, WA.dtype)
    if lost.is_meta or not lost.any():
        return squared
    direction = dense() + dense_product(A, B, scale, squared.dtype)
    return torch.where(lost, direction.square().sum(1), squared)


def compiled_norm_squared(
    base_norm_squared: Tensor, WA: Tensor, A: Tensor, B: Tensor, scale: float, weight: Held
) -> Tensor:
    """The same by one operator, with W as its layer holds it; no gradient flows through it."""
    return torch.ops.phicore.dora_norm_squared(base_norm_squared, WA, A, B, scale, *weight)


def row_scale(magnitude: Tensor, norm: Tensor, positive: bool = False) -> Tensor:
    """m / ||V'||, [out]; zero where the norm is zero, so that a zero row stays a finite zero row.

    Args:
        magnitude, norm: [out].
        positive: whether it is known that no norm is zero.
    """
    if positive:
        return magnitude / norm
    return torch.where(norm == 0, 0, magnitude / norm.where(norm != 0, 1))  # a NaN stays one


def _by_parts(
    base_norm_squared: Tensor,
    WA: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    weight: Sequence[Tensor | None],
    shape: Sequence[int],
    block_size: int,
) -> Tensor:
    def dense() -> Tensor:
        if block_size:
            packed, absmax, nested_absmax, offset = weight
            return dequantize(packed, absmax, nested_absmax, offset, shape, block_size, base_norm_squared.dtype)
        (W,) = weight
        assert W is not None
        return W.to(base_norm_squared.dtype)

    return exact_norm_squared(base_norm_squared, WA, A, B, scale, dense)


torch.library.impl("phicore::dora_norm_squared", "default", _by_parts)


@torch.library.register_fake("phicore::dora_norm_squared")
def _(base_norm_squared, WA, A, B, scale, weight, shape, block_size):
    return base_norm_squared.new_empty(base_norm_squared.shape)
