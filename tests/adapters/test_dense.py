"""Adapters in 16 bits on a CPU that has no such products: exact but for rounding, by one operator, in little memory.

The CPU that runs this may have them; then it is told that it has not.
"""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import phicore
from phicore import products
from phicore.adapters import dense
from phicore.adapters.dense import dense_low_rank, dense_low_rank_dx
from tests.adapters.test_dora import Allocations
from tests.test_products import HALVES

OPERATOR = "phicore.dense_low_rank.default"
KINDS = ("linear", "conv1d", "nf4")
LAYERS = (phicore.LoRALinear, phicore.DoRALinear)


@pytest.fixture(autouse=True)
def _emulating():
    with mock.patch.object(products, "EMULATED", HALVES):
        yield


def base_of(kind: str, out: int, inner: int, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    linear = nn.Linear(inner, out, bias=bias).to(dtype)
    if kind == "nf4":
        return phicore.NF4Linear.from_linear(linear)
    if kind == "linear":
        return linear
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(out, inner).to(dtype)
    with torch.no_grad():
        layer.bias.normal_()
    return layer


def build(make, randomize, kind: str = "linear", out: int = 23, inner: int = 37, **options):
    dtype, bias = options.pop("dtype", torch.bfloat16), options.pop("bias", True)
    base = base_of(kind, out, inner, bias=bias, dtype=dtype)
    return randomize(make(base, **{"rank": 4, "alpha": 7.0, **options}))


class Products(TorchDispatchMode):
    """Notes which operators run, and which matrix products torch itself takes in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.in_16_bits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm):
            self.in_16_bits += [str(func) for t in args if isinstance(t, Tensor) and t.dtype in HALVES]
        return func(*args, **(kwargs or {}))


def exact(layer, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of x and of what trains, by the dense formulas in float64, with a draw of dropout of
    the seed that torch has now."""
    from phicore.adapters.dropout import dropped_projection

    W = layer.base.nf4.dequantize(torch.float32) if hasattr(layer.base, "nf4") else layer.base.weight
    W = (W.t() if type(layer.base).__name__ == "Conv1D" else W).detach().double()
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    x, A, B = leaves
    u = dropped_projection(x, A, layer.dropout) if layer.dropout else x @ A.T
    y = x @ W.T + layer.scaling * u @ B.T
    if isinstance(layer, phicore.DoRALinear):
        m = layer.magnitude.detach().double().requires_grad_()
        leaves.append(m)
        y = y * (m / (W + layer.scaling * B @ A).norm(dim=1).detach())
    if layer.bias is not None:
        y = y + layer.bias.double()
    return [y, *torch.autograd.grad(y, leaves, grad.double())]


@given(
    make=st.sampled_from(LAYERS),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(HALVES),
    lead=st.sampled_from(((), (5,), (0,), (2, 3))),
    out=st.integers(1, 24),
    inner=st.integers(1, 40),
    rank=st.integers(1, 9),
    bias=st.booleans(),
    strided=st.booleans(),
    dropout=st.sampled_from((0.0, 0.3)),
    pair_dtype=st.sampled_from((None, torch.float32)),
)
def test_values_and_gradients_are_rounded_and_no_worse(
    randomize, relative_error, make, kind, dtype, lead, out, inner, rank, bias, strided, dropout, pair_dtype
):
    layer = build(make, randomize, kind, out, inner, rank=rank, bias=bias, dropout=dropout, dtype=dtype)
    layer = layer if pair_dtype is None else randomize(make(layer.base, rank, 7.0, dropout, dtype=pair_dtype))
    x = torch.randn(*((inner, *lead) if strided else (*lead, inner))).to(dtype)
    x = (x.movedim(0, -1) if strided else x).requires_grad_()
    grad = torch.randn(*lead, out).to(dtype)
    trained = [layer.lora_A, layer.lora_B] + ([layer.magnitude] if make is phicore.DoRALinear else [])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        with Products() as seen:
            y = layer(x)
            given = [y, *torch.autograd.grad(y, [x, *trained], grad)]
    assert not seen.in_16_bits
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = exact(layer, x, grad)
    # Of norms, rounding costs a little over half of half a step. DoRA also rounds x V'^T; NF4's u, and its products of
    # dropout, are rounded on the way, as on a GPU.
    roundings = 1 + (make is phicore.DoRALinear) + (kind == "nf4") + 2 * (dropout > 0)
    for g, e, t in zip(given, expected, [y, x, *trained], strict=True):
        assert g.dtype == t.dtype
        assert relative_error(g, e) <= roundings * torch.finfo(dtype).eps / 2 + 1e-6


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("make", "roundings"), [(phicore.LoRALinear, 1), (phicore.DoRALinear, 2)])
def test_errors_are_those_of_rounding_once_or_twice(randomize, relative_error, make, roundings, dtype):
    """Errors of several roundings add up as the root of their number. DoRA's second one is that of x V'^T."""
    layer = build(make, randomize, "linear", 64, 96, dtype=dtype)
    x, grad = torch.randn(50, 96).to(dtype).requires_grad_(), torch.randn(50, 64).to(dtype)
    y = layer(x)
    given = [y, *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), grad)]
    for g, e in zip(given, exact(layer, x, grad)[:4], strict=True):
        assert relative_error(g, e) < 1.1 * roundings**0.5 * relative_error(e.to(dtype), e)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("make", LAYERS)
