"""The same script under torchrun and with the variables set by hand; restarts; a signal to one of the processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from phicore.training import checkpoint
from phicore.training.consolidate import consolidate
from tests.training.small_run import metrics, process, small_trainer

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def script(output: Path, settings: dict[str, Any], *more: object) -> list[str]:
    return ["-m", "tests.training.small_run", str(output), "0", json.dumps(settings), *map(str, more)]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def losses(output: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(output)]


def newest_step(output: Path) -> int:
    newest = checkpoint.latest_checkpoint(output / "checkpoints")
    assert newest is not None
    consolidate(newest)
    return checkpoint.read_state(newest)["step"]


# ===== Variables set by hand: as a cluster's own launcher does =====


def as_rank(rank: int, world_size: int, port: int, run: Callable[..., None], *arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without it
    run(*arguments)


def start(world_size: int, run: Callable[..., None], *arguments: Any) -> list[Any]:
    port = free_port()
    processes = [process(as_rank, rank, world_size, port, run, *arguments) for rank in range(world_size)]
    for one in processes:
        one.start()
    return processes


def train(output: Path, pause: float, settings: dict[str, Any]) -> None:
    small_trainer(output, pause, **settings).fit()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_to_one_process_saves_once_and_ends_all(tmp_path: Path, number: signal.Signals, status: int) -> None:
    ranks = start(3, train, tmp_path, 0.1, {"steps": 500, "batch_size": 6})
    deadline = time.monotonic() + 60
    while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(ranks[1].pid, number)
    for one in ranks:
        one.join(30)
    assert [one.exitcode for one in ranks] == [status] * 3
    assert newest_step(tmp_path) == metrics(tmp_path)[-1]["step"] < 500
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 1


# ===== torchrun =====


def test_ctrl_c_on_torchrun_saves_once_and_restarts_nothing(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["-m", "tests.training.small_run", str(tmp_path), "0.1", json.dumps({"steps": 500, "log_every": 1})]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without it
    try:
        agent = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    agent.send_signal(signal.SIGINT)
    told = agent.communicate(timeout=60)[1]
    assert newest_step(tmp_path) == metrics(tmp_path)[-1]["step"] < 500
    assert told.count("stopped as asked") == 1
    assert "Ctrl-C again" not in told  # torchrun would send SIGTERM
    assert "restarted by torchrun" not in told


def test_a_run_restarted_on_two_nodes_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Two agents, which find each other on the loopback interface. Their output held another run, which they were to
    overwrite. A rank kills itself in step 6; the run ends with the losses of one that was left in peace."""
    settings = {"steps": 6, "save_every": 2, "overwrite": True}
    small_trainer(tmp_path / "run", steps=9, seed=4).fit()
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "7"]
    command = [*TORCHRUN, *nodes, *meeting, *script(tmp_path / "run", settings, 6)]
    files = [tmp_path / f"agent-{i}.txt" for i in range(2)]  # so that an agent that hangs is heard, and the other too
    agents = []
    for file in files:
        with file.open("w") as output:
            environment = {**ENVIRONMENT, "LOGLEVEL": "INFO"}  # torchrun's: what an agent waits for
            agents.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT))
    whole = start(2, train, tmp_path / "whole", 0.0, settings)
    deadline = time.monotonic() + 400  # six programs import torch and end: on two busy cores that took 113 s
    while None in (codes := [agent.poll() for agent in agents]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for agent in agents:
        agent.terminate()
    for agent in agents:
        with suppress(subprocess.TimeoutExpired):
            agent.wait(40)
        agent.kill()  # one whose processes are done, and that waits for the other, hears SIGTERM only minutes later
    told = [file.read_text() for file in files]
    assert codes == [0, 0], "\n=====\n".join(told)
    assert "".join(told).count("going on with the run in") == 1
    assert "".join(told).count("training 4/6") == 1  # rank 0 alone speaks
    for one in whole:
        one.join(60)
    assert [one.exitcode for one in whole] == [0, 0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert newest_step(tmp_path / "run") == 6
    assert checkpoint.read_state(tmp_path / "run/checkpoints/step-00000006")["world_size"] == 2
