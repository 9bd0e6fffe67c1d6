"""metrics.jsonl keeps what a resumed run builds on and nothing else; progress suits where stderr goes."""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phicore.training import metrics
from phicore.training.metrics import MetricsLog, Progress, peak_memory_bytes
from tests.training.small_run import process, small_trainer

# ===== metrics.jsonl =====


def test_a_line_is_written_at_once(tmp_path: Path) -> None:
    path = tmp_path / "some" / "where" / "metrics.jsonl"
    log = MetricsLog(path, last_step=0)
    assert path.read_text() == ""
    log.write(step=1, loss=2.5)
    assert path.read_text() == '{"step": 1, "loss": 2.5}\n'
    log.write(step=1, eval_loss=0.1 + 0.2)
    assert json.loads(path.read_text().splitlines()[1]) == {"step": 1, "eval_loss": 0.1 + 0.2}


def test_a_line_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """/dev/full takes no byte, as a full disk."""
    log = MetricsLog(tmp_path / "metrics.jsonl", last_step=0)
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write .*/metrics.jsonl: .*No space left on device\. Make room for it"):
        log.write(step=1, loss=2.5)


@given(steps=st.lists(st.integers(1, 9), max_size=9), last=st.integers(0, 9), cut=st.integers(0, 30))
def test_lines_after_the_last_step_and_broken_ones_go(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], last: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": i / 3}) for i, step in enumerate(steps)]
    broken = json.dumps({"step": 0, "loss": 1 / 7})[:cut]  # what a kill leaves of a line
    path.write_text("".join(line + "\n" for line in lines) + broken)
    MetricsLog(path, last).write(step=last + 1)
    whole = [broken] if len(broken) == len(json.dumps({"step": 0, "loss": 1 / 7})) else []
    kept = [line for line, step in zip(lines, steps, strict=True) if step <= last]
    assert path.read_text().splitlines() == [*kept, *whole, json.dumps({"step": last + 1})]


@pytest.mark.parametrize("garbage", [b"\xff\xfe", b"\0\0\0", b'{"step": 1e400}', b'{"step": 1, "loss": 2\xff'])
def test_what_a_crash_leaves_of_a_file_goes(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.5}\n' + garbage + b"\n")
    MetricsLog(path, 1)
    assert path.read_text() == '{"step": 1, "loss": 2.5}\n'


def test_lines_of_another_kind_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('[]\n{"loss": 1}\n{"step": null}\n\n\0\0\n{"step": 1}\n')
    MetricsLog(path, 5)
    assert path.read_text() == '{"step": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


# ===== Progress =====


def test_elsewhere_a_line_for_each_step_that_is_worth_one(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(5, 2)
    progress.step(3, "loss 1.0", say=True)
    progress.step(4, "loss 0.9", say=False)
    progress.step(5, "loss 0.8", say=True)
    progress.close()
    captured = capsys.readouterr()
    assert captured.err == "training 3/5  loss 1.0\ntraining 5/5  loss 0.8\n"
    assert captured.out == ""


def test_a_rank_that_keeps_quiet_keeps_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(5, 0, shown=False)
    progress.step(1, "loss 1.0", say=True)
    progress.close()
    assert capsys.readouterr().err == ""


def test_without_a_terminal_a_run_writes_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_trainer(tmp_path, steps=5, log_every=2).fit()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"training {step}/5" for step in (1, 2, 4, 5)]
    assert all("loss " in line and line.endswith(" tokens/s") for line in lines)
    assert "\r" not in "".join(lines)


def run_on(terminal: str, output: Path, without_tqdm: bool) -> None:
    descriptor = os.open(terminal, os.O_RDWR)
    os.dup2(descriptor, 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if without_tqdm:
        sys.modules["tqdm"] = None  # type: ignore[assignment]  # so that importing it fails
    small_trainer(output, steps=5, pause=0.2, log_every=2).fit()


@pytest.mark.parametrize("without_tqdm", [False, True])
def test_on_a_terminal_a_run_draws_a_bar(tmp_path: Path, without_tqdm: bool) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    child = process(run_on, os.ttyname(theirs), tmp_path, without_tqdm)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    shown = ""
    while select.select([ours], [], [], 2)[0]:  # the kernel hands a terminal's output over when it gets to it
        shown += os.read(ours, 1 << 20).decode()
    os.close(ours)
    os.close(theirs)
    if without_tqdm:
        assert [line.split("  ")[0] for line in shown.splitlines()] == [f"training {n}/5" for n in (1, 2, 4, 5)]
        return
    frames = shown.split("\r")
    assert len(frames) > 3
    last = [frame for frame in frames if frame.strip()][-1]
    assert "training: 100%" in last
    assert "5/5" in last
    assert "loss " in last
    assert "tokens/s" in last


def test_a_large_checkpoint_is_told_of_and_a_small_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_trainer(tmp_path / "small", steps=1, log_every=2).fit()
    assert "writing" not in capsys.readouterr().err
    monkeypatch.setattr(metrics, "LARGE", 100)
    small_trainer(tmp_path / "run", steps=2, save_every=1).fit()
    told = [re.sub(r"[\d.]+ s$", "_ s", line) for line in capsys.readouterr().err.splitlines()]
    one, two = (tmp_path / f"run/checkpoints/step-0000000{step}" for step in (1, 2))
    assert [line for line in told if not line.startswith("training")] == [
        f"writing {one}: 0.00 GB ...",
        f"writing {one}: _ s",
        f"writing {two}: 0.00 GB ...",
        f"writing {two}: _ s",
    ]
    small_trainer(tmp_path / "run", steps=2, save_every=1, resume=True).fit()
    assert f"reading {two}: 0.00 GB ...\nreading {two}: " in capsys.readouterr().err


# ===== Memory =====


def test_peak_memory_is_in_bytes_and_does_not_fall() -> None:
    cpu = torch.device("cpu")
    before = peak_memory_bytes(cpu)
    assert 50e6 < before < 1e12  # torch alone is larger than 50 MB
    block = torch.ones(16 << 20)
    assert peak_memory_bytes(cpu) >= before
    del block
    assert peak_memory_bytes(cpu) >= before


def test_peak_memory_is_this_process_own_and_not_that_of_the_one_that_started_it() -> None:
    held = torch.ones(256 << 20)  # 1 GiB
    script = "import torch; from phicore.training.metrics import peak_memory_bytes as p; print(p(torch.device('cpu')))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 50e6 < int(run.stdout) < held.nbytes
