"""The learning rate: a straight rise, a cosine fall, and the values at both ends."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phicore.training.config import TrainConfig
from phicore.training.schedule import learning_rate

shapes = st.tuples(st.integers(0, 20), st.integers(2, 60)).map(lambda pair: (pair[0], pair[0] + pair[1]))
rates = st.floats(1e-6, 1.0)


def config(warmup: int, steps: int, peak: float, minimum: float = 0.0) -> TrainConfig:
    return TrainConfig(steps=steps, warmup_steps=warmup, learning_rate=peak, min_learning_rate=minimum)


@given(shapes, rates, st.floats(0, 1))
def test_rises_to_the_peak_and_falls_to_the_minimum(shape: tuple[int, int], peak: float, fraction: float) -> None:
    warmup, steps = shape
    low = peak * fraction
    values = [learning_rate(step, config(warmup, steps, peak, low)) for step in range(steps)]
    for step in range(warmup):
        assert values[step] == pytest.approx(peak * (step + 1) / (warmup + 1))
    assert values[warmup] == pytest.approx(peak)
    assert values[-1] == pytest.approx(low, abs=1e-12)
    fall = values[warmup:]
    assert all(a >= b - 1e-12 for a, b in pairwise(fall))
    assert all(v > 0 for v in values[:-1])
    # A cosine is symmetric about the middle of the fall.
    assert all(a + b == pytest.approx(peak + low) for a, b in zip(fall, reversed(fall), strict=True))


def test_a_quarter_of_the_way_down() -> None:
    quarter = 0.5 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)) - 0.3
    assert learning_rate(4 + 2, config(4, 13, 1.0, 0.2)) == pytest.approx(quarter)


@given(st.integers(0, 9), st.integers(1, 9), rates)
def test_is_never_zero_before_the_last_step_nor_above_the_peak(warmup: int, steps: int, peak: float) -> None:
    values = [learning_rate(step, config(warmup, steps, peak)) for step in range(steps)]
    assert all(0 < v <= peak for v in values[:-1])
    assert 0 <= values[-1] <= peak
    if steps == 1:  # a run of one step learns something
        assert values[0] > 0


def test_stays_at_the_minimum_beyond_the_run() -> None:
    assert learning_rate(99, config(2, 10, 1.0, 0.25)) == pytest.approx(0.25)