def test_one_operator_where_products_are_emulated_and_only_there(randomize, make, kind):
    layer, x = build(make, randomize, kind), torch.randn(3, 37).bfloat16()
    with Products() as seen:
        layer(x)
    assert OPERATOR in seen.names
    expected = layer(x)
    with mock.patch.object(products, "EMULATED", ()), Products() as seen:
        y = layer(x)
    assert not {name for name in seen.names if name.startswith("phicore")}
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("make", LAYERS)
def test_what_is_not_frozen_or_not_plain_is_called(randomize, make):
    layer, x, seen = build(make, randomize), torch.randn(3, 37).bfloat16(), []
    layer.base.weight.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.base.weight.grad is not None
    if make is phicore.LoRALinear:  # DoRA asks its base for products and never calls it
        layer.base.weight.requires_grad_(False)
        expected = layer(x)
        layer.base.register_forward_hook(lambda *_: seen.append("hook"))
        torch.testing.assert_close(layer(x), expected, rtol=3e-2, atol=3e-2)
        assert seen == ["hook"]
    with pytest.raises(RuntimeError, match="dtype"):  # as torch has it
        build(make, randomize)(torch.randn(3, 37))


@pytest.mark.parametrize("make", LAYERS)
def test_a_trained_bias_and_a_disabled_adapter(randomize, make):
    layer, x = build(make, randomize), torch.randn(3, 37).bfloat16()
    y = layer(x)
    layer.trained_bias = nn.Parameter(layer.base.bias.detach() + 1)
    with Products() as seen:
        torch.testing.assert_close(layer(x), y + 1, rtol=2e-2, atol=2e-2)
        layer(x).sum().backward()
        torch.testing.assert_close(layer.trained_bias.grad, torch.full((23,), 3.0, dtype=torch.bfloat16))
        layer.enabled = False
        torch.testing.assert_close(layer(x).double(), layer.base(x).double(), rtol=1e-2, atol=1e-2)
    assert len(seen.in_16_bits) <= 3  # of layer.base(x) alone


@pytest.mark.parametrize("kind", ["linear", "nf4"])
@pytest.mark.parametrize("make", LAYERS)
def test_autocast_over_a_float32_base(randomize, relative_error, make, kind):
    layer = build(make, randomize, kind, dtype=torch.float32)
    x, grad = torch.randn(5, 37, requires_grad=True), torch.randn(5, 23)
    with torch.autocast("cpu", dtype=torch.bfloat16), Products() as seen:
        y = layer(x)
    y.backward(grad.bfloat16())
    assert not seen.in_16_bits
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == layer.lora_A.grad.dtype == torch.float32
    for g, e in zip((y, x.grad, layer.lora_A.grad, layer.lora_B.grad), exact(layer, x, grad), strict=False):
        assert relative_error(g, e) < 8e-3  # roundings of x, of the gradient and of results


@pytest.mark.parametrize("stack", ["lora+dora", "dora+lora", "dora+dora"])
def test_adapters_over_adapters(randomize, stack):
    makes = {"lora": phicore.LoRALinear, "dora": phicore.DoRALinear}
    layer = base_of("linear", 23, 37)
    for name in reversed(stack.split("+")):
        layer = randomize(makes[name](layer, rank=4, alpha=7.0))
    with torch.no_grad():
        wide = copy.deepcopy(layer).double()
    x = torch.randn(5, 37).bfloat16().requires_grad_()
    with Products() as seen:
        y = layer(x)
        y.sum().backward()
    assert not seen.in_16_bits
    torch.testing.assert_close(y.double(), wide(x.detach().double()), rtol=3e-2, atol=3e-2)


def test_saves_x_and_its_projection_only(randomize, saved_for_backward):
    x = torch.randn(50, 96).bfloat16().requires_grad_()
    for make, more in zip(LAYERS, ([], [(50, 64)]), strict=True):
        layer = build(make, randomize, "linear", 64, 96)
        kept = [t for t in saved_for_backward(lambda layer=layer: layer(x), layer) if t.numel() > 96]
        assert sorted(tuple(t.shape) for t in kept) == sorted([(50, 4), (50, 96), *more])
        assert {t.dtype for t in kept if t.shape != (50, 4)} == {torch.bfloat16}
        assert list(layer.state_dict()) == list(build(make, randomize, dtype=torch.float32).state_dict())


