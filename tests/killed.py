"""A kill before each single change that a write makes to a directory."""

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.training.small_run import process

KILLED = -signal.SIGKILL


def die_before_change(n: int, directory: Path) -> None:
    """Will kill this process before its nth change in that directory."""
    changes = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal changes
        inside = any(str(directory) in os.fsdecode(a) for a in args if isinstance(a, str | bytes | os.PathLike))
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        # shutil.rmtree names what it removes relative to its directory.
        if (inside and (writes or event in ("os.mkdir", "os.rename"))) or event in ("os.rmdir", "os.remove"):
            changes += 1
            if changes > n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def in_a_fork(call: Callable[[], object]) -> int:
    """The process id of a fork that does this and ends."""
    child = os.fork()
    if child:
        return child
    try:
        call()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def die_before_each_change(call: Callable[[Path], object], start: Path, work: Path) -> None:
    """For n = 0, 1, ...: copies start to work/n and calls call(work/n) in a fork that dies before its nth change
    there; until one ends well."""
    call(shutil.copytree(start, work / "first"))  # so that the forks have nothing to import
    n, status = 0, KILLED
    while status == KILLED:
        directory = shutil.copytree(start, work / str(n))
        child = in_a_fork(lambda n=n, directory=directory: (die_before_change(n, directory), call(directory)))  # type: ignore[misc]
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        n += 1
    shutil.rmtree(work / "first")
    assert status == 0


def kills(call: Callable[[Path], object], start: Path, work: Path) -> Iterator[Path]:
    """What `die_before_each_change` left behind."""
    child = process(die_before_each_change, call, start, work)
    child.start()
    child.join(120)
    assert child.exitcode == 0
    left = sorted(work.iterdir(), key=lambda path: int(path.name))
    assert len(left) > 5
    return iter(left)
