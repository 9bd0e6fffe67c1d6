"""Random states: they come back, and each rank has its own."""

import random

import numpy
import torch

from phicore.training.randomness import kept_random, random_json, random_tensors, restore_random, seed_everything


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.randn(), float(torch.rand(()))]


def test_random_states_come_back() -> None:
    draw()  # leaves half of a pair of normal numbers behind in both generators
    states = random_tensors(), random_json()
    expected = [draw(), draw()]
    restore_random(*states)
    assert [draw(), draw()] == expected


def test_seeds_tell_steps_and_ranks_apart() -> None:
    def after(*place: int) -> list[float]:
        seed_everything(*place)
        return draw()

    assert after(3, 5, 2) == after(3, 5, 2)
    seen = [after(*place) for place in ((3, 0, 0), (3, 0, 1), (3, 1, 0), (4, 0, 0), (4, 0, 1), (3, 1, 1))]
    for column in zip(*seen, strict=True):
        assert len(set(column)) == len(seen)
    torch.manual_seed(3)  # rank 0 of a new run takes the seed itself
    assert seen[0][-1] == float(torch.rand(()))


def test_what_is_drawn_within_leaves_no_trace() -> None:
    draw()
    states = random_tensors(), random_json()
    expected = draw()
    restore_random(*states)
    try:
        with kept_random():
            draw()
            raise KeyError
    except KeyError:
        pass
    assert draw() == expected
