"""LoRAConvolution and DoRAConvolution against convolutions with kernels computed densely in float64."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import phicore
from phicore.adapters.convolution import DoRAConvolution, LoRAConvolution

BOTH = pytest.mark.parametrize("kind", [LoRAConvolution, DoRAConvolution])
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def kernels(layer, *, detach: bool = True) -> tuple[Tensor, list[Tensor]]:
    """The adapted kernels over all channels, [out, in, *kernel], and the leaves A, B (and m) that made them."""
    conv = layer.innermost
    names = ["lora_A", "lora_B", *(["magnitude"] if isinstance(layer, DoRAConvolution) else [])]
    leaves = [getattr(layer, name).detach().double().requires_grad_(True) for name in names]
    if layer.base is conv:
        W = torch.zeros(conv.out_channels, conv.in_channels, *conv.kernel_size, dtype=torch.float64)
        for o in range(conv.out_channels):  # written out, one output channel after the other
            group = o // (conv.out_channels // conv.groups)
            width = conv.in_channels // conv.groups
            W[o, group * width : (group + 1) * width] = conv.weight[o].detach().double()
    else:
        W = kernels(layer.base)[0].detach()
    rows = []
    for o in range(conv.out_channels):
        group = o // (conv.out_channels // conv.groups)
        ranks = layer.rank // conv.groups
        A = leaves[0][group * ranks : (group + 1) * ranks]
        rows.append(torch.einsum("r,r...->...", leaves[1][o].flatten(), A))
    s = layer.alpha / layer.rank**0.5 if layer.rslora else layer.alpha / layer.rank
    V = W + s * torch.stack(rows)
    if len(leaves) == 2:
        return V, leaves
    norm = V.flatten(1).square().sum(1).sqrt()
    return V * (leaves[2] / (norm.detach() if detach else norm)).view(-1, *(1,) * (V.dim() - 1)), leaves


def dense(layer, x: Tensor, weight: Tensor) -> Tensor:
    """What torch's own convolution computes with these kernels."""
    conv = copy.deepcopy(layer.innermost)
    conv.groups = 1
    return conv._conv_forward(x, weight, None if conv.bias is None else conv.bias.detach())


@given(
    kind=st.sampled_from((LoRAConvolution, DoRAConvolution)),
    dims=st.integers(1, 3),
    groups=st.sampled_from((1, 2, 3)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from((0, 1, "same", "valid")),
    mode=st.sampled_from(("zeros", "circular", "reflect", "replicate")),
    bias=st.booleans(),
    rslora=st.booleans(),
    batch=st.sampled_from(((), (1,), (2,))),
)
def test_forward_and_gradients_equal_dense_kernels(
    randomize, kind, dims, groups, kernel, stride, dilation, padding, mode, bias, rslora, batch
):
    if padding == "same":
        stride = 1  # torch's rule
    conv = CONVOLUTIONS[dims - 1](
        groups * 2, groups * 3, kernel, stride, padding, dilation, groups, bias, padding_mode=mode
    ).double()
    layer = randomize(kind(conv, rank=groups * 2, alpha=7.0, rslora=rslora), seed=3)
    x = torch.randn(*batch, groups * 2, *(7, 6, 5)[:dims], dtype=torch.float64, requires_grad=True)
    weight, leaves = kernels(layer)
    y, expected = layer(x), dense(layer, x, weight)
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(y, expected, **close)
    grad = torch.randn_like(y)
    mine = [layer.lora_A, layer.lora_B, *([layer.magnitude] if kind is DoRAConvolution else [])]
    given_grads = torch.autograd.grad(y, (x, *mine), grad)
    for g, e in zip(given_grads, torch.autograd.grad(expected, (x, *leaves), grad), strict=True):
        torch.testing.assert_close(g, e, **close)

    model = nn.Sequential(layer)
    phicore.merge(model)
    assert type(model[0]) is type(conv)
    torch.testing.assert_close(model(x), y, **close)
    phicore.unmerge(model)
    assert model[0].innermost is conv
    assert conv.groups == groups


def test_the_norm_is_a_constant_in_the_backward_pass(randomize, relative_error):
    layer = randomize(DoRAConvolution(nn.Conv2d(4, 6, 3).double(), rank=4, alpha=7.0), seed=3)
    x, grad = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.randn(2, 6, 3, 3, dtype=torch.float64)
    given_grads = torch.autograd.grad(layer(x), (layer.lora_A, layer.lora_B), grad)
    weight, leaves = kernels(layer, detach=False)
    for g, e in zip(given_grads, torch.autograd.grad(dense(layer, x, weight), leaves[:2], grad), strict=True):
        assert relative_error(g, e) > 0.02


@BOTH
def test_a_new_adapter_equals_its_base(kind):
    conv = nn.Conv2d(4, 6, 3, groups=2).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(kind(conv, rank=4, alpha=7)(x), conv(x))


@BOTH
@pytest.mark.parametrize("groups", [1, 2])
def test_adapters_stack(kind, groups, randomize):
    conv = nn.Conv2d(4, 6, 3, groups=groups, padding=1, padding_mode="circular").double()
    lower = randomize(DoRAConvolution(conv, rank=2, alpha=5.0), seed=5)
    layer = randomize(kind(lower, rank=4, alpha=7.0), seed=9)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(layer, x, kernels(layer)[0]))
    model = nn.Sequential(layer)
    phicore.merge(model)
    torch.testing.assert_close(model(x), layer(x))


