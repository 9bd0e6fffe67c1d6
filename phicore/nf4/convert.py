"""Putting NF4 layers in the place of a model's linear layers."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from phicore.modules import ALL_LINEAR, Model, has_own_forward, listed, replace, select, unwrapped
from phicore.nf4.linear import NF4Linear
from phicore.nf4.pages import give_back_freed_memory
from phicore.nf4.tensor import check_block_size, quantize

finishers: list[Callable[[nn.Module], None]] = []
"""Called with each model that quantize_ has changed. Foreign formats see to the model's own methods here, since this
package imports none of them."""


def quantize_(
    model: Model,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    exclude_modules: Sequence[str] = (),
    *,
    block_size: int = 64,
    double_quant: bool = True,
    progress: Callable[[str], object] | None = None,
) -> Model:
    """Replaces nn.Linear layers by NF4Linear, in place. save_pretrained of a model of transformers then writes them in
    bitsandbytes' layout, from which from_pretrained makes the same model.

    Args:
        model: any module. A layer in it that torch.compile wraps alone is not compiled any more once it is replaced.
        target_modules, exclude_modules: which layers; see `phicore.modules.select`. "all-linear" leaves the output
            head alone.
        block_size: weights that share one absmax.
        double_quant: also code the absmax in 8 bits.
        progress: called with each layer's name when it is done.

    Returns:
        The model.

    Raises:
        ValueError: a target that matches nothing; a NaN or Inf weight, or one too large for double_quant, naming its
            layer; a layer that is more than its weight (a subclass with its own forward, a parametrization) or whose
            weight is not there (offloaded, lazy); a model with adapters. The model is then unchanged.
        TypeError: a weight that is not float32, bfloat16 or float16, naming its layer; the model is then unchanged.

    Warns:
        UserWarning: "all-linear" leaves out what is no layer to replace, above all the experts of a mixture where they
            stand in stacked parameters.
    """
    check_block_size(block_size)
    with unwrapped(model) as bare:
        _quantize(bare, target_modules, exclude_modules, block_size, double_quant, progress)
    give_back_freed_memory()
    return model


def _quantize(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: Sequence[str],
    block_size: int,
    double_quant: bool,
    progress: Callable[[str], object] | None,
) -> None:
    adapters = [name for name, module in model.named_modules() if hasattr(module, "adapter_name")]
    if adapters:  # their frozen bases and trained copies are nn.Linear too, and DoRA holds norms of its base
        raise ValueError(
            f"{adapters[0] or 'the model itself'} is an adapter; quantize a model before adapters are attached to it"
        )
    try:
        chosen: dict[str, Any] = select(model, target_modules, exclude_modules, (nn.Linear,))
    except ValueError as error:
        already = sum(isinstance(module, NF4Linear) for module in model.modules())
        raise (ValueError(f"{error}; {already} layers are in NF4 already") if already else error) from None
    all_meta = all(parameter.is_meta for parameter in model.parameters())
    # All weights are looked at before the first is replaced, so that an error leaves no half-quantised model.
    for name, layer in chosen.items():
        check_layer(name, layer, all_meta, block_size if double_quant else None)
    share, stacks = stacks_beside(model) if target_modules == ALL_LINEAR else (0, "")
    if stacks:
        warnings.warn(
            f"all-linear leaves out stacked parameters, {share:.0%} of the model, which keep their dtype: {stacks}",
            stacklevel=3,
        )
    done: dict[nn.Module, NF4Linear] = {}
    for name, layer in chosen.items():
        if layer not in done:  # a layer that stands in two places stays one layer
            done[layer] = coded(layer, block_size, double_quant)
        replace(model, name, done[layer])
        if progress is not None:
            progress(name)
    for finish in finishers:
        finish(model)


def stacks_beside(model: nn.Module) -> tuple[float, str]:
    """Weights of three dimensions that no layer of torch holds: what share of the model they are, and their names in
    short. Most of a mixture of experts stands in them. (0, "") where they are less than a tenth."""
    sizes = {p: p.numel() for p in model.parameters() if not isinstance(p, UninitializedParameter)}
    coded = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear))
    total = sum(sizes.values()) + coded
    stacks = {
        f"{path}.{name}".lstrip("."): sizes[parameter]
        for path, module in model.named_modules()
        if not type(module).__module__.startswith("torch.nn.")
        for name, parameter in module.named_parameters(recurse=False)
        if parameter in sizes and parameter.dim() == 3 and parameter.is_floating_point()
    }
    if not stacks or 10 * sum(stacks.values()) < total:
        return 0, ""
    return sum(stacks.values()) / total, listed(list(stacks), 1)


HOOKS = [n for n in vars(nn.Module()) if n.startswith(("_forward", "_backward")) or n == "_is_full_backward_hook"]


def coded(layer: nn.Linear, block_size: int = 64, double_quant: bool = True) -> NF4Linear:
    """An NF4Linear to stand in a layer's place, with its hooks."""
    return with_hooks_of(layer, NF4Linear.from_linear(layer, block_size, double_quant))


def with_hooks_of(layer: nn.Module, made: Model) -> Model:
    """A module that is to stand in a layer's place, with its hooks: the dicts, which handles know."""
    made.__dict__.update({name: vars(layer)[name] for name in HOOKS})
    return made


def check_layer(name: str, layer: nn.Linear, all_meta: bool, nested_block_size: int | None = None) -> None:
    """Raises ValueError or TypeError for a layer that has no NF4 code, or that an NF4Linear would not be the same as.

    Args:
        name: of the layer.
        layer: is not changed.
        all_meta: whether the model has no values yet, in any of its weights.
        nested_block_size: the block size of a double quantisation, which has no mean for the largest weights.
    """
    replaced = "forward" in vars(layer)
    if replaced or has_own_forward(layer):
        raise ValueError(
            f"{name} is a {type(layer).__name__} whose forward "
            + ("was replaced, as accelerate does to offload" if replaced else "is not nn.Linear's")
            + ", and would compute otherwise as NF4Linear; "
            + ("load the model without that" if replaced else "exclude it")
        )
    if "weight" not in layer._parameters:
        raise ValueError(
            f"{name} computes its weight (a parametrization, weight norm or pruning), which NF4 would freeze; remove "
            f"that first (torch.nn.utils.parametrize.remove_parametrizations), or exclude it"
        )
    if isinstance(layer.weight, UninitializedParameter):
        raise ValueError(f"{name} has no shape yet; run a batch through the model first")
    if layer.weight.is_meta and not all_meta:
        raise ValueError(f"{name}.weight is on meta and other weights are not: it is offloaded; load the model whole")
    weight = layer.weight
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name}.weight is {weight.dtype}; NF4 encodes float32, bfloat16 or float16 weights")
    if not weight.numel() or weight.is_meta:
        return
    largest = torch.stack(weight.detach().aminmax()).abs().amax().float()
    if not largest.isfinite():
        raise ValueError(f"{name}.weight holds NaN or Inf, for which NF4 has no code; the model is unchanged")
    if nested_block_size is not None and not (largest * (weight.numel() / nested_block_size + 1)).isfinite():
        try:  # the sum of the absmax may be beyond float32; coding the weight tells whether it is
            quantize(weight, nested_block_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; the model is unchanged") from None
