"""Adapted layers under torch.func's transforms, forward-mode differentiation and torch.jit.trace: the same numbers as
without them."""

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

import phicore
from phicore.adapters import DoRAExperts, FusedDoRALinear, FusedLoRALinear, LoRAExperts
from phicore.adapters.convolution import DoRAConvolution, LoRAConvolution
from phicore.adapters.dora import DoRALayer
from phicore.adapters.embedding import DoRAEmbedding, LoRAEmbedding
from tests.adapters.toys import Experts

Parameters = dict[str, Tensor]
DTYPE = torch.float64


def linear() -> nn.Module:
    return nn.Linear(10, 7)


def nf4() -> nn.Module:
    return phicore.NF4Linear.from_linear(nn.Linear(10, 7))


def zero_row() -> nn.Module:
    layer = nn.Linear(10, 7)
    with torch.no_grad():
        layer.weight[2] = 0
    return layer


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "NF4Linear": lambda: (nf4(), torch.randn(5, 3, 10)),
    **{
        f"{kind.__name__} over {base.__name__}": lambda kind=kind, base=base: (kind(base(), 3), torch.randn(5, 3, 10))
        for kind in (phicore.LoRALinear, phicore.DoRALinear)
        for base in (linear, nf4, zero_row)
    },
    "DoRALinear over LoRALinear": lambda: (
        phicore.DoRALinear(phicore.LoRALinear(linear(), 2), 3), torch.randn(5, 3, 10),
    ),
    **{
        kind.__name__: lambda kind=kind: (kind(nn.Conv2d(4, 6, 3, groups=2), 2), torch.randn(5, 1, 4, 5, 5))
        for kind in (LoRAConvolution, DoRAConvolution)
    },
    **{
        kind.__name__: lambda kind=kind: (kind(nn.Embedding(9, 4), 2), torch.randint(9, (5, 3)))
        for kind in (LoRAEmbedding, DoRAEmbedding)
    },
}  # fmt: skip


@pytest.fixture(params=LAYERS)
def case(request) -> tuple[nn.Module, Tensor]:
    """A layer whose B is not zero, in float64, and five examples."""
    torch.manual_seed(0)
    layer, x = LAYERS[request.param]()
    layer = layer.to(DTYPE)
    for name, p in layer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    for module in layer.modules():
        if isinstance(module, DoRALayer):
            module.refresh_base_norm()  # of an adapter under it
    return layer, x.to(DTYPE) if x.is_floating_point() else x


def parameters_of(layer: nn.Module) -> Parameters:
    """The layer's own; an adapter under it is part of its base."""
    return {name: p.detach() for name, p in layer.named_parameters(recurse=False)}


def with_leaves(layer: nn.Module, parameters: Parameters, x: Tensor) -> tuple[Parameters, Tensor]:
    """A plain call's leaves and output."""
    leaves = {name: p.clone().requires_grad_(True) for name, p in parameters.items()}
    return leaves, functional_call(layer, leaves, (x,))


def test_gradients_for_each_example(case):
    layer, x = case
    parameters = parameters_of(layer)

    def loss(parameters: Parameters, x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, example in enumerate(x):
        leaves, y = with_leaves(layer, parameters, example)
        expected = torch.autograd.grad(y.square().sum(), leaves.values())
        for name, e in zip(leaves, expected, strict=True):
            torch.testing.assert_close(found[name][i], e)


def directional(layer: nn.Module, parameters: Parameters, tangents: Parameters, x: Tensor) -> Tensor:
    """The directional derivative that the backward pass of a plain call knows: J t, an element of y at a time."""
    leaves, y = with_leaves(layer, parameters, x)
    rows = [torch.autograd.grad(element, leaves.values(), retain_graph=True) for element in y.flatten()]
    return torch.stack([sum((g * t).sum() for g, t in zip(row, tangents.values(), strict=True)) for row in rows])


def test_forward_mode_agrees_with_the_backward_pass(case):
    layer, x = case
    parameters = parameters_of(layer)
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    expected = directional(layer, parameters, tangents, x[0])
    y, dy = jvp(lambda p: functional_call(layer, p, (x[0],)), (parameters,), (tangents,))
    torch.testing.assert_close(y, functional_call(layer, parameters, (x[0],)))
    torch.testing.assert_close(dy.flatten(), expected)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, tangents[name]) for name, p in parameters.items()}
        dual = functional_call(layer, duals, (x[0],))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent.flatten(), expected)


@pytest.mark.parametrize("case", [name for name in LAYERS if "Embedding" not in name], indirect=True)
def test_forward_mode_follows_the_input(case):
    layer, x = case
    tangent = torch.randn_like(x[0])
    leaf = x[0].clone().requires_grad_(True)
    rows = [torch.autograd.grad(element, leaf, retain_graph=True)[0] for element in layer(leaf).flatten()]
    _, dy = jvp(layer, (x[0],), (tangent,))
    torch.testing.assert_close(dy.flatten(), torch.stack([(row * tangent).sum() for row in rows]))


def test_many_adapters_over_one_base(case):
    layer, x = case
    one = parameters_of(layer)
    other = {name: torch.randn_like(p) for name, p in one.items()}
    found = vmap(lambda p: functional_call(layer, p, (x[0],)))(
        {name: torch.stack([one[name], other[name]]) for name in one}
    )
    for y, parameters in zip(found, (one, other), strict=True):
        torch.testing.assert_close(y, functional_call(layer, parameters, (x[0],)))


