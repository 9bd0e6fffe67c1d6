"""State moves between world sizes, and to and from plain torch optimizers, without a change of a bit."""

import copy
import io
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import phicore
from phicore.zero.state import FORMAT, cut, joined, read_shards
from tests.zero.models import Net, backward, batch, equal_parts, farthest, loss_sum, train_alone, weights

KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    "nadam": (torch.optim.NAdam, {"lr": 1e-2}),
}


def packed(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)  # nothing in a state needs unpickling


def zero(model: nn.Module, kind: str = "adamw", **options: Any) -> phicore.ZeroOptimizer:
    optimizer_class, settings = KINDS[kind]
    return phicore.ZeroOptimizer(
        model.named_parameters(), optimizer_class, reduction="sum", bucket_bytes=4000, **{**settings, **options}
    )


def plain(model: nn.Module, kind: str = "adamw") -> torch.optim.Optimizer:
    optimizer_class, settings = KINDS[kind]
    return optimizer_class(model.parameters(), **settings)


def flat(full: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of a full state by name."""
    (group,) = full["param_groups"]
    names = group["param_names"]
    states = {
        f"{names[i]}/{key}": torch.as_tensor(value)
        for i, state in full["state"].items()
        for key, value in state.items()
    }
    return {**states, **{f"{name}/master": value for name, value in full.get("masters", {}).items()}}


def first_half(kind: str, dtype: torch.dtype) -> tuple[bytes, bytes, bytes]:
    """This rank's state, the full one, and the weights after three steps."""
    model = Net(dtype)
    optimizer = zero(model, kind)
    train(model, optimizer, range(3))
    return packed(optimizer.state_dict()), packed(optimizer.full_state_dict()), packed(model.state_dict())


def second_half(kind: str, dtype: torch.dtype, state: bytes, full: bytes, model_state: bytes) -> float:
    model = Net(dtype)
    optimizer = zero(model, kind, lr=0.5)  # the loaded one counts
    model.load_state_dict(unpacked(model_state))
    optimizer.load_state_dict(unpacked(state))
    found, expected = optimizer.full_state_dict(), unpacked(full)
    assert found["param_groups"] == expected["param_groups"]
    assert farthest(flat(found), flat(expected)) == 0
    train(model, optimizer, range(3, 6))
    if dtype != torch.float32:
        return 0.0
    return farthest(weights(model), train_alone(equal_parts, 6, lambda model: plain(model, kind)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, equal_parts, step, dist.get_rank(), dist.get_world_size())
        optimizer.step()


@pytest.mark.parametrize("before", [1, 2, 3, 4])
def test_a_run_goes_on_at_any_world_size(ranks, before):
    halves = ranks(before)(first_half, "adamw", torch.float32)
    shards = packed([unpacked(shard) for shard, _, _ in halves])
    for after in (1, 2, 3, 4):
        assert max(ranks(after)(second_half, "adamw", torch.float32, shards, *halves[0][1:])) < 1e-6
    assert max(ranks(3)(second_half, "adamw", torch.float32, halves[0][1], *halves[0][1:])) < 1e-6  # the full state


@pytest.mark.parametrize(
    ("kind", "dtype"), [("sgd", torch.float32), ("nadam", torch.float32), ("adamw", torch.bfloat16)]
)
def test_other_states_and_masters_go_on_too(ranks, kind, dtype):
    halves = ranks(3)(first_half, kind, dtype)
    shards = packed([unpacked(shard) for shard, _, _ in halves])
    for state in (shards, halves[0][1]):
        assert max(ranks(2)(second_half, kind, dtype, state, *halves[0][1:])) < 1e-6


def own_shard() -> float:
    model = Net()
    optimizer = zero(model)
    train(model, optimizer, range(3))
    other = Net()
    other.load_state_dict(model.state_dict())
    again = zero(other)
    again.load_state_dict(unpacked(packed(optimizer.state_dict())))
    for m, o in ((model, optimizer), (other, again)):
        train(m, o, range(3, 5))
    return farthest(weights(model), weights(other))


def test_a_rank_needs_only_its_own_state_at_the_same_world_size(ranks):
    assert ranks(3)(own_shard) == [0.0] * 3


def only_first() -> tuple[bool, bool]:
    model = Net()
    optimizer = zero(model)
    train(model, optimizer, range(1))
    full = optimizer.full_state_dict(first_rank_only=True)
    return bool(full), dist.get_rank() == 0


def test_the_whole_state_can_go_to_the_first_rank_only(ranks):
    assert all(got == first for got, first in ranks(3)(only_first))


def through_plain(kind: str) -> float:
    """Three steps on all ranks, two in a plain optimizer on whole batches, two on all ranks again."""
    model = Net()
    optimizer = zero(model, kind)
    train(model, optimizer, range(3))
    alone = Net()
    alone.load_state_dict(model.state_dict())
    reference = plain(alone, kind)
    reference.load_state_dict(optimizer.full_state_dict())
    for step in range(3, 5):
        reference.zero_grad()
        (loss_sum(alone, *batch(step)) / 12).backward()
        reference.step()
    between = Net()
    between.load_state_dict(alone.state_dict())
    again = zero(between, kind)
    again.load_state_dict(reference.state_dict())
    train(between, again, range(5, 7))
    return farthest(weights(between), train_alone(equal_parts, 7, lambda model: plain(model, kind)))


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_plain_optimizer_takes_over_and_gives_back(ranks, kind):
    assert max(ranks(3)(through_plain, kind)) < 1e-6


def test_a_state_by_name_is_read_by_name_in_any_order():
    """As torch.distributed.checkpoint gives it, of an optimizer that has the parameters in another order."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))  # of equal shapes: only names tell them apart
    reference = torch.optim.AdamW(list(model.parameters())[::-1])
    model(torch.randn(2, 4)).square().sum().backward()
    reference.step()
    by_name = get_optimizer_state_dict(model, reference)
    again = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = zero(again)
    optimizer.load_state_dict(by_name)
    expected = {f"{name}/{key}": t for name, values in by_name["state"].items() for key, t in values.items()}
    assert farthest(flat(optimizer.full_state_dict()), expected) == 0


def test_lora_state_has_the_adapters_size():
    model = Net()
    model.requires_grad_(False)
    model.first.bias.requires_grad_(True)
    optimizer = zero(model)
    loss_sum(model, *batch(0)).backward()
    optimizer.step()
    state = optimizer.state_dict()
    assert list(state["state"]) == ["first.bias"]
    assert sum(t.numel() for t in state["state"]["first.bias"].values()) == 2 * 37 + 1
    reference = plain(model)
    reference.load_state_dict(optimizer.full_state_dict())
    assert list(reference.state) == [model.first.bias]


def test_a_parameter_that_was_frozen_when_saved_starts_without_state():
    _, optimizer = stepped()
    model = Net()
    model.head.bias.requires_grad_(True)
    again = zero(model)
    again.load_state_dict(optimizer.state_dict())
    assert "head.bias" not in again.state_dict()["state"]
    assert farthest(flat(again.full_state_dict()), flat(optimizer.full_state_dict())) == 0


def stepped() -> tuple[Net, phicore.ZeroOptimizer]:
    model = Net()
    optimizer = zero(model)
    loss_sum(model, *batch(0)).backward()
    optimizer.step()
    return model, optimizer


def test_a_state_that_does_not_fit_is_named_and_changes_nothing():
    _, optimizer = stepped()
    good = unpacked(packed(optimizer.state_dict()))
    full = unpacked(packed(optimizer.full_state_dict()))

    def refused(match: str, state: Any) -> None:
        before = flat(unpacked(packed(optimizer.full_state_dict())))
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(state)
        assert farthest(before, flat(optimizer.full_state_dict())) == 0

    (group,) = good["param_groups"]
    refused("expected states from ZeroOptimizer", {"weights": 1})
    refused("expected at least one", [])
    refused("lacks left.bias", {**good, "shapes": {k: v for k, v in good["shapes"].items() if k != "left.bias"}})
    refused("holds other, which this", {**good, "shapes": {**good["shapes"], "other": [1]}})
    refused(
        r"left.bias has shape \[36\] in the state, \[37\] here",
        {**good, "shapes": {**good["shapes"], "left.bias": [36]}},
    )
    refused("groups of", {**good, "param_groups": [group, {"params": []}]})
    refused("lacks elements 5 to 37 of left.bias", {**good, "slices": {**good["slices"], "left.bias": [0, 5]}})
    refused(
        "lacks elements 0 to 37 of left.bias; load the states of all ranks",
        {**good, "slices": {**good["slices"], "left.bias": [5, 37]}},
    )
    late = {**good["state"]["left.bias"], "step": torch.tensor(9.0)}
    halves = [
        {**good, "slices": {**good["slices"], "left.bias": [a, b]}, "state": {**good["state"], "left.bias": state}}
        for a, b, state in ((0, 5, good["state"]["left.bias"]), (5, 37, late))
    ]
    for half, (a, b) in zip(halves, ((0, 5), (5, 37)), strict=True):
        state = half["state"]["left.bias"]
        half["state"]["left.bias"] = {key: v[a:b] if v.dim() else v for key, v in state.items()}
    refused("parts of the state of left.bias are of different steps", halves)
    (group,) = full["param_groups"]
    trained = {**full["state"], group["param_names"].index("head.bias"): {"step": torch.ones(())}}
    refused("trained for head.bias, which is frozen here", {**full, "state": trained})
    refused("groups of", {**full, "param_groups": [{**group, "params": group["params"][1:]}]})
    for kind, lacking in ((torch.optim.SGD, "betas, eps"), (torch.optim.RMSprop, "betas")):
        other = phicore.ZeroOptimizer(Net().named_parameters(), kind, lr=1e-2)
        for foreign in (other.state_dict(), other.full_state_dict()):
            refused(f"is of another optimizer than AdamW: it has no {lacking}, but lr, ", foreign)
    refused(
        "state exp_avg of first.weight has shape", {**full, "state": {**full["state"], 0: {"exp_avg": torch.ones(3)}}}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_holds_the_state_once_and_a_parameters_beside_it(most_held, dtype):
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(8)]).to(dtype)
    optimizer = zero(model)
    model(torch.ones(2, 64, dtype=dtype)).sum().backward()
    optimizer.step()
    moments = 2 * 4 * sum(p.numel() for p in model.parameters())
    own, full = optimizer.state_dict(), optimizer.full_state_dict()
    halves = [
        {
            **own,
            "slices": {name: [a, b] for name in own["slices"]},
            "state": {
                name: {key: v[a:b] if v.dim() else v for key, v in state.items()}
                for name, state in own["state"].items()
            },
        }
        for a, b in ((0, 1000), (1000, 64 * 64))  # of two ranks
    ]
    for saved in (own, full, halves):
        other = zero(copy.deepcopy(model))
        assert most_held(lambda: other.load_state_dict(saved)) < 1.3 * moments  # noqa: B023
        assert all(map(torch.equal, flat(other.full_state_dict()).values(), flat(full).values()))


@given(st.integers(1, 40), st.lists(st.integers(0, 40), max_size=4), st.data())
def test_any_cut_of_any_slices_is_the_slice(numel, cuts, data):
    whole = torch.arange(numel, dtype=torch.float32)
    bounds = sorted({0, numel, *(c for c in cuts if c < numel)})
    shards = [
        {
            "format": FORMAT,
            "shapes": {"w": [numel]},
            "slices": {"w": [a, b]},
            "frozen": [],
            "state": {"w": {"exp_avg": whole[a:b], "step": torch.tensor(7.0)}},
            "param_groups": [{"lr": 0.1, "params": ["w"]}],
        }
        for a, b in pairwise(bounds)
    ]
    shards = data.draw(st.permutations(shards))
    source = read_shards(shards, {"w": torch.Size([numel])}, [["w"]])
    start = data.draw(st.integers(0, numel - 1))
    stop = data.draw(st.integers(start + 1, numel))
    state = joined(cut(source, "w", start, stop))
    assert torch.equal(state["exp_avg"], whole[start:stop])
    assert float(state["step"]) == 7
