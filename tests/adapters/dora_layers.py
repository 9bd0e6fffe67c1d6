"""DoRA layers for tests, and what those look at."""

from unittest import mock

import torch
from torch import Tensor, nn

import phicore
from phicore.adapters import dora

OUT, IN = 23, 37
NAMES = ("lora_A", "lora_B", "magnitude")


def trained(layer: phicore.DoRALinear) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(getattr(layer, name) for name in NAMES)


def random_adapter(base: nn.Module, randomize, **options) -> phicore.DoRALinear:
    return randomize(phicore.DoRALinear(base, **{"rank": 4, "alpha": 7.0, **options}), seed=3)


def cancelling(kind: str, layer_of, dtype: torch.dtype, ratio: float) -> tuple[phicore.DoRALinear, Tensor]:
    """A layer whose s B A takes all but about `ratio` of ||W|| away in each row, and ||V'|| in float64."""
    out, inner = 16, 12
    base, W, _ = layer_of(kind, out, inner, dtype=dtype)
    layer = phicore.DoRALinear(base, rank=inner, alpha=2.0 * inner)
    with torch.no_grad():
        layer.lora_A.copy_(torch.linalg.qr(torch.randn(inner, inner)).Q)
        V = ratio * W.norm(dim=1, keepdim=True) * torch.randn_like(W) / inner**0.5
        layer.lora_B.copy_((V - W) / 2 @ layer.lora_A.double().inverse())
        layer.magnitude.normal_()
    V = W + 2 * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    return layer, V.norm(dim=1)


def norm_used(layer: phicore.DoRALinear, x: Tensor) -> Tensor:
    """||V'|| per row as a forward pass of the layer uses it."""
    with mock.patch.object(dora, "row_scale", wraps=dora.row_scale) as spy:
        layer(x)
    return spy.call_args.args[1]


def row_error(norm: Tensor, exact: Tensor) -> float:
    return float(((norm.double() - exact) / exact).abs().max())
