"""The dropout that keeps one bit an element: its rate, its scale, its gradient, what it saves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import phicore
from phicore.adapters.dropout import LEVELS, draw, drop_levels, dropped_projection, pack, unpack

CPU = torch.device("cpu")


@given(st.integers(0, 300), st.sampled_from((0.1, 0.5, 0.9)))
def test_packing_loses_nothing(n, p):
    stays = draw(n, p, CPU)
    assert stays.dtype == torch.int16
    assert stays.numel() == -(-n // 8) * 8
    assert torch.equal(unpack(pack(stays)), stays)
    assert pack(stays).numel() == -(-n // 8)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.97])
def test_each_position_of_a_word_is_dropped_at_the_rate(p):
    dropped = draw(1 << 20, p, CPU).view(-1, 8) == 0
    rates = dropped.double().mean(0)
    sigma = (p * (1 - p) / len(dropped)) ** 0.5
    assert ((rates - p).abs() < 5 * sigma + 1 / LEVELS).all()
    assert torch.corrcoef(dropped.double().T).fill_diagonal_(0).abs().max() < 5 / len(dropped) ** 0.5


def test_a_seed_fixes_the_draw_and_draws_differ():
    torch.manual_seed(3)
    first, second = draw(64, 0.5, CPU), draw(64, 0.5, CPU)
    torch.manual_seed(3)
    assert torch.equal(draw(64, 0.5, CPU), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [1e-9, 0.9999999])
def test_extreme_rates_stay_finite(p):
    assert 0 <= drop_levels(p) < LEVELS
    assert dropped_projection(torch.ones(4, 8), torch.ones(2, 8), p).isfinite().all()


@given(
    shape=st.sampled_from(((), (1,), (5,), (0,), (2, 3))),
    inner=st.integers(1, 20),
    rank=st.integers(1, 4),
    p=st.sampled_from((0.1, 0.5, 0.8)),
    strided=st.booleans(),
)
def test_value_and_gradients_are_those_of_one_mask(shape, inner, rank, p, strided):
    x = torch.randn(inner, *shape, dtype=torch.float64).movedim(0, -1)
    x = (x if strided else x.contiguous()).detach().requires_grad_(True)
    A = torch.randn(rank, inner, dtype=torch.float64, requires_grad=True)
    seed = torch.get_rng_state()
    y = dropped_projection(x, A, p)
    torch.set_rng_state(seed)
    stays = -draw(x.numel(), p, CPU)[: x.numel()].view(x.shape)
    expected = nn.functional.linear(x * stays * LEVELS / (LEVELS - round(p * LEVELS)), A)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    for g, e in zip(torch.autograd.grad(y, (x, A), grad), torch.autograd.grad(expected, (x, A), grad), strict=True):
        torch.testing.assert_close(g, e)


def test_the_backward_pass_can_itself_be_differentiated():
    def f(x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return dropped_projection(x, A, 0.5)

    x, A = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (4, 5)))
    assert torch.autograd.gradgradcheck(f, (x, A))


def test_the_mean_is_that_of_no_dropout():
    x, A = torch.randn(1, 64, dtype=torch.float64), torch.randn(3, 64, dtype=torch.float64)
    mean = dropped_projection(x.expand(20_000, 64), A, 0.3).mean(0)
    exact = nn.functional.linear(x, A)[0]
    spread = (0.3 / 0.7 * (x * A).square().sum(1) / 20_000).sqrt()
    assert ((mean - exact).abs() < 5 * spread).all()


def test_one_bit_an_element_is_kept(saved_for_backward):
    x = torch.randn(50, 64, requires_grad=True)
    A = nn.Parameter(torch.randn(4, 64))
    kept = saved_for_backward(lambda: dropped_projection(x, A, 0.1), nn.Module())
    assert sorted((t.dtype, t.numel()) for t in kept if t.data_ptr() not in (x.data_ptr(), A.data_ptr())) == [
        (torch.uint8, 50 * 64 // 8)
    ]
    assert len(kept) == 3


@pytest.mark.parametrize("frozen", ["x", "A"])
def test_what_needs_no_gradient_gets_none(frozen):
    x, A = torch.randn(5, 8, requires_grad=frozen != "x"), torch.randn(2, 8, requires_grad=frozen != "A")
    dropped_projection(x, A, 0.5).sum().backward()
    assert (x.grad is None) == (frozen == "x")
    assert (A.grad is None) == (frozen == "A")


def test_one_graph():
    x, A = torch.randn(5, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    compiled = torch.compile(dropped_projection, fullgraph=True, backend="aot_eager")
    compiled(x, A, 0.5).sum().backward()
    assert A.grad is not None
    assert x.grad is not None
    assert (x.grad == 0).any()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [phicore.LoRALinear, phicore.DoRALinear])
def test_recomputing_a_block_draws_the_same_mask(randomize, reentrant, make):
    base = phicore.NF4Linear.from_linear(nn.Linear(37, 23)).double()
    layer = randomize(make(base, rank=4, alpha=7.0, dropout=0.4), seed=3)
    x = torch.randn(5, 37, dtype=torch.float64, requires_grad=True)
    trained = [p for p in layer.parameters() if p.requires_grad]
    results = []
    for recompute in (False, True):
        torch.manual_seed(1)
        layer.zero_grad()
        x.grad = None
        y = checkpoint(layer, x, use_reentrant=reentrant) if recompute else layer(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in trained)])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain)