def test_no_temporary_of_the_size_of_the_weight(randomize):
    out, inner, tokens, piece = 80, 100, 30, 1000
    weight, x = torch.randn(out, inner).bfloat16(), torch.randn(tokens, inner).bfloat16()
    A, B, grad = (torch.randn(shape).bfloat16() for shape in ((4, inner), (out, 4), (tokens, out)))
    with mock.patch.object(products, "PIECE", piece), Allocations() as allocations:
        dense.reference(x, A, B, 0.5, weight, None, True)
        dense.reference_dx(grad, grad[:, :4], A, weight)
        products._addmm(None, grad, B, 1.0, torch.float32)
        products._addmm(None, grad.t(), x[:, :4], 1.0, torch.bfloat16)
    assert max(size for _, size in allocations.sizes) <= tokens * inner
    assert len(allocations.sizes) > 30  # it did look


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("make", LAYERS)
def test_scaling_makes_no_float32_copy_of_the_output(randomize, make, dropout):
    layer = build(make, randomize, "linear", 64, 48, dropout=dropout)
    x = torch.randn(50, 48).bfloat16().requires_grad_()
    from phicore.adapters import scaled_rows

    with mock.patch.object(scaled_rows, "SCALED", 640):
        y = layer(x)
        with Floats() as floats:
            (layer(x) - y).sum().backward()
    assert floats.largest < 50 * 48


class Floats(TorchDispatchMode):
    """The size of the largest float32 tensor that an operator returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = [t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.largest = max(self.largest, *found)
        return result


@pytest.mark.parametrize(
    ("make", "kind", "dropout"),
    [
        (phicore.LoRALinear, "linear", 0.0),
        (phicore.DoRALinear, "linear", 0.3),
        (phicore.DoRALinear, "nf4", 0.0),
    ],
)
def test_compiled_in_one_graph_for_any_batch(randomize, make, kind, dropout):
    torch._dynamo.reset()
    layer = build(make, randomize, kind, dropout=dropout)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (5, 8, 13):
        x = torch.randn(2, tokens, 37).bfloat16().requires_grad_()
        torch._dynamo.mark_dynamic(x, 1)
        results = []
        for f in (layer, compiled):
            torch.manual_seed(1)
            y = f(x)
            results.append((y, *torch.autograd.grad(y.sum(), (x, layer.lora_A, layer.lora_B))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert counter.frame_count == 1


# ===== the operators =====


def arguments(dtype: torch.dtype, *, bias: bool = True) -> tuple[Tensor, ...]:
    shapes = ((2, 3, 6), (2, 6), (5, 2), (5, 6), (5,))
    x, A, B, W, b = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return x, A, B, W.detach(), b if bias else None


@pytest.mark.parametrize(("bias", "with_rows"), [(True, False), (False, True)])
def test_operator_values_and_gradients(bias, with_rows):
    x, A, B, W, b = arguments(torch.float64, bias=bias)
    y, u, rows = dense_low_rank(x, A, B, 0.7, W, b, with_rows)
    torch.testing.assert_close(y, x @ (W + 0.7 * B @ A).T + (0 if b is None else b))
    torch.testing.assert_close(u, x @ A.T)
    torch.testing.assert_close(rows, A @ W.T if with_rows else W.new_empty(0, 5))
    assert not rows.requires_grad

    def f(x, A, B, b):
        return dense_low_rank(x, A, B, 0.7, W, b, with_rows)[0]

    assert torch.autograd.gradcheck(f, (x, A, B, b))
    assert torch.autograd.gradgradcheck(f, (x, A, B, b))


def test_operator_without_a_pair():
    x, A, _, W, b = arguments(torch.float64)

    def f(x, b):
        return dense_low_rank(x, A, None, 1.0, W, b, True)[0]

    torch.testing.assert_close(f(x, b), x @ W.T + b)
    assert torch.autograd.gradcheck(f, (x, b))
    assert torch.autograd.gradgradcheck(f, (x, b))


def test_opcheck():
    x, A, B, W, b = arguments(torch.bfloat16)
    torch.library.opcheck(dense_low_rank, (x, A, B, 0.7, W, b, True))
    torch.library.opcheck(dense_low_rank, (x, A.detach(), None, 0.7, W, None, True))
    grad, left = torch.randn(2, 3, 5, dtype=torch.bfloat16, requires_grad=True), torch.randn(2, 3, 2)
    torch.library.opcheck(dense_low_rank_dx, (grad, left.requires_grad_(), A, W))
