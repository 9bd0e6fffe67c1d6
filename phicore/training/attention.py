"""Causal attention of a short example in 16 bits on a CPU, by plain matrix products in float32.

torch's kernel for CPUs works in blocks of rows, which short examples do not fill, so that in 16 bits it takes longer.
As with that kernel, operands alone are kept, and the backward pass makes the scores again.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORTEST, LONGEST = 24, 192  # tokens; torch's kernel is as fast below and beyond


def attends_plainly(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `causal_attention` gains over torch's own for these operands."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and query.shape == key.shape == value.shape
        and SHORTEST <= query.shape[-2] <= LONGEST
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T over those not behind) v, summed in float32 and rounded once.

    Args:
        query, key, value: [..., N, D], differentiable once.
        scale: of the scores; None for 1 / sqrt(D).

    Returns:
        [..., N, D] in query's dtype.
    """
    return _Attention.apply(query, key, value, 1 / math.sqrt(query.shape[-1]) if scale is None else scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        with torch.autocast(query.device.type, enabled=False):  # which would take these products in 16 bits
            weights = _weights(_heads(query), _heads(key), scale)
            return torch.bmm(weights, _heads(value)).view(query.shape).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = map(_heads, ctx.saved_tensors)
        weights, grad = _weights(query, key, ctx.scale), _heads(grad)
        grad_value = torch.bmm(weights.transpose(1, 2), grad)
        products = torch.bmm(grad, value.transpose(1, 2)).mul_(weights)
        # Of the scores: weights * (grad v^T - its mean by the weights).
        scores = products.sub_(weights.mul_(products.sum(-1, keepdim=True))).mul_(ctx.scale)
        grads = (torch.bmm(scores, key), torch.bmm(scores.transpose(1, 2), query), grad_value)
        return *(g.view(t.shape).to(t.dtype) for g, t in zip(grads, ctx.saved_tensors, strict=True)), None


def _heads(x: Tensor) -> Tensor:
    """[..., N, D] -> float32 [heads, N, D]."""
    return x.reshape(-1, *x.shape[-2:]).float()


def _weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """softmax of the causal scores, float32 [heads, N, N]."""
    behind = query.new_full((query.shape[1],) * 2, -math.inf).triu_(1)
    scores = torch.baddbmm(behind.expand(len(query), -1, -1), query, key.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1)
