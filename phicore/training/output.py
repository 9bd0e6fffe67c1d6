"""Whose run an output directory holds: whether to go on with it, to refuse it, or to make room."""

import contextlib
import dataclasses
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from phicore import atomic
from phicore.training.checkpoint import LATEST, latest_checkpoint
from phicore.training.config import TrainConfig
from phicore.training.distributed import everywhere, is_restarted, on_first_rank, rank, start_of_ranks, together

RUN_ID = "TORCHELASTIC_RUN_ID"
LOCK = "lock"  # an empty file in the output, locked while a run is at work there
# A file in the output: which start of torchrun began, or went on with, the run there, by which agent, and by which of
# its processes; a line each.
MARKER = "launch"


def launch() -> str | None:
    """What tells this start of torchrun from others, the same after its restarts; None without torchrun."""
    run_id = os.environ.get(RUN_ID)
    if run_id == "none":  # torchrun's default, which tells nothing apart; its process does
        return f"none, process {os.getppid()} on {socket.gethostname()}"
    return run_id


def _agent() -> str:
    """What tells torchrun's agent that started this process from all others."""
    parent, began = os.getppid(), ""
    with contextlib.suppress(OSError):  # Linux only
        # The system cuts a process's name anywhere, in a character too.
        began = Path(f"/proc/{parent}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    return f"process {parent} of {began} on {socket.gethostname()}"


def _start() -> str:
    """What tells the processes that run now from those before a restart; the same for all ranks that began together."""
    return start_of_ranks() or on_first_rank(lambda: f"process {os.getpid()}")


def hold_output(output: Path) -> Callable[[], None]:
    """Makes the directory and takes it for one run at a time, until what is returned is called or rank 0 ends; every
    rank must call it.

    Raises:
        FileExistsError: another run is at work in it.
        OSError: it cannot be written.
    """
    return everywhere(lambda: _hold(output) if rank() == 0 else lambda: None)


def _hold(output: Path) -> Callable[[], None]:
    try:
        checkpoints = output / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=checkpoints):  # not only after the steps that a checkpoint shall keep
            file = open(output / LOCK, "a")  # noqa: SIM115 (it is what holds the lock)
    except OSError as error:
        raise type(error)(
            f"cannot write into {output} ({error}); give an output that this process may write"
        ) from error
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise FileExistsError(
            f"another run is at work in {output}, and two would write over each other; give another output, or wait "
            f"until it has ended"
        ) from error
    except (ImportError, OSError):  # not on Windows, nor on every network's file system
        return file.close

    def release() -> None:
        fcntl.flock(file, fcntl.LOCK_UN)  # closed alone, processes that were forked since would hold it on
        file.close()

    return release


def after_restart(config: TrainConfig) -> TrainConfig:
    """The config with which a process goes on: after a restart by torchrun with the run that this start of torchrun has
    begun, whatever resume and overwrite were; otherwise as it is. Every rank must call it.

    torchrun starts processes again after a failure (`--max-restarts`), and then counts it; or because a node has come
    or gone, and then does not. The agent of some rank is still that which began the run then.

    Raises:
        FileExistsError: overwrite is set, and it cannot be told whether the run in the output is this one.
    """
    restarted = any(together(is_restarted))
    start = _start()
    replaced = any(together(lambda: _is_by_this_agent_before(Path(config.output), start)))
    going_on = (restarted or replaced) and on_first_rank(lambda: replaced or _has_begun(config))
    if going_on and rank() == 0:
        print(f"restarted by torchrun: going on with the run in {config.output}", file=sys.stderr, flush=True)
    return dataclasses.replace(config, resume=True, overwrite=False) if going_on else config


def _is_by_this_agent_before(output: Path, start: str) -> bool:
    """Whether the run in the output is by this process's agent, and by other processes than those of now."""
    marker = output / MARKER
    lines = marker.read_text().splitlines() if launch() is not None and marker.is_file() else []
    return len(lines) == 3 and lines[1] == _agent() and lines[2] != start


def _has_begun(config: TrainConfig) -> bool:
    """Whether this start of torchrun has begun the run in the output, as far as its name tells."""
    output, own = Path(config.output), launch()
    marker = output / MARKER
    if marker.is_file() and marker.read_text().splitlines()[:1] == [own]:
        return True
    if config.overwrite and own is not None and own.startswith("none,") and (output / "checkpoints" / LATEST).exists():
        raise FileExistsError(
            f"{output} holds a run, and after a restart on another machine it cannot be told whether to overwrite it; "
            f"give torchrun --rdzv-id (or --standalone), or start again with resume or overwrite"
        )
    return False


def prepare_output(config: TrainConfig) -> Path | None:
    """Makes room for a new run, or finds the checkpoint to go on from.

    Raises:
        FileExistsError: the output holds a run, and neither resume nor overwrite is set.
    """
    output = Path(config.output)
    checkpoints, log = output / "checkpoints", output / "metrics.jsonl"
    if config.overwrite and checkpoints.exists():
        # First the name: a kill in between must not leave it without its checkpoint.
        (checkpoints / LATEST).unlink(missing_ok=True)
        for path in checkpoints.iterdir():  # not itself, which may be a link to another disk
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    newest = latest_checkpoint(checkpoints)
    if newest is not None and not config.resume:
        raise FileExistsError(f"{output} holds a run ({newest.name}); set resume, overwrite, or another output")
    if not (config.resume or config.overwrite) and log.exists() and log.stat().st_size:
        raise FileExistsError(f"{log} is of a run that has no checkpoint; set overwrite, or another output")
    own = launch()
    if own is not None:
        start = start_of_ranks() or f"process {os.getpid()}"
        atomic.write_text(output / MARKER, f"{own}\n{_agent()}\n{start}\n")
    else:
        (output / MARKER).unlink(missing_ok=True)
    return newest