@BOTH
def test_a_zero_kernel_stays_finite(kind, randomize):
    conv = nn.Conv1d(4, 6, 3).double()
    nn.init.zeros_(conv.weight[2])
    layer = kind(conv, rank=4, alpha=7)
    y = layer(torch.randn(2, 4, 9, dtype=torch.float64))
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


@BOTH
def test_dropout_touches_the_low_rank_path_alone(kind, randomize):
    conv = nn.Conv1d(4, 6, 3).double()
    layer = randomize(kind(conv, rank=4, alpha=7, dropout=0.5), seed=3)
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    nn.init.zeros_(layer.lora_B)
    once = layer.train()(x)
    assert torch.equal(once, layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@BOTH
def test_dtypes(kind, dtype, randomize, relative_error):
    layer = randomize(kind(nn.Conv2d(8, 16, 3).to(dtype), rank=4, alpha=7.0), seed=3)
    x = torch.randn(2, 8, 6, 6, dtype=dtype)
    y = layer(x)
    assert (y.dtype, layer.lora_A.dtype) == (dtype, dtype)
    exact = copy.deepcopy(layer).double()
    assert relative_error(y, dense(exact, x.double(), kernels(layer)[0])) < 20 * torch.finfo(dtype).eps


@BOTH
def test_autocast(kind, randomize, relative_error):
    layer, x = randomize(kind(nn.Conv2d(8, 16, 3), rank=4, alpha=7.0), seed=3), torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16  # as the base's
    assert relative_error(y, layer(x)) < 2e-2


@BOTH
def test_one_graph(kind, randomize):
    layer = randomize(kind(nn.Conv2d(4, 6, 3).double(), rank=4, alpha=7.0), seed=3)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, layer(x))
    y.sum().backward()
    assert layer.lora_B.grad is not None


def test_what_is_refused(unchanged):
    base = nn.Conv1d(4, 6, 3, groups=2)
    with unchanged(base), pytest.raises(ValueError, match="groups=2 needs a rank that this divides, got 3"):
        LoRAConvolution(base, rank=3)
    with unchanged(base), pytest.raises(ValueError, match='init "pissa" is for linear layers'):
        LoRAConvolution(base, rank=2, init="pissa")
    with pytest.raises(TypeError, match=r"adapts nn\.Conv1d, .* or another adapter of one, got ConvTranspose1d"):
        DoRAConvolution(nn.ConvTranspose1d(4, 6, 3))
    model = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="groups=2 needs a rank"):
        phicore.attach(model, phicore.LoRAConfig(rank=3, target_modules=["1", "0"]))
    assert type(model[1]) is nn.Linear


@pytest.mark.parametrize("bias", [True, False])
@BOTH
def test_a_base_with_hooks_is_called(kind, randomize, bias):
    layer, x, seen = randomize(kind(nn.Conv1d(3, 4, 2, bias=bias), 2)), torch.randn(2, 3, 5), []
    expected = layer(x)
    layer.base.register_forward_hook(lambda *_: seen.append("hook"))
    torch.testing.assert_close(layer(x), expected)
    assert seen == ["hook"]


def test_a_convolution_that_computes_otherwise_with_its_weight_takes_lora_and_keeps_it(randomize, unchanged):
    class Doubled(nn.Conv1d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, 2 * weight, bias)

    base, x = Doubled(3, 4, 2), torch.randn(2, 3, 5)
    with unchanged(base), pytest.raises(ValueError, match="a Doubled has a forward of its own; DoRA computes with its"):
        DoRAConvolution(base, rank=2)
    layer = randomize(LoRAConvolution(base, rank=2))
    torch.testing.assert_close(layer(x), base(x) + layer.low_rank(x))
    model = nn.Sequential(layer)
    with unchanged(model), pytest.raises(ValueError, match="a Doubled has a forward of its own, and what that does"):
        phicore.merge(model)
