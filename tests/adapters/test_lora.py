"""LoRALinear over every kind of base, against the dense formula y = x (W + s B A)^T + b in float64."""

import copy
import functools
import math

import pytest
import torch
from torch import Tensor, nn

import phicore
from phicore.adapters.convolution import LoRAConvolution
from phicore.adapters.embedding import LoRAEmbedding
from phicore.adapters.fused import FusedLoRALinear
from tests.adapters.cases import dense_cases, leaf

KINDS = ("linear", "nf4", "lora+linear", "dora+nf4", "lora+lora+nf4")
OUT, IN = 23, 37


def reference(layer, W: Tensor, b: Tensor | None, x: Tensor) -> tuple[Tensor, ...]:
    """Output, and float64 leaves A and B that it was computed from."""
    A = layer.lora_A.detach().double().requires_grad_(True)
    B = layer.lora_B.detach().double().requires_grad_(True)
    s = layer.alpha / math.sqrt(layer.rank) if layer.rslora else layer.alpha / layer.rank
    y = x @ (W + s * (B @ A)).T
    return (y if b is None else y + b), A, B


def random_adapter(base: nn.Module, randomize, **options) -> phicore.LoRALinear:
    return randomize(phicore.LoRALinear(base, **{"rank": 4, "alpha": 7.0, **options}), seed=3)


@dense_cases(KINDS)
def test_forward_and_gradients_equal_the_dense_formula(
    layer_of, randomize, kind, lead, out, inner, rank, alpha, rslora, bias, strided
):
    base, W, b = layer_of(kind, out, inner, bias=bias)
    layer = random_adapter(base, randomize, rank=rank, alpha=alpha, rslora=rslora)
    x = leaf(lead, inner, strided)
    expected, A, B = reference(layer, W, b, x)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.project(x), expected if b is None else expected - b, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(y)
    given_grads = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), grad)
    for g, e in zip(given_grads, torch.autograd.grad(expected, (x, A, B), grad), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(layer_of, randomize, kind):
    layer = random_adapter(layer_of(kind, 5, 6)[0], randomize, rank=2)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def f(x, A, B):
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    assert torch.autograd.gradcheck(f, (x, layer.lora_A, layer.lora_B))
    assert torch.autograd.gradgradcheck(f, (x, layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_new_adapter_equals_its_base(layer_of, kind, init):
    base, W, b = layer_of(kind, OUT, IN)
    layer = phicore.LoRALinear(base, rank=4, alpha=7, init=init)
    x = torch.randn(3, IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ W.T + b)
    assert layer.lora_A.shape == (4, IN)
    assert layer.lora_B.shape == (OUT, 4)
    assert not layer.lora_B.any()
    assert layer.lora_A.any()


def test_inits_have_the_spread_that_they_promise():
    base = nn.Linear(400, 8)
    kaiming = phicore.LoRALinear(base, rank=50).lora_A
    bound = 1 / math.sqrt(400)  # kaiming_uniform with a = sqrt(5)
    assert bound * 0.95 < kaiming.abs().max() <= bound
    gaussian = phicore.LoRALinear(base, rank=50, init="gaussian").lora_A
    assert float(gaussian.detach().std()) == pytest.approx(1 / 50, rel=0.05)


def test_reset_parameters_starts_anew(randomize):
    base = nn.Linear(IN, OUT)
    layer = random_adapter(base, randomize)
    x = torch.randn(3, IN)
    assert not torch.allclose(layer(x), base(x))
    layer.reset_parameters()
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_pair_trains(layer_of, kind):
    layer = phicore.LoRALinear(layer_of(kind, OUT, IN)[0])
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    layer(torch.randn(2, IN, dtype=torch.float64)).sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


def test_disabled_layer_is_its_base(layer_of, randomize):
    base, _, _ = layer_of("nf4", OUT, IN)
    layer = random_adapter(base, randomize)
    layer.enabled = False
    x = torch.randn(3, IN, dtype=torch.float64)
    assert torch.equal(layer(x), base(x))
    assert torch.equal(layer.project(x), base.project(x))


# ===== dropout =====


def identity_adapter(width: int, p: float) -> phicore.LoRALinear:
    """y = 2 * dropout(x): a zero base, A and B the identity."""
    layer = phicore.LoRALinear(nn.Linear(width, width, bias=False), rank=width, alpha=2 * width, dropout=p)
    with torch.no_grad():
        layer.base.weight.zero_()
        layer.lora_A.copy_(torch.eye(width))
        layer.lora_B.copy_(torch.eye(width))
    return layer


def test_dropout_zeroes_inputs_at_its_rate_and_rescales_the_rest():
    layer = identity_adapter(20, 0.3)
    x = torch.randn(500, 20) + 3
    y = layer(x)
    dropped = y == 0
    assert float(dropped.float().mean()) == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(y[~dropped], (2 * x / 0.7)[~dropped], rtol=2e-5, atol=0)  # 0.3 to 16 bits
    assert not torch.equal(y, layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), 2 * x)


def test_dropout_leaves_the_base_path():
    layer = identity_adapter(20, 0.5)
    with torch.no_grad():
        layer.base.weight.copy_(100 * torch.eye(20))
    x = torch.ones(50, 20)
    assert set(layer(x).unique().tolist()) == {100.0, 104.0}


def test_dropout_gradient_uses_the_same_mask():
    layer = identity_adapter(20, 0.5)
    x = torch.ones(50, 20, requires_grad=True)
    y = layer(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y.detach())  # d(2 m x)/dx = 2 m, and x is one


# ===== dtypes, devices, copies =====


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
def test_low_precision_stays_near_the_formula(layer_of, randomize, relative_error, kind, dtype, bound):
    base, W, b = layer_of(kind, 40, 70, dtype=dtype)
    layer = random_adapter(base, randomize)
    assert layer.lora_A.dtype == layer.lora_B.dtype == dtype
    x = torch.randn(9, 70).to(dtype).requires_grad_(True)
    x64 = x.detach().double().requires_grad_(True)
    expected, A, B = reference(layer, W, b, x64)
    y = layer(x)
    assert y.dtype == dtype
    assert relative_error(y, expected) < bound
    grad = torch.randn(9, 40).to(dtype)
    given_grads = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), grad)
    for g, e in zip(given_grads, torch.autograd.grad(expected, (x64, A, B), grad.double()), strict=True):
        assert g.dtype == dtype
        assert relative_error(g, e) < bound


