"""The step of an adapted linear layer on a CPU, written out: y = x W^T + bias + scale * (dropout(x) A^T) B^T.

Autograd would make the low-rank path's share of y, and of the gradient of x, in a tensor of its own and then add it,
and would take its narrow products in shapes at which CPU libraries are slow. Here both are added where they belong. A
GPU and torch.compile fuse these steps themselves, and CPUs that emulate 16-bit products have `phicore.products`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from phicore.adapters.dropout import draw, factor, masked, pack, unpack
from phicore.nf4.ops import flat
from phicore.transforms import transformed


class Frozen(NamedTuple):
    """A weight that does not train, as the parts that hold it and the function that makes it of them."""

    parts: tuple[Tensor | None, ...]
    dense: Callable[..., Tensor]
    """(*parts, dtype=dtype) -> W [out, in]."""


def low_rank_step(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    weight: Frozen,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    *,
    with_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """x W^T + bias + scale * (dropout(x) A^T) B^T.

    Saves for the backward pass x, the weight's parts, dropout(x) A^T and, with dropout, one bit an element of x; makes
    W once in each pass.

    Args:
        x: [..., in], differentiable, as are A, B and bias.
        A: [rank, in], cast to x's dtype as B and bias are.
        B: [out, rank].
        scale: factor of the product.
        weight: W, [out, in].
        bias: [out], or None.
        dropout: probability of zeroing an element of x on the low-rank path.
        with_rows: return A W^T beside it, without a gradient.

    Returns:
        [..., out] in x's dtype, and A W^T [rank, out], or [0, out].

    Raises:
        ValueError: x's last dimension is not A's.
    """
    if x.shape[-1] != A.shape[-1]:
        raise ValueError(f"x of shape {list(x.shape)} does not fit a layer of {A.shape[-1]} input features")
    y, above = _Step.apply(x, A, B, scale, bias, dropout, with_rows, weight.dense, *weight.parts)
    return y.view(*x.shape[:-1], y.shape[-1]), above


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        scale: float,
        bias: Tensor | None,
        dropout: float,
        with_rows: bool,
        dense: Callable[..., Tensor],
        *parts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        W, a, b, rows = dense(*parts, dtype=x.dtype), A.to(x.dtype), B.to(x.dtype), flat(x)
        mask = draw(rows.numel(), dropout, x.device) if dropout else None
        u = _projected(rows, a, mask, dropout)
        y = linear(u * scale, b, None if bias is None else bias.to(x.dtype))  # [tokens, out]
        _add_product(y, rows, W.t())  # sums in the larger product, in which that costs least
        above = linear(a, W) if with_rows else a.new_empty(0, len(W))
        ctx.save_for_backward(x, A, B, u, None if mask is None else pack(mask), *parts)
        ctx.scale, ctx.dropout, ctx.dense = scale, dropout, dense
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(above)
        ctx.set_materialize_grads(False)
        return y, above  # flat: a view that is made in here could not be written to in place

    @staticmethod
    def backward(ctx, grad, _grad_above):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        with torch.autocast("cpu", enabled=False):  # which may be on here though it was off in the forward pass
            return _gradients(ctx, grad)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Of the inputs of _Step.forward, of g [tokens, out] for y."""
    x, A, B, u, bits, *parts = ctx.saved_tensors
    needs, rows, a, b = ctx.needs_input_grad, flat(x), A.to(x.dtype), B.to(x.dtype)
    mask = None if bits is None else unpack(bits)
    if torch.is_grad_enabled():  # the backward pass is itself differentiated, and u depends on x and A
        u = _projected(rows, a, mask, ctx.dropout)
    dx = dA = dB = dbias = None
    if needs[0] or needs[1]:
        # For float32 a library is slow where B's rows are narrow; a copy has them long.
        du = g @ (b if b.dtype.itemsize < 4 else b.t().contiguous().t())  # [tokens, out] @ [out, rank]
        du = du * (ctx.scale * (factor(ctx.dropout) if ctx.dropout else 1))
    if needs[1]:
        dA = (du.t() @ (rows if mask is None else masked(rows, mask))).to(A.dtype)
    if needs[2]:
        dB = ctx.scale * (u.t() @ g)  # [rank, tokens] @ [tokens, out]
        dB = dB.t().to(B.dtype, memory_format=torch.contiguous_format)
    if needs[0]:
        dx = du @ a
        dx = dx if mask is None else masked(dx, mask)
        dx = _add_product(dx, g, ctx.dense(*parts, dtype=x.dtype)).view(x.shape)
    if needs[4]:
        dbias = g.sum(0).to(ctx.bias_dtype)
    return dx, dA, dB, None, dbias, *(None,) * (len(needs) - 5)


def _add_product(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + a b, in y's memory where neither autograd nor vmap looks: [n, m], [n, k], [k, m]. As addmm and not addmm_,
    which torch.utils.flop_counter does not count."""
    return torch.addmm(y, a, b, out=None if torch.is_grad_enabled() or transformed() else y)


def _projected(x: Tensor, A: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """dropout(x) A^T: [tokens, in], [rank, in] -> [tokens, rank]."""
    if mask is None:
        return linear(x, A)
    return linear(masked(x, mask), A).mul_(factor(dropout))
