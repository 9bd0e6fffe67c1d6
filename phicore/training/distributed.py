"""What the loop asks of other ranks, and how a process becomes one. Alone, rank 0 of 1, every answer is immediate."""

import atexit
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from phicore.training.lost import LostRankError, first_sentence, is_lost_connection
from phicore.training.rendezvous import meet, store_in_environment, who_is_missing

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        *(ValueError, TypeError, FloatingPointError, OSError, FileNotFoundError, FileExistsError, PermissionError),
        *(ImportError, NotImplementedError),
    )
}
_made_here = False  # the process group, by `join`
_start: str | None = None  # tells the start of ranks that `join` made one from others


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
        LostRankError: ranks came and were lost while they connected to each other, naming them.
    """
    global _made_here, _start
    if dist.is_initialized():
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
    size, waits = place.world_size, timedelta(seconds=timeout)
    store = store_in_environment(place.rank, timeout)
    try:
        _start = meet(store, place.rank, size, timeout)
        store = dist.PrefixStore(_start, store)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=size, timeout=waits)
    except RuntimeError as error:
        if missing := who_is_missing(store, place.rank, size):
            raise LostRankError(
                f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} came and ended, or does not answer, "
                f"while the ranks connected to each other ({first_sentence(error)})"
            ) from error
        raise
    _made_here = True
    atexit.register(_leave_at_exit)
    sys.excepthook = functools.partial(_tell_once, sys.excepthook)


def start_of_ranks() -> str | None:
    """A word that all ranks of this start share and no other start has; None where `join` did not make the group."""
    return _start if _made_here else None


def leave() -> None:
    """Ends the process group if `join` made it."""
    global _made_here
    if _made_here and dist.is_initialized():
        dist.destroy_process_group()
    _made_here = False


def _leave_at_exit() -> None:
    # After an error of this rank alone the others may never come; they see the exit instead. Of one that all have been
    # told of, each leaves: a group that is still there as a process ends can abort it.
    error = getattr(sys, "last_value", None)
    if error is None or hasattr(error, "told_by"):
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
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


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
        Exception: what `work` raised on any rank, on every rank: of the same class if that is one of KINDS, else a
            RuntimeError. Unless all ranks say the same, the lowest rank that has something to say stands in front, and
            `is_told_here` is true of it there alone. Alone, the very error.
    """
    if world_size() == 1:
        return [work()]
    error: Exception | None = None
    try:
        own: tuple[T | None, tuple[str, str] | None] = (work(), None)
    except Exception as caught:
        if is_lost_connection(caught):  # there is nobody to tell
            raise
        error, own = caught, (None, _kind_and_text(caught))
    answers: list[tuple[T | None, tuple[str, str] | None]] = [own] * world_size()
    dist.all_gather_object(answers, own, group=group)
    problems = [problem for _, problem in answers]
    for number, problem in enumerate(problems):
        if problem is not None:
            kind, text = problem
            said = text if problems == [problem] * len(problems) else f"rank {number}: {text}"
            raised = KINDS.get(kind, RuntimeError)(said)
            raised.told_by = number  # type: ignore[attr-defined]
            raise raised from error
    return [value for value, _ in answers]  # type: ignore[misc]


def _kind_and_text(error: Exception) -> tuple[str, str]:
    known = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in KINDS), None)
    return (known, str(error)) if known else (RuntimeError.__name__, f"{type(error).__name__}: {error}")


def is_told_here(error: BaseException) -> bool:
    """Whether it is for this rank to print an error that ends the run: False for one that another rank prints too."""
    return getattr(error, "told_by", rank()) == rank()


def told_elsewhere(error: BaseException) -> str:
    """What this rank says where `is_told_here` is False."""
    return f"rank {rank()} ends with the error that rank {getattr(error, 'told_by', 0)} tells"


def _tell_once(before: Callable[..., object], kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """In place of sys.excepthook: an error that all ranks raise has its traceback printed by one of them."""
    if is_told_here(error):
        before(kind, error, trace)
    else:
        print(told_elsewhere(error), file=sys.stderr, flush=True)


def everywhere(work: Callable[[], T]) -> T:
    """Does something on every rank, without collectives in it, that must succeed on all; what it returned here.

    Raises:
        Exception: see `together`.
    """
    kept: list[T] = []
    together(lambda: kept.append(work()))
    return kept[0]


def on_first_rank(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """`together`, with rank 0 at work and the others waiting; what it returned."""
    return together(lambda: work() if rank() == 0 else None, group)[0]  # type: ignore[return-value]
