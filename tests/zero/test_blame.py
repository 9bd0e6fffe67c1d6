"""Which rank's gradients were not finite, wherever in a bucket and whichever rank sums them."""

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import phicore
from phicore.zero import collectives
from phicore.zero.scratch import Scratch


def finite_by_case(stage: int, backend: str) -> list[bool]:
    """Where rank 1 gives something that is not finite at either end of the parameters, twice the largest number, or
    nothing of the kind, in turn, and memory of buckets holds NaNs before."""
    found = []
    shapes = {"a": (7,), "b": (3, 40)}  # padded, within the bucket and at its end
    named = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    take = collectives._Gloo.take
    with (
        mock.patch.object(collectives, "backend", return_value=backend),
        mock.patch.object(Scratch, "take", lambda _, like: torch.full_like(like, math.nan)),
        mock.patch.object(collectives._Gloo, "take", lambda self, like: take(self, like).fill_(math.nan)),
    ):
        optimizer = phicore.ZeroOptimizer(named.items(), torch.optim.SGD, stage=stage, reduction="sum", lr=0.1)
        for place, value in ((0, math.nan), (-1, math.inf), (0, 3e38), (-1, -math.inf), (0, 1.0)):
            factor = torch.ones(127)
            factor[place] = value if dist.get_rank() == 1 or value == 3e38 else 1.0
            (torch.cat([p.flatten() for p in named.values()]) * factor).sum().backward()
            optimizer.clip_grad_norm_(math.inf)
            found.append(optimizer.own_gradients_were_finite())
            optimizer.zero_grad()
            assert optimizer.own_gradients_were_finite()
    return found


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("backend", ["gloo", "one that sums itself"])
def test_the_rank_that_gave_it_knows_and_no_other(each_world, stage, backend):
    found = each_world(finite_by_case, stage, backend)
    assert found.pop(1) == [False, False, True, False, True]
    assert found == [[True] * 5] * (each_world.world_size - 1)
