"""Signals end a run after its step, with a checkpoint."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from phicore.training import TrainConfig, Trainer, checkpoint
from tests.training.small_run import (
    SETTINGS,
    assert_same_run,
    examples,
    metrics,
    small_model,
    small_trainer,
    stop_after,
)

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(autouse=True)
def answered() -> Iterator[None]:
    """A shell's background jobs start with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "status"), [*zip(STOPS, (0, 0, 130), strict=True)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(
    tmp_path: Path, number: signal.Signals, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(n) for n in STOPS]
    trainer = small_trainer(tmp_path, accumulation=1)
    inner = trainer.loss_fn

    def signalled(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | int]:
        if trainer.step == 2:
            os.kill(os.getpid(), number)
        return inner(model, batch)

    trainer.loss_fn = signalled
    with pytest.raises(SystemExit) as stopped:
        trainer.fit()
    assert stopped.value.code == status
    assert trainer.step == 3
    assert checkpoint.latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000003"
    assert [signal.getsignal(n) for n in STOPS] == handlers
    told = capfd.readouterr().err
    assert ("Ctrl-C again ends at once" in told) == (number == signal.SIGINT)
    assert told.endswith(f"resume goes on from {tmp_path / 'checkpoints' / 'step-00000003'}\n")


def test_ctrl_c_does_not_end_an_interactive_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    trainer = small_trainer(tmp_path)
    inner = trainer.loss_fn

    def interrupted(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | int]:
        os.kill(os.getpid(), signal.SIGINT)
        trainer.loss_fn = inner
        return inner(model, batch)

    trainer.loss_fn = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert checkpoint.latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000001"
    assert trainer.fit().steps == SETTINGS["steps"]


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_stop_does_not_wait_for_an_evaluation(tmp_path: Path, batches: int) -> None:
    """Who sends SIGTERM sends SIGKILL some seconds later, and an evaluation may take minutes: a stop that is asked for
    in the step before it, or in a batch of it, comes first, and the run that goes on evaluates."""

    def trainer(name: str, **settings: Any) -> Trainer:
        config = TrainConfig(output=str(tmp_path / name), **SETTINGS, eval_every=3, eval_batch_size=2, **settings)
        return Trainer(small_model(), config, examples(), examples(7))

    trainer("whole").fit()
    stopped = trainer("stopped")
    inner, evaluated = stopped.loss_fn, []

    def loss_fn(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | int]:
        if not model.training:
            evaluated.append(stopped.step)
        if len(evaluated) == batches and stopped.step == (3 if batches else 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(model, batch)

    stopped.loss_fn = loss_fn
    with pytest.raises(SystemExit):
        stopped.fit()
    assert evaluated == [3] * batches
    assert (
        checkpoint.latest_checkpoint(tmp_path / "stopped/checkpoints") == tmp_path / "stopped/checkpoints/step-00000003"
    )
    assert "eval_loss" not in metrics(tmp_path / "stopped")[-1]
    trainer("stopped", resume=True).fit()
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, save_every=2)
    inner = trainer.loss_fn

    def signalled(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | int]:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return inner(model, batch)

    trainer.loss_fn = signalled
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert checkpoint.latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000002"


def test_ctrl_c_that_is_ignored_stays_so(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = small_trainer(tmp_path)
    inner = trainer.loss_fn

    def signalled(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | int]:
        os.kill(os.getpid(), signal.SIGINT)
        return inner(model, batch)

    trainer.loss_fn = signalled
    assert trainer.fit().steps == SETTINGS["steps"]


def test_a_stop_at_the_very_end_of_a_step_loses_nothing(tmp_path: Path) -> None:
    """Asked for when the step's own checks are behind it."""

    class Late(int):
        def __rmod__(self, step: int) -> int:  # the last thing that a step looks at
            if step == 3:
                trainer.request_stop()
            return 1

    trainer = small_trainer(tmp_path, save_every=Late(99))
    with pytest.raises(SystemExit):
        trainer.fit()
    assert checkpoint.latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000003"


def test_outside_the_main_thread_signals_are_left_alone(tmp_path: Path) -> None:
    steps: list[int] = []
    thread = threading.Thread(target=lambda: steps.append(small_trainer(tmp_path).fit().steps))
    thread.start()
    thread.join(60)
    assert steps == [8]


def test_a_process_that_is_terminated_exits_with_0_and_can_be_resumed(tmp_path: Path) -> None:
    settings = {"steps": 40}
    small_trainer(tmp_path / "whole", **settings).fit()
    output = tmp_path / "stopped"
    program = [sys.executable, "-m", "tests.training.small_run", str(output), "0.1", json.dumps(settings)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(program, cwd=root, env=environment, stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 60
        while not (output / "metrics.jsonl").exists() or len(metrics(output)) < 2:
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        _, told = run.communicate(timeout=60)
    assert run.returncode == 0, told
    assert "Traceback" not in told
    newest = checkpoint.latest_checkpoint(output / "checkpoints")
    assert newest is not None
    step = checkpoint.read_state(newest)["step"]
    assert 2 <= step < 40
    assert len(metrics(output)) == step
    small_trainer(output, resume=True, **settings).fit()
    assert_same_run(output, tmp_path / "whole")


def test_a_stop_is_answered_once(tmp_path: Path) -> None:
    trainer = stop_after(small_trainer(tmp_path), 3)
    with pytest.raises(SystemExit):
        trainer.fit()
    assert trainer.fit().steps == SETTINGS["steps"]
