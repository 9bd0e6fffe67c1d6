"""What a command on several ranks prints of an error: once what all of them say, by its rank what one of them says."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from phicore.cli import main
from phicore.formats import huggingface
from tests.training.faults import die
from tests.training.small_run import process
from tests.training.test_torchrun import free_port


def as_rank(rank: int, port: int, log: Path, model: Callable[..., Any], arguments: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    huggingface.load_model = model  # which would import transformers
    status = main(arguments)
    sys.stdout.flush()
    sys.exit(status)


def nothing_there(*_: Any) -> Any:
    raise FileNotFoundError("no such model")


def a_model(*_: Any) -> Any:
    return torch.nn.Linear(2, 2), None


def start(log: Path, *of_ranks: tuple[Callable[..., Any], list[str]]) -> list[Any]:
    port = free_port()
    ranks = [
        process(as_rank, rank, port, Path(f"{log} {rank}"), model, arguments)
        for rank, (model, arguments) in enumerate(of_ranks)
    ]
    for one in ranks:
        one.start()
    return ranks


def end(log: Path, ranks: list[Any]) -> tuple[list[int], list[str]]:
    """Exit codes, and what each rank printed."""
    for one in ranks:
        one.join(90)
    return [one.exitcode for one in ranks], [Path(f"{log} {rank}").read_text() for rank in range(2)]


def test_an_error_is_told_once_or_by_its_rank(tmp_path: Path, data: Path) -> None:
    def arguments(run: str, *more: str) -> list[str]:
        where = ["--model", "m", "--data", str(data), "--output", str(tmp_path / "runs" / run), "--dtype", "float32"]
        return ["finetune", *where, "--first-step-timeout", "60", *more]

    a, b, c, d, e = (arguments(run) for run in "abcde")
    runs = {
        "missing": start(tmp_path / "missing", (nothing_there, a), (nothing_there, a)),
        "missing there": start(tmp_path / "missing there", (a_model, b), (nothing_there, b)),
        "mistyped": start(tmp_path / "mistyped", *[(a_model, [*c, "--stepz", "3"])] * 2),
        "mistyped there": start(tmp_path / "mistyped there", (a_model, d), (a_model, [*d, "--stepz", "3"])),
        "killed": start(tmp_path / "killed", (a_model, e), (die, e)),
    }
    told = {name: end(tmp_path / name, ranks) for name, ranks in runs.items()}

    codes, (first, second) = told["missing"]
    assert codes == [1, 1]
    assert first.splitlines()[-1] == "phicore finetune: no such model"
    assert second.splitlines()[-1] == "rank 1 ends with the error that rank 0 tells"
    codes, (first, second) = told["missing there"]
    assert codes == [1, 1]
    assert first.splitlines()[-1] == "rank 0 ends with the error that rank 1 tells"
    assert second.splitlines()[-1] == "phicore finetune: rank 1: no such model"
    codes, (first, second) = told["mistyped"]
    assert codes == [2, 2]
    assert "--stepz" in first
    assert second == ""
    codes, (first, second) = told["mistyped there"]
    assert codes == [2, 2]
    assert first == ""
    assert second.startswith("rank 1: ")
    assert "--stepz" in second
    codes, (first, _) = told["killed"]
    assert codes == [1, -9]
    line = first.splitlines()[-1]
    assert line.startswith("phicore finetune: rank 0: rank 1 has ended in loading the model and the data (process ")


SCRIPT = """
import sys, torch
from phicore import TrainConfig, Trainer
Trainer(torch.nn.Linear(2, 2), TrainConfig(output=sys.argv[1]), [])
"""


def test_a_script_has_one_traceback(tmp_path: Path) -> None:
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            env={**os.environ, **where, "RANK": str(rank), "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (rank.communicate(timeout=90)[1] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert first.splitlines()[-1].endswith("ValueError: train_data is empty")
    assert "Traceback" not in second
    assert second.splitlines()[-1] == "rank 1 ends with the error that rank 0 tells"
