"""Checkpoints of a run: directories that are whole or absent, written by all ranks at once.

A checkpoint is a directory step-00000040 with

    state.json            step, tokens, settings; each tensor's shape; checksums of the base and of the files; a version
    rank-0.safetensors    what rank 0 of the run's ranks holds, see `phicore.training.shards`
    rank-1.safetensors    ...

written under a temporary name and renamed when whole. `latest` names the newest and is written after it, so a kill at
any moment leaves a run that loads. Nothing in it is pickled.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from phicore import atomic
from phicore.training.distributed import on_first_rank, rank, together, world_size
from phicore.training.shards import Part, digest, file_name, write_shard

FORMAT = 2
LATEST = "latest"
STATE = "state.json"
NAME = r"step-\d{8,}"


def directory_name(step: int) -> str:
    """Of the checkpoint of a step."""
    return f"step-{step:08d}"


def _checkpoints(directory: Path) -> list[Path]:
    """Those there, oldest first; not what else stands beside them, such as a copy of one under another name."""
    return sorted(path for path in directory.glob("step-*") if re.fullmatch(NAME, path.name))


def save_checkpoint(
    directory: str | os.PathLike[str],
    state: Mapping[str, Any],
    parts: Mapping[str, Part],
    keep: int,
    *,
    random: str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes a checkpoint and then removes the oldest beyond `keep`, with a warning of one that it cannot remove; every
    rank must call it at the same point.

    Args:
        directory: of all checkpoints of the run, on a file system that all ranks share.
        state: what state.json shall hold; needs "step".
        parts: what this rank holds.
        keep: how many of the newest stay.
        random: see `write_shard`.
        group: in which the ranks agree; default all.

    Returns:
        The new checkpoint's directory.

    Raises:
        OSError: a rank could not write its file, naming it, on every rank; `latest` names what it named before.
    """
    directory = Path(directory)
    name = directory_name(state["step"])
    unsaved = functools.partial(_unsaved, directory / name)
    with ExitStack() as stack:
        # Only rank 0 has the directory on its stack: an error takes it away, the stack's end puts it in its place.
        begin = unsaved("")(lambda: stack.enter_context(atomic.new_directory(directory / name, overwrite=True)))
        new = on_first_rank(begin, group)
        files = dict(together(unsaved(file_name(rank()))(lambda: write_shard(new, rank(), parts, random)), group))
        state = {**state, "world_size": world_size(), "files": files}
        on_first_rank(unsaved(STATE)(lambda: _publish(stack, new, state, keep)), group)
    return directory / name


@contextmanager
def _unsaved(checkpoint: Path, file: str) -> Iterator[None]:
    """Adds to what the system says of a write that failed: of what, what is left, and what to do."""
    try:
        yield
    except FileNotFoundError:  # ranks do not share the directory, as it says
        raise
    except OSError as error:
        try:
            newest = latest_checkpoint(checkpoint.parent)
        except (OSError, ValueError):
            newest = None
        left = f"{newest.name} is still the newest" if newest is not None else "there is none before it"
        raise OSError(
            f"cannot write {checkpoint / file}: {error}. This checkpoint is not saved, {left}. Make room for it (or "
            f"let it be written), then start again with resume"
        ) from error


def _publish(stack: ExitStack, new: Path, state: Mapping[str, Any], keep: int) -> None:
    """Rank 0's part, once all files are there."""
    directory, name = new.parent, directory_name(state["step"])
    state = {"format": FORMAT, **state}
    (new / STATE).write_text(json.dumps({**state, "sha256": _digest_of_state(state)}, indent=2))
    stack.close()
    atomic.write_text(directory / LATEST, name + "\n")
    # Not beyond this one: after going back to an earlier checkpoint there are later ones, which will be written again.
    old = [path for path in _checkpoints(directory) if path.name <= name][:-keep]
    # The others are left of writes that were killed.
    for path in (*old, *directory.glob(".step-*"), *directory.glob(f".{LATEST}.*")):
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:  # NFS keeps files that are open somewhere; the new checkpoint is saved all the same
            warnings.warn(f"cannot remove {path}, which is not needed any more ({error}); remove it", stacklevel=2)


def _digest_of_state(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The checkpoint that `latest` names; None where there is none yet.

    Where `latest` itself is missing, as after a kill just before it was first written, it is the newest one: a
    directory gets its name when it is whole.

    Raises:
        ValueError: `latest` does not hold the name of a checkpoint.
        FileNotFoundError: `latest` names a directory that is gone.
    """
    directory = Path(directory)
    if not (directory / LATEST).exists():
        return max((path for path in _checkpoints(directory) if (path / STATE).is_file()), default=None)
    name = (directory / LATEST).read_text(errors="replace").strip()
    if not re.fullmatch(NAME, name):
        raise ValueError(f"{directory / LATEST} is damaged: it holds {name!r}, not the name of a checkpoint")
    # A kill while the same step is saved again can leave it where `atomic.new_directory` put it aside.
    for path in (directory / name, *directory.glob(f".{name}.old.*/{name}")):
        if path.is_dir():
            return path
    raise FileNotFoundError(
        f"{directory / LATEST} names {name}, which is not there; put it back, or {_others(directory, name)}"
    )


def _others(directory: Path, name: str) -> str:
    """What to do where a checkpoint is gone."""
    there = [path.name for path in _checkpoints(directory) if path.name != name and (path / STATE).is_file()]
    if there:
        return (
            f"write another's name into {directory / LATEST}: there {'are' if there[1:] else 'is'} {', '.join(there)}"
        )
    return "start anew with overwrite"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The contents of a checkpoint's state.json.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged, or was written in another format.
    """
    path = checkpoint / STATE
    try:
        state = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is missing, so {checkpoint} is no whole checkpoint; put it back, or "
            f"{_others(checkpoint.parent, checkpoint.name)}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{checkpoint} has checkpoint format {state.get('format')!r}; this version reads {FORMAT}. Finish the run "
            f"with the version that began it, or start anew in another output"
        )
    if state.pop("sha256", None) != _digest_of_state(state):
        raise ValueError(f"{path} is damaged: its contents do not have the checksum that it names")
    return state


def check_files(checkpoint: Path, state: Mapping[str, Any], rank: int = 0, world_size: int = 1) -> None:
    """Compares the files, or a rank's share of them, with the checksums that were taken when they were written.

    Raises:
        FileNotFoundError, ValueError: one is missing or damaged.
    """
    files = state["files"]
    for name in sorted(files)[rank::world_size]:
        try:
            found = digest(checkpoint / name)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{checkpoint / name} is missing: this checkpoint has a file of each of {len(files)} ranks, and needs "
                f"all of them; put it back, or {_others(checkpoint.parent, checkpoint.name)}"
            ) from error
        if found != files[name]:
            raise ValueError(
                f"{checkpoint / name} is damaged: its SHA-256 is {found}, it was written with {files[name]}; put the "
                f"file back as it was, or {_others(checkpoint.parent, checkpoint.name)}"
            )
