"""Cross-entropy behind an output head, a few rows of logits at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phicore import products
from phicore.nf4.linear import autocast
from phicore.training.encoding import IGNORE_INDEX


def chunk_elements(device: torch.device) -> int:
    """Logits that are held at once.

    Each chunk reads the head's weight again, so it must have rows enough to hide that: 32 MiB of float32 logits on a
    CPU (170 rows of a vocabulary of 49,152, as fast there as all rows at once), 256 MiB elsewhere (500 of 128,000).
    """
    return 1 << 23 if device.type == "cpu" else 1 << 26


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The summed cross-entropy of logits = hidden @ weight^T + bias, which never exist as a whole.

    Rows are taken in chunks. Each chunk's logits become its loss and at once its gradients (softmax minus one-hot,
    through the head), so that the backward pass only scales what the forward pass has kept: hidden's gradient, and the
    head's where it trains. As in torch, logits have hidden's dtype (autocast's under autocast), but are float32 on a
    CPU without products in it (phicore.products); the softmax, the loss and the sums over chunks are float32, or
    float64 for float64.

    Args:
        hidden: [n, in].
        weight: [classes, in].
        bias: [classes] or None.
        targets: int64 [n]; -100 for a row without loss.

    Returns:
        The sum over the rows with a target, float32 [] (float64 for float64).

    Raises:
        IndexError: a target is neither -100 nor one of the classes.
    """
    rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    targets = targets[rows]
    classes = weight.shape[0]
    if len(targets) and not (int(targets.min()) >= 0 and int(targets.max()) < classes):
        raise IndexError(f"targets must be 0 to {classes - 1} or {IGNORE_INDEX}, got {targets.unique().tolist()[:10]}")
    hidden, weight = autocast(hidden), autocast(weight)
    bias = None if bias is None else autocast(bias)
    kept = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    return _LinearCrossEntropy.apply(hidden, weight, bias, rows, targets, kept)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[c, in] -> [c, classes] in dtype, through hidden's unless products in that are emulated."""
    if products.emulated(hidden):
        logits = hidden.new_empty(len(hidden), len(weight), dtype=dtype)
        return products.linear(hidden, products.row_blocks(weight), logits, bias)
    return torch.nn.functional.linear(hidden, weight, bias).to(dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor, kept: list[bool]
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if kept[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if kept[1] else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=wide) if kept[2] else None
        with torch.autocast(hidden.device.type, enabled=False):
            size = max(1, chunk_elements(hidden.device) // max(1, weight.shape[0]))
            for index, target in zip(rows.split(size), targets.split(size), strict=True):
                part = hidden[index]  # [c, in]
                logits = _logits(part, weight, bias, wide)  # [c, classes]
                picked = target.unsqueeze(1)
                lse = logits.logsumexp(1, keepdim=True)
                total += (lse - logits.gather(1, picked)).sum()
                if not any(kept):
                    continue
                slope = logits.sub_(lse).exp_()  # softmax, in the logits' place
                slope.scatter_add_(1, picked, slope.new_full(picked.shape, -1))
                if grad_bias is not None:
                    grad_bias += slope.sum(0)
                if products.emulated(hidden):
                    if grad_hidden is not None:
                        grad_hidden[index] = products.linear_dx(slope, products.row_blocks(weight), weight.shape[1]).to(
                            hidden.dtype
                        )
                    if grad_weight is not None:
                        grad_weight.addmm_(slope.t(), part.to(wide))
                    continue
                slope = slope.to(weight.dtype)
                if grad_hidden is not None:
                    grad_hidden[index] = slope @ weight  # [c, classes] @ [classes, in]
                if grad_weight is not None:
                    grad_weight += slope.t() @ part  # [classes, c] @ [c, in]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scaled = [None if kept is None else (kept * grad).to(ctx.dtype) for kept in ctx.saved_tensors]
        return (*scaled, None, None, None)
