"""ZeroOptimizer trains as one process does."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import phicore
from tests.zero.models import (
    Net,
    batch,
    equal_parts,
    farthest,
    loss_sum,
    train_alone,
    train_here,
    unequal_parts,
    weights,
)

OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True, "foreach": True}),
    (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.05}),
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "foreach": True}),
    (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.9, "centered": True}),
    (torch.optim.Adagrad, {"lr": 1e-2}),
    (torch.optim.NAdam, {"lr": 1e-2}),
    (torch.optim.Adadelta, {}),
]
ADAMW = OPTIMIZERS[0]


def zero(model: nn.Module, kind: Any = ADAMW, **options: Any) -> phicore.ZeroOptimizer:
    """A ZeroOptimizer with small buckets that sums over ranks."""
    optimizer_class, settings = kind
    return phicore.ZeroOptimizer(
        model.named_parameters(), optimizer_class, **{"reduction": "sum", "bucket_bytes": 4000, **settings, **options}
    )


def plain(model: nn.Module, kind: Any = ADAMW) -> torch.optim.Optimizer:
    optimizer_class, settings = kind
    return optimizer_class(model.parameters(), **settings)


def fifty_steps(stage: int) -> float:
    here = train_here(equal_parts, 50, lambda model: zero(model, stage=stage), clip=1.0)
    alone = train_alone(equal_parts, 50, plain, clip=1.0)
    return farthest(here, alone)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_fifty_steps_equal_one_process(ranks, world_size, stage):
    assert max(ranks(world_size)(fifty_steps, stage)) < 1e-6


def each_optimizer() -> dict[str, float]:
    found = {}
    for kind in OPTIMIZERS:
        alone = train_alone(unequal_parts, 3, lambda model, kind=kind: plain(model, kind))
        for stage in (1, 2):
            here = train_here(unequal_parts, 3, lambda model, kind=kind, stage=stage: zero(model, kind, stage=stage))
            found[f"{kind[0].__name__} {kind[1]} stage {stage}"] = farthest(here, alone)
    return found


def test_every_optimizer_with_unequal_accumulated_batches(ranks):
    for found in ranks(3)(each_optimizer):
        assert len(found) == 2 * len(OPTIMIZERS)
        assert {name: error for name, error in found.items() if not error < 1e-6} == {}


def against_ddp(stage: int, bucket_bytes: int) -> dict[str, bool]:
    models = [Net(), Net()]
    ddp = DistributedDataParallel(models[0])
    optimizers = [plain(models[0]), zero(models[1], stage=stage, reduction="mean", bucket_bytes=bucket_bytes)]
    for step in range(50):
        x, y = batch(step + 1000 * dist.get_rank())
        for model, optimizer in zip((ddp, models[1]), optimizers, strict=True):
            optimizer.zero_grad()
            loss_sum(model, x, y).backward()
            optimizer.step()
    return {
        name: torch.equal(p, q)
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True)
    }


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("bucket_bytes", [1, 25 * 2**20])
def test_two_ranks_equal_ddp_bit_for_bit(ranks, stage, bucket_bytes):
    for equal in ranks(2)(against_ddp, stage, bucket_bytes):
        assert all(equal.values()), equal


def bucket_sizes() -> list[float]:
    runs = [
        train_here(unequal_parts, 5, lambda model, size=size: zero(model, bucket_bytes=size))
        for size in (1, 3000, 10**9)
    ]
    return [farthest(runs[0], run) for run in runs[1:]]


def test_bucket_sizes_change_no_bit(each_world):
    assert each_world(bucket_sizes) == [[0.0, 0.0]] * each_world.world_size


def groups(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.dim() > 1], "weight_decay": 0.3},
        {"params": []},
        {"params": [(n, p) for n, p in named if p.dim() == 1], "weight_decay": 0.0, "lr": 3e-2},
    ]


def groups_and_schedule() -> float:
    world = dist.get_world_size()
    results = []
    for distributed in (True, False):
        model = Net()
        given = groups(model)
        if distributed:
            optimizer: torch.optim.Optimizer = phicore.ZeroOptimizer(given, torch.optim.AdamW, lr=1e-2, reduction="sum")
        else:
            bare = [{**group, "params": [p for _, p in group["params"]]} for group in given]
            optimizer = torch.optim.AdamW(bare, lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(5):
            for rank in [dist.get_rank()] if distributed else range(world):
                x, y, _ = equal_parts(step, rank, world)[0]
                (loss_sum(model, x, y) / 12).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2 / 6, 1e-2 / 6, 3e-2 / 6])
        results.append(weights(model))
    return farthest(*results)


def test_groups_keep_their_settings_and_follow_a_scheduler(each_world):
    assert max(each_world(groups_and_schedule)) < 1e-6


def half_precision(dtype: torch.dtype, stage: int) -> bool:
    """Against masters kept by hand: the sum over ranks in float32, AdamW in float32, and one rounding at the end."""
    world = dist.get_world_size()
    model, reference = Net(dtype), Net(dtype)
    optimizer = zero(model, stage=stage)
    masters = {n: nn.Parameter(p.detach().float()) for n, p in reference.named_parameters() if p.requires_grad}
    by_hand = torch.optim.AdamW(masters.values(), **ADAMW[1])
    for step in range(5):
        x, y, _ = equal_parts(step, dist.get_rank(), world)[0]
        loss_sum(model, x, y).backward()
        optimizer.step()
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for rank in range(world):
            x, y, _ = equal_parts(step, rank, world)[0]
            reference.zero_grad()
            loss_sum(reference, x, y).backward()
            for name, p in reference.named_parameters():
                if p.requires_grad:
                    masters[name].grad += p.grad.float()
        by_hand.step()
        with torch.no_grad():
            for name, p in reference.named_parameters():
                if p.requires_grad:
                    p.copy_(masters[name])
    found = optimizer.full_state_dict()["masters"]
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(masters, torch.float32)
    assert farthest(found, {name: master.detach() for name, master in masters.items()}) == 0
    return farthest(weights(model), weights(reference)) == 0


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_have_float32_masters(each_world, dtype, stage):
    assert all(each_world(half_precision, dtype, stage))


def weights_from_outside() -> float:
    """A model's weights loaded after the optimizer was made, which masters must take over."""
    other = copy.deepcopy(Net(torch.bfloat16))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-0.7)
    runs = []
    for load_first in (True, False):
        model = Net(torch.bfloat16)
        if load_first:
            model.load_state_dict(other.state_dict())
        optimizer = zero(model)
        if not load_first:
            model.load_state_dict(other.state_dict())
        x, y, _ = equal_parts(0, dist.get_rank(), dist.get_world_size())[0]
        loss_sum(model, x, y).backward()
        optimizer.step()
        runs.append(weights(model))
    return farthest(*runs)


