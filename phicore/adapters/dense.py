"""The product with a frozen dense weight and a low-rank pair beside it as one operator, where 16-bit products are
emulated: y = x W^T + bias + scale * (x A^T) B^T, summed in float32 and rounded once.

As phicore.nf4.low_rank, for a weight that is not coded. The weight is cast a few rows at a time and kept in 16 bits.
"""

import torch
from torch import Tensor

from phicore.nf4.low_rank import flat, pair_gradients
from phicore.products import linear, linear_dx, matmul, row_blocks

torch.library.define(
    "phicore::dense_low_rank",
    "(Tensor x, Tensor A, Tensor? B, float scale, Tensor weight, Tensor? bias, bool with_rows) "
    "-> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "phicore::dense_low_rank_dx", "(Tensor grad, Tensor? left, Tensor? right, Tensor weight) -> Tensor"
)

dense_low_rank = torch.ops.phicore.dense_low_rank
"""x [..., in], A [rank, in], B [out, rank] or None for no low-rank term, weight [out, in], bias [out] or None, each in
a float dtype of its own -> y [..., out] in x's dtype; u = x A^T [..., rank] in float32, which the backward pass needs,
[..., 0] without B; and, with_rows, A W^T [rank, out] in float32, else [0, out]. The weight gets no gradient, and none
flows through A W^T."""

dense_low_rank_dx = torch.ops.phicore.dense_low_rank_dx
"""grad [..., out], left [..., rank], right [rank, in] -> grad W + left right [..., in]; without left, grad W."""


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def reference(x, A, B, scale, weight, bias, with_rows):
    rows = A.new_empty((len(A) if with_rows else 0, len(weight)), dtype=_wide(x))
    y, x = x.new_empty(*x.shape[:-1], len(weight)), flat(x)
    wide = x.to(_wide(x))
    with torch.autocast("cpu", enabled=False):
        u = wide.new_empty(len(x), 0) if B is None else wide @ A.to(wide.dtype).t()
    linear(
        wide, row_blocks(weight), y.view(len(x), len(weight)), bias,
        None if B is None else (u, B), scale, (A, rows) if with_rows else None,
    )  # fmt: skip
    return y, u.view(*y.shape[:-1], u.shape[1]), rows


def reference_dx(grad, left, right, weight):
    dx = linear_dx(flat(grad), row_blocks(weight), weight.shape[1], None if left is None else flat(left), right)
    return dx.view(*grad.shape[:-1], weight.shape[1])


torch.library.impl("phicore::dense_low_rank", "default", reference)
torch.library.impl("phicore::dense_low_rank_dx", "default", reference_dx)


@torch.library.register_fake("phicore::dense_low_rank")
def _(x, A, B, scale, weight, bias, with_rows):
    rank, out = A.shape[0], weight.shape[0]
    y, u = x.new_empty((*x.shape[:-1], out)), x.new_empty((*x.shape[:-1], 0 if B is None else rank), dtype=_wide(x))
    return y, u, A.new_empty((rank if with_rows else 0, out), dtype=_wide(x))


@torch.library.register_fake("phicore::dense_low_rank_dx")
def _(grad, left, right, weight):
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _setup(ctx, inputs, output):
    x, A, B, scale, weight, bias, _ = inputs
    _, u, rows = output
    # Without a pair the product is linear in x: its backward pass needs the weight only.
    ctx.save_for_backward(*((weight,) if B is None else (weight, x, A, B, u)))
    ctx.scale, ctx.bias_dtype = scale, None if bias is None else bias.dtype
    ctx.mark_non_differentiable(rows)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_u, _grad_rows):
    weight, *pair = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx = dA = dB = dbias = None
    if pair:
        x, A, B, u = pair
        if grad is None:
            grad = x.new_zeros((*x.shape[:-1], weight.shape[0]))
        du, dA, dB = pair_gradients(grad, grad_u, x, A, B, u, ctx.scale, needs[:3])
        dx = dense_low_rank_dx(grad, du, A, weight) if needs[0] else None
    elif grad is not None and needs[0]:
        dx = dense_low_rank_dx(grad, None, None, weight)
    if grad is not None and needs[5]:
        dbias = flat(grad).sum(0).to(ctx.bias_dtype)
    return dx, dA, dB, None, None, dbias, None


def _dx_setup(ctx, inputs, output):
    _, left, right, weight = inputs
    ctx.save_for_backward(left, right, weight)


def _dx_backward(ctx, grad):
    left, right, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    empty = grad.new_empty(0, weight.shape[1])
    grad_g = dense_low_rank(grad, empty, None, 1.0, weight, None, False)[0] if needs[0] else None
    grad_left = matmul(grad, right.t(), dtype=left.dtype) if needs[1] else None
    grad_right = matmul(flat(left).t(), flat(grad), dtype=right.dtype) if needs[2] else None
    return grad_g, grad_left, grad_right, None


torch.library.register_autograd("phicore::dense_low_rank", _backward, setup_context=_setup)
torch.library.register_autograd("phicore::dense_low_rank_dx", _dx_backward, setup_context=_dx_setup)
