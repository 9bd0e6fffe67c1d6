"""Ratios of two callables, measured in alternating pairs, with the peer against itself as the noise."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Run = Callable[[], object]
Turn = tuple[float, float, float]  # seconds of peer, ours, peer again


@dataclass(frozen=True)
class Ratio:
    """How long one takes beside another; all are medians over turns, so ratio is not quite seconds / peer_seconds.

    Attributes:
        ratio: ours / peer within a turn, the peer being the mean of its two runs.
        self_pair: peer again / peer, what the same measure says of two equals.
        noise: how far one self-pair lies from 1.
        seconds, peer_seconds: of one run, the peer's being the mean of its two.
    """

    ratio: float
    self_pair: float
    noise: float
    seconds: float
    peer_seconds: float

    def __str__(self) -> str:
        return f"{self.ratio:.3f} (self-pair {self.self_pair:.3f}; {self.seconds * 1e3:.2f} ms)"


def ratio(turns: Iterable[Turn]) -> Ratio:
    """The medians of turns that were measured elsewhere (in other processes, over ranks)."""
    turns = list(turns)
    return Ratio(
        ratio=statistics.median(2 * mine / (before + after) for before, mine, after in turns),
        self_pair=statistics.median(after / before for before, _, after in turns),
        noise=statistics.median(abs(after / before - 1) for before, _, after in turns),
        seconds=statistics.median(mine for _, mine, _ in turns),
        peer_seconds=statistics.median((before + after) / 2 for before, _, after in turns),
    )


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rounds(runs: Sequence[Run], turns: int, warm_ups: int = 2) -> list[tuple[float, ...]]:
    """Seconds of each run in each turn, one after the other, after turns that warm them up."""
    for _ in range(warm_ups):
        for run in dict.fromkeys(runs):  # once, where one stands twice
            run()
    return [tuple(seconds(run) for run in runs) for _ in range(turns)]


def compare(ours: Run, peer: Run, turns: int, warm_ups: int = 2) -> Ratio:
    """Times peer, ours, peer again in each turn."""
    return ratio((before, mine, after) for before, mine, after in rounds((peer, ours, peer), turns, warm_ups))
