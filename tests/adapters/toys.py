"""What tests of this room share: the toy model of conftest, dense or NF4, with an adapter; and stacked experts."""

import pytest
import torch
from torch import Tensor, nn

import phicore

NF4 = pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
DORA = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
CONFIG = {"rank": 3, "alpha": 7.0}


class Experts(nn.Module):
    """Their weights are one parameter, all on all tokens: [..., 8] -> [..., 3, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...eo", x, self.up)


def adapted(model: nn.Module, randomize, name: str = "default", seed: int = 1, **options) -> nn.Module:
    """A model with an adapter whose B is not zero."""
    return randomize(phicore.attach(model, phicore.LoRAConfig(**{**CONFIG, **options}), name), seed=seed)


def build(toy, nf4: bool = False, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    model = toy(dtype=dtype, **options)
    return phicore.quantize_(model) if nf4 else model


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def x_for(model: nn.Module, *lead: int) -> Tensor:
    return torch.randn(*(lead or (5,)), 10, dtype=model.norm.weight.dtype)
