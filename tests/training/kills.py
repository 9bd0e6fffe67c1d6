"""Kills ranks of training runs at random moments and looks for what was lost.

    python -m tests.training.kills --kills 50

Each run trains on two ranks and saves after every step, in the background or not. At a random moment one rank or both
get SIGKILL; what is left must end by itself and name the killed rank, `latest` must name a whole checkpoint that is not
older than before, and the run is resumed, to be killed again or to end. A run that ended must have the losses, weights,
optimizer and random states of one that was not disturbed, bit for bit. Prints each kill and the sums; exits with status
1 if anything was lost, differs, hangs or does not say who was killed.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phicore.training.checkpoint import latest_checkpoint, read_state
from phicore.training.consolidate import consolidate
from tests.training.faults import finish, log, start
from tests.training.small_run import assert_same_run

WORLD_SIZE = 2
SETTINGS: dict[str, Any] = {"steps": 24, "save_every": 1, "eval_every": 4, "step_timeout": 30.0}


@dataclass
class Report:
    """What a campaign found.

    Attributes:
        kills: random moments at which ranks that were training were killed.
        resumes: starts that went on from a checkpoint.
        runs: that came to their end, and were compared.
        lost: checkpoints that were there before a kill and not after, or that do not load.
        wrong: all else that should not be: runs that differ, hang, or do not name the killed rank.
    """

    kills: int = 0
    resumes: int = 0
    runs: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        sums = f"{self.kills} kills, {len(self.lost)} checkpoints lost, {self.resumes} resumes, {self.runs} runs ended"
        return "\n".join([*self.lost, *self.wrong, f"{sums}, {len(self.wrong)} other faults"])


def campaign(directory: Path, kills: int, seed: int, say: Callable[[str], object] = lambda text: None) -> Report:
    """Kills at `kills` random moments, in as many runs as that takes; the last run is then left to end."""
    choose, report = random.Random(seed), Report()
    ranks = start(WORLD_SIZE, directory / "undisturbed", **SETTINGS)
    begun = _wait_for_training(directory / "undisturbed", ranks, time.time())
    if not begun or finish(ranks) != [0] * WORLD_SIZE:
        report.wrong.append(f"the undisturbed run failed: {log(directory / 'undisturbed', 0).read_text()}")
        return report
    duration = time.time() - begun
    number, resume = 0, False
    while True:
        output = directory / f"run {number}"
        done = _newest_step(output) or 0
        at = time.time()
        ranks = start(WORLD_SIZE, output, resume=resume, async_save=choose.random() < 0.5, **SETTINGS)
        report.resumes += resume
        killed: list[int] = []
        before = None
        if report.kills < kills and _wait_for_training(output, ranks, at):
            time.sleep(choose.uniform(0, duration * max(1 / 3, 1 - done / SETTINGS["steps"])))
            before = _newest_step(output)
            killed = [rank for rank in choose.choice([[0], [1], [0, 1]]) if ranks[rank].is_alive()]
            for rank in killed:
                ranks[rank].kill()
        codes = finish(ranks)
        if killed:
            report.kills += 1
            where = f"kill {report.kills}, of rank {' and '.join(map(str, killed))}, {output.name}"
            newest = check(output, before, where, report)
            _check_survivors(output, killed, codes, where, report)
            say(f"{where}: newest checkpoint {newest}")
        if codes != [0] * WORLD_SIZE and killed:
            resume = True
            continue
        if codes != [0] * WORLD_SIZE:
            report.wrong.append(f"{output.name} ended by itself with {codes}: {log(output, 0).read_text()[-2000:]}")
        else:
            try:
                assert_same_run(output, directory / "undisturbed")
            except AssertionError as error:
                report.wrong.append(f"{output.name} differs from the undisturbed run: {error}")
        report.runs += 1
        if report.kills >= kills or len(report.wrong) > 3:
            return report
        shutil.rmtree(output)
        number, resume = number + 1, False


def _wait_for_training(output: Path, ranks: list[Any], since: float) -> float | None:
    """When all ranks noted that they train; None if one ended before."""
    notes = [output / "ranks" / f"{rank}.json" for rank in range(len(ranks))]
    while not all(note.exists() and note.stat().st_mtime > since for note in notes):
        if not all(rank.is_alive() for rank in ranks):
            return None
        time.sleep(0.005)
    return time.time()


def _newest_step(output: Path) -> int | None:
    newest = latest_checkpoint(output / "checkpoints")
    return None if newest is None else int(newest.name.partition("-")[2])


def check(output: Path, before: int | None, where: str, report: Report) -> int | None:
    """The newest checkpoint's step; notes it as lost if it is older than before, or does not load."""
    try:
        newest = latest_checkpoint(output / "checkpoints")
        if newest is not None:
            consolidate(newest)
            step = read_state(newest)["step"]
        else:
            step = None
    except Exception as error:
        report.lost.append(f"{where}: {type(error).__name__}: {error}")
        return None
    if before is not None and (step is None or step < before):
        report.lost.append(f"{where}: the newest checkpoint was of step {before}, and is of {step}")
    return step


def _check_survivors(output: Path, killed: list[int], codes: list[int | None], where: str, report: Report) -> None:
    for rank in set(range(WORLD_SIZE)) - set(killed):
        told = log(output, rank).read_text()
        if codes[rank] is None:
            report.wrong.append(f"{where}: rank {rank} hangs; it said {told[-1000:]}")
        elif codes[rank] != 0 and f"LostRankError: rank {killed[0]} has ended " not in told:
            report.wrong.append(f"{where}: rank {rank} does not say who was killed: {told[-3000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start_time = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        report = campaign(Path(directory), options.kills, options.seed, lambda text: print(text, flush=True))
    print(f"{report}, in {time.monotonic() - start_time:.0f} s")
    return int(bool(report.lost or report.wrong))


if __name__ == "__main__":
    sys.exit(main())
