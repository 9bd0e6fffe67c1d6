"""Ranks that train together while something goes wrong with one of them."""

import errno
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phicore.training import TrainConfig, Trainer, checkpoint, distributed, shards
from phicore.training.buffers import TrainedBuffers
from tests.training.small_disk import fill
from tests.training.small_run import SETTINGS, examples, process, small_model

Fault = tuple[str, int, int]  # what goes wrong, on which rank, in which step
PATIENCE = 60.0  # seconds for a run, many more than it takes


def start(world_size: int, output: Path, fault: Fault | None = None, **settings: Any) -> list[Any]:
    """A process for each rank; what it says on stderr goes to `log(output, rank)`."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    processes = [process(run_rank, rank, world_size, port, output, fault, settings) for rank in range(world_size)]
    for one in processes:
        one.start()
    return processes


def finish(processes: list[Any]) -> list[int | None]:
    """Exit codes; None for a rank that is still there after PATIENCE, which is ended."""
    end = time.monotonic() + PATIENCE
    for one in processes:
        one.join(max(0.0, end - time.monotonic()))
    codes = [one.exitcode for one in processes]
    for one in processes:
        one.kill()
        one.join()
    return codes


def log(output: Path, rank: int) -> Path:
    return output.parent / f"{output.name} {rank}.log"


def run_rank(
    rank: int, world_size: int, port: int, output: Path, fault: Fault | None, settings: dict[str, Any]
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    output.parent.mkdir(parents=True, exist_ok=True)
    os.dup2(os.open(log(output, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
    config = TrainConfig(output=str(output), **{**SETTINGS, "first_step_timeout": 60.0, **settings})
    here = fault is not None and fault[1] == rank
    if fault is not None and here and fault[0] in EARLY_FAULTS:
        EARLY_FAULTS[fault[0]]()
    trainer = Trainer(small_model(), config, examples(), examples(7))
    if fault is not None and here and fault[0] in FAULTS:
        FAULTS[fault[0]](trainer, fault[2])
    trainer.fit()


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stall(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _in_loss(trainer: Trainer, happens: Callable[[Tensor], Tensor | None], when: Callable[[], bool]) -> None:
    inner = trainer.loss_fn

    def loss_fn(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | int]:
        loss, count = inner(model, batch)
        changed = happens(loss) if when() else None
        return (loss if changed is None else changed), count

    trainer.loss_fn = loss_fn


def _while_connecting() -> None:
    """All ranks have met; this one ends before it is connected to the others."""
    distributed.dist.init_process_group = die  # type: ignore[assignment]


def _in_construction(happens: Callable[[], object]) -> Callable[[], None]:
    def plant() -> None:
        share = TrainedBuffers.share

        def shared(buffers: TrainedBuffers) -> None:  # between two collectives
            happens()
            share(buffers)

        TrainedBuffers.share = shared  # type: ignore[method-assign]

    return plant


def _fail() -> None:
    raise KeyError("no such thing")


def _kill_in_backward(trainer: Trainer, step: int) -> None:
    _in_loss(trainer, lambda loss: loss.register_hook(die) and None, lambda: trainer.step == step - 1)


def _kill_in_evaluation(trainer: Trainer, step: int) -> None:
    _in_loss(trainer, die, lambda: trainer.step == step and not trainer.model.training)


def _kill_in_save(trainer: Trainer, step: int) -> None:
    write = checkpoint.write_shard

    def half(directory: Path, *arguments: Any) -> tuple[str, str]:
        if trainer.step == step:
            name, _ = write(directory, *arguments)
            os.truncate(directory / name, 100)
            die()
        return write(directory, *arguments)

    checkpoint.write_shard = half  # type: ignore[assignment]


def _kill_before_latest(trainer: Trainer, step: int) -> None:
    """The checkpoint is in its place; `latest` does not name it yet."""
    write = checkpoint.atomic.write_text

    def killed(path: Path, text: str) -> None:
        if trainer.step == step and path.name == checkpoint.LATEST:
            die()
        write(path, text)

    checkpoint.atomic.write_text = killed  # type: ignore[assignment]


def _kill_before_rename(trainer: Trainer, step: int) -> None:
    """The checkpoint is written and still has its temporary name."""
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == checkpoint.directory_name(step):
            die()
        replace(source, target)

    checkpoint.atomic.os.replace = killed  # type: ignore[assignment]


def _stall(trainer: Trainer, step: int) -> None:
    once = iter([True])  # of the step's micro-batches
    _in_loss(trainer, stall, lambda: trainer.step == step - 1 and next(once, False))


def _raise(trainer: Trainer, step: int) -> None:
    def fail(loss: Tensor) -> None:
        raise KeyError("no such thing")

    _in_loss(trainer, fail, lambda: trainer.step == step - 1)


def _not_a_number(trainer: Trainer, step: int) -> None:
    _in_loss(trainer, lambda loss: loss * torch.nan, lambda: trainer.step == step - 1)


def _no_space(trainer: Trainer, step: int) -> None:
    """From the step on the disk that holds the output is really full, but for what half of the ranks' files take."""
    _in_loss(trainer, lambda loss: fill(trainer.output, 32 * 1024), lambda: trainer.step == step - 1)


def _no_space_in_python(trainer: Trainer, step: int) -> None:
    """For where no small disk can be had: half of a file is written, then the error of a full disk comes."""
    save_file = shards.save_file

    def half(tensors: Any, path: Path, metadata: Any) -> None:
        save_file(tensors, path, metadata)
        if trainer.step >= step:
            os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shards.save_file = half  # type: ignore[assignment]


def _full_disk(trainer: Trainer, step: int) -> None:
    """From the step on the kernel refuses to write beyond a kilobyte into any file."""
    _in_loss(
        trainer, lambda loss: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)), lambda: trainer.step == step - 1
    )


EARLY_FAULTS: dict[str, Callable[[], None]] = {
    "killed before it came": die,
    "killed while connecting": _while_connecting,
    "killed in the construction": _in_construction(die),
    "stalled in the construction": _in_construction(stall),
    "raising in the construction": _in_construction(_fail),
}
FAULTS: dict[str, Callable[[Trainer, int], None]] = {
    "killed in the backward pass": _kill_in_backward,
    "killed in an evaluation": _kill_in_evaluation,
    "killed in a save": _kill_in_save,
    "killed before the rename": _kill_before_rename,
    "killed before latest": _kill_before_latest,
    "stalled": _stall,
    "raising": _raise,
    "not a number": _not_a_number,
    "full disk": _full_disk,
    "no space": _no_space,
    "no space in Python": _no_space_in_python,
}
