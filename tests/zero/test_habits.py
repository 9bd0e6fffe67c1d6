"""What users of torch.optim are used to: ZeroOptimizer does the same, or says that it does not."""

import collections
import copy
import gc
import math
import pickle
import sys
import typing
import weakref
from typing import get_type_hints
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import phicore
from tests.zero.models import parameters, sgd

STAGES = pytest.mark.parametrize("stage", [1, 2])


def values(named: dict[str, nn.Parameter]) -> list[float]:
    return [float(p.detach().flatten()[0]) for p in named.values()]


# ===== clipping =====


def norms_of_nan() -> list[tuple[float, bool]]:
    """The inf-norm where one element, of the first rank's shard or the last one's, is NaN or inf."""
    found = []
    for place in (0, -1):
        for bad in (math.nan, math.inf):
            named = parameters((600,))
            optimizer = sgd(named)
            weight = torch.ones(600)
            weight[place] = bad
            (named["a"] * weight).sum().backward()
            with pytest.raises(RuntimeError, match="so they cannot be clipped"):
                optimizer.clip_grad_norm_(1.0, math.inf, error_if_nonfinite=True)
            found.append(float(optimizer.clip_grad_norm_(1.0, "inf")))
    return found


def test_a_nan_reaches_the_largest_element_on_every_rank(each_world):
    for found in each_world(norms_of_nan):
        assert [math.isnan(norm) for norm in found] == [True, False, True, False]
        assert found[1] == found[3] == math.inf


@pytest.mark.parametrize("norm_type", [0, -math.inf, math.nan])
def test_a_norm_type_that_is_none_is_named(norm_type):
    with pytest.raises(ValueError, match="norm_type must be above 0 or inf, got"):
        sgd(parameters((2,))).clip_grad_norm_(1.0, norm_type)


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_a_limit_that_turns_gradients_around_or_away_is_named(max_norm):
    with pytest.raises(ValueError, match=r"max_norm must be at least 0 .*, got"):
        sgd(parameters((2,))).clip_grad_norm_(max_norm)


def scaled_between(stage: int) -> str | float:
    named = parameters((4,))
    optimizer = sgd(named, stage)
    named["a"].sum().backward()
    optimizer.scale_gradients_(0.5)
    try:
        named["a"].sum().backward()
    except RuntimeError as error:
        return str(error)
    optimizer.step()
    return values(named)[0]


def test_a_pass_after_scaling_adds_to_what_was_scaled_or_is_an_error(ranks):
    assert ranks(2)(scaled_between, 2) == [-0.5] * 2
    assert all("clip once, before step, or use stage 2" in text for text in ranks(2)(scaled_between, 1))


