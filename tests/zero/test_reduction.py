"""Parameters that some ranks do not use, accumulation, and freezing: the right result, and no rank that waits."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import phicore
from phicore.zero.collectives import Collectives
from phicore.zero.layout import build_bucket, cut_pieces
from phicore.zero.reduction import GradientReducer
from phicore.zero.scratch import Scratch
from tests.zero.models import (
    Micro,
    Net,
    backward,
    batch,
    equal_parts,
    farthest,
    loss_sum,
    total_size,
    train_alone,
    train_here,
    unequal_parts,
    weights,
)

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}


def zero(model: nn.Module, stage: int = 2, bucket_bytes: int = 4000) -> phicore.ZeroOptimizer:
    return phicore.ZeroOptimizer(
        model.named_parameters(), torch.optim.AdamW, stage=stage, reduction="sum", bucket_bytes=bucket_bytes, **SETTINGS
    )


def plain(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **SETTINGS)


def branches(step: int, rank: int, world_size: int) -> list[Micro]:
    """A parameter is used on one rank only, by all but one, by none, and by one in one micro-batch only."""
    x, y = batch(step, size=4)
    if step == 0:
        return [(x, y, "left" if rank == 0 else "right")]
    if step == 1:
        return [(x, y, "right" if rank == 0 else "both")]
    if step == 2:
        return [(x, y, "right")]  # left.weight is used all the same: it is tied to last.weight
    if step == 3:
        return [(x, y, "none")] * 2
    if step == 4:
        return [(x, y, "left" if rank == place == 1 else "none") for place in range(3)]
    return [(x, y, "both" if rank == 0 else "left")] * 2


STEPS = 6


def unused(stage: int) -> float:
    here = train_here(branches, STEPS, lambda model: zero(model, stage))
    return farthest(here, train_alone(branches, STEPS, plain))


@pytest.mark.parametrize("stage", [1, 2])
def test_parameters_unused_on_some_ranks_or_all(each_world, stage):
    assert max(each_world(unused, stage)) < 1e-6


def left_out(step: int, rank: int, world_size: int) -> list[Micro]:
    """Rank 0 has no backward pass in step 1."""
    return [] if (step, rank) == (1, 0) else equal_parts(step, rank, world_size)


def no_gradient_at_all(stage: int) -> float:
    here = train_here(left_out, 3, lambda model: zero(model, stage), clip=1e9)
    return farthest(here, train_alone(left_out, 3, plain))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_rank_without_any_gradient(each_world, stage):
    assert max(each_world(no_gradient_at_all, stage)) < 1e-6


def accumulated(stage: int, no_sync: bool) -> float:
    model = Net()
    optimizer = zero(model, stage)
    for step in range(4):
        micros = unequal_parts(step, dist.get_rank(), dist.get_world_size())
        for place, (x, y, _) in enumerate(micros):
            last = place == len(micros) - 1
            with optimizer.no_sync() if no_sync and not last else nullcontext():
                (loss_sum(model, x, y) / total_size(unequal_parts, step, dist.get_world_size())).backward()
            gone = all(p.grad is None for p in model.parameters())
            assert gone == (stage == 2 and (last or not no_sync))
        optimizer.step()
    return farthest(weights(model), train_alone(unequal_parts, 4, plain))


@pytest.mark.parametrize("no_sync", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation_equals_the_single_large_batch(each_world, stage, no_sync):
    assert max(each_world(accumulated, stage, no_sync)) < 1e-6


def no_sync_throughout() -> float:
    """Gradients that no synchronised pass has carried are reduced by step."""
    model = Net()
    optimizer = zero(model)
    with optimizer.no_sync():
        backward(model, unequal_parts, 0, dist.get_rank(), dist.get_world_size())
    optimizer.step()
    return farthest(weights(model), train_alone(unequal_parts, 1, plain))


def test_step_reduces_what_no_sync_left(ranks):
    assert max(ranks(3)(no_sync_throughout)) < 1e-6


def scaled_afterwards() -> float:
    """Gradients of summed losses, divided by the number of examples once that is known."""
    world = dist.get_world_size()
    model = Net()
    optimizer = zero(model)
    for step in range(3):
        for x, y, _ in unequal_parts(step, dist.get_rank(), world):
            loss_sum(model, x, y).backward()
        optimizer.scale_gradients_(1 / total_size(unequal_parts, step, world))
        optimizer.step()
    return farthest(weights(model), train_alone(unequal_parts, 3, plain))


def test_gradients_can_be_divided_by_the_number_of_tokens_later(ranks):
    assert max(ranks(3)(scaled_afterwards)) < 1e-6


def change_trained(model: nn.Module, step: int) -> None:
    assert isinstance(model, Net)
    if step == 1:
        model.head.bias.requires_grad_(True)
    if step == 3:
        model.right.requires_grad_(False)


def unfrozen(stage: int) -> tuple[float, bool]:
    optimizers = []

    def make(model: nn.Module) -> phicore.ZeroOptimizer:
        optimizers.append(zero(model, stage))
        return optimizers[-1]

    here = train_here(equal_parts, 6, make, before=change_trained)
    state = optimizers[0].full_state_dict()
    names = state["param_groups"][0]["param_names"]
    return farthest(here, train_alone(equal_parts, 6, plain, before=change_trained)), names.index("head.bias") in state[
        "state"
    ]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_parameter_can_be_unfrozen_and_frozen_later(each_world, stage):
    for distance, has_state in each_world(unfrozen, stage):
        assert distance < 1e-6
        assert has_state


def unfrozen_on_one_rank() -> list[float]:
    model = Net()
    optimizer = zero(model)
    if dist.get_rank() == 1:
        model.head.bias.requires_grad_(True)
    backward(model, equal_parts, 0, dist.get_rank(), dist.get_world_size())
    optimizer.step()
    return model.head.bias.tolist()


def test_a_parameter_unfrozen_on_one_rank_moves_on_all(ranks):
    found = ranks(3)(unfrozen_on_one_rank)
    assert found[0] == found[1] == found[2] != Net().head.bias.tolist()


class Checkpointed(Net):
    """Recomputes all but one path, which shares its weights with the recomputed ones."""

    reentrant = False

    def forward(self, x: Tensor, branches: str = "both") -> Tensor:
        inside = checkpoint(super().forward, x.requires_grad_(), use_reentrant=self.reentrant)
        return inside + self.head(torch.tanh(self.first(x)))  # last, so that its backward pass comes first


class Reentrant(Checkpointed):
    """Its backward passes run within a backward pass, and come back to parameters that have had their gradient."""

    reentrant = True


def recomputed(stage: int, build: type[Checkpointed], bucket_bytes: int) -> float:
    here = train_here(unequal_parts, 3, lambda model: zero(model, stage, bucket_bytes), build)
    return farthest(here, train_alone(unequal_parts, 3, plain, build))


@pytest.mark.parametrize("bucket_bytes", [1, 10**9])
@pytest.mark.parametrize("build", [Checkpointed, Reentrant])
@pytest.mark.parametrize("stage", [1, 2])
def test_recomputed_activations(ranks, stage, build, bucket_bytes):
    assert max(ranks(3)(recomputed, stage, build, bucket_bytes)) < 1e-6


class Lent(nn.Module):
    """Has a weight that fills its bucket without padding, and gets two gradients of it in one pass, of which both have
    to wait: a bucket before it, of what no pass reaches, starts at the pass's end."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.middle = nn.Linear(13, 32), nn.Linear(32, 32, bias=False)
        self.head = nn.Linear(32, 5)
        self.unreached = nn.Linear(1, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor, branches: str = "both") -> Tensor:
        h = checkpoint(self.middle, torch.tanh(self.first(x)), use_reentrant=True)
        return self.head(self.middle(h))


