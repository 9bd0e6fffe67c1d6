"""What the loop asks of other ranks, and how a process becomes one. Alone, rank 0 of 1, every answer is immediate."""

import atexit
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from phicore.training.rendezvous import meet, store_in_environment

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, FloatingPointError, OSError, FileNotFoundError, FileExistsError)
}
_made_here = False  # the process group, by `join`


@dataclass(frozen=True, slots=True)
class Place:
    """What the environment says of this process.

    Attributes:
        rank, world_size: its number among the processes, and theirs.
        local_rank: its number on this machine, None where nobody said.
    """

    rank: int
    world_size: int
    local_rank: int | None


def place_in_environment(environment: Mapping[str, str]) -> Place | None:
    """The place that torchrun's variables, or the same set by hand, give this process; None where none is set.

    Raises:
        ValueError: some are missing, are no numbers, or contradict each other; each is named.
    """
    given = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if not given:
        return None
    missing = [name for name in VARIABLES if name not in given]
    if missing:
        raise ValueError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}; set all of {', '.join(VARIABLES)} "
            f"(torchrun does) to train on several ranks, or none of them to train alone"
        )
    rank, size, port = (_number(name, given[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if not 0 <= rank < size:
        raise ValueError(f"RANK={rank} and WORLD_SIZE={size} contradict each other; ranks are 0 to {size - 1}")
    if not 0 < port < 2**16:
        raise ValueError(f"MASTER_PORT={port} is no port; ports are 1 to {2**16 - 1}")
    local = environment.get("LOCAL_RANK")
    local_rank = None if not local else _number("LOCAL_RANK", local)
    local_size = _number("LOCAL_WORLD_SIZE", environment.get("LOCAL_WORLD_SIZE") or str(size))
    if local_rank is not None and not 0 <= local_rank < local_size:
        of = "LOCAL_WORLD_SIZE" if environment.get("LOCAL_WORLD_SIZE") else "WORLD_SIZE"
        raise ValueError(f"LOCAL_RANK={local_rank} and {of}={local_size} contradict each other")
    return Place(rank, size, local_rank)


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is no whole number") from None


def join(timeout: float) -> None:
    """Makes the process group that the environment asks for: NCCL for tensors on GPUs, gloo for those on CPUs.

    Does nothing where there is a group already, or where the environment asks for one process or says nothing. On a
    machine with GPUs, LOCAL_RANK's becomes the current one. The group ends with the process, or with `leave`.

    Args:
        timeout: seconds that a rank waits for the others in a collective.

    Raises:
        ValueError: see `place_in_environment`; or there is no GPU for LOCAL_RANK.
        TimeoutError: ranks did not come; rank 0 names them.
    """
    global _made_here
    if dist.is_available() and dist.is_initialized():
        return
    place = place_in_environment(os.environ)
    if place is None or place.world_size == 1:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        local, gpus = place.rank if place.local_rank is None else place.local_rank, torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(
                f"{'RANK' if place.local_rank is None else 'LOCAL_RANK'}={local}, but this machine shows {gpus} GPUs; "
                f"start as many processes on it, or set LOCAL_RANK"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    store = meet(store_in_environment(timeout), place.rank, place.world_size, timeout)
    dist.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timedelta(seconds=timeout)
    )
    _made_here = True
    atexit.register(_leave_at_exit)


def leave() -> None:
    """Ends the process group if `join` made it."""
    global _made_here
    if _made_here and dist.is_initialized():
        dist.destroy_process_group()
    _made_here = False


def _leave_at_exit() -> None:
    if getattr(sys, "last_value", None) is None:  # after an error the others may never come; they see the exit instead
        leave()


def new_group(timeout: float) -> dist.ProcessGroup | None:
    """Another group of all ranks, over gloo, whose collectives may run beside the first's; None alone."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if world_size() > 1 else None


def set_timeout(seconds: float, *more: dist.ProcessGroup | None) -> None:
    """How long later collectives wait, in the group that `join` made (in no other's), and in those of `new_group`."""
    for group in (None, *(group for group in more if group is not None)) if _made_here else ():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def to_own_gpu(model: nn.Module) -> None:
    """Moves a model that was put on a GPU before `join` had said which to this rank's."""
    device = next(model.parameters()).device
    if _made_here and device.type == "cuda" and device.index != torch.cuda.current_device():
        nn.Module.to(model, torch.device("cuda", torch.cuda.current_device()))


def is_restarted() -> bool:
    """Whether torchrun's agent on this machine has started its processes again after a failure of one of them
    (`--max-restarts`); agents count their own."""
    return _number(RESTARTS, os.environ.get(RESTARTS) or "0") > 0


def rank() -> int:
    """This process's rank; 0 alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# Every rank must call what follows at the same point.


def gather_rows(values: Sequence[float], device: torch.device) -> list[list[float]]:
    """Each rank's values, in float64, by rank; every rank gives as many."""
    if world_size() == 1:
        return [[float(value) for value in values]]
    own = torch.tensor(values, dtype=torch.float64, device=device)
    rows = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(rows, own)
    return torch.stack(rows).tolist()


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums each value over all ranks, in float64 and in the order of ranks."""
    return [sum(column) for column in zip(*gather_rows(values, device), strict=True)]


def together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Does something on every rank, and tells each what it came to on all of them.

    Returns:
        What `work` returned, by rank.

    Raises:
        Exception: what `work` raised on any rank, on every rank, with the number of the lowest such rank in front: of
            the same class if that is one of KINDS, else a RuntimeError. Alone, the very error.
    """
    if world_size() == 1:
        return [work()]
    error: Exception | None = None
    try:
        own: tuple[T | None, tuple[str, str] | None] = (work(), None)
    except Exception as caught:
        error, own = caught, (None, (type(caught).__name__, str(caught)))
    answers: list[tuple[T | None, tuple[str, str] | None]] = [own] * world_size()
    dist.all_gather_object(answers, own, group=group)
    for number, (_, problem) in enumerate(answers):
        if problem is not None:
            kind, text = problem
            raise KINDS.get(kind, RuntimeError)(f"rank {number}: {text}") from error
    return [value for value, _ in answers]  # type: ignore[misc]


def on_first_rank(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """`together`, with rank 0 at work and the others waiting; what it returned."""
    return together(lambda: work() if rank() == 0 else None, group)[0]  # type: ignore[return-value]
