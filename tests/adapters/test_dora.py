"""DoRALinear over every kind of base, against the dense formula W' = m V' / ||V'|| in float64, and what it costs."""

import copy
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import phicore
from tests.adapters.cases import dense_cases, leaf
from tests.adapters.dora_layers import IN, NAMES, OUT, random_adapter, trained

KINDS = ("linear", "nf4", "lora+linear", "dora+nf4", "dora+lora+nf4")


def reference(
    layer, W: Tensor, b: Tensor | None, x: Tensor, *, detach: bool = True
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Output, and the float64 leaves A, B, m that it was computed from. Section 4.3: the norm is a constant in the
    backward pass."""
    A, B, m = leaves = tuple(getattr(layer, name).detach().double().requires_grad_(True) for name in NAMES)
    s = layer.alpha / layer.rank**0.5 if layer.rslora else layer.alpha / layer.rank
    V = W + s * (B @ A)
    norm = (V**2).sum(dim=1, keepdim=True).sqrt()
    y = x @ (m[:, None] * V / (norm.detach() if detach else norm)).T
    return (y if b is None else y + b), leaves


# ===== equal to the dense formula =====


@dense_cases(KINDS)
def test_forward_and_gradients_equal_the_dense_formula(
    layer_of, randomize, kind, lead, out, inner, rank, alpha, rslora, bias, strided
):
    base, W, b = layer_of(kind, out, inner, bias=bias)
    layer = random_adapter(base, randomize, rank=rank, alpha=alpha, rslora=rslora)
    x = leaf(lead, inner, strided)
    expected, leaves = reference(layer, W, b, x)
    y = layer(x)
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(layer.project(x), expected if b is None else expected - b, **close)
    grad = torch.randn_like(y)
    given_grads = torch.autograd.grad(y, (x, *trained(layer)), grad)
    for g, e in zip(given_grads, torch.autograd.grad(expected, (x, *leaves), grad), strict=True):
        torch.testing.assert_close(g, e, **close)


def test_the_norm_is_a_constant_in_the_backward_pass(layer_of, randomize, relative_error):
    base, W, b = layer_of("nf4", OUT, IN)
    layer = random_adapter(base, randomize)
    x = torch.randn(5, IN, dtype=torch.float64)
    grad = torch.randn(5, OUT, dtype=torch.float64)
    given_grads = torch.autograd.grad(layer(x), trained(layer), grad)
    expected, leaves = reference(layer, W, b, x, detach=False)
    through = torch.autograd.grad(expected, leaves, grad)
    errors = [relative_error(g, e) for g, e in zip(given_grads, through, strict=True)]
    assert min(errors[:2]) > 0.05  # A and B would differ visibly were the norm differentiated
    assert errors[2] < 1e-10  # m's own gradient is exact either way


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_new_adapter_equals_its_base_and_m_is_the_norm(layer_of, kind, init):
    base, W, b = layer_of(kind, OUT, IN)
    layer = phicore.DoRALinear(base, rank=4, alpha=7, init=init)
    x = torch.randn(3, IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ W.T + b)
    torch.testing.assert_close(layer.magnitude, W.norm(dim=1))
    assert layer.magnitude.shape == (OUT,)
    assert layer.lora_A.any()
    assert not layer.lora_B.any()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weight_has_rows_of_length_m(layer_of, randomize, kind):
    base, W, b = layer_of(kind, OUT, IN)
    layer = random_adapter(base, randomize)
    merged = layer.merged_weight()
    torch.testing.assert_close(merged.norm(dim=1), layer.magnitude.detach().abs())
    x = torch.randn(3, IN, dtype=torch.float64)
    torch.testing.assert_close(x @ merged.T + b, reference(layer, W, b, x)[0])
    torch.testing.assert_close(layer.dense_weight(torch.float32), merged.float())


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_trains(layer_of, kind):
    layer = phicore.DoRALinear(layer_of(kind, OUT, IN)[0])
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == set(NAMES)
    layer(torch.randn(2, IN, dtype=torch.float64)).sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == set(NAMES)
    assert not layer.base_norm_squared.requires_grad


def test_disabled_layer_is_its_base(layer_of, randomize):
    base, W, _ = layer_of("nf4", OUT, IN)
    layer = random_adapter(base, randomize)
    layer.enabled = False
    x = torch.randn(3, IN, dtype=torch.float64)
    assert torch.equal(layer(x), base(x))
    assert torch.equal(layer.project(x), base.project(x))
    assert torch.equal(layer.merged_weight(), W)


def test_reset_parameters_starts_anew(layer_of, randomize):
    base, W, b = layer_of("nf4", OUT, IN)
    layer = random_adapter(base, randomize)
    layer.reset_parameters()
    x = torch.randn(3, IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ W.T + b)
    torch.testing.assert_close(layer.magnitude, W.norm(dim=1))


def test_dropout_touches_the_low_rank_path_only():
    # W = 3 I and s B A = 2 I, so V' = 5 I and, with m = 10, y = 2 (3 x + 2 dropout(x))
    width = 20
    layer = phicore.DoRALinear(nn.Linear(width, width), rank=width, alpha=2 * width, dropout=0.3)
    with torch.no_grad():
        layer.base.weight.copy_(3 * torch.eye(width))
        layer.base.bias.fill_(1)
        layer.lora_A.copy_(torch.eye(width))
        layer.lora_B.copy_(torch.eye(width))
        layer.magnitude.fill_(10)
    layer.refresh_base_norm()
    x = torch.randn(500, width) + 3
    low_rank = (layer(x) - 1) / 2 - 3 * x
    dropped = low_rank.abs() < 1e-4
    assert float(dropped.float().mean()) == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(low_rank[~dropped], (2 * x / 0.7)[~dropped], rtol=1e-4, atol=1e-4)
    layer.eval()
    torch.testing.assert_close(layer(x), 10 * x + 1)


# ===== what it costs =====


class Allocations(TorchDispatchMode):
    """Notes the size of everything that operators put in new storage."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            a.untyped_storage().data_ptr()
            for a in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(a, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.sizes.append((str(func), t.numel()))
        return result


def test_no_temporary_of_the_size_of_the_weight(layer_of, randomize):
    out, inner, tokens = 80, 100, 30
    layer = randomize(phicore.DoRALinear(layer_of("linear", out, inner, dtype=torch.float32)[0], rank=4, alpha=8.0))
    x = torch.randn(tokens, inner, requires_grad=True)
    with Allocations() as allocations:
        layer(x).pow(2).sum().backward()
    assert max(allocations.sizes, key=lambda entry: entry[1])[1] <= tokens * inner
    assert len(allocations.sizes) > 10  # it did look

    with Allocations() as allocations:  # and it would have seen one
        layer.merged_weight()
    assert max(allocations.sizes, key=lambda entry: entry[1])[1] == out * inner


def test_flops_are_those_of_lora_and_rank_terms(layer_of, randomize):
    out, inner, tokens, rank = 80, 100, 30, 4

    counts = []
    for make in (phicore.LoRALinear, phicore.DoRALinear):
        layer = randomize(make(layer_of("linear", out, inner, dtype=torch.float32)[0], rank=rank, alpha=8.0))
        x = torch.randn(tokens, inner, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            layer(x).pow(2).sum().backward()
        counts.append(counter.get_total_flops())
    lora, dora_ = counts
    assert lora == 2 * tokens * (2 * inner * out + 3 * rank * (inner + out))
    # W A^T, A A^T and B (A A^T)
    assert dora_ - lora == 2 * rank * inner * out + 2 * rank**2 * (inner + out)


@pytest.mark.parametrize("kind", ["linear", "nf4"])
@pytest.mark.parametrize("bias", [False, True])
def test_saves_one_output_more_than_lora(layer_of, randomize, saved_for_backward, kind, bias):
    layer = random_adapter(layer_of(kind, 64, 96, bias=bias, dtype=torch.float32)[0], randomize)
    x = torch.randn(50, 96, requires_grad=True)
    kept = saved_for_backward(lambda: layer(x), layer)
    large = sorted(tuple(t.shape) for t in kept if t.numel() > 96)
    assert large == [(50, 4), (50, 64), (50, 96)]  # x A^T, x V'^T (for m's gradient) and x


def test_the_gradient_is_itself_differentiable(layer_of, randomize):
    """The backward pass reuses a buffer, but not where it is differentiated."""
    layer = random_adapter(layer_of("linear", 5, 6)[0], randomize)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(layer(x).pow(3).sum(), (x, *trained(layer)), create_graph=True)
    given = torch.autograd.grad(sum(g.pow(2).sum() for g in grads), x)[0]
    scale = layer.magnitude / torch.linalg.vector_norm(layer._direction(), dim=1).detach()
    y = (x @ layer._direction().t()) * scale + layer.bias
    grads = torch.autograd.grad(y.pow(3).sum(), (x, *trained(layer)), create_graph=True)
    expected = torch.autograd.grad(sum(g.pow(2).sum() for g in grads), x)[0]
    torch.testing.assert_close(given, expected)


def test_the_bases_output_is_written_to_in_no_sight_of_others(layer_of, randomize):
    """Neither x nor what another call returned changes when a layer adds its product in place."""
    layer = random_adapter(layer_of("linear", 5, 6, bias=False)[0], randomize)
    x = torch.randn(3, 6, dtype=torch.float64)
    before, first = x.clone(), layer(x)
    kept = first.detach().clone()
    layer(x)
    assert torch.equal(x, before)
    assert torch.equal(first, kept)


# ===== dtypes, devices, copies =====


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
def test_low_precision_stays_near_the_formula(layer_of, randomize, relative_error, kind, dtype, bound):
    base, W, b = layer_of(kind, 40, 70, dtype=dtype)
    layer = random_adapter(base, randomize)
    assert {p.dtype for p in trained(layer)} == {dtype}
    x = torch.randn(9, 70).to(dtype).requires_grad_(True)
    x64 = x.detach().double().requires_grad_(True)
    expected, leaves = reference(layer, W, b, x64)
    y = layer(x)
    assert y.dtype == dtype
    assert relative_error(y, expected) < bound
    grad = torch.randn(9, 40).to(dtype)
    given_grads = torch.autograd.grad(y, (x, *trained(layer)), grad)
    for g, e in zip(given_grads, torch.autograd.grad(expected, (x64, *leaves), grad.double()), strict=True):
        assert g.dtype == dtype
        assert relative_error(g, e) < bound


@pytest.mark.parametrize("kind", ["linear", "nf4", "lora+nf4"])
def test_autocast(layer_of, randomize, relative_error, kind):
    base, W, b = layer_of(kind, OUT, IN, dtype=torch.float32)
    layer = random_adapter(base, randomize)
    x = torch.randn(5, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, reference(layer, W, b, x.double())[0]) < 2e-2
    y.sum().backward()
    assert x.grad.dtype == layer.magnitude.grad.dtype == torch.float32


def expected_base_norm(W: Tensor, dtype: torch.dtype) -> Tensor:
    return (W**2).sum(1).to(dtype)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("kind", ["linear", "nf4", "lora+nf4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_base_norm_is_right_after_a_cast(layer_of, randomize, kind, dtype, times):
    # .half() rounds the base's weight; the sums must be those of the rounded weight, and not be rounded themselves. The
    # second one changes no weight: model.to(device, dtype), of a model that was loaded in it
    base, _, _ = layer_of(kind, OUT, IN, dtype=torch.float64 if dtype == torch.float32 else torch.float32)
    net = nn.Sequential(random_adapter(base, randomize))
    for _ in range(times):
        net.to(dtype)
    layer = net[0]
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    weight = phicore.DoRALinear(layer.base).dense_base().double()
    assert layer.base_norm_squared.dtype == sums
    torch.testing.assert_close(layer.base_norm_squared, expected_base_norm(weight, sums), rtol=1e-5, atol=0)
    assert {p.dtype for p in trained(layer)} == {dtype}
    assert layer(torch.randn(2, IN, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip_also_from_meta(layer_of, randomize, kind):
    base, W, _ = layer_of(kind, OUT, IN)
    layer = random_adapter(base, randomize)
    state = copy.deepcopy(layer.state_dict())
    assert "base_norm_squared" not in state  # it follows from the base
    x = torch.randn(3, IN, dtype=torch.float64)
    expected = layer(x)

    other = phicore.DoRALinear(layer_of(kind, OUT, IN, seed=5)[0], rank=4, alpha=7.0)
    assert not torch.allclose(other(x), expected)
    other.load_state_dict(state, strict=True)
    torch.testing.assert_close(other.base_norm_squared, expected_base_norm(W, torch.float64))
    torch.testing.assert_close(other(x), expected)

    empty = phicore.DoRALinear(copy.deepcopy(base).to("meta"), rank=4, alpha=7.0)
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    empty.load_state_dict(state, strict=True, assign=True)
    torch.testing.assert_close(empty(x), expected)

    emptied = nn.Sequential(phicore.DoRALinear(copy.deepcopy(base).to("meta"), rank=4, alpha=7.0))
    emptied.to_empty(device="cpu")
    emptied.load_state_dict({f"0.{k}": v for k, v in state.items()}, strict=True)
    torch.testing.assert_close(emptied(x), expected)


def test_rows_of_zeros_need_no_dense_product(randomize):
    base = nn.Linear(IN, OUT, bias=False)
    with torch.no_grad():
        base.weight[2] = 0
    layer = randomize(phicore.DoRALinear(base, rank=2), std=0.01)
    with torch.no_grad():
        layer.lora_B[2] = 0
    with mock.patch.object(phicore.DoRALinear, "dense_base", side_effect=AssertionError):
        y = layer(torch.randn(3, IN))
    y.sum().backward()
    assert (y[:, 2] == 0).all()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


def test_base_norm_follows_a_weight_changed_by_hand(layer_of, randomize):
    base, W, b = layer_of("linear", OUT, IN)
    layer = random_adapter(base, randomize)
    with torch.no_grad():
        base.weight.mul_(3)
    layer.refresh_base_norm()
    x = torch.randn(3, IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference(layer, 3 * W, b, x)[0])


@pytest.mark.parametrize("kind", ["linear", "lora+linear"])
def test_base_norm_follows_a_base_that_trains(layer_of, randomize, kind):
    base, _, _ = layer_of(kind, OUT, IN)
    layer, x = random_adapter(base, randomize).requires_grad_(True), torch.randn(5, IN, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    for forward in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        for _ in range(2):
            forward(x).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(forward(x), x @ layer.merged_weight().T + layer.bias)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_base_norm_follows_a_base_that_computes_its_weight(randomize, norm):
    """Spectral norm's estimate moves in each pass of training."""
    torch.manual_seed(0)
    base = norm(nn.Linear(IN, OUT, dtype=torch.float64))
    layer, x = random_adapter(base, randomize), torch.randn(5, IN, dtype=torch.float64)
    for _ in range(50):
        layer(x)
    layer.eval()
    torch.testing.assert_close(layer(x), x @ layer.merged_weight().T + layer.bias)


def test_a_bias_that_trains_moves_no_norm(layer_of, randomize, monkeypatch):
    layer = random_adapter(layer_of("nf4", OUT, IN)[0], randomize)
    layer.base.bias.requires_grad_(True)
    monkeypatch.setattr(layer, "refresh_base_norm", lambda: pytest.fail("summed the weight anew"))
    layer(torch.randn(5, IN, dtype=torch.float64)).sum().backward()


def test_deepcopy_is_independent(layer_of, randomize):
    layer = random_adapter(layer_of("nf4", OUT, IN)[0], randomize)
    other = copy.deepcopy(layer)
    x = torch.randn(3, IN, dtype=torch.float64)
    before = layer(x)
    assert torch.equal(other(x), before)
    randomize(other)
    assert not torch.equal(other(x), before)
    assert torch.equal(layer(x), before)
    other.load_state_dict(layer.state_dict())  # the copy's hook refreshes the copy
    assert torch.equal(other(x), before)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "nf4", "lora+linear"])
def test_a_base_with_hooks_is_called(layer_of, randomize, kind, bias):
    base, _, _ = layer_of(kind, OUT, IN, bias=bias)
    layer, x, seen = random_adapter(base, randomize), torch.randn(2, 3, IN, dtype=torch.float64), []
    expected, y = layer(x), base(x)
    base.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    torch.testing.assert_close(layer(x), expected)
    ((x_seen, y_seen),) = seen  # once, and afterwards still what it was
    assert x_seen is x
    torch.testing.assert_close(y_seen, y)
    seen.clear()
    phicore.DoRALinear(layer, 2)(x)  # through the protocol of an adapter over another
    assert len(seen) == 1
