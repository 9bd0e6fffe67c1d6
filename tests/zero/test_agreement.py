"""Ranks that were given different things: an error on all that names the first difference, or rank 0's values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import phicore
from tests.zero.models import Net, farthest, weights


def make(named: Any, **options: Any) -> phicore.ZeroOptimizer:
    return phicore.ZeroOptimizer(named, torch.optim.AdamW, **{"lr": 1e-2, **options})


def on_rank_1(change: Callable[[Net], Any]) -> str:
    """The error when rank 1 does `change` and the others what is right."""
    model = Net()
    if dist.get_rank() == 1:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            change(model)
    else:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            make(model.named_parameters())
    return str(error.value)


def shuffled(model: Net) -> None:
    named = list(model.named_parameters())
    make([named[1], named[0], *named[2:]])


def missing(model: Net) -> None:
    make(list(model.named_parameters())[:-1])


def another_shape(model: Net) -> None:
    model.left = nn.Linear(37, 36)
    make(model.named_parameters())


def frozen(model: Net) -> None:
    model.first.bias.requires_grad_(False)
    make(model.named_parameters())


def another_rate(model: Net) -> None:
    make(model.named_parameters(), lr=1e-3)


def another_stage(model: Net) -> None:
    make(model.named_parameters(), stage=1)


def nothing(model: Net) -> None:
    make([])


def unnamed(model: Net) -> None:
    make(model.parameters())


def in_second_pair() -> str:
    pair = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][dist.get_rank() // 2]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make(Net().named_parameters(), lr=1 + dist.get_rank() % 2, process_group=pair)
    return str(error.value)


def test_ranks_of_a_group_are_named_as_among_all(ranks):
    found = ranks(4)(in_second_pair)
    for error in found[:2]:
        assert error.startswith("rank 1 has")
        assert "where rank 0 has" in error
    for error in found[2:]:
        assert error.startswith("rank 3 has")
        assert "where rank 2 has" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            shuffled,
            "rank 1 has first.bias (trained, [37], torch.float32) in parameter group 0 where rank 0 has first.w",
        ),
        (missing, "rank 1 has nothing more where rank 0 has head.bias (frozen"),
        (another_shape, "rank 1 has left.weight (trained, [36, 37]"),
        (frozen, "rank 1 has first.bias (frozen"),
        (another_rate, "lr=0.001"),
        (another_stage, "stage=1"),
        (nothing, "on rank 1: ZeroOptimizer got no parameters"),
        (unnamed, "on rank 1: expected (name, parameter), got Parameter"),
    ],
)
def test_the_first_difference_is_named_on_every_rank(ranks, change, message):
    messages = ranks(3)(on_rank_1, change)
    assert message in messages[0]
    assert messages[0] == messages[1] == messages[2]


def different_weights() -> bool:
    model = Net()
    right = weights(model)
    if dist.get_rank():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        model.head.bias.data = model.head.bias.data.repeat(2)[::2]  # not contiguous
        assert not model.head.bias.is_contiguous()
    make(model.named_parameters())
    return farthest(weights(model), weights(Net())) == farthest(right, weights(Net())) == 0


def test_every_rank_starts_from_rank_0s_values(ranks):
    assert all(ranks(3)(different_weights)) is True


def different_group() -> str:
    model = Net()
    named = list(model.named_parameters())
    optimizer = make(named[:2])
    with pytest.raises(ValueError, match="rank 2 has") as error:
        optimizer.add_param_group({"params": named[2:4], "lr": 0.1 * (dist.get_rank() == 2)})
    assert len(optimizer.param_groups) == 1
    return str(error.value)


def test_a_group_added_later_is_compared_too(ranks):
    assert len(set(ranks(3)(different_group))) == 1