def test_an_adapter_of_another_dtype_than_its_base(layer_of, randomize, relative_error):
    base, W, b = layer_of("nf4", OUT, IN, dtype=torch.bfloat16)
    layer = random_adapter(base, randomize, dtype=torch.float32)
    assert layer.lora_A.dtype == torch.float32
    x = torch.randn(5, IN).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, reference(layer, W, b, x.double())[0]) < 2e-2
    y.sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["linear", "nf4", "dora+nf4"])
def test_autocast(layer_of, randomize, relative_error, kind):
    base, W, b = layer_of(kind, OUT, IN, dtype=torch.float32)
    layer = random_adapter(base, randomize)
    x = torch.randn(5, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, reference(layer, W, b, x.double())[0]) < 2e-2
    y.sum().backward()
    assert x.grad.dtype == layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["linear", "nf4", "lora+nf4"])
def test_state_dict_round_trip_also_from_meta(layer_of, randomize, kind):
    layer = random_adapter(layer_of(kind, OUT, IN)[0], randomize)
    state = copy.deepcopy(layer.state_dict())
    x = torch.randn(3, IN, dtype=torch.float64)
    other = phicore.LoRALinear(layer_of(kind, OUT, IN, seed=5)[0], rank=4, alpha=7.0)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(x), layer(x))

    empty = phicore.LoRALinear(copy.deepcopy(layer.base).to("meta"), rank=4, alpha=7.0)
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(state, strict=True, assign=True)
    assert torch.equal(empty(x), layer(x))


def test_state_dict_of_another_rank_is_refused(layer_of):
    layer = phicore.LoRALinear(layer_of("linear", OUT, IN)[0], rank=4)
    other = phicore.LoRALinear(layer_of("linear", OUT, IN)[0], rank=5)
    with pytest.raises(RuntimeError, match="size mismatch for lora_A"):
        layer.load_state_dict(other.state_dict())


def test_deepcopy_is_independent(layer_of, randomize):
    layer = random_adapter(layer_of("nf4", OUT, IN)[0], randomize)
    other = copy.deepcopy(layer)
    x = torch.randn(3, IN, dtype=torch.float64)
    before = layer(x)
    assert torch.equal(other(x), before)
    randomize(other)
    assert not torch.equal(other(x), before)
    assert torch.equal(layer(x), before)


