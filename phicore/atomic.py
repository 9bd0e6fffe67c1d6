"""Writes that are whole or absent: temporary name beside the target, fsync, os.replace."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the name of an empty temporary file beside path; when the block ends well, it takes path's place, so that
    a reader, or a kill at any moment, sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fchmod(file.fileno(), 0o644)  # mkstemp makes it private, and safetensors its files
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # of a full disk, say, which does not say where
            error.filename = str(path)
        _raise_as_system(error, path)
        raise
    fsync(path.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that is whole or absent, see `new_file`."""
    with new_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def check_apart(output: str | os.PathLike[str], *sources: str | os.PathLike[str]) -> None:
    """Raises ValueError where an output directory is or holds what it is made from, which would go with what it
    replaces."""
    whole = Path(output).resolve()
    for source in sources:
        here = Path(source).expanduser().resolve()
        if here.exists() and whole in (here, *here.parents):  # a name on the hub is nowhere
            what = "is" if whole == here else "holds"
            raise ValueError(f"{output} {what} {source}, and would be replaced with all that is in it; choose another")


def check_free(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raises OSError where `new_directory` would, as far as that is known before: what is to be written may take long
    to make."""
    path = _end_of_links(Path(path))
    if path.name in ("", "..") or path.is_mount():
        why = "what is written takes a directory's place, which '.' and mount points cannot give up; give one in it"
        raise OSError(errno.EBUSY, why, str(path))
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not overwrite)):
        replaced = "set overwrite" if path.is_dir() else "remove it first"
        raise FileExistsError(f"{path} exists and is not an empty directory; choose another, or {replaced}")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise PermissionError(f"{path} cannot be made: {above} is not a directory that this process may write into")


@contextmanager
def new_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary directory beside path; when the block ends well, it takes path's place.

    Args:
        path: where the directory shall stand. Where it is a symbolic link, what it leads to is replaced or made, and
            the link stays.
        overwrite: whether one that is there and not empty may be replaced. It is renamed aside first and removed
            last, so that a kill in between loses neither.

    Raises:
        FileExistsError: path is not empty and overwrite is False, or it is a file.
        PermissionError: it cannot be made where it shall stand.
        OSError: path is a link that leads to itself, or "." or a mount point; the disk is full.
    """
    check_free(path, overwrite=overwrite)
    path = _end_of_links(Path(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    aside: Path | None = None
    try:
        yield temporary
        for root, _, names in os.walk(temporary):
            os.chmod(root, 0o755)  # mkdtemp makes it private, and safetensors its files
            for name in names:
                with open(os.path.join(root, name), "rb") as file:
                    os.fchmod(file.fileno(), 0o644)
                    os.fsync(file.fileno())
            fsync(root)
        if path.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent)) / path.name
            os.replace(path, aside)
        os.replace(temporary, path)
        fsync(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if aside is not None:
            if not path.exists():
                os.replace(aside, path)
            if not aside.exists():
                aside.parent.rmdir()
        _raise_as_system(error, path)
        raise
    if aside is not None:
        shutil.rmtree(aside.parent)


def _raise_as_system(error: BaseException, path: Path) -> None:
    """Raises an OSError for what Rust, in which safetensors and tokenizers write, says of the system as another."""
    if (system := re.search(r"\(os error (\d+)\)$", str(error))) and not isinstance(error, OSError):
        raise OSError(int(system[1]), os.strerror(int(system[1])), str(path)) from error


def _end_of_links(path: Path) -> Path:
    """Where a path leads if its last name is a symbolic link. The folders above stay as they are written: realpath
    would resolve /proc/<pid>/root too, to the root of another process's mounts."""
    end = path
    for _ in range(40):  # as many as Linux follows
        if not end.is_symlink():
            return end
        end = end.parent / os.readlink(end)
    raise OSError(errno.ELOOP, "a symbolic link that leads to itself; give a directory", str(path))


def fsync(path: str | os.PathLike[str]) -> None:
    """Makes what was written into a file, or renamed and removed in a directory, last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
