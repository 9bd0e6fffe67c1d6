"""Whose run an output holds, after a restart by torchrun too, and that only one is at work there."""

import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from phicore.training import TrainConfig, checkpoint
from phicore.training.output import after_restart, hold_output, launch, prepare_output
from tests.training.small_disk import small_disk
from tests.training.small_run import assert_same_run, process, small_trainer


def start(monkeypatch: pytest.MonkeyPatch, run_id: str, restarts: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))


def config(output: Path, **settings: bool) -> TrainConfig:
    return TrainConfig(output=str(output), **settings)  # type: ignore[arg-type]


def test_a_restart_goes_on_with_what_its_own_start_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_trainer(tmp_path, steps=2).fit()
    for settings in ({"overwrite": True}, {"resume": True}):
        start(monkeypatch, "a", 0)
        given = config(tmp_path, **settings)
        assert after_restart(given) == given
        prepare_output(given)
        start(monkeypatch, "a", 1)
        assert after_restart(given) == config(tmp_path, resume=True)
        start(monkeypatch, "b", 1)  # restarted before it had begun
        assert after_restart(given) == given
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert launch() is None
    prepare_output(config(tmp_path, resume=True))
    start(monkeypatch, "a", 1)
    assert after_restart(config(tmp_path)) == config(tmp_path)  # a run without torchrun lay between


def test_processes_that_a_new_node_replaces_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun counts no restart then."""
    start(monkeypatch, "a", 0)
    small_trainer(tmp_path, steps=2).fit()
    given = config(tmp_path, overwrite=True)
    assert after_restart(given) == given  # these processes themselves begin anew
    with monkeypatch.context() as replaced:
        replaced.setattr(os, "getpid", lambda: 7)
        assert after_restart(given) == config(tmp_path, resume=True)
        replaced.setattr(os, "getppid", lambda: 7)  # another torchrun
        assert after_restart(given) == given
        replaced.delenv("TORCHELASTIC_RUN_ID")
        assert after_restart(given) == given


def test_what_the_first_start_refused_a_restart_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_trainer(tmp_path, steps=2).fit()
    for restarts in (0, 1):
        start(monkeypatch, "a", restarts)
        with pytest.raises(FileExistsError, match="holds a run"):
            prepare_output(after_restart(config(tmp_path)))


def test_without_a_run_id_nothing_is_overwritten_on_a_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_trainer(tmp_path, steps=2).fit()
    start(monkeypatch, "none", 0)
    prepare_output(config(tmp_path, resume=True))
    start(monkeypatch, "none", 1)
    assert after_restart(config(tmp_path, overwrite=True)).resume
    (tmp_path / "launch").write_text("none, process 1 on another")
    with pytest.raises(FileExistsError, match="give torchrun --rdzv-id"):
        after_restart(config(tmp_path, overwrite=True))


def test_two_runs_are_not_at_work_in_one_output(tmp_path: Path) -> None:
    """Neither in one process, nor from another; and the first goes on undisturbed."""
    small_trainer(tmp_path / "alone").fit()
    first = small_trainer(tmp_path / "run", save_every=2)
    inner, told = first.loss_fn, []

    def second(model: Any, batch: Any) -> Any:
        if first.step == 4 and not told:
            for settings in ({"resume": True}, {"overwrite": True}, {}):
                with pytest.raises(
                    FileExistsError, match=r"another run is at work in .*give another output, or wait"
                ) as e:
                    small_trainer(tmp_path / "run", **settings).fit()
                told.append(str(e.value))
            other = process(overwrite, tmp_path / "run")
            other.start()
            other.join(60)
            assert other.exitcode == 1
        return inner(model, batch)

    first.loss_fn = second
    first.fit()
    assert len(told) == 3
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    small_trainer(tmp_path / "run", resume=True).fit()  # it has ended
    with pytest.raises(ValueError, match="seed: 0 then, 7 now"):
        small_trainer(tmp_path / "run", resume=True, seed=7).fit()
    small_trainer(tmp_path / "run", resume=True).fit()  # so has one that was refused


def test_an_output_that_is_given_back_is_free(tmp_path: Path) -> None:
    """Also while a process lives that was forked meanwhile, as a DataLoader's workers are."""
    release = hold_output(tmp_path)
    forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    forked.start()
    try:
        with pytest.raises(FileExistsError):
            hold_output(tmp_path)
        release()
        hold_output(tmp_path)()
    finally:
        forked.kill()
        forked.join()


def overwrite(output: Path) -> None:
    small_trainer(output, overwrite=True).fit()


def test_without_latest_the_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    """As after a kill between the first checkpoint and its name: it is neither passed over nor written over."""
    small_trainer(tmp_path / "whole").fit()
    small_trainer(tmp_path / "run", save_every=3, keep_checkpoints=9).fit()
    checkpoints = tmp_path / "run/checkpoints"
    shutil.rmtree(checkpoints / "step-00000008")
    (checkpoints / "latest").unlink()
    (checkpoints / "step-00000007").mkdir()  # half removed
    with pytest.raises(FileExistsError, match=r"holds a run .step-00000006.; set resume"):
        small_trainer(tmp_path / "run").fit()
    trainer = small_trainer(tmp_path / "run", resume=True, save_every=3)
    trainer._start()
    assert trainer.step == 6
    trainer.fit()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_checkpoints_that_are_a_link_to_another_disk_are_overwritten_there(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    small_trainer(tmp_path / "run").fit()
    (tmp_path / "run/checkpoints/elsewhere").symlink_to(tmp_path)
    small_trainer(tmp_path / "run", overwrite=True, steps=3).fit()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["latest", "step-00000003"]
    assert (tmp_path / "run/checkpoints").is_symlink()


def test_a_run_stays_in_its_output_wherever_the_process_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_trainer(tmp_path / "whole").fit()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = small_trainer("run", save_every=1)
    inner = trainer.loss_fn
    trainer.loss_fn = lambda *given: (monkeypatch.chdir(elsewhere) if trainer.step == 2 else None, inner(*given))[1]
    trainer.fit()
    assert list(elsewhere.iterdir()) == []
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(FileExistsError, match="holds a run"):
        small_trainer(tmp_path / "run").fit()


def test_an_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write into .*/file/run \(.*\); give an output that this process may"):
        small_trainer(tmp_path / "file/run").fit()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("")
    trainer = small_trainer(tmp_path / "run")
    with pytest.raises(OSError, match=r"cannot write into .*/run \(.*checkpoints.*\); give an output"):
        trainer.fit()
    assert trainer.step == 0  # told before the steps that could not be kept
    with small_disk(tmp_path / "disk", 1, "ro") as disk:
        if disk is not None:  # else no file system here is read-only for root
            with pytest.raises(
                OSError, match=r"cannot write into .*/run \(.*Read-only file system.*\); give an output"
            ):
                small_trainer(disk / "run").fit()


def test_a_run_that_fails_holds_its_output_until_its_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that overwrites it at once would find the old one's checkpoint in its place, and as its latest."""
    write = checkpoint.write_shard
    monkeypatch.setattr(checkpoint, "write_shard", lambda *given: (time.sleep(0.3), write(*given))[1])
    trainer = small_trainer(tmp_path, save_every=2, async_save=True)
    inner = trainer.loss_fn

    def loss_fn(*given: Any) -> Any:
        if trainer.step == 2:
            raise KeyError("no such thing")
        return inner(*given)

    trainer.loss_fn = loss_fn
    with pytest.raises(KeyError):
        trainer.fit()
    assert checkpoint.latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-00000002"
