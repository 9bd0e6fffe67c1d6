"""Notes of ranks, and what is told of them: whom a failed collective is laid to."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from phicore.training import watch
from phicore.training.watch import LENGTH, LostRankError, Watch, is_lost_connection

GLOO = RuntimeError("[pair.cc:534] gloo: Connection closed by peer [127.0.0.1]:1. Good luck!\nmore")


def fail(output: str, told: dict[int, str | None]) -> str:
    """Notes of this rank's failure, by rank ("" for a failed collective, None for none), and what it was told then."""
    watching = Watch(Path(output))
    failed = told[dist.get_rank()]
    error = GLOO if failed == "" else KeyError(failed)
    os.environ[watch.TORCHRUN] = f"{output}/error {dist.get_rank()}.json"
    try:
        with watching.during(f"step {3 + dist.get_rank()}"):
            dist.barrier()
            if failed is not None:
                raise error
    except (LostRankError, KeyError) as caught:
        answer = str(caught)
    else:
        answer = "nothing"
    del os.environ[watch.TORCHRUN]
    dist.barrier()
    return answer


def test_who_is_named(tmp_path, ranks):
    three = ranks(3)
    lost = three(fail, str(tmp_path), {0: "", 1: "", 2: "x" * 9000})
    assert lost[0].startswith("rank 2 failed in step 5: KeyError: 'xxx")
    assert lost[1].endswith(
        "Rank 1 was in step 4 ([pair.cc:534] gloo: Connection closed by peer [127.0.0.1]:1). Start again with resume "
        "to go on from the newest checkpoint"
    )
    assert lost[2] == repr("x" * 9000)
    summaries = [json.loads((tmp_path / f"error {rank}.json").read_text())["message"] for rank in range(3)]
    assert summaries[1]["message"] == f"LostRankError: {lost[1]}"
    assert summaries[1]["extraInfo"]["py_callstack"].endswith(f"LostRankError: {lost[1]}\n")
    assert summaries[2]["message"].startswith("KeyError")
    everyone = three(fail, str(tmp_path), {0: "", 1: "", 2: ""})
    assert all(answer.startswith("the other ranks have given up waiting for this one. Rank") for answer in everyone)
    silent = three(fail, str(tmp_path), {0: "", 1: "", 2: None})
    assert silent[0].startswith("rank 2 does not answer; it was last heard of after step 5. Rank 0 was in step 3")
    assert silent[2] == "nothing"
    for rank in range(3):
        assert (tmp_path / "ranks" / f"{rank}.json").stat().st_size == LENGTH


def fail_alone(output: str) -> str:
    """What rank 0 is told where rank 1 has noted nothing yet."""
    watching, answer = Watch(Path(output)), ""
    watching._start = "this one"
    if dist.get_rank() == 0:
        with pytest.raises(LostRankError) as told, watching.during("step 1"):
            raise GLOO
        answer = str(told.value)
    dist.barrier()
    return answer


def test_notes_of_an_earlier_run_are_not_taken_for_this_ones(tmp_path, ranks):
    (tmp_path / "ranks").mkdir()
    earlier = json.dumps({"at": "in step 900", "failed": "KeyError: old", "start": "another"})
    (tmp_path / "ranks/1.json").write_text(earlier)
    answers = ranks(2)(fail_alone, str(tmp_path))
    assert answers[0].startswith("rank 1 does not answer; it was last heard of before the Trainer was made. Rank 0 was")


def test_alone_nothing_is_written_and_nothing_changed(tmp_path):
    with pytest.raises(RuntimeError) as caught, Watch(tmp_path).during("step 1"):
        raise GLOO
    assert caught.value is GLOO
    assert not list(tmp_path.iterdir())


def test_an_ended_process_is_told_from_one_elsewhere():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    note = {"process": ended.pid, "machine": watch._machine(), "at": "step 2"}
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # a zombie: nobody has asked for its exit code
    assert watch._has_ended(note)
    ended.wait()
    assert watch._has_ended(note)
    assert not watch._has_ended(note | {"machine": "elsewhere"})
    with mock.patch.object(Path, "read_text", return_value="another"):  # a start of a machine of the same name
        elsewhere = note | {"machine": watch._machine()}
    assert not watch._has_ended(elsewhere)
    assert not watch._has_ended(note | {"process": os.getpid()})
    assert not watch._has_ended({})
    with mock.patch.object(watch, "_machine", return_value=note["machine"]):
        with mock.patch.object(Path, "read_text", side_effect=ProcessLookupError):  # reaped between opening and reading
            assert watch._has_ended(note)
        with mock.patch.object(Path, "read_text", side_effect=PermissionError):  # hidden from this user
            assert watch._has_ended(note)
            assert not watch._has_ended(note | {"process": os.getpid()})


NAMED = """
import ctypes, os, sys, torch
from phicore.training import metrics, output, watch
ctypes.CDLL(None).prctl(15, "éééééééé".encode())  # PR_SET_NAME keeps 15 bytes, seven characters and a half
assert metrics.peak_memory_bytes(torch.device("cpu")) > 0
if os.fork():
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
else:
    assert not watch._has_ended({"process": os.getppid(), "machine": watch._machine()})
    print(output._agent())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells processes by files")
def test_a_process_may_have_any_name():
    ended = subprocess.run([sys.executable, "-c", NAMED], text=True, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "of  on" not in ended.stdout


def test_which_errors_are_of_a_lost_connection():
    assert is_lost_connection(GLOO)
    assert is_lost_connection(RuntimeError("Application timeout caused pair closure"))
    assert is_lost_connection(dist.DistNetworkError("closed"))
    assert not is_lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_connection(ValueError("gloo"))
