"""Hooks on optimizers are called as of one that is torch's own: once, with the optimizer that users have."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import phicore


def made(kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> phicore.ZeroOptimizer:
    return phicore.ZeroOptimizer([("a", nn.Parameter(torch.ones(3)))], kind, lr=0.1)


@pytest.fixture
def stepped() -> Iterator[list[tuple[str, str]]]:
    """What steps the hooks for all optimizers have seen."""
    seen: list[tuple[str, str]] = []
    handles = [
        register(lambda optimizer, *_, when=when: seen.append((when, type(optimizer).__name__)))
        for when, register in (
            ("before", register_optimizer_step_pre_hook),
            ("after", register_optimizer_step_post_hook),
        )
    ]
    yield seen
    for handle in handles:
        handle.remove()


def test_hooks_for_all_optimizers_see_a_step_once(stepped):
    optimizer = made()
    assert stepped == []  # of the trial whether it is element-wise
    optimizer.register_step_pre_hook(lambda *_: stepped.append(("before", "own")))
    optimizer.register_step_post_hook(lambda *_: stepped.append(("after", "own")))
    optimizer.step()
    assert stepped == [("before", "ZeroOptimizer"), ("before", "own"), ("after", "own"), ("after", "ZeroOptimizer")]


def test_what_others_put_around_a_step_is_called():
    """It has all the marks of the step within."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))])  # from here on torch's step has its hooks

    class Wrapped(torch.optim.SGD):
        steps = 0

        @functools.wraps(torch.optim.SGD.step)
        def step(self, *arguments: Any) -> Any:
            Wrapped.steps += 1
            return super().step(*arguments)

    optimizer = made(Wrapped)
    before = Wrapped.steps
    optimizer.step()
    assert Wrapped.steps == before + 1


def test_hooks_on_state_dicts_are_called_in_torchs_order_and_may_change_them():
    def seen_by(optimizer: torch.optim.Optimizer) -> list[str]:
        seen = []
        optimizer.register_state_dict_pre_hook(lambda given: seen.append(f"before state_dict {given is optimizer}"))
        optimizer.register_state_dict_post_hook(lambda _, state: {**state, "epoch": 3})
        optimizer.register_state_dict_post_hook(lambda _, state: seen.append(f"after state_dict {state['epoch']}"))
        state = optimizer.state_dict()
        state["param_groups"][0]["lr"] = 0.2
        optimizer.register_load_state_dict_pre_hook(lambda _, given: seen.append(f"before load {given.pop('epoch')}"))
        optimizer.register_load_state_dict_pre_hook(lambda _, given: {**given, "changed": True})
        optimizer.register_load_state_dict_pre_hook(lambda _, given: seen.append(f"changed {given['changed']}"))
        optimizer.register_load_state_dict_post_hook(
            lambda given: seen.append(f"after load {given.param_groups[0]['lr']}")
        )
        optimizer.load_state_dict(state)
        assert state["epoch"] == 3  # what was given stays as it was
        return seen

    ours, theirs = seen_by(made()), seen_by(torch.optim.AdamW([nn.Parameter(torch.ones(3))], lr=0.1))
    assert ours == theirs
    assert len(ours) == 5