def test_takes_over_the_mode_of_the_base():
    assert not phicore.LoRALinear(nn.Linear(3, 4).eval(), dropout=0.5).training
    assert phicore.LoRALinear(nn.Linear(3, 4), dropout=0.5).training


# ===== cost =====


def test_saves_x_and_the_low_rank_product_only(saved_for_backward, layer_of):
    for kind in ("linear", "nf4"):
        layer = phicore.LoRALinear(layer_of(kind, 64, 96, dtype=torch.float32)[0], rank=4)
        x = torch.randn(50, 96, requires_grad=True)
        kept = saved_for_backward(lambda layer=layer, x=x: layer(x), layer)
        assert sorted(tuple(t.shape) for t in kept) == [(50, 4), (50, 96)]


def test_dropout_saves_a_bit_an_element_more(saved_for_backward, layer_of):
    for kind in ("linear", "nf4"):
        layer = phicore.LoRALinear(layer_of(kind, 64, 96, dtype=torch.float32)[0], rank=4, dropout=0.1)
        x = torch.randn(50, 96, requires_grad=True)
        kept = saved_for_backward(lambda layer=layer, x=x: layer(x), layer)
        assert sorted(tuple(t.shape) for t in kept) == [(50, 4), (50, 96), (50 * 96 // 8,)]


# ===== torch.compile =====


@pytest.mark.parametrize("kind", ["linear", "lora+nf4"])
def test_compiled_in_one_graph_equals_eager(layer_of, randomize, kind):
    torch._dynamo.reset()
    layer = random_adapter(layer_of(kind, OUT, IN)[0], randomize)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    results = []
    for f in (layer, compiled):
        y = f(x)
        results.append((y, *torch.autograd.grad((y**2).sum(), (x, layer.lora_A, layer.lora_B))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# ===== errors =====


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number above 0, got 0"),
        ({"rank": -1}, "rank must be a whole number above 0, got -1"),
        ({"rank": 2.0}, "rank must be a whole number above 0, got 2.0"),
        ({"alpha": 0}, "alpha must be a number above 0, got 0"),
        ({"alpha": float("nan")}, "alpha must be a number above 0, got nan"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
        ({"init": "zeros"}, "init must be one of kaiming, gaussian, pissa, olora, loftq, got 'zeros'"),
    ],
)
@pytest.mark.parametrize("make", [phicore.LoRALinear, phicore.DoRALinear])
def test_values_out_of_range_are_refused_and_the_base_stays(unchanged, make, options, message):
    base = nn.Linear(3, 4)
    with unchanged(base), pytest.raises(ValueError, match=message):
        make(base, **options)


@pytest.mark.parametrize(
    ("make", "base"),
    [
        (phicore.LoRALinear, nn.Linear(3, 4)),
        (phicore.DoRALinear, nn.Linear(3, 4)),
        (LoRAConvolution, nn.Conv1d(3, 4, 1)),
        (LoRAEmbedding, nn.Embedding(3, 4)),
        (functools.partial(FusedLoRALinear, parts={"q": 4}), nn.Linear(3, 4)),
    ],
)
def test_a_keyword_that_is_not_known_is_refused_in_the_name_of_the_class_called(make, base):
    name = getattr(make, "func", make).__name__
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'ranks'$"):
        make(base, ranks=3)


@pytest.mark.parametrize("make", [phicore.LoRALinear, phicore.DoRALinear])
def test_what_is_not_linear_is_refused(unchanged, make):
    base = nn.Conv2d(3, 4, 1)
    with (
        unchanged(base),
        pytest.raises(
            TypeError,
            match=r"adapts nn\.Linear, NF4Linear, transformers' Conv1D or another adapter of these, got Conv2d",
        ),
    ):
        make(base)


def test_what_only_looks_linear_is_refused():
    """How its weight lies, and what its forward does with it, is not known."""
    layer = nn.Identity()
    layer.in_features = layer.out_features = 4
    layer.weight = nn.Parameter(torch.randn(4, 4))
    with pytest.raises(TypeError, match=r"LoRALinear adapts nn\.Linear, .*, got Identity"):
        phicore.LoRALinear(layer)
