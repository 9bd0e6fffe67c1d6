"""Checkpoints: what goes in comes back, damage is named, and a kill at any moment leaves a run that loads."""

import errno
import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from phicore.training import checkpoint
from phicore.training.consolidate import consolidate
from phicore.training.shards import Part
from tests.killed import in_a_fork, kills
from tests.training.small_run import assert_same_run, assert_same_tensors, process, saved, small_trainer


def state_of(step: int) -> tuple[dict[str, Any], dict[str, Part]]:
    """state and parts of a step, all told apart by their values."""
    value = torch.full((6,), float(step))
    state = {
        "step": step,
        "settings": {"seed": step},
        "tensors": {"a.weight": [[3, 2], "float32"]},
        "param_groups": [{"lr": 0.1, "params": ["a.weight"]}],
    }
    return state, {"parameter/a.weight": Part(value), "exp_avg/a.weight": Part(value * 10)}


def save(directory: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save_checkpoint(directory, *state_of(step), keep)


def assert_whole(path: Path) -> int:
    """A checkpoint holds what `save` wrote for its step."""
    state = checkpoint.read_state(path)
    step = state["step"]
    assert path.name == f"step-{step:08d}"
    assert state == {"format": checkpoint.FORMAT, **state_of(step)[0], "world_size": 1, "files": state["files"]}
    tensors, optimizer = consolidate(path)  # which compares the checksums
    assert torch.equal(tensors["a.weight"], torch.full((3, 2), float(step)))
    assert torch.equal(optimizer["state"][0]["exp_avg"], 10 * tensors["a.weight"])
    return step


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def latest(directory: Path) -> Path:
    path = checkpoint.latest_checkpoint(directory)
    assert path is not None
    return path


# ===== What goes in comes back =====


def test_a_checkpoint_holds_what_it_was_given(tmp_path: Path) -> None:
    assert checkpoint.latest_checkpoint(tmp_path / "none") is None
    path = save(tmp_path / "checkpoints", 40)
    assert path == checkpoint.latest_checkpoint(str(tmp_path / "checkpoints"))
    assert path.name == "step-00000040"
    assert names(path) == ["rank-0.safetensors", "state.json"]
    assert assert_whole(path) == 40


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_consolidated_leaves_the_files(tmp_path: Path) -> None:
    state, parts = state_of(3)
    path = checkpoint.save_checkpoint(tmp_path, state, {**parts, "step/a.weight": Part(torch.tensor(3.0))}, keep=1)
    _, optimizer = consolidate(path)
    assert float(optimizer["state"][0]["step"]) == 3
    assert str(path) not in Path("/proc/self/maps").read_text()


# ===== Which stay =====


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_stay(tmp_path: Path, keep: int) -> None:
    for step in (5, 9, 10, 100, 99_999_999):
        save(tmp_path, step, keep)
    kept = [5, 9, 10, 100, 99_999_999][-keep:]
    assert names(tmp_path) == ["latest", *(f"step-{step:08d}" for step in kept)]
    assert assert_whole(latest(tmp_path)) == kept[-1]


def test_an_old_one_that_cannot_be_removed_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps the files of a directory that are open somewhere."""
    save(tmp_path, 1, keep=1)
    with monkeypatch.context() as held:
        held.setattr(shutil, "rmtree", mock.Mock(side_effect=OSError(errno.ENOTEMPTY, "Directory not empty")))
        with pytest.warns(UserWarning, match=r"cannot remove .*/step-00000001, .* Directory not empty"):
            save(tmp_path, 2, keep=1)
    assert assert_whole(latest(tmp_path)) == 2
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["latest", "step-00000003"]


@pytest.mark.parametrize("keep", [1, 2])
def test_going_back_to_an_earlier_one_never_loses_the_newest(tmp_path: Path, keep: int) -> None:
    """`latest` may name an earlier step than others: after a kill just before it was written, or by hand."""
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=4)
    (tmp_path / "latest").write_text("step-00000004\n")
    for step in (5, 6, 7):
        save(tmp_path, step, keep)
        assert assert_whole(latest(tmp_path)) == step
    save(tmp_path, 8, keep)
    assert names(tmp_path) == ["latest", *(f"step-{step:08d}" for step in (7, 8)[-keep:])]


def test_a_copy_beside_them_is_no_checkpoint_of_the_run(tmp_path: Path) -> None:
    """It is neither removed nor counted nor gone on from."""
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000001-best")
    for step in (2, 3):
        save(tmp_path, step)
    assert names(tmp_path) == ["latest", "step-00000001-best", "step-00000002", "step-00000003"]
    (tmp_path / "latest").unlink()
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"step-{step:08d}")
    assert checkpoint.latest_checkpoint(tmp_path) is None


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".hidden").mkdir()
    for step in (1, 2, 3):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == [".hidden", "latest", "notes.txt", "step-00000003"]


# ===== Damage =====


@pytest.mark.parametrize("file", ["state.json", "rank-0.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "one bit"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str, damage: str) -> None:
    trainer = small_trainer(tmp_path, steps=2)
    trainer.fit()
    path = latest(tmp_path / "checkpoints") / file
    content = path.read_bytes()
    if damage == "one bit":
        at = content.index(b'"tokens": ') + 10 if file == "state.json" else len(content) - 5
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    else:
        noise = b"\xff\xfe" + content[::-1]
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "noise": noise}[damage])
    fresh = small_trainer(tmp_path, steps=2, resume=True)
    before = {name: p.detach().clone() for name, p in fresh.parameters.items()}
    with pytest.raises(ValueError, match=rf"step-00000002/{file} is damaged"):
        fresh.fit()
    assert_same_tensors(before, dict(fresh.parameters))  # nothing is loaded by half
    assert not fresh.optimizer.state
    path.write_bytes(content)
    fresh.fit()


@pytest.mark.parametrize("file", ["state.json", "rank-0.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    small_trainer(tmp_path, steps=2).fit()
    (latest(tmp_path / "checkpoints") / file).unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"step-00000002/{file} is missing.*put it back, or start anew with over"
    ):
        small_trainer(tmp_path, steps=2, resume=True).fit()


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"step-", b"../elsewhere", b"\xff\xfe"])
def test_a_damaged_latest_is_named(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 1)
    (tmp_path / "latest").write_bytes(content)
    with pytest.raises(ValueError, match="latest is damaged: it holds"):
        checkpoint.latest_checkpoint(tmp_path)


def test_a_latest_without_its_checkpoint_is_told(tmp_path: Path) -> None:
    shutil.rmtree(save(tmp_path, 1))
    with pytest.raises(FileNotFoundError, match="latest names step-00000001, which is not there"):
        checkpoint.latest_checkpoint(tmp_path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "state.json").write_text(json.dumps({"format": 1, "step": 1}))
    with pytest.raises(ValueError, match=r"step-00000001 has checkpoint format 1; this version reads 2\. Finish"):
        checkpoint.read_state(path)


# ===== Kills =====


@pytest.mark.parametrize(("step", "may_be"), [(4, {3, 4}), (3, {3})], ids=["a new step", "the same step again"])
def test_a_save_killed_anywhere_leaves_a_checkpoint_that_loads(tmp_path: Path, step: int, may_be: set[int]) -> None:
    for earlier in (2, 3):
        save(tmp_path / "start", earlier)
    seen = set()
    for directory in kills(functools.partial(save, step=step), tmp_path / "start", tmp_path / "work"):
        newest = assert_whole(latest(directory))
        seen.add(newest)
        save(directory, 5)  # what the kill left does not stand in the way, nor stay
        assert assert_whole(latest(directory)) == 5
        assert names(directory) in [["latest", f"step-0000000{former}", "step-00000005"] for former in (2, 3, 4)]
    assert seen == may_be


def overwrite(directory: Path) -> None:
    small_trainer(directory, steps=1, overwrite=True).fit()


def test_an_overwrite_killed_anywhere_can_be_done_again(tmp_path: Path) -> None:
    small_trainer(tmp_path / "start", steps=2, save_every=1).fit()
    small_trainer(tmp_path / "exact", steps=1).fit()
    for directory in kills(overwrite, tmp_path / "start", tmp_path / "work"):
        checkpoint.latest_checkpoint(directory / "checkpoints")  # there or not, it is no riddle
        overwrite(directory)
        assert_same_run(directory, tmp_path / "exact")
        assert names(directory / "checkpoints") == ["latest", "step-00000001"]


def kill_at_random(output: Path, settings: dict[str, Any]) -> None:
    """Fits in one fork after the other, each killed at a random moment after its first checkpoint; writes down how
    far each came."""
    small_trainer(output.parent / "first", steps=1).fit()  # so that the forks have nothing to import
    moments = random.Random(8)
    reached = [0]
    while reached[-1] < settings["steps"]:
        child = in_a_fork(lambda: small_trainer(output, **settings).fit())
        while position(output) == reached[-1]:
            time.sleep(0.001)
        time.sleep(0.03 * moments.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved(output)
        reached.append(position(output))
    (output.parent / "reached.json").write_text(json.dumps(reached))


def position(output: Path) -> int:
    try:
        newest = checkpoint.latest_checkpoint(output / "checkpoints")
        return 0 if newest is None else checkpoint.read_state(newest)["step"]
    except FileNotFoundError:  # replaced by a newer one meanwhile
        return position(output)


def test_runs_killed_at_random_moments_go_on_as_if_they_had_not_been(tmp_path: Path) -> None:
    settings = {"steps": 30, "save_every": 1, "resume": True}
    small_trainer(tmp_path / "whole", **settings).fit()
    child = process(kill_at_random, tmp_path / "killed", settings)
    child.start()
    child.join(120)
    assert child.exitcode == 0
    reached = json.loads((tmp_path / "reached.json").read_text())
    assert len(reached) > 4
    assert reached == sorted(set(reached))
    small_trainer(tmp_path / "killed", **settings).fit()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
