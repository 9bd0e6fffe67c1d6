"""Ratios over alternating turns: what they say of equals, of one twice as fast, and of one slow moment."""

import pytest

from benchmarks import pairs


def test_a_ratio_is_a_median_within_turns() -> None:
    # The machine becomes ten times slower in the middle; ours takes half the peer's time all along.
    turns = [(2.0 * load, 1.0 * load, 2.2 * load) for load in (1, 1, 10, 10, 10)]
    found = pairs.ratio(turns)
    assert found.ratio == pytest.approx(2 / 4.2)
    assert found.self_pair == pytest.approx(1.1)
    assert found.noise == pytest.approx(0.1)
    assert (found.seconds, found.peer_seconds) == (10.0, 21.0)  # the peer's by both its runs, as the ratio is


def test_noise_is_how_far_a_self_pair_lies_from_one_on_either_side() -> None:
    assert pairs.ratio([(1.0, 1.0, 1.2), (1.0, 1.0, 0.8), (1.0, 1.0, 1.1)]).noise == pytest.approx(0.2)


def test_runs_are_timed_in_turn_after_two_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def peer() -> None:
        order.append("peer")

    def ours() -> None:
        order.append("ours")

    pairs.compare(ours, peer, 2)
    assert order == ["peer", "ours"] * 2 + ["peer", "ours", "peer"] * 2