def test_masters_follow_weights_that_were_loaded_later(ranks):
    assert ranks(3)(weights_from_outside) == [0.0] * 3


def norms() -> list[tuple[float, float]]:
    world, rank = dist.get_world_size(), dist.get_rank()
    found = []
    for norm_type in (2.0, 1.0, float("inf")):
        model, alone = Net(), Net()
        optimizer = zero(model)
        x, y, _ = equal_parts(0, rank, world)[0]
        loss_sum(model, x, y).backward()
        loss_sum(alone, *batch(0)).backward()
        norm = optimizer.clip_grad_norm_(0.5, norm_type)
        exact = nn.utils.clip_grad_norm_(alone.parameters(), 0.5, norm_type)
        found.append((float(norm), float(exact)))
        assert float(optimizer.clip_grad_norm_(1e9, norm_type)) == pytest.approx(0.5, rel=1e-5)  # it did clip
    return found


def test_clipping_returns_the_norm_before_it_on_every_rank(each_world):
    results = each_world(norms)
    assert all(result == results[0] for result in results)
    for norm, exact in results[0]:
        assert norm == pytest.approx(exact, rel=1e-6)


def not_finite() -> str:
    model = Net()
    optimizer = zero(model)
    x, y, _ = equal_parts(0, dist.get_rank(), dist.get_world_size())[0]
    loss_sum(model, x * (float("nan") if dist.get_rank() == 1 else 1.0), y).backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match="norm of the gradients is nan") as error:
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert farthest(before, weights(model)) == 0
    return str(error.value)


def test_a_norm_that_is_not_finite_on_one_rank_is_an_error_on_all(ranks):
    assert len(set(ranks(3)(not_finite))) == 1


def added_group(stage: int) -> float:
    model, alone = Net(), Net()
    world = dist.get_world_size()
    body = [(n, p) for n, p in model.named_parameters() if not n.startswith("head")]
    optimizer = phicore.ZeroOptimizer(body, torch.optim.AdamW, lr=1e-2, reduction="sum", stage=stage)
    reference = torch.optim.AdamW([p for n, p in alone.named_parameters() if not n.startswith("head")], lr=1e-2)
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": [("head.weight", model.head.weight)], "lr": 5e-2})
            reference.add_param_group({"params": [alone.head.weight], "lr": 5e-2})
            model.head.weight.grad = alone.head.weight.grad = None
        for rank in range(world):
            x, y, _ = equal_parts(step, rank, world)[0]
            loss_sum(alone, x, y).backward()
            if rank == dist.get_rank():
                loss_sum(model, x, y).backward()
        reference.step()
        reference.zero_grad()
        optimizer.step()
    return farthest(weights(model), weights(alone))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_group_added_later_trains(ranks, stage):
    assert max(ranks(3)(added_group, stage)) < 1e-6


