"""Merging adapters into a model's weights, and taking them out again."""

from typing import TypeAlias, cast

import torch
from torch import nn

from phicore.adapters import base as base_layer
from phicore.adapters.attention import OpenAttention, allow_fused_paths, keep_off_fused_paths, projections
from phicore.adapters.experts import LoRAExperts
from phicore.adapters.layers import AdapterLayer, adapter_layers, merged_layers
from phicore.adapters.lora import LowRankLayer
from phicore.adapters.tied import same_table, shared_pair
from phicore.adapters.trained import TrainedPart
from phicore.adapters.wrapped import check_not_sharded
from phicore.modules import Model, replace, unwrapped
from phicore.nf4.convert import with_hooks_of
from phicore.nf4.linear import NF4Linear
from phicore.nf4.pages import Freed
from phicore.nf4.tensor import quantize

Made: TypeAlias = dict[AdapterLayer, tuple[nn.Module, float]]
"""Adapter layers with the layers that were made to take their places, and the relative errors of these."""


@torch.no_grad()
def merge(model: nn.Module, *, requantize: bool = False) -> dict[str, float]:
    """Replaces each adapter layer by one plain layer that computes the same, in place.

    A merged model has the modules and state-dict keys that it had before `attach`. The sum is made in float32 and
    rounded once to the base's dtype. An NF4 base becomes a dense layer of its compute dtype, since encoding again loses
    about as much as the first encoding did. The adapter layers and their bases are kept aside for `unmerge`: until
    then a merged model holds its adapted weights twice.

    Args:
        model: a model with adapters.
        requantize: encode the result over an NF4 base to NF4 again.

    Returns:
        The relative error of each merged weight against the exact sum, ||stored - exact|| / ||exact||, by name.

    Raises:
        ValueError: the model has no adapter, is one, is sharded, is merged already or in `mixed`; a layer that cannot
            be merged (one with a forward of its own, or that computes its weight, or whose merged weight is not finite
            in its dtype, or an adapter with hooks over a layer with hooks). The model is then unchanged.
    """
    with unwrapped(model) as bare:
        return _merge(bare, requantize)


def _merge(model: nn.Module, requantize: bool) -> dict[str, float]:
    outermost = _outermost(model)
    made: Made = {}
    shared: dict[int, nn.Parameter] = {}
    freed = Freed()
    for path, layer in outermost.items():
        if layer not in made:
            made[layer] = _made(path, layer, made, shared, requantize)
            freed.add(_bytes(made[layer][0]))
    for path, layer in outermost.items():
        merged, _ = made[layer]
        merged.__dict__["merged_from"] = layer  # past nn.Module's registry: not a submodule, not in state dicts
        replace(model, path, merged)
    _close(model)
    allow_fused_paths(model)
    return {path: made[layer][1] for path, layer in outermost.items()}


@torch.no_grad()
def merge_for_good(model: nn.Module) -> dict[str, float]:
    """`merge` without a way back: each adapter layer goes with its base once its merged layer is made, so that beside
    the model there is one layer in memory. After an error the model is partly merged."""
    places: dict[AdapterLayer, list[str]] = {}
    for path, layer in _outermost(model).items():
        places.setdefault(layer, []).append(path)
    made: Made = {}  # what others may be merged by: a tied table, what trains whole
    shared: dict[int, nn.Parameter] = {}
    errors: dict[str, float] = {}
    freed = Freed()
    while places:
        layer = next(iter(places))
        paths = places.pop(layer)
        merged, error = _made(paths[0], layer, made, shared)
        for path in paths:
            replace(model, path, merged)
            errors[path] = error
        if isinstance(layer, TrainedPart) or shared_pair(layer) is not None:
            made[layer] = merged, error
        freed.add(_bytes(merged))
    _close(model)
    for _, merged, _ in list(merged_layers(model)):
        del merged.__dict__["merged_from"]
    allow_fused_paths(model)
    return errors


