"""Finding out, at construction, that ranks were given different things."""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def read_alike(
    read: Callable[[], T], describe: Callable[[T], list[str]], world_size: int, group: dist.ProcessGroup | None
) -> T:
    """What each rank reads of its arguments, where all have the same; an error on one rank becomes one on all.

    Args:
        read: raises what is wrong with them.
        describe: what must be the same, an item a line.
        world_size, group: the ranks.
    """
    found: list[T] = []
    lines: list[str] = []
    problem: Exception | None = None
    try:
        found = [read()]
        lines = describe(*found)
    except Exception as error:  # of the caller's objects too; the other ranks are waiting
        problem = error
    if world_size > 1:
        check_same(lines, None if problem is None else str(problem), group)
    if problem is not None:
        raise problem
    return found[0]


def check_same(lines: Sequence[str], problem: str | None, group: dist.ProcessGroup | None) -> None:
    """Compares descriptions over ranks; every rank must call it, also one that has found a problem of its own.

    Args:
        lines: what this rank has, an item each.
        problem: what is wrong on this rank already.
        group: the ranks.

    Raises:
        ValueError: on every rank, naming the lowest rank with a problem or the first line that differs from the first
            rank's.
    """
    reference = [list(lines)]
    dist.broadcast_object_list(reference, group=group, group_src=0)
    names = dist.get_process_group_ranks(group)  # their numbers among the ranks of all groups
    rank = dist.get_rank()
    if problem is None:
        problem = next(
            (
                f"rank {rank} has {ours or 'nothing more'} where rank {names[0]} has {theirs or 'nothing more'}; give "
                f"every rank the same parameters in the same order, with the same settings"
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
