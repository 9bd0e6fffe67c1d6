"""An NF4 product with a low-rank pair beside it as one operator: y = x W^T + bias + scale * (x A^T) B^T.

On a GPU the low-rank term is the epilogue of the product, forward and backward; y, and dx, are then written once. As in
phicore.nf4.ops, the implementations here are the torch reference, and phicore.nf4.kernels overrides them.
"""

import torch
from torch import Tensor

from phicore import products
from phicore.nf4.ops import PARTS, flat, nf4_dequantize, nf4_linear, product, row_blocks, unflat

torch.library.define(
    "phicore::nf4_low_rank",
    f"(Tensor x, Tensor A, Tensor B, float scale, {PARTS}, Tensor? bias, SymInt[] shape, int block_size, "
    "bool with_rows) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "phicore::nf4_low_rank_dx",
    f"(Tensor grad, Tensor left, Tensor right, {PARTS}, SymInt[] shape, int block_size) -> Tensor",
)

nf4_low_rank = torch.ops.phicore.nf4_low_rank
"""x [..., in], A [rank, in], B [out, rank], bias [out] or None, all in one dtype -> y [..., out]; u = x A^T
[..., rank], which the backward pass needs; and, with_rows, A W^T [rank, out] without a gradient (else [0, out]).
with_rows takes no bias."""

nf4_low_rank_dx = torch.ops.phicore.nf4_low_rank_dx
"""grad [..., out], left [..., rank], right [rank, in] -> grad W + left right [..., in]."""


def _plus_product(y: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """y += scale * left right, in place."""
    flat(y).addmm_(flat(left), right, alpha=scale)
    return y


def reference_low_rank(x, A, B, scale, packed, absmax, nested_absmax, offset, bias, shape, block_size, with_rows):
    if products.emulated(x):
        blocks = row_blocks(packed, absmax, nested_absmax, offset, shape, block_size)
        rows, y = A.new_empty((len(A) if with_rows else 0, shape[0])), x.new_empty(*x.shape[:-1], shape[0])
        u = products.matmul(x, A.t(), dtype=torch.float32)
        products.linear(flat(x), blocks, flat(y), bias, (flat(u), B), scale, (A, rows) if with_rows else None)
        return y, u.to(x.dtype), rows
    weight = nf4_dequantize(packed, absmax, nested_absmax, offset, shape, block_size, x.dtype)  # [out, in]
    u = product(x, A)
    y = product(x, weight, bias)
    rows = product(A, weight) if with_rows else A.new_empty((0, shape[0]))
    return _plus_product(y, u, B.t(), scale), u, rows


def reference_low_rank_dx(grad, left, right, packed, absmax, nested_absmax, offset, shape, block_size):
    if products.emulated(grad):
        blocks = row_blocks(packed, absmax, nested_absmax, offset, shape, block_size)
        return unflat(products.linear_dx(flat(grad), blocks, shape[1], flat(left), right), grad)
    weight = nf4_dequantize(packed, absmax, nested_absmax, offset, shape, block_size, grad.dtype)  # [out, in]
    with torch.autocast(grad.device.type, enabled=False):  # which may be on here though it was off in the forward pass
        return _plus_product(grad @ weight, left, right)


torch.library.impl("phicore::nf4_low_rank", "default", reference_low_rank)
torch.library.impl("phicore::nf4_low_rank_dx", "default", reference_low_rank_dx)


@torch.library.register_fake("phicore::nf4_low_rank")
def _(x, A, B, scale, packed, absmax, nested_absmax, offset, bias, shape, block_size, with_rows):
    rows = A.new_empty((A.shape[0] if with_rows else 0, shape[0]))
    return x.new_empty((*x.shape[:-1], shape[0])), x.new_empty((*x.shape[:-1], A.shape[0])), rows


@torch.library.register_fake("phicore::nf4_low_rank_dx")
def _(grad, left, right, packed, absmax, nested_absmax, offset, shape, block_size):
    return grad.new_empty((*grad.shape[:-1], shape[1]))


def _setup(ctx, inputs, output):
    x, A, B, scale, *parts, _bias, shape, block_size, _ = inputs
    _, u, rows = output
    ctx.save_for_backward(x, A, B, u, *parts)
    ctx.scale, ctx.shape, ctx.block_size = scale, shape, block_size
    ctx.mark_non_differentiable(rows)
    ctx.set_materialize_grads(False)


def pair_gradients(grad, grad_u, x, A, B, u, scale, needs):
    """What the backward pass of y = x W^T + scale * u B^T, u = x A^T, shares over all weights.

    Args:
        grad: of y, [..., out].
        grad_u: of u, [..., rank] or None; u has one of its own only where the backward pass is itself differentiated.
        x, A, B, u, scale: as there.
        needs: whether x, A and B need a gradient.

    Returns:
        du [..., rank], so that dx = grad W + du A, if x or A need it; and dA, dB; None for what is not needed.
    """
    du = dA = dB = None
    if needs[0] or needs[1]:
        du = products.matmul(grad, B, scale, products.wide_dtype(grad))
        du = du if grad_u is None else du + grad_u
    if du is not None and needs[1]:
        dA = products.matmul(flat(du).t(), flat(x), dtype=A.dtype)
    if needs[2]:
        dB = products.matmul(flat(grad).t(), flat(u), scale, B.dtype)
    return du, dA, dB


def _backward(ctx, grad, grad_u, _grad_rows):
    x, A, B, u, *parts = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if grad is None:
        grad = x.new_zeros((*x.shape[:-1], ctx.shape[0]))
    du, dA, dB = pair_gradients(grad, grad_u, x, A, B, u, ctx.scale, needs[:3])
    dx = nf4_low_rank_dx(grad, du, A, *parts, ctx.shape, ctx.block_size) if needs[0] else None
    dbias = flat(grad).sum(0) if needs[8] else None
    return dx, dA, dB, None, None, None, None, None, dbias, None, None, None


def _dx_setup(ctx, inputs, output):
    _, left, right, *parts, shape, block_size = inputs
    ctx.save_for_backward(left, right, *parts)
    ctx.shape, ctx.block_size = shape, block_size


def _dx_backward(ctx, grad):
    left, right, *parts = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_g = nf4_linear(grad, *parts, None, ctx.shape, ctx.block_size) if needs[0] else None
    grad_left = products.matmul(grad, right.t(), dtype=left.dtype) if needs[1] else None
    grad_right = products.matmul(flat(left).t(), flat(grad), dtype=right.dtype) if needs[2] else None
    return grad_g, grad_left, grad_right, None, None, None, None, None, None


torch.library.register_autograd("phicore::nf4_low_rank", _backward, setup_context=_setup)
torch.library.register_autograd("phicore::nf4_low_rank_dx", _dx_backward, setup_context=_dx_setup)