def test_second_derivatives_are_those_of_two_backward_passes():
    torch.manual_seed(0)
    layer, x = phicore.LoRALinear(nf4(), 2).to(DTYPE), torch.randn(3, 10, dtype=DTYPE)
    parameters = parameters_of(layer)
    nn.init.normal_(parameters["lora_B"])

    def loss(B: Tensor) -> Tensor:
        return functional_call(layer, {**parameters, "lora_B": B}, (x,)).exp().sum()

    B = parameters["lora_B"]
    torch.testing.assert_close(hessian(loss)(B), torch.autograd.functional.hessian(loss, B))


@pytest.mark.parametrize("kind", [phicore.LoRALinear, phicore.DoRALinear])
def test_dropout_is_drawn_for_each_example(kind):
    torch.manual_seed(0)
    layer = kind(nn.Linear(64, 7), 3, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(64).expand(4000, 64)
    y = vmap(layer, randomness="different")(x)
    assert len(y.unique(dim=0)) == len(y)
    torch.testing.assert_close(y.mean(0), layer.eval()(x[0]), rtol=0.1, atol=0.1 * float(y.detach().std(0).max()))


def test_sixteen_bits(monkeypatch):
    """Where this CPU has no products of 16 bits either."""
    monkeypatch.setattr("phicore.products.EMULATED", (torch.bfloat16,))
    torch.manual_seed(0)
    layer, x = phicore.LoRALinear(nf4(), 2).bfloat16(), torch.randn(4, 10, dtype=torch.bfloat16)
    nn.init.normal_(layer.lora_B)
    torch.testing.assert_close(vmap(layer)(x), layer(x), rtol=0.02, atol=0.02)


class Attending(nn.Module):
    """[..., T, 8] -> [..., T, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(x, x, x)[0])


def attending(dora: bool) -> nn.Module:
    config = phicore.LoRAConfig(rank=2, dora=dora, target_modules=["attention", "last"])
    return phicore.attach(Attending(), config)


def experts(dora: bool) -> nn.Module:
    return (DoRAExperts if dora else LoRAExperts)(Experts(), {"up": 2})


def fused(dora: bool) -> nn.Module:
    base = phicore.NF4Linear.from_linear(nn.Linear(8, 12))
    return (FusedDoRALinear if dora else FusedLoRALinear)(base, {"q": 6, "k": 4, "v": 2}, {"q": 2, "v": 1})


def plain(dora: bool) -> nn.Module:
    return (phicore.DoRALinear if dora else phicore.LoRALinear)(phicore.NF4Linear.from_linear(nn.Linear(8, 5)), 2)


DORA = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


def loss_of(build: Callable[[bool], nn.Module], dora: bool) -> tuple[Callable[..., Tensor], Parameters, Tensor]:
    """A model's loss as a function of what trains and of an example, and both."""
    torch.manual_seed(0)
    model = build(dora).to(DTYPE)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, p in parameters.items():
        if "lora_B" in name:
            nn.init.normal_(p)

    def loss(parameters: Parameters, x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    return loss, parameters, torch.randn(4, 1, 3, 8, dtype=DTYPE)


@DORA
@pytest.mark.parametrize("build", [attending, experts, fused])
def test_gradients_for_each_example_of_a_model(build, dora):
    loss, parameters, x = loss_of(build, dora)
    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, example in enumerate(x):
        leaves = {name: p.clone().requires_grad_(True) for name, p in parameters.items()}
        for name, e in zip(leaves, torch.autograd.grad(loss(leaves, example), leaves.values()), strict=True):
            torch.testing.assert_close(found[name][i], e)


@DORA
def test_one_graph_within_torch_compile(dora):
    """A graph made without a transform is not taken for one with it."""
    loss, parameters, x = loss_of(plain, dora)
    per_example = vmap(grad(loss), in_dims=(None, 0))
    torch._dynamo.reset()
    alone = torch.compile(loss, backend="aot_eager", fullgraph=True)(parameters, x[0])
    torch.testing.assert_close(alone, loss(parameters, x[0]))
    compiled = torch.compile(per_example, backend="aot_eager", fullgraph=True)(parameters, x)
    torch.testing.assert_close(compiled, per_example(parameters, x))


@pytest.mark.parametrize("emulated", [False, True], ids=["", "emulated"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_several_gradients_of_one_output(monkeypatch, case, dropout, emulated):
    """vmap of a backward pass, as torch.vmap's documentation makes Jacobians: the forward pass has run without it."""
    layer, x = case
    layer.dropout, bounds = dropout, {}
    if emulated:
        monkeypatch.setattr("phicore.products.EMULATED", (torch.bfloat16,))
        layer, bounds = layer.bfloat16(), {"rtol": 0.05, "atol": 0.1}
    x = x[0].to(torch.bfloat16 if emulated else DTYPE).requires_grad_() if x.is_floating_point() else x[0]
    leaves, y = with_leaves(layer, parameters_of(layer), x)
    inputs = [*leaves.values(), *([x] if x.requires_grad else [])]
    grads = torch.randn(3, *y.shape, dtype=y.dtype)

    def backward(g: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, inputs, g, retain_graph=True)

    batched = torch.autograd.grad(y, inputs, grads, retain_graph=True, is_grads_batched=True)
    for found, again, *expected in zip(vmap(backward)(grads), batched, *map(backward, grads), strict=True):
        torch.testing.assert_close(found, torch.stack(expected), **bounds)
        torch.testing.assert_close(again, torch.stack(expected), **bounds)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_is_saved_and_takes_other_batches(case):
    layer, x = case
    x = x.flatten(0, 1)
    traced, file = torch.jit.trace(layer.eval(), x[:2]), io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), layer(x))
