"""Putting NF4 layers in the place of a model's linear layers."""

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from phicore.modules import ALL_LINEAR, replace, select
from phicore.nf4.linear import NF4Linear
from phicore.nf4.tensor import check_block_size


def quantize_(
    model: nn.Module,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    exclude_modules: Sequence[str] = (),
    *,
    block_size: int = 64,
    double_quant: bool = True,
    progress: Callable[[str], object] | None = None,
) -> nn.Module:
    """Replaces nn.Linear layers by NF4Linear, in place.

    Args:
        model: any module.
        target_modules, exclude_modules: which layers; see `phicore.modules.select`. "all-linear" leaves the output
            head alone.
        block_size: weights that share one absmax.
        double_quant: also code the absmax in 8 bits.
        progress: called with each layer's name when it is done.

    Returns:
        The model.

    Raises:
        ValueError: a target that matches nothing; a NaN or Inf weight, naming its layer; a model with adapters. The
            model is then unchanged.
        TypeError: a weight that is not float32, bfloat16 or float16, naming its layer; the model is then unchanged.
    """
    check_block_size(block_size)
    adapters = [name for name, module in model.named_modules() if hasattr(module, "adapter_name")]
    if adapters:  # their frozen bases and trained copies are nn.Linear too, and DoRA holds norms of its base
        raise ValueError(f"{adapters[0]} is an adapter; quantize a model before adapters are attached to it")
    chosen: dict[str, Any] = select(model, target_modules, exclude_modules, (nn.Linear,))
    # All weights are looked at before the first is replaced, so that an error leaves no half-quantised model.
    for name, layer in chosen.items():
        weight = layer.weight
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name}.weight is {weight.dtype}; NF4 encodes float32, bfloat16 or float16 weights")
        if weight.numel() and not weight.is_meta and not torch.stack(weight.detach().aminmax()).isfinite().all():
            raise ValueError(f"{name}.weight holds NaN or Inf, for which NF4 has no code; the model is unchanged")
    done: dict[nn.Module, NF4Linear] = {}
    for name, layer in chosen.items():
        if layer not in done:  # a layer that stands in two places stays one layer
            done[layer] = NF4Linear.from_linear(layer, block_size, double_quant)
        replace(model, name, done[layer])
        if progress is not None:
            progress(name)
    chosen.clear()
    done.clear()
    layer = weight = None  # the last references to the dense weights
    _give_back_freed_memory()
    return model


def _give_back_freed_memory() -> None:
    """Gives the dense weights' memory back to the system. glibc keeps what lies between blocks in use, in pieces that
    the activations of training do not fit into: 0.4 of the 1.8 GB that fine-tuning SmolLM2-135M took."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)
