"""Telling which rank is missing, and where it was, when ranks stop hearing from each other.

A collective that fails says that a connection was closed or that time ran out, on whichever rank is next in line. So
each rank keeps a note of what it is at, in a file beside the checkpoints (output/ranks/1.json). Whoever a collective
fails looks into the others' notes: those who noted a failure too are waiting likewise, and the rank that did not is the
one that is missing. Files, and not the process group's store, because the store goes with the rank that keeps it. A
note says which start of the ranks it is of, so that an earlier run's are not taken for this one's.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from phicore.training.distributed import on_first_rank, rank, start_of_ranks, world_size
from phicore.training.lost import LostRankError, first_sentence, is_lost_connection
from phicore.zero.shared_memory import processes_known_here

GRACE = 3.0  # seconds in which ranks that wait for the same one note their failures
PAUSE = 0.05  # seconds between looks
LENGTH = 4096  # of a note, in bytes
BEFORE = "before the Trainer was made"
TORCHRUN = "TORCHELASTIC_ERROR_FILE"


class Watch:
    """Notes what this rank is at, and says of a failed collective which rank it failed for. Alone it does nothing.

    Args:
        output: directory of the run, on a file system that all ranks share.
    """

    def __init__(self, output: Path) -> None:
        self.directory = output / "ranks"
        self._at = BEFORE
        self._start: str | None = None

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Within it, this rank is at `what` ("step 7"). Every rank must enter it at the same point.

        Raises:
            LostRankError: in place of the error of a collective that failed: names the missing rank, what it was at,
                and what this one was at.
        """
        if world_size() == 1:
            yield
            return
        before, self._at = self._at, f"in {what}"
        after = before if before.startswith("in ") else f"after {what}"
        try:
            if self._start is None:
                self._start = start_of_ranks() or on_first_rank(lambda: uuid.uuid4().hex)
            self._note()
            yield
        except LostRankError:
            raise
        except BaseException as error:
            lost = is_lost_connection(error)
            self._note(failed="" if lost else f"{type(error).__name__}: {error}")
            if not lost:
                _tell_torchrun(error)
                raise
            try:
                raise LostRankError(self._explain(error)) from error
            except LostRankError as told:
                _tell_torchrun(told)
                raise
        finally:
            self._at = after
        self._note()

    def _note(self, failed: str | None = None) -> None:
        short = None if failed is None else failed[: LENGTH // 8]  # a character takes up to six bytes
        note = {"at": self._at, "failed": short, "process": os.getpid(), "machine": _machine(), "start": self._start}
        # A full disk ends a run at its next checkpoint, and says so; not for the sake of a note. In place, and always
        # of one length, a note needs no new block.
        with suppress(OSError):
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.directory / f"{rank()}.json", os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, json.dumps(note).ljust(LENGTH).encode())
            finally:
                os.close(descriptor)

    def _explain(self, error: BaseException) -> str:
        """Names the ranks that are missing, once the others have had time to note that they miss them too."""
        end = time.monotonic() + GRACE
        while True:
            notes = {other: self._read(other) for other in range(world_size()) if other != rank()}
            silent = [r for r, note in notes.items() if note.get("failed") is None and not _has_ended(note)]
            if not silent or time.monotonic() > end:
                break
            time.sleep(PAUSE)
        told = [_tell(r, note, r in silent) for r, note in notes.items() if note.get("failed") != ""]
        return (
            f"{'; '.join(told) or 'the other ranks have given up waiting for this one'}. Rank {rank()} was "
            f"{self._at} ({first_sentence(error)}). Start again with resume to go on from the newest checkpoint"
        )

    def _read(self, other: int) -> dict[str, Any]:
        try:
            note = json.loads((self.directory / f"{other}.json").read_text())
        except (OSError, ValueError):  # none yet, or half written at this moment
            return {}
        return note if note.get("start") == self._start else {}


def _tell(other: int, note: dict[str, Any], silent: bool) -> str:
    at = note.get("at", BEFORE)
    if note.get("failed"):
        return f"rank {other} failed {at}: {note['failed']}"
    if silent:
        return f"rank {other} does not answer; it was last heard of {at}"
    return f"rank {other} has ended {at} (process {note['process']}, killed or crashed)"


def _machine() -> str:
    """Tells whether a process's number means the same process here."""
    try:
        return processes_known_here()
    except OSError:
        return socket.gethostname()


def _has_ended(note: dict[str, Any]) -> bool:
    """Whether the process that wrote a note is known to have ended; False for one on another machine."""
    if note.get("machine") != _machine():
        return False
    try:
        # The system cuts a process's name anywhere, in a character too.
        state = Path(f"/proc/{note['process']}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        return state in "ZX"  # ended, and its parent has not looked yet
    except ProcessLookupError:  # it went as its file was read
        return True
    except OSError:  # no such file, or one of another user's process
        pass
    try:
        os.kill(note["process"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _tell_torchrun(error: BaseException) -> None:
    """Puts an error that is being handled into the summary that torchrun prints of its processes."""
    if os.environ.get(TORCHRUN) and isinstance(error, Exception):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
