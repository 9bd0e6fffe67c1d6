"""Adapter layers where one operator takes the place of several, as on a GPU: what they save, and when they do not.

Here the operators run as their torch references; tests/kernels/test_gpu_bodies.py runs the same layers on the kernels.
"""

from unittest import mock

import pytest
import torch
from torch import nn

import phicore
from phicore import products
from phicore.adapters.dora_scale import scale_columns
from phicore.nf4 import kernels
from tests.gpu.bodies import called

FUSED = "phicore::nf4_low_rank"


@pytest.fixture
def _as_on_a_gpu():
    with mock.patch.object(kernels, "DEVICE_TYPES", ("cpu",)), mock.patch.object(products, "EMULATED", ()):
        yield


def build(make, randomize, **options):
    base = phicore.NF4Linear.from_linear(nn.Linear(96, 64)).requires_grad_(False)
    return randomize(make(base, rank=4, alpha=8.0, **options))


def names_of(layer: nn.Module, x: torch.Tensor) -> set[str]:
    with called() as names:
        layer(x)
    return names


def test_a_cpu_keeps_the_single_steps(randomize):
    for make in (phicore.LoRALinear, phicore.DoRALinear):
        assert not {FUSED, "phicore::dora_scale"} & names_of(build(make, randomize), torch.randn(3, 96))


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_fusing_saves_no_more_for_the_backward_pass(randomize, saved_for_backward):
    x = torch.randn(50, 96, requires_grad=True)
    lora, dora = (build(make, randomize) for make in (phicore.LoRALinear, phicore.DoRALinear))
    assert FUSED in names_of(lora, x)
    kept = saved_for_backward(lambda: lora(x), lora)
    assert sorted(tuple(t.shape) for t in kept) == [(50, 4), (50, 96)]
    kept = saved_for_backward(lambda: dora(x), dora)
    assert sorted(tuple(t.shape) for t in kept if t.numel() > 64) == [(50, 4), (50, 64), (50, 96)]


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("make", [phicore.LoRALinear, phicore.DoRALinear])
def test_autocast_and_adapters_of_another_dtype(randomize, relative_error, make):
    layer = build(make, randomize, dtype=torch.float32)
    x = torch.randn(5, 96, requires_grad=True)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 2e-2
    y.sum().backward()
    assert x.grad.dtype == layer.lora_A.grad.dtype == torch.float32


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_what_one_operator_cannot_do_takes_single_steps(randomize):
    x = torch.randn(3, 96)
    assert FUSED not in names_of(build(phicore.LoRALinear, randomize, dropout=0.5), x)
    assert FUSED in names_of(build(phicore.LoRALinear, randomize, dropout=0.5).eval(), x)
    assert FUSED not in names_of(build(phicore.LoRALinear, randomize).double(), x.double())
    disabled = build(phicore.LoRALinear, randomize)
    disabled.enabled = False
    assert FUSED not in names_of(disabled, x)
    assert torch.equal(disabled(x), disabled.base(x))


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_a_base_with_hooks_is_called(randomize):
    layer, seen = build(phicore.LoRALinear, randomize), []
    expected = layer(torch.ones(2, 96))
    handle = layer.base.register_forward_hook(lambda *_: seen.append("hook"))
    torch.testing.assert_close(layer(torch.ones(2, 96)), expected)
    assert seen == ["hook"]
    handle.remove()
    forward = layer.base.forward  # what accelerate does to a module
    layer.base.forward = lambda x: seen.append("wrapped") or forward(x)
    layer(torch.ones(2, 96))
    assert seen == ["hook", "wrapped"]


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_rows_whose_norm_cancels_are_summed_densely(randomize, relative_error):
    layer = build(phicore.DoRALinear, randomize)
    with torch.no_grad():  # V' = 0.001 W in one row of rank one
        W = layer.base.nf4.dequantize(torch.float32)
        layer.lora_A.zero_()
        layer.lora_B.zero_()
        layer.lora_A[0], layer.lora_B[5, 0] = W[5], -0.999 / layer.scaling
    x = torch.randn(4, 96)
    V = W.double().clone()
    V[5] += layer.scaling * layer.lora_B[5, 0].double() * layer.lora_A[0].double()
    expected = x.double() @ (layer.magnitude.double() / V.norm(dim=1))[:, None].mul(V).T + layer.bias.double()
    assert relative_error(layer(x)[:, :5], expected[:, :5]) < 1e-5
    # x V'^T itself loses three digits in that row; the norm must not lose six
    assert relative_error(layer(x)[:, 5], expected[:, 5]) < 1e-3


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("make", [phicore.LoRALinear, phicore.DoRALinear])
def test_compiled_in_one_graph_equals_eager(randomize, make):
    torch._dynamo.reset()
    layer = build(make, randomize)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 96, requires_grad=True)
    results = []
    for f in (layer, compiled):
        y = f(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.lora_A, layer.lora_B))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_scaling_operator_for_the_dispatcher():
    v, WA, A, B = torch.randn(2, 3, 5), torch.randn(5, 2), torch.randn(2, 6), torch.randn(5, 2)
    m, bias = torch.rand(5), torch.randn(5)
    for tensor in (v, m, bias):
        tensor.requires_grad_()
    arguments = (v, torch.rand(5) + 9, WA, A, B, m, bias, 0.3)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.phicore.dora_scale, arguments, test_utils=checks)
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in arguments[:-1]]

    def f(v, m, bias):
        return scale_columns(v, *doubles[1:5], m, bias, 0.3)[0]

    assert torch.autograd.gradcheck(f, (doubles[0], doubles[5], doubles[6]))
