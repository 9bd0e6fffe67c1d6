"""The norm of gradients that are dealt out to ranks."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def total_norm(
    grads: Sequence[Tensor], norm_type: float, device: torch.device, world_size: int, group: dist.ProcessGroup | None
) -> Tensor:
    """Norm of all ranks' gradients, each [n], as one vector; float64 [], the same on every rank.

    Args:
        grads: this rank's; there may be none.
        norm_type: above 0, or inf.
        device: where ranks exchange it.
        world_size, group: the ranks.
    """
    norms = [_norm(grad, norm_type) for grad in grads]
    total = torch.zeros((), dtype=torch.float64, device=device)
    if norms:
        total += torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if world_size > 1:
        if math.isinf(norm_type):
            # A NaN goes beside the maximum: gloo's passes over it.
            known = torch.stack([total.where(total.isfinite(), math.inf), total.isnan().to(total.dtype)])
            dist.all_reduce(known, op=dist.ReduceOp.MAX, group=group)
            total = known[0].where(known[1] == 0, math.nan)
        else:
            total.pow_(norm_type)
            dist.all_reduce(total, group=group)
            total.pow_(1.0 / norm_type)
    return total


def _norm(grad: Tensor, norm_type: float) -> Tensor:
    """Norm of a gradient [n], float64 []. Rows of 1,024 elements are taken in the gradient's dtype and put together in
    float64: nearly as exact as float64 throughout, however elements are dealt out to ranks, and faster."""
    whole = grad.numel() // 1024 * 1024
    rows = torch.linalg.vector_norm(grad[:whole].view(-1, 1024), norm_type, dim=1)  # [n // 1024]
    rest = torch.cat([rows.double(), grad[whole:].double()])
    return torch.linalg.vector_norm(rest, norm_type)
