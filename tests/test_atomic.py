"""Writes that are whole or absent, whatever fails in between."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from phicore import atomic
from tests.training.small_disk import small_disk


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


@given(first=st.binary(max_size=100), second=st.binary(max_size=100))
def test_write_bytes_replaces_the_whole_content(tmp_path_factory, first, second):
    path = tmp_path_factory.mktemp("write") / "some" / "where" / "file"
    for data in (first, second):
        atomic.write_bytes(path, data)
        assert path.read_bytes() == data
    assert names(path.parent) == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_write_text_is_utf8(tmp_path):
    atomic.write_text(str(tmp_path / "text"), "é\n")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa9\n"


@pytest.mark.parametrize("call", ["fsync", "fchmod", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, call, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with mock.patch.object(atomic.os, call, side_effect=error), pytest.raises(type(error)):
        atomic.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_the_content_is_on_disk_before_the_name_changes(tmp_path):
    calls = []
    real_fsync, real_replace = os.fsync, os.replace
    with (
        mock.patch.object(atomic.os, "fsync", side_effect=lambda fd: (calls.append("fsync"), real_fsync(fd))),
        mock.patch.object(atomic.os, "replace", side_effect=lambda *a: (calls.append("replace"), real_replace(*a))),
    ):
        atomic.write_bytes(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the directory


def test_a_killed_writer_leaves_one_of_the_two_contents(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([c]) * 300_000 for c in b"ab"]
    atomic.write_bytes(path, contents[0])
    script = (
        f"import importlib.util as u; s = u.spec_from_file_location('atomic', {atomic.__file__!r})\n"
        f"m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        f"print('on', flush=True)\n"
        f"while True:\n for c in b'ab': m.write_bytes({str(path)!r}, bytes([c]) * 300_000)\n"
    )
    for delay in (0.0, 0.003, 0.01):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        assert path.read_bytes() in contents


# ===== directories =====


def write(directory: Path, **files: str) -> None:
    for name, text in files.items():
        (directory / name).write_text(text)


def read(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("there", [False, True])
def test_new_directory_appears_whole(tmp_path, there):
    path = tmp_path / "a" / "b"
    if there:
        path.mkdir(parents=True)  # empty: may be taken
    with atomic.new_directory(path) as temporary:
        assert temporary.parent == path.parent
        write(temporary, x="1")
        (temporary / "sub").mkdir()
        write(temporary / "sub", y="2")
        (temporary / "sub" / "y").chmod(0o600)  # as safetensors' save_file makes its files
        assert not path.exists() or not any(path.iterdir())
    assert read(path) == {"x": "1", "sub/y": "2"}
    assert names(path.parent) == ["b"]
    modes = {str(p.relative_to(path)): stat.S_IMODE(p.stat().st_mode) for p in (path, *path.rglob("*"))}
    assert modes == {".": 0o755, "x": 0o644, "sub": 0o755, "sub/y": 0o644}


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    atomic.check_free(tmp_path / "new" / "deep" / "dir")
    monkeypatch.chdir(tmp_path)
    atomic.check_free("dir")
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match=r"deep/dir cannot be made: .*file is not a directory that this process"):
        atomic.check_free(tmp_path / "file" / "deep" / "dir")
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))  # root may write anywhere
    with pytest.raises(PermissionError, match="dir cannot be made"), atomic.new_directory(tmp_path / "new" / "dir"):
        pass
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("path", [".", "", "..", "in/..", "/", "volume"])
def test_a_place_that_cannot_be_replaced_is_told_before_the_work(tmp_path, monkeypatch, path):
    """As an empty folder that one stands in, or the volume of a container, which would fail when all is written."""
    (tmp_path / "in").mkdir()
    (tmp_path / "volume").mkdir()
    monkeypatch.chdir(tmp_path / "volume")
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "volume")
    for overwrite in (False, True):
        where = tmp_path / path if path in ("in/..", "volume") else path
        with pytest.raises(OSError, match="give one in it") as caught, atomic.new_directory(where, overwrite=overwrite):
            raise AssertionError("it was to be written")
        assert caught.value.errno == errno.EBUSY
    assert names(tmp_path) == ["in", "volume"]
    assert names(tmp_path / "volume") == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failing_block_leaves_things_as_they_were(tmp_path, overwrite):
    path = tmp_path / "dir"
    if overwrite:
        path.mkdir()
        write(path, x="old")
    with pytest.raises(RuntimeError), atomic.new_directory(path, overwrite=overwrite) as temporary:  # noqa: PT012
        write(temporary, x="new")
        raise RuntimeError
    assert names(tmp_path) == (["dir"] if overwrite else [])
    if overwrite:
        assert read(path) == {"x": "old"}


def save_weights(directory):
    save_file({"weight": torch.ones(1_000_000)}, directory / "model.safetensors")


def save_tokenizer(directory):
    tokens = {f"token {i}": i for i in range(100_000)}
    tokenizers.Tokenizer(tokenizers.models.BPE(tokens, [])).save(str(directory / "tokenizer.json"))


@pytest.mark.parametrize("save", [save_weights, save_tokenizer])
def test_a_full_disk_is_an_error_of_the_system_that_says_where(tmp_path, save):
    with small_disk(tmp_path / "disk", 1) as disk:
        if disk is None:
            pytest.skip("users mount no file system here")
        with (
            pytest.raises(OSError, match=r"No space left on device.*disk/model") as told,
            atomic.new_directory(disk / "model") as temporary,
        ):
            save(temporary)
        assert told.value.errno == errno.ENOSPC
        assert names(disk) == []


def test_what_is_there_is_not_overwritten_unless_asked(tmp_path):
    path = tmp_path / "dir"
    path.mkdir()
    write(path, x="old", y="old")
    refused = "exists and is not an empty directory; choose another, or"
    with pytest.raises(FileExistsError, match=f"{refused} set overwrite"), atomic.new_directory(path):
        pytest.fail("the block must not run")
    assert read(path) == {"x": "old", "y": "old"}
    with pytest.raises(FileExistsError, match=f"{refused} remove it first"):
        atomic.check_free(path / "x", overwrite=True)
    with atomic.new_directory(path, overwrite=True) as temporary:
        write(temporary, x="new")
    assert read(path) == {"x": "new"}
    assert names(tmp_path) == ["dir"]


@pytest.mark.parametrize("there", [None, {}, {"x": "old"}])
def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path, there):
    (tmp_path / "links").mkdir()
    (tmp_path / "disk").mkdir()
    path, target = tmp_path / "links" / "out", tmp_path / "disk" / "target"
    path.symlink_to("next")
    (path.parent / "next").symlink_to("../disk/target")
    if there is not None:
        target.mkdir()
        write(target, **there)
    if there:
        with pytest.raises(FileExistsError, match="exists and is not an empty directory"), atomic.new_directory(path):
            pytest.fail("the block must not run")
    with atomic.new_directory(path, overwrite=bool(there)) as temporary:
        assert temporary.parent.samefile(tmp_path / "disk")  # or the rename could cross file systems
        write(temporary, x="new")
    assert path.is_symlink()
    assert not target.is_symlink()
    assert read(target) == read(path) == {"x": "new"}
    assert (names(path.parent), names(target.parent)) == (["next", "out"], ["target"])


def test_folders_above_are_taken_as_they_are_written(tmp_path, monkeypatch):
    """A path through /proc/<pid>/root leads elsewhere than what its links say."""
    (tmp_path / "real").mkdir()
    (tmp_path / "above").symlink_to("real")
    monkeypatch.setattr(os, "readlink", lambda _: pytest.fail("no folder above is to be resolved"))
    with atomic.new_directory(tmp_path / "above" / "out") as temporary:
        assert temporary.parent == tmp_path / "above"


def test_a_link_to_itself_is_named(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with (
        pytest.raises(OSError, match=r"leads to itself; give a directory: .*loop"),
        atomic.new_directory(tmp_path / "loop"),
    ):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["loop"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_not_taken_for_a_directory(tmp_path, overwrite):
    write(tmp_path, file="text")
    with pytest.raises(FileExistsError), atomic.new_directory(tmp_path / "file", overwrite=overwrite):
        pytest.fail("the block must not run")
    assert read(tmp_path) == {"file": "text"}


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_rename_keeps_the_old_directory_in_its_place(tmp_path, failing):
    path = tmp_path / "dir"
    path.mkdir()
    write(path, x="old")
    calls, real = [], os.replace

    def replace(source, target):
        calls.append((source, target))
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        real(source, target)

    with (
        mock.patch.object(atomic.os, "replace", side_effect=replace),
        pytest.raises(OSError, match="Input/output"),
        atomic.new_directory(path, overwrite=True) as temporary,
    ):
        write(temporary, x="new")
    assert read(path) == {"x": "old"}
    assert names(tmp_path) == ["dir"]