def in_subgroups() -> float:
    """Ranks 0, 1 and ranks 2, 3 train apart, on different batches."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    pair, place = divmod(dist.get_rank(), 2)
    model, alone = Net(), Net()
    with torch.no_grad():
        model.first.weight += dist.get_rank()  # the group's first rank has the right one
        alone.first.weight += 2 * pair
    optimizer = zero(model, process_group=pairs[pair])
    reference = plain(alone)
    for step in range(3):
        reference.zero_grad()
        for part in range(2):
            x, y, _ = equal_parts(step + 10 * pair, part, 2)[0]
            loss_sum(alone, x, y).backward()
            if part == place:
                loss_sum(model, x, y).backward()
        norm = nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        assert float(optimizer.clip_grad_norm_(1.0)) == pytest.approx(float(norm), rel=1e-5)
        optimizer.step()
        reference.step()
    full, expected = optimizer.full_state_dict(), reference.state_dict()
    assert full["state"].keys() == expected["state"].keys()
    return farthest(weights(model), weights(alone))


def test_groups_of_ranks_train_apart(ranks):
    assert max(ranks(4)(in_subgroups)) < 1e-6


def test_alone_it_is_the_inner_optimizer():
    for kind in OPTIMIZERS:
        model, alone = Net(), Net()
        optimizer, reference = zero(model, kind), plain(alone, kind)

        def closure(model=model):
            loss = loss_sum(model, *batch(0))
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == loss_sum(alone, *batch(0)).item()
        reference.zero_grad()
        loss_sum(alone, *batch(0)).backward()
        reference.step()
        assert farthest(weights(model), weights(alone)) < 1e-7, kind


def test_gradients_written_to_after_their_reduction_are_an_error():
    model = Net()
    optimizer = zero(model, stage=1)
    loss_sum(model, *batch(0)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match="use this optimizer's clip_grad_norm_"):
        optimizer.step()


def under_ddp() -> str:
    model = nn.Linear(4, 2)
    ddp = DistributedDataParallel(model)
    optimizer = zero(model, stage=1)
    ddp(torch.ones(3, 4)).sum().backward()
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    return str(raised.value)


def test_a_model_in_distributed_data_parallel_is_an_error(ranks):
    """Both would reduce each gradient."""
    for text in ranks(2)(under_ddp):
        assert "take the model out of a DistributedDataParallel, in whose place this optimizer reduces" in text


def test_a_model_that_was_moved_afterwards_is_an_error():
    model = Net()
    optimizer = zero(model)
    model.double()
    loss_sum(model, *batch(0)).backward()
    with pytest.raises(RuntimeError, match=r"\.weight has other memory than when this optimizer was made"):
        optimizer.step()


def test_bad_arguments_are_named():
    model = Net()
    named = list(model.named_parameters())
    make = phicore.ZeroOptimizer
    with pytest.raises(ValueError, match="no parameters"):
        make([], torch.optim.AdamW)
    with pytest.raises(TypeError, match=r"model\.named_parameters\(\)"):
        make(model.parameters(), torch.optim.AdamW)
    with pytest.raises(ValueError, match="stage must be 1"):
        make(named, torch.optim.AdamW, stage=3)
    with pytest.raises(ValueError, match='reduction must be "mean"'):
        make(named, torch.optim.AdamW, reduction="max")
    with pytest.raises(ValueError, match=r"head\.weight is given twice"):
        make([{"params": named}, {"params": named[-2:]}], torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"scale is torch\.complex64"):
        make([("scale", nn.Parameter(torch.ones(2, dtype=torch.complex64)))], torch.optim.AdamW)
    with pytest.raises(ValueError, match="cannot keep them as zeros"):
        make(named, torch.optim.AdamW).zero_grad(set_to_none=False)
    optimizer = make(named, torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"first\.weight is in another ZeroOptimizer"):
        make(named, torch.optim.AdamW)
    del optimizer
    make(named, torch.optim.AdamW)  # the first is gone, with its hooks
    untied = Net()
    untied.last.weight = nn.Parameter(untied.left.weight.data)
    with pytest.raises(ValueError, match=r"left\.weight and last\.weight share memory"):
        make(untied.named_parameters(), torch.optim.AdamW)


def test_a_parameter_that_shares_memory_with_itself_is_named():
    """torch's optimizers refuse it too, at their first step."""
    scale = nn.Parameter(torch.ones(2, 1).expand(2, 3))
    with pytest.raises(ValueError, match=r"scale has elements that share memory"):
        phicore.ZeroOptimizer([("scale", scale)], torch.optim.AdamW)
    kept = nn.Parameter(torch.ones(3).expand(1, 3))  # one row: each element is its own
    phicore.ZeroOptimizer([("scale", kept)], torch.optim.AdamW)


def test_groups_without_trained_parameters():
    model = Net()
    model.requires_grad_(False)
    optimizer = zero(model)
    before = weights(model)
    assert float(optimizer.clip_grad_norm_(1.0)) == 0.0
    optimizer.step()
    assert farthest(before, weights(model)) == 0
    assert optimizer.full_state_dict()["state"] == {}