def _outermost(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers to merge, by the names of their places: of several in one place the outermost."""
    if any(merged_layers(model)):
        raise ValueError("the model is merged already")
    outermost: dict[str, AdapterLayer] = {}
    for path, layer in adapter_layers(model, every_place=True):
        outermost.setdefault(path, layer)
    if not outermost:
        raise ValueError("the model has no adapter to merge")
    if any(getattr(layer, "rows", None) is not None for _, layer in adapter_layers(model)):
        raise ValueError("within mixed() each row has a weight of its own; leave its `with` block before you merge")
    check_not_sharded(model)
    if "" in outermost:
        raise ValueError(
            f"the model itself is a {type(model).__name__}, which a plain layer cannot take the place of; put it into "
            f"another module, and merge that"
        )
    return outermost


def _made(
    path: str, layer: AdapterLayer, made: Made, shared: dict[int, nn.Parameter], requantize: bool = False
) -> tuple[nn.Module, float]:
    """The layer that takes an adapter layer's place, and its relative error."""
    try:
        if isinstance(layer, TrainedPart):
            made_of = layer.merged(shared), 0.0
        elif isinstance(layer, LoRAExperts):
            made_of = layer.merged()
        else:
            made_of = _merged_once(layer, made) or _merged_layer(layer, requantize)
        _keep_hooks(layer, made_of[0])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return made_of


def _keep_hooks(layer: AdapterLayer, merged: nn.Module) -> None:
    """Gives a merged layer, which has the hooks of the base, those of the adapter layer that it stands for.

    Raises:
        ValueError: both have some.
    """
    base_layer.check_forward(layer)
    if not base_layer.has_hooks(layer):
        return
    if base_layer.has_hooks(merged):
        raise ValueError(
            f"the {type(layer).__name__} and the layer under it both have hooks, which one layer cannot tell apart; "
            f"remove those of the one"
        )
    with_hooks_of(layer, merged)


def _bytes(merged: nn.Module) -> int:
    """Of its weights in float32, in which they were summed."""
    return 4 * sum(p.numel() for p in merged.parameters())


def _close(model: nn.Module) -> None:
    """Puts nn.MultiheadAttention back where all projections are plain again."""
    closed: dict[nn.Module, nn.Module] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, OpenAttention) and all(isinstance(m, nn.Linear) for m in projections(module).values()):
            if module not in closed:
                closed[module] = module.closed()
                closed[module].__dict__["merged_from"] = module
            replace(model, path, closed[module])


def _merged_once(layer: LowRankLayer, made: Made) -> tuple[nn.Module, float] | None:
    """A merged layer with the very table of one that was merged before, if the two read one."""
    if shared_pair(layer) is not None:
        for other, (merged, error) in made.items():
            if same_table(layer, other):
                like = base_layer.with_parameter(layer.innermost, "weight", cast(nn.Parameter, merged.weight))
                return _with_bias(like, layer).train(layer.training), error
    return None


def _merged_layer(layer: LowRankLayer, requantize: bool) -> tuple[nn.Module, float]:
    innermost = layer.innermost
    base_layer.check_forward(innermost)
    exact = layer.merged_weight()  # [out, in]
    if requantize and isinstance(innermost, NF4Linear):
        code = quantize(exact, innermost.block_size, innermost.double_quant)
        coded = NF4Linear.from_nf4(code, layer.bias)
        coded.dtype = innermost.dtype
        merged: nn.Module = with_hooks_of(innermost, coded)
        stored = code.dequantize(exact.dtype)
    else:
        stored = exact.to(layer.dtype)
        merged = layer.plain(stored)
    error = base_layer.rounding_error(stored, exact)
    return _with_bias(merged, layer).train(layer.training), error


def _with_bias(merged: nn.Module, layer: LowRankLayer) -> nn.Module:
    """A merged layer with a bias of its own, that which its adapter trained if it did: what is loaded into or trained
    in a merged model is not the base's."""
    bias = getattr(layer, "bias", None)  # an embedding has none
    if bias is not None and "bias" in merged._parameters:  # and computed by no parametrization
        merged.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return merged


def unmerge(model: Model) -> Model:
    """Puts the adapter layers back that `merge` took out. The base is restored bit for bit: it was never touched. A
    model that was moved or cast meanwhile gets them there and in that dtype.

    Raises:
        ValueError: the model is not merged.
    """
    if not any(merged_layers(model)):
        raise ValueError("the model is not merged")
    while found := list(merged_layers(model)):  # twice where the layers of an attention stand in one
        casts = [_cast(merged, layer) for _, merged, layer in found]  # before any is cast: tied ones share a table
        for (path, merged, layer), dtype in zip(found, casts, strict=True):
            merged.__dict__.pop("merged_from", None)
            where = next((t.device for t in [*merged.parameters(), *merged.buffers()]), None)
            layer.to(where)
            if dtype is not None:
                layer.to(dtype)
            replace(model, path, layer.train(merged.training))
    keep_off_fused_paths(model)
    return model


def _cast(merged: nn.Module, layer: nn.Module) -> torch.dtype | None:
    """The dtype to which a merged layer was cast since it was merged from another; None if it was not."""
    dtype = _dtype(merged)
    return None if dtype == _dtype(layer) else dtype


def _dtype(layer: nn.Module) -> torch.dtype | None:
    """What a layer, merged or adapted, is held in; None for one without floating-point numbers."""
    if isinstance(layer, LowRankLayer | NF4Linear):
        return layer.dtype
    if isinstance(layer, OpenAttention):  # its projections may be cast already, and its other biases not
        return None
    base = (
        layer.innermost if isinstance(layer, LoRAExperts) else layer.base if isinstance(layer, TrainedPart) else layer
    )
    return next((p.dtype for p in base.parameters() if p.is_floating_point()), None)
