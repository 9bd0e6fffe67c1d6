"""One of several ranks is killed, stalls, fails or cannot write: the others stop and say which rank and where, and the
run goes on from its last checkpoint as if nothing had been."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from phicore.training.checkpoint import latest_checkpoint, read_state
from phicore.training.consolidate import consolidate
from tests.training import kills
from tests.training.faults import PATIENCE, finish, log, start
from tests.training.kills import Report, campaign
from tests.training.small_disk import small_disk
from tests.training.small_run import assert_same_run

SETTINGS = {"steps": 8, "save_every": 2, "eval_every": 3, "step_timeout": 20.0}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of two ranks that were left in peace."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    assert finish(start(2, output, **SETTINGS)) == [0, 0], log(output, 0).read_text() + log(output, 1).read_text()
    return output


CASES = [
    # what, rank, step; what the others say; the step of the newest checkpoint then
    ("killed in the backward pass", 1, 6, r"LostRankError: rank 1 has ended in step 6 \(process", 4),
    ("killed in the backward pass", 0, 5, r"LostRankError: rank 0 has ended in step 5 \(process", 4),
    ("killed in an evaluation", 1, 6, r"rank 1 has ended in the evaluation after step 6 ", 4),
    ("killed in a save", 1, 4, r"rank 1 has ended in the checkpoint of step 4 ", 2),
    ("killed before the rename", 0, 4, r"rank 0 has ended in the checkpoint of step 4 ", 2),
    ("killed before latest", 0, 4, r"rank 0 has ended in the checkpoint of step 4 ", 2),
    ("raising", 1, 6, r"LostRankError: rank 1 failed in step 6: KeyError: 'no such thing'", 4),
    ("not a number", 1, 6, r"FloatingPointError: step 6, rank 1: loss is nan", 4),
    ("full disk", 1, 4, r"OSError: rank 1: cannot write .*/step-00000004/rank-1.safetensors: .*File too large.*", 2),
    ("full disk", 0, 4, r"OSError: rank 0: cannot write .*/step-00000004/rank-0.safetensors: .*File too large.*", 2),
    ("no space in Python", 1, 4, r"OSError: rank 1: cannot write .*step-00000004/rank-1.*: \[Errno 28\] No space", 2),
]


@pytest.mark.parametrize(("what", "rank", "step", "said", "newest"), CASES)
def test_others_say_who_and_where_and_the_run_goes_on(undisturbed, tmp_path, what, rank, step, said, newest):
    output = tmp_path / "run"
    codes = finish(start(2, output, (what, rank, step), **SETTINGS))
    assert codes[rank] == (-signal.SIGKILL if "killed" in what else 1)
    assert codes[1 - rank] == 1
    told = log(output, 1 - rank).read_text()
    assert_told(told, said)
    goes_on(output, newest, undisturbed)


def assert_told(told: str, said: str) -> None:
    assert re.search(said, told), told


def goes_on(output: Path, newest: int, undisturbed: Path) -> None:
    """The newest checkpoint is of that step and loads, and the resumed run is the undisturbed one."""
    found = latest_checkpoint(output / "checkpoints")
    assert found is not None
    assert read_state(found)["step"] == newest
    consolidate(found)
    codes = finish(start(2, output, resume=True, **SETTINGS))
    assert codes == [0, 0], log(output, 0).read_text() + log(output, 1).read_text()
    assert_same_run(output, undisturbed)


def test_a_stalled_rank_is_named_within_the_time_out(undisturbed, tmp_path):
    output = tmp_path / "run"
    ranks = start(2, output, ("stalled", 1, 6), **{**SETTINGS, "step_timeout": 6.0})
    ranks[0].join(PATIENCE)
    assert ranks[0].exitcode == 1
    assert_told(
        log(output, 0).read_text(),
        r"LostRankError: rank 1 does not answer; it was last heard of in step 6\. Rank 0 was",
    )
    # when it goes on, it finds that nobody waits any more
    os.kill(ranks[1].pid, signal.SIGCONT)
    assert finish(ranks) == [1, 1]
    assert_told(log(output, 1).read_text(), r"LostRankError: the other ranks have given up waiting for this one")
    goes_on(output, 4, undisturbed)


def test_a_disk_that_is_full_for_all_ranks_costs_no_checkpoint(undisturbed, tmp_path):
    """A real disk where the system lets users mount one, and an error like its elsewhere."""
    with small_disk(tmp_path / "disk", 3) as disk:
        output = tmp_path / "run"
        if disk is not None:
            output.symlink_to(disk)
        what = "no space in Python" if disk is None else "no space"
        assert finish(start(2, output, (what, 0, 4), **SETTINGS)) == [1, 1]
        for rank in (0, 1):
            assert_told(
                log(output, rank).read_text(),
                r"OSError: rank [01]: cannot write .*/run/checkpoints/step-00000004/rank-[01].safetensors: .*No space "
                r"left on device.*\. This checkpoint is not saved, step-00000002 is still the newest\. Make room",
            )
        (output / "filler").unlink(missing_ok=True)
        goes_on(output, 2, undisturbed)


EARLY = [
    ("killed before it came", 1, r"TimeoutError: rank 1 did not come within 3 s"),
    ("killed before it came", 0, r"TimeoutError: nobody opened 127.0.0.1:\d+, as rank 0 should, within 3 s"),
    ("killed while connecting", 1, r"LostRankError: rank 1 came and ended, or does not answer, while the ranks conn"),
    ("killed while connecting", 0, r"LostRankError: rank 0 came and ended, or does not answer, while the ranks conn"),
    ("killed in the construction", 1, r"LostRankError: rank 1 has ended in the construction of the Trainer \(process"),
    ("killed in the construction", 0, r"LostRankError: rank 0 has ended in the construction of the Trainer \(process"),
    ("stalled in the construction", 1, r"LostRankError: rank 1 does not answer; .* in the construction of the Trainer"),
    ("raising in the construction", 1, r"LostRankError: rank 1 failed in the construction of the Trainer: KeyError"),
]


def test_a_rank_that_is_lost_before_the_first_step_is_named(tmp_path):
    """All cases at once: they do little but wait."""
    outputs = [tmp_path / str(case) for case in range(len(EARLY))]
    runs = [
        start(2, output, (what, rank, 0), first_step_timeout=3.0)
        for (what, rank, _), output in zip(EARLY, outputs, strict=True)
    ]
    for (_, rank, _), ranks in zip(EARLY, runs, strict=True):
        ranks[1 - rank].join(PATIENCE)
    codes = [ranks[1 - rank].exitcode for (_, rank, _), ranks in zip(EARLY, runs, strict=True)]
    for one in (one for ranks in runs for one in ranks):
        one.kill()  # those that stall
        one.join()
    for (_, rank, said), output, code in zip(EARLY, outputs, codes, strict=True):
        assert_told(log(output, 1 - rank).read_text(), said)
        assert code == 1, said


def test_all_of_three_ranks_name_the_same_one(tmp_path):
    output = tmp_path / "run"
    codes = finish(start(3, output, ("killed in the backward pass", 1, 2), **SETTINGS))
    assert codes == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        told = log(output, rank).read_text()
        assert_told(
            told, rf"LostRankError: rank 1 has ended in step 2 \(process \d+, killed or crashed\)\. Rank {rank} was"
        )


def test_a_lost_checkpoint_is_counted(undisturbed, tmp_path):
    output = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    report = Report()
    assert kills.check(output, 8, "kill 1", report) == 8
    assert not report.lost
    kills.check(output, 9, "kill 2", report)
    (output / "checkpoints/step-00000008/rank-1.safetensors").write_bytes(b"torn")
    kills.check(output, 8, "kill 3", report)
    shutil.rmtree(output / "checkpoints/step-00000008")
    kills.check(output, 8, "kill 4", report)
    assert [text.partition(":")[0] for text in report.lost] == ["kill 2", "kill 3", "kill 4"]


def test_random_kills_lose_nothing(tmp_path):
    """The short form of `make kills`."""
    report = campaign(tmp_path, kills=4, seed=1)
    assert report.kills == 4
    assert report.resumes >= 1
    assert not report.lost, report
    assert not report.wrong, report
    assert "4 kills, 0 checkpoints lost" in str(report)
