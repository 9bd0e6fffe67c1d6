"""A real disk of a few megabytes that can be filled, without being root."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def small_disk(mount_point: Path, megabytes: int, mode: str = "rw") -> Iterator[Path | None]:
    """A directory on a file system of that size; None where the system lets users mount none.

    A process in a user and mount namespace of its own mounts a tmpfs and keeps it; others reach it by that process's
    root directory.
    """
    mount_point.mkdir(parents=True, exist_ok=True)
    script = f'mount -t tmpfs -o size={megabytes}m,{mode} none "$0" && echo mounted && read end'
    try:
        holder = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(mount_point)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        yield None
        return
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder:
        mounted = holder.stdout.readline() == b"mounted\n"
        seen = Path(f"/proc/{holder.pid}/root") / mount_point.relative_to("/")
        yield seen if mounted and os.access(seen, os.R_OK) else None
        holder.stdin.close()


def fill(directory: Path, spare: int) -> None:
    """Writes until the disk is full, and gives `spare` bytes back."""
    block = bytes(4096)
    with open(directory / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(block)
        except OSError:
            file.truncate(max(0, os.fstat(file.fileno()).st_size - spare))