def test_a_pass_after_scaling_alone_with_16_bit_parameters():
    """Gradients of these are reduced alone, too."""
    found = {}
    for stage in (1, 2):
        named = {"a": nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
        optimizer = sgd(named, stage)
        named["a"].sum().backward()
        optimizer.scale_gradients_(0.5)
        try:
            named["a"].sum().backward()
            optimizer.step()
            found[stage] = values(named)
        except RuntimeError as error:
            found[stage] = str(error)
    assert found[2] == [-0.5]
    assert "clip once, before step, or use stage 2" in found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_in_the_place_of_another_counts(dtype):
    """As recipes that restart an optimizer have it: optimizer.state = defaultdict(dict)."""
    found = []
    for restarted in (False, True):
        named = {"a": nn.Parameter(torch.ones(4, dtype=dtype))}
        optimizer = phicore.ZeroOptimizer(named.items(), torch.optim.AdamW, lr=0.5)
        for grad in (1.0, -0.25):
            if restarted:
                optimizer.state = collections.defaultdict(dict)
            (named["a"] * grad).sum().backward()
            optimizer.step()
        found.append(values(named))
        assert float(optimizer.state_dict()["state"]["a"]["step"]) == (1 if restarted else 2)
    assert found[0] != found[1] == pytest.approx([1.0 - 0.5 + 0.5], abs=0.02)  # first steps of AdamW: of size lr


def scaled_and_reduced_again(stage: int, again: str, dtype: torch.dtype) -> list[float]:
    named = {name: nn.Parameter(p.detach().to(dtype)) for name, p in parameters((4,), (3,)).items()}
    optimizer = sgd({"a": named["a"]}, stage)
    (named["a"].sum() + named["b"].sum()).backward()
    optimizer.scale_gradients_(0.5)
    if again == "no_sync":
        with optimizer.no_sync():
            pass
    else:
        optimizer.add_param_group({"params": [("b", named["b"])]})
    optimizer.step()
    return values(named)


@STAGES
@pytest.mark.parametrize("again", ["no_sync", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_round_without_a_pass_leaves_what_was_scaled(ranks, stage, again, dtype):
    expected = [0.5, 1.0 if again == "no_sync" else 0.0]
    assert ranks(2)(scaled_and_reduced_again, stage, again, dtype) == [expected] * 2
    assert scaled_and_reduced_again(stage, again, dtype) == expected


# ===== gradients that come and go =====


def dropped_through_the_model(stage: int) -> list[float]:
    named = parameters((3,), (3,))
    optimizer = sgd(named, stage)
    for kind in ("all", "one between passes", "one after clipping"):
        (named["a"].sum() + named["b"].sum()).backward()
        if kind == "one after clipping":
            optimizer.clip_grad_norm_(math.inf)
        named["b"].grad = None
        if kind == "all":
            named["a"].grad = None
        elif kind == "one between passes":
            named["a"].sum().backward()
        optimizer.step()
    return values(named)


def test_gradients_that_are_taken_away_do_not_count(ranks):
    """In stage 2 they are not there to be taken, which the class says."""
    expected = [-2.0, 1.0]  # a: nothing, two passes' 2, 1
    assert ranks(2)(dropped_through_the_model, 1) == [expected] * 2
    assert dropped_through_the_model(1) == dropped_through_the_model(2) == expected  # alone, in both


def group_added_between(stage: int) -> list[float]:
    named = parameters((3,), (5,))
    optimizer = sgd({"a": named["a"]}, stage)
    (named["a"].sum() + named["b"].sum()).backward()
    optimizer.add_param_group({"params": [("b", named["b"])]})
    optimizer.step()
    return values(named)


@STAGES
def test_a_group_that_is_added_between_pass_and_step_counts(each_world, stage):
    assert each_world(group_added_between, stage) == [[0.0, 0.0]] * each_world.world_size
    assert group_added_between(stage) == [0.0, 0.0]


def unfrozen_for_a_pass(stage: int) -> list[float]:
    found = []
    for late in (False, True):
        named = parameters((3,), (5,))
        named["b"].requires_grad_(False)
        optimizer = sgd(named, stage)
        if late:
            named["a"].sum().backward()
            optimizer.clip_grad_norm_(math.inf)
        named["b"].requires_grad_(True)
        (named["b"].sum() if late else named["a"].sum() + named["b"].sum()).backward()
        if not late:
            named["b"].requires_grad_(False)
        optimizer.step()
        found += values(named)
    return found


@STAGES
def test_a_parameter_that_is_unfrozen_for_one_pass_or_after_clipping(ranks, stage):
    assert ranks(2)(unfrozen_for_a_pass, stage) == [[0.0] * 4] * 2
    assert unfrozen_for_a_pass(stage) == [0.0] * 4


def unfrozen_on_one_rank_after_clipping(stage: int) -> list[float]:
    named = parameters((3,), (5,))
    named["b"].requires_grad_(False)
    optimizer = sgd(named, stage)
    named["a"].sum().backward()
    optimizer.clip_grad_norm_(math.inf)
    if dist.get_rank() == 1:
        named["b"].requires_grad_(True)
    optimizer.step()
    (named["a"].sum() + named["b"].sum()).backward()
    optimizer.step()
    return values(named)


@STAGES
def test_a_parameter_that_one_rank_unfreezes_after_clipping_stops_nobody(ranks, stage):
    """Its gradient there counts: the mean over two ranks, of which one has it."""
    assert ranks(2)(unfrozen_on_one_rank_after_clipping, stage) == [[-1.0, 0.5]] * 2


def overflowed_once() -> tuple[float, float]:
    named = parameters((4,))
    optimizer = sgd(named)
    scaler = phicore.zero.GradScaler(device="cpu", init_scale=8.0, growth_interval=100)
    for factor in (math.inf if dist.is_initialized() and dist.get_rank() == 1 else 1.0, 1.0):
        scaler.scale((named["a"] * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    return values(named)[0], scaler.get_scale()


def test_an_overflow_does_not_stay_for_the_next_step(ranks):
    assert ranks(2)(overflowed_once) == [(0.0, 4.0)] * 2


# ===== states =====


def scalar_parameters(stage: int) -> float:
    """A parameter of shape [], as CLIP's logit_scale: its state goes to a plain optimizer and back."""
    named, plain = parameters((), (3,)), parameters((), (3,))
    reference = torch.optim.NAdam(plain.values(), lr=0.1)
    optimizer = phicore.ZeroOptimizer(named.items(), torch.optim.NAdam, stage=stage, lr=0.1)
    for step in range(6):
        for those, which in ((named, optimizer), (plain, reference)):
            ((those["a"] * those["b"]).square().sum() * (step + 1)).backward()
            which.step()
            which.zero_grad()
        if step in (1, 3):
            whole = optimizer.full_state_dict()
            other = torch.optim.NAdam(plain.values(), lr=0.1)
            other.load_state_dict(whole)
            optimizer.load_state_dict(whole if step == 1 else reference.state_dict())
            reference = other if step == 1 else reference
    return max(float((p - q).abs().max()) for p, q in zip(named.values(), plain.values(), strict=True))


@STAGES
def test_the_state_of_a_scalar_parameter(ranks, stage):
    assert max(ranks(2)(scalar_parameters, stage)) < 1e-6
    assert scalar_parameters(stage) < 1e-6


def test_a_whole_state_is_a_snapshot():
    named = parameters((3,))
    optimizer = phicore.ZeroOptimizer(named.items(), torch.optim.AdamW, lr=torch.tensor(0.1))
    for _ in range(3):
        named["a"].sum().backward()
        optimizer.step()
    kept = optimizer.full_state_dict()
    named["a"].sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"].fill_(7.0)
    assert float(kept["state"][0]["step"]) == 3
    assert float(kept["param_groups"][0]["lr"]) == pytest.approx(0.1)
    optimizer.load_state_dict(kept)
    optimizer.param_groups[0]["lr"].fill_(5.0)
    assert float(kept["param_groups"][0]["lr"]) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_states_of_older_torch_load(kind):
    """Momentum that was never made is None there, and steps are numbers."""
    named, plain = parameters((3,)), parameters((3,))
    options = {"lr": 0.1, "momentum": 0.9} if kind is torch.optim.SGD else {"lr": 0.1}
    reference = kind(plain.values(), **options)
    plain["a"].grad = torch.ones(3)
    if kind is torch.optim.AdamW:
        reference.step()
    state = reference.state_dict()
    state["state"] = {0: {"momentum_buffer": None}} if kind is torch.optim.SGD else state["state"]
    if kind is torch.optim.AdamW:
        state["state"][0]["step"] = 1
    optimizer = phicore.ZeroOptimizer(named.items(), kind, **options)
    optimizer.load_state_dict(state)
    with torch.no_grad():
        named["a"].copy_(plain["a"])
    if kind is torch.optim.AdamW:
        state["state"][0]["step"] = torch.tensor(1.0)
    reference.load_state_dict(state)
    named["a"].sum().backward()
    reference.step()
    optimizer.step()
    torch.testing.assert_close(named["a"], plain["a"])


def test_copies_are_refused():
    optimizer = sgd(parameters((3,)))
    with pytest.raises(TypeError, match="take its full_state_dict"):
        copy.deepcopy(optimizer)
    with pytest.raises(TypeError, match="save its state_dict"):
        pickle.dumps(optimizer)


# ===== steps =====


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 keeps no overloads")
def test_a_step_is_typed_as_torchs_are():
    """A loss where there is a closure, None where there is none."""
    theirs, ours = (
        [get_type_hints(form) for form in typing.get_overloads(kind.step)]
        for kind in (torch.optim.Optimizer, phicore.ZeroOptimizer)
    )
    assert ours == theirs != []
    assert get_type_hints(phicore.ZeroOptimizer.step)["return"] == float | None


def closed_over(stage: int) -> tuple[float, float | None, list[float]]:
    named = parameters((3,))
    optimizer = sgd(named, stage)
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        loss = named["a"].sum() * (1 + (dist.get_rank() if dist.is_initialized() else 0))
        loss.backward()
        return loss.item()

    loss = optimizer.step(closure)
    assert calls == [True]
    return loss, optimizer.step(), values(named)


@STAGES
def test_a_step_returns_this_ranks_loss_of_its_closure(ranks, stage):
    assert closed_over(stage) == (3.0, None, [0.0])
    assert ranks(2)(closed_over, stage) == [(3.0, None, [-0.5]), (6.0, None, [-0.5])]


# ===== lives =====


@STAGES
def test_model_and_optimizer_are_freed(stage):
    model = nn.Linear(4, 4)
    optimizer = phicore.ZeroOptimizer(model.named_parameters(), torch.optim.AdamW, stage=stage)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    gone = weakref.ref(model.weight), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_an_optimizer_that_is_older_than_the_process_group_is_named():
    named = parameters((3,))
    optimizer = sgd(named)
    named["a"].sum().backward()
    with (
        mock.patch.object(dist, "is_initialized", return_value=True),
        mock.patch.object(dist, "get_world_size", return_value=2),
        pytest.raises(RuntimeError, match="made for 1 ranks and there are 2; make it after init_process_group"),
    ):
        optimizer.step()


def in_a_group_that_is_gone() -> str:
    named = parameters((3,))
    optimizer = sgd(named)
    named["a"].sum().backward()
    with (
        mock.patch.object(dist, "is_initialized", return_value=False),
        pytest.raises(RuntimeError) as error,
    ):
        optimizer.step()
    optimizer.step()
    return str(error.value)


def test_an_optimizer_that_outlives_its_process_group_is_named(ranks):
    for error in ranks(2)(in_a_group_that_is_gone):
        assert error.startswith("this optimizer was made for 2 ranks and there are 1;")
        assert error.endswith("use it before destroy_process_group")
