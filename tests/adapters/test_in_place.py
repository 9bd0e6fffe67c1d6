"""What comes after a layer may write to its output in place, as nn.ReLU(inplace=True) and `y += residual` do."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import phicore
from phicore.adapters import DoRAExperts, FusedDoRALinear, FusedLoRALinear
from phicore.adapters.convolution import DoRAConvolution, LoRAConvolution
from tests.adapters.toys import Experts


def linear() -> nn.Module:
    return nn.Linear(10, 8)


def nf4() -> nn.Module:
    return phicore.NF4Linear.from_linear(nn.Linear(10, 8))


def nf4_without_bias() -> nn.Module:
    return phicore.NF4Linear.from_linear(nn.Linear(10, 8, bias=False))


PARTS = {"q": 5, "v": 3}
BASES = (linear, nf4, nf4_without_bias)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{base.__name__: base for base in BASES},
    **{
        f"{kind.__name__} over {base.__name__}": lambda kind=kind, base=base: kind(base(), 3)
        for kind in (phicore.LoRALinear, phicore.DoRALinear)
        for base in BASES
    },
    **{
        f"{kind.__name__} with dropout": lambda kind=kind: kind(linear(), 3, dropout=0.5)
        for kind in (phicore.LoRALinear, phicore.DoRALinear)
    },
    **{kind.__name__: lambda kind=kind: kind(nf4(), PARTS, 2) for kind in (FusedLoRALinear, FusedDoRALinear)},
    "LoRALinear over DoRALinear": lambda: phicore.LoRALinear(phicore.DoRALinear(linear(), 2), 3),
}


def check(layer: nn.Module, x: Tensor) -> None:
    """Output and gradients with a step in place equal those with a step that is not."""
    found = []
    for write in (lambda y: y.mul_(2).relu_(), lambda y: (y * 2).relu()):
        ours, leaf = copy.deepcopy(layer), x.clone().requires_grad_(True)
        torch.manual_seed(1)
        y = write(ours(leaf))
        y.square().sum().backward()
        found.append([y, leaf.grad, *(p.grad for p in ours.parameters())])
    for inside, outside in zip(*found, strict=True):
        assert (inside is None) == (outside is None)
        if inside is not None:
            torch.testing.assert_close(inside, outside)


@pytest.mark.parametrize("emulated", [False, True], ids=["", "emulated"])
@pytest.mark.parametrize("lead", [(4,), (2, 3)])
@pytest.mark.parametrize("name", LAYERS)
def test_linear_layers(monkeypatch, name, lead, emulated):
    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(*lead, 10)
    for parameter_name, p in layer.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(p)
    if emulated:
        monkeypatch.setattr("phicore.products.EMULATED", (torch.bfloat16,))
        layer, x = layer.bfloat16(), x.bfloat16()
    check(layer, x)


@pytest.mark.parametrize("kind", [LoRAConvolution, DoRAConvolution])
def test_convolutions(kind):
    torch.manual_seed(0)
    layer = kind(nn.Conv2d(3, 8, 3), 2)
    nn.init.normal_(layer.lora_B)
    check(layer, torch.randn(2, 3, 5, 5))


def test_experts():
    torch.manual_seed(0)
    layer = DoRAExperts(Experts(), {"up": 2})
    nn.init.normal_(layer.pairs["up"].lora_B)
    check(layer, torch.randn(4, 8))
