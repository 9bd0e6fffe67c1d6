"""Whose run an output holds, after a restart by torchrun too."""

from pathlib import Path

import pytest

from phicore.training import TrainConfig
from phicore.training.output import after_restart, launch, prepare_output
from tests.training.small_run import small_trainer


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