def lent(stage: int) -> float:
    here = train_here(unequal_parts, 3, lambda model: zero(model, stage, bucket_bytes=1), Lent)
    return farthest(here, train_alone(unequal_parts, 3, plain, Lent))


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_that_are_their_buckets_may_come_twice(ranks, stage):
    assert max(ranks(2)(lent, stage)) < 1e-6


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_that_fills_its_bucket_is_sent_from_where_it_is(stage):
    weight = nn.Parameter(torch.ones(32, 32))
    bucket = build_bucket([("weight", weight)], 0, 2)
    cut_pieces(bucket, 0)
    places, sent = [], []
    weight.register_post_accumulate_grad_hook(lambda p: places.append(p.grad.data_ptr()))

    class Recorded(Collectives):
        def reduce(self, full: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
            sent.append(full.data_ptr())
            return lambda: 2 * full[:512]

        def gather(self, full: Tensor) -> Callable[[], None]:
            return lambda: None

    reducer = GradientReducer(stage, 0.5, lambda device: Recorded(Scratch(0)))
    reducer.add([bucket])
    for _ in range(2):
        (3 * weight).sum().backward()
    reducer.finish()
    assert sent == places
    assert bucket.grad.tolist() == [6.0] * 512


def zeroed(bucket_bytes: int) -> float:
    """Gradients that zero_grad drops, whole or halfway, leave nothing behind."""
    model = Net()
    optimizer = zero(model, bucket_bytes=bucket_bytes)
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(2):
        loss_sum(model, *batch(50)).backward()
        optimizer.zero_grad()
        model.left.weight.register_hook(fail := Fail())
        with pytest.raises(RuntimeError, match="halfway"):
            loss_sum(model, *batch(50)).backward()
        fail.armed = False
        optimizer.zero_grad()
        backward(model, equal_parts, step, rank, world)
        optimizer.step()
    return farthest(weights(model), train_alone(equal_parts, 2, plain))


class Fail:
    armed = True

    def __call__(self, grad: Tensor) -> None:
        if self.armed:
            raise RuntimeError("halfway")


@pytest.mark.parametrize("bucket_bytes", [1, 10**9])
def test_zero_grad_leaves_nothing_behind(ranks, bucket_bytes):
    assert max(ranks(3)(zeroed, bucket_bytes)) < 1e-6
