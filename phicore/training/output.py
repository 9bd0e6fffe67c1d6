"""Whose run an output directory holds: whether to go on with it, to refuse it, or to make room."""

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
from phicore.training.distributed import is_restarted, on_first_rank, together

RUN_ID = "TORCHELASTIC_RUN_ID"
LOCK = "lock"  # an empty file in the output, locked while a run is at work there
MARKER = "launch"  # a file in the output: which start of torchrun began, or went on with, the run there


def launch() -> str | None:
    """What tells this start of torchrun from others, the same after its restarts; None without torchrun."""
    run_id = os.environ.get(RUN_ID)
    if run_id == "none":  # torchrun's default, which tells nothing apart; its process does
        return f"none, process {os.getppid()} on {socket.gethostname()}"
    return run_id


def hold_output(output: Path) -> Callable[[], None]:
    """Makes the directory and takes it for one run at a time, until what is returned is called or the process ends.

    Raises:
        FileExistsError: another run is at work in it.
        OSError: it cannot be written.
    """
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
        pass
    return file.close


def after_restart(config: TrainConfig) -> TrainConfig:
    """The config with which a process goes on: after a restart by torchrun (`--max-restarts`) with the run that this
    start of torchrun has begun, whatever resume and overwrite were; otherwise as it is. Every rank must call it.

    Raises:
        FileExistsError: overwrite is set, and it cannot be told whether the run in the output is this one.
    """
    restarted = any(together(is_restarted))
    going_on = restarted and on_first_rank(lambda: _has_begun(config))
    return dataclasses.replace(config, resume=True, overwrite=False) if going_on else config


def _has_begun(config: TrainConfig) -> bool:
    """Whether this start of torchrun has begun the run in the output."""
    output, own = Path(config.output), launch()
    marker = output / MARKER
    if marker.is_file() and marker.read_text() == own:
        print(f"restarted by torchrun: going on with the run in {output}", file=sys.stderr, flush=True)
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
        shutil.rmtree(checkpoints)
    newest = latest_checkpoint(checkpoints)
    if newest is not None and not config.resume:
        raise FileExistsError(f"{output} holds a run ({newest.name}); set resume, overwrite, or another output")
    if not (config.resume or config.overwrite) and log.exists() and log.stat().st_size:
        raise FileExistsError(f"{log} is of a run that has no checkpoint; set overwrite, or another output")
    own = launch()
    if own is not None:
        atomic.write_text(output / MARKER, own)
    else:
        (output / MARKER).unlink(missing_ok=True)
    return newest
