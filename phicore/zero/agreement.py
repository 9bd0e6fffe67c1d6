"""Finding out, at construction, that ranks were given different things."""

from collections.abc import Sequence
from itertools import zip_longest

import torch.distributed as dist
from torch import Tensor


def check_same(lines: Sequence[str], problem: str | None, group: dist.ProcessGroup | None) -> None:
    """Compares descriptions over ranks; every rank must call it, also one that has found a problem of its own.

    Args:
        lines: what this rank has, an item each.
        problem: what is wrong on this rank already.
        group: the ranks.

    Raises:
        ValueError: on every rank, naming the lowest rank with a problem or the first line that differs from rank 0's.
    """
    reference = [list(lines)]
    dist.broadcast_object_list(reference, group=group, group_src=0)
    rank = dist.get_rank(group)
    if problem is None:
        problem = next(
            (
                f"rank {rank} has {ours or 'nothing more'} where rank 0 has {theirs or 'nothing more'}; give every "
                f"rank the same parameters in the same order, with the same settings"
                for ours, theirs in zip_longest(lines, reference[0])
                if ours != theirs
            ),
            None,
        )
    else:
        problem = f"on rank {rank}: {problem}"
    problems: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    # Where rank 0 itself has a problem its lines may be empty, and the others' differences follow from that.
    first = next((found for found in problems if found is not None), None)
    if first is not None:
        raise ValueError(first)


def copy_from_first_rank(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Gives every rank rank 0's values."""
    for tensor in tensors:
        values = tensor.detach().contiguous()
        dist.broadcast(values, group=group, group_src=0)
        if values.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(values)
