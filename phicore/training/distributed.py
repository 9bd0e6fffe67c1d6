"""What the loop asks of other ranks. Alone, rank 0 of 1, every answer is immediate."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def rank() -> int:
    """This process's rank; 0 alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums each value over all ranks, in float64. Every rank must call it at the same point."""
    if world_size() == 1:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()
