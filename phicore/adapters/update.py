"""The low-rank path beside a product with the base, y + scale * (x A^T) B^T, and the dense product of its pair."""

from typing import Any

import torch
from torch import Tensor, nn

from phicore import products
from phicore.adapters.base import without_autocast
from phicore.adapters.dropout import dropped_projection
from phicore.nf4.linear import autocast
from phicore.nf4.ops import flat
from phicore.transforms import transformed


def low_rank_update(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0, *, in_place: bool = False
) -> Tensor:
    """y + scale * (dropout(x) A^T) B^T.

    Saves x and dropout(x) A^T for the backward pass, with dropout one bit an element of x too, and makes no other
    temporary as large as y.

    Args:
        y: [..., out].
        x: [..., in].
        A: [rank, in].
        B: [out, rank].
        scale: factor of the product.
        dropout: probability of zeroing an element of x.
        in_place: whether y, which is then [tokens, out] and nobody else's, is written to.

    Returns:
        [..., out] in y's dtype.
    """
    x = autocast(x)
    if transformed():
        u = nn.functional.linear(nn.functional.dropout(x, dropout), A.to(x.dtype))
        in_place = False
    elif dropout:
        u = dropped_projection(x, A.to(x.dtype), dropout)
    elif products.emulated(x):
        u = products.matmul(x, A.t(), dtype=torch.float32)
    else:
        u = nn.functional.linear(x, A.to(x.dtype))  # [..., in] @ [in, rank] -> [..., rank]
    if in_place:
        return add_product_(y, u, B, scale)
    return add_product(y, u, B, scale)


def add_product(y: Tensor, u: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale * u B^T with no temporary as large as y: [..., out], [..., rank], [out, rank] -> [..., out]."""
    flat_y, flat_u = flat(y), flat(u)
    if products.emulated(y):
        return products.addmm(flat_y, flat_u, B.t(), scale).view(y.shape)
    if B.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed():
        return _AddProduct.apply(flat_y, flat_u, B.to(u.dtype), scale, False).view(y.shape)
    return torch.addmm(flat_y, flat_u, B.to(u.dtype).t(), alpha=scale).view(y.shape)


def add_product_(y: Tensor, u: Tensor, B: Tensor, scale: float) -> Tensor:
    """The same, written to y: [tokens, out], [tokens, rank], [out, rank] -> [tokens, out]."""
    if products.emulated(y):
        return products.addmm(y, u, B.t(), scale)  # into another tensor; y is not kept
    if B.device.type == "cpu" and not torch.compiler.is_compiling():
        return _AddProduct.apply(y, u, B.to(u.dtype), scale, True)
    return y.addmm_(u, B.to(u.dtype).t(), alpha=scale)


class _AddProduct(torch.autograd.Function):
    """y + scale * u B^T as torch.addmm, but with products in the backward pass that suit a CPU.

    Autograd would take B's gradient as (g^T u)^T and u's as g B with B's narrow rows, shapes at which the CPU's
    libraries are slow. As u^T g, and with a copy of B^T for the other, the two take 0.24 and 0.33 ms in place of 1.2
    and 0.8 (404 tokens, 1536 features, rank 8).
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, u: Tensor, B: Tensor, scale: float, in_place: bool) -> Tensor:
        ctx.save_for_backward(u, B)
        ctx.scale = scale
        if not in_place:
            return torch.addmm(y, u, B.t(), alpha=scale)
        ctx.mark_dirty(y)
        return torch.addmm(y, u, B.t(), alpha=scale, out=y)  # torch.utils.flop_counter does not count addmm_

    @staticmethod
    def backward(ctx, grad):
        u, B = ctx.saved_tensors
        grad_u = grad_B = None
        if ctx.needs_input_grad[1]:
            grad_u = ctx.scale * (grad @ B.t().contiguous().t())  # [tokens, out] @ [out, rank]
        if ctx.needs_input_grad[2]:
            grad_B = (ctx.scale * (u.t() @ grad)).t()  # [rank, tokens] @ [tokens, out]
        return grad, grad_u, grad_B, None, None


def dense_product(A: Tensor, B: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
    """scale * B A in dtype: [rank, in], [out, rank] -> [out, in]."""
    with without_autocast(A.device):
        return scale * (B.to(dtype) @ A.to(dtype))
