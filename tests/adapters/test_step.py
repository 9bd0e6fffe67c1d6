"""The step of an adapted linear layer written out for CPUs: its value, its gradients of both orders, what it is for."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import phicore
from phicore.adapters import base as base_layer
from phicore.adapters import dora, lora, step
from phicore.adapters.dropout import draw, factor

OUT, IN, RANK = 7, 10, 3


def weight_of(kind: str, dtype: torch.dtype = torch.float64) -> tuple[step.Frozen, Tensor]:
    """A frozen weight, and the same as a dense tensor."""
    linear = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    base = (phicore.NF4Linear.from_linear(linear) if kind == "nf4" else linear).to(dtype)
    weight = base_layer.frozen_weight(base, torch.empty(1, IN, dtype=dtype))
    assert weight is not None
    return weight, base_layer.dense_weight(base, dtype)


def operands(shape: tuple[int, ...], bias: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    sizes = ((*shape, IN), (RANK, IN), (OUT, RANK), *(((OUT,),) if bias else ()))
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


@given(
    kind=st.sampled_from(("dense", "nf4")),
    shape=st.sampled_from(((), (1,), (5,), (0,), (2, 3))),
    bias=st.booleans(),
    dropout=st.sampled_from((0.0, 0.5)),
    with_rows=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_are_those_of_the_formula(kind, shape, bias, dropout, with_rows, seed):
    torch.manual_seed(seed)
    weight, W = weight_of(kind)
    x, A, B, *b = operands(shape, bias)
    torch.manual_seed(seed)
    y, rows = step.low_rank_step(x, A, B, 0.7, weight, *b, dropout=dropout, with_rows=with_rows)
    torch.manual_seed(seed)
    mask = -draw(x.numel(), dropout, x.device)[: x.numel()].view(x.shape) * factor(dropout) if dropout else 1
    expected = x @ W.T + sum(b) + 0.7 * ((x * mask) @ A.T) @ B.T
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(rows, (A @ W.T if with_rows else W.new_empty(0, OUT)).detach())
    assert not rows.requires_grad
    grad = torch.randn_like(y)
    for g, e in zip(*(torch.autograd.grad(z, (x, A, B, *b), grad) for z in (y, expected)), strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_the_backward_pass_can_itself_be_differentiated(kind, dropout):
    weight, _ = weight_of(kind)

    def f(*operands: Tensor) -> Tensor:
        torch.manual_seed(0)
        return step.low_rank_step(*operands[:3], 0.7, weight, *operands[3:], dropout=dropout)[0]

    assert torch.autograd.gradgradcheck(f, operands((4,), bias=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_backward_pass_within_autocast_alone(kind, dropout):
    """As after a part of a model that has autocast off: the gradients are those of the forward pass, in its dtype."""
    weight, _ = weight_of(kind, torch.float32)
    inputs = operands((4,), bias=True, dtype=torch.float32)
    y = step.low_rank_step(*inputs[:3], 0.7, weight, inputs[3], dropout)[0].sum()
    expected = torch.autograd.grad(y, inputs, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(y, inputs)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_an_x_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"x of shape \[2, 9\] does not fit a layer of 10 input features"):
        phicore.LoRALinear(nn.Linear(IN, OUT), rank=2)(torch.ones(2, IN - 1))


@pytest.mark.parametrize("needed", range(4))
def test_only_what_needs_a_gradient_gets_one(needed):
    weight, _ = weight_of("dense")
    given_ = [t.detach().requires_grad_(i == needed) for i, t in enumerate(operands((4,), bias=True))]
    step.low_rank_step(*given_[:3], 0.7, weight, given_[3])[0].sum().backward()
    assert [t.grad is not None for t in given_] == [i == needed for i in range(4)]


@pytest.mark.parametrize(("dropout", "kept"), [(0.0, []), (0.1, [(torch.uint8, 40 * IN // 8)])])
def test_x_and_its_projection_are_kept_and_no_float_copy_of_x(saved_for_backward, dropout, kept):
    weight, _ = weight_of("nf4", torch.float32)
    x, A, B = operands((40,), bias=False, dtype=torch.float32)
    own = {t.data_ptr() for t in (x, A, B, *weight.parts) if t is not None}
    saved = saved_for_backward(lambda: step.low_rank_step(x, A, B, 0.7, weight, dropout=dropout), nn.Module())
    beside = [(t.dtype, t.numel()) for t in saved if t.data_ptr() not in own]
    assert sorted(beside, key=str) == sorted([(torch.float32, 40 * RANK), *kept], key=str)


@pytest.mark.parametrize("make", [phicore.LoRALinear, phicore.DoRALinear])
@pytest.mark.parametrize("coded", [False, True])
def test_which_layers_take_the_step(make, coded):
    """A base that is more than its weight is called; so is one in torch.compile, which sees single steps."""

    def taken(layer: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
        with (
            mock.patch.object(dora, "low_rank_step", wraps=step.low_rank_step) as one,
            mock.patch.object(lora, "low_rank_step", wraps=step.low_rank_step) as other,
        ):
            layer(torch.randn(2, IN, dtype=dtype))
        return one.called or other.called

    def build(base: nn.Module | None = None) -> nn.Module:
        base = base or nn.Linear(IN, OUT)
        return make(phicore.NF4Linear.from_linear(base) if coded else base, rank=2)

    assert taken(build())
    assert taken(build().double(), torch.float64)
    hooked = build()
    hooked.base.register_forward_hook(lambda *_: None)
    assert not taken(hooked)
    assert base_layer.frozen_weight(build(), torch.randn(2, IN)) is None  # what an adapter over an adapter has
    disabled = build()
    disabled.enabled = False
    assert not taken(disabled)
    if not coded:
        unfrozen = build()
        unfrozen.base.weight.requires_grad_()
        assert not taken(unfrozen)


@pytest.mark.parametrize("make", [phicore.LoRALinear, phicore.DoRALinear])
@pytest.mark.parametrize("coded", [False, True])
def test_the_layer_is_what_it_is_step_by_step(randomize, relative_error, make, coded):
    base = nn.Linear(IN, OUT)
    base = (phicore.NF4Linear.from_linear(base) if coded else base).double()
    layer = randomize(make(base, rank=2, alpha=3.0))
    x = torch.randn(2, 4, IN, dtype=torch.float64, requires_grad=True)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    results = []
    for patched in (False, True):
        with mock.patch.object(base_layer, "frozen_weight", return_value=None) if patched else nullcontext():
            y = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), trained)))
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) < 1e-12
