"""Ratios of two callables, measured in alternating pairs, with the first against itself as the noise."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Run = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """How long one takes beside another: medians over pairs; `noise` is what the same measure says of two equals."""

    ratio: float
    noise: float
    seconds: float
    peer_seconds: float

    def __str__(self) -> str:
        return f"{self.ratio:.3f} (self-pair {self.noise:.3f}; {self.seconds * 1e3:.2f} ms)"


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(ours: Run, peer: Run, pairs: int) -> Ratio:
    """Times peer, ours, peer again, `pairs` times after a warm-up; all three are medians of within-turn ratios."""
    for run in (peer, ours, peer, ours):
        run()
    turns = [(seconds(peer), seconds(ours), seconds(peer)) for _ in range(pairs)]
    return Ratio(
        ratio=statistics.median(2 * mine / (before + after) for before, mine, after in turns),
        noise=statistics.median(after / before for before, _, after in turns),
        seconds=statistics.median(mine for _, mine, _ in turns),
        peer_seconds=statistics.median(before for before, _, _ in turns),
    )
