"""An overflow on one rank skips the step on all, and all lower the scale."""

import pytest
import torch
import torch.distributed as dist

import phicore
from phicore.zero import GradScaler
from tests.zero.models import Net, equal_parts, farthest, loss_sum, weights


def train(overflow_on: int | None, unscale: bool) -> tuple[list[float], list[float], float]:
    """Scale and distance from the start after each of three steps (the second may overflow), and the norm."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Net(torch.float16)
    optimizer = phicore.ZeroOptimizer(model.named_parameters(), torch.optim.AdamW, lr=1e-2, bucket_bytes=4000)
    scaler = GradScaler(device="cpu", init_scale=64.0, growth_interval=1000)
    scales, moved, norm = [], [], 0.0
    overflow = False

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        """Makes one element infinite, which one rank owns."""
        return grad.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.inf).half()) if overflow else grad

    model.head.weight.register_hook(spoil)
    for step in range(3):
        before = weights(model)
        x, y, _ = equal_parts(step, rank, world)[0]
        overflow = step == 1 and rank == overflow_on
        scaler.scale(loss_sum(model, x, y)).backward()
        if unscale:
            scaler.unscale_(optimizer)
            norm = float(optimizer.clip_grad_norm_(1e9))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        moved.append(farthest(before, weights(model)))
    return scales, moved, norm


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("overflow_on", [0, 2])
def test_an_overflow_on_one_rank_skips_on_all(ranks, overflow_on, unscale):
    for scales, moved, _ in ranks(3)(train, overflow_on, unscale):
        assert scales == [64.0, 32.0, 32.0]
        assert [distance > 0 for distance in moved] == [True, False, True]


def test_the_norm_is_that_of_unscaled_gradients(ranks):
    _, _, norm = ranks(3)(train, None, True)[0]
    model = Net(torch.float16)
    optimizer = phicore.ZeroOptimizer(model.named_parameters(), torch.optim.AdamW, lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(3):
            x, y, _ = equal_parts(step, rank, 3)[0]
            (loss_sum(model, x, y) / 3).backward()
        alone = float(optimizer.clip_grad_norm_(1e9))
        optimizer.step()
    assert norm == pytest.approx(alone, rel=0.01)  # float16 rounds differently at another scale


def test_without_ranks_and_disabled():
    for enabled in (True, False):
        model = torch.nn.Linear(2, 1)
        optimizer = phicore.ZeroOptimizer(model.named_parameters(), torch.optim.SGD, lr=0.5)
        scaler = GradScaler(device="cpu", init_scale=4.0, enabled=enabled)
        before = model.weight.detach().clone()
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert torch.allclose(before - 0.5, model.weight)


@pytest.mark.parametrize("early", ["unscale", "reduce", None])
def test_torchs_own_scaler_is_refused_before_ranks_part(early):
    """It would skip the step on the ranks that own an overflow alone, and the others would wait."""
    model = torch.nn.Linear(2, 1)
    optimizer = phicore.ZeroOptimizer(model.named_parameters(), torch.optim.SGD, lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = model.weight.detach().clone()
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    if early == "reduce":
        optimizer.finish_reduction()
    elif early == "unscale":
        scaler.unscale_(optimizer)
    with pytest.raises(TypeError, match=r"use phicore\.zero\.GradScaler"):
        scaler.step(optimizer)
    assert torch.equal(before, model.weight)
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)  # it is nothing then
    assert not torch.equal(before, model.weight)


def unscaled_between() -> str:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = phicore.ZeroOptimizer([("a", parameter)], torch.optim.SGD, stage=1, lr=0.5)
    scaler = GradScaler(device="cpu", init_scale=1024.0)
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError) as raised:
        scaler.scale(parameter.sum()).backward()
    return str(raised.value)


def test_a_pass_after_unscaling_is_an_error_in_stage_1(ranks):
    """Its reduction would have put all gradients back to what they were before, 1,024 times as large."""
    for text in ranks(2)(unscaled_between):
        assert "a gets another gradient after gradients were clipped or scaled" in text
