"""Putting adapters into a model, merging them into its weights and taking them out again."""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from phicore.adapters import base as base_layer
from phicore.adapters.base import transposed_kinds
from phicore.adapters.config import LoRAConfig
from phicore.adapters.convolution import CONVOLUTIONS, DoRAConvolution, LoRAConvolution, LowRankConvolution
from phicore.adapters.dora import DoRALinear
from phicore.adapters.embedding import DoRAEmbedding, LoRAEmbedding, LowRankEmbedding
from phicore.adapters.layer_index import at_indices
from phicore.adapters.lora import LoRALinear, LowRankLayer, LowRankLinear
from phicore.adapters.tied import TiedHead, add_tied, owners_of_tied, same_table
from phicore.adapters.token_rows import token_rows
from phicore.adapters.trained import TrainedBias, TrainedPart, biases_beside, has_bias, new_bias
from phicore.modules import ends_with, matches, no_match, replace, select
from phicore.nf4.linear import NF4Linear
from phicore.nf4.tensor import quantize

T = TypeVar("T")


def linear_kinds() -> tuple[type[nn.Module], ...]:
    """What "all-linear" can mean."""
    return (nn.Linear, NF4Linear, LowRankLinear, *transposed_kinds())


def adaptable_kinds() -> tuple[type[nn.Module], ...]:
    """What a target can name."""
    return (*linear_kinds(), nn.Embedding, LowRankEmbedding, *CONVOLUTIONS, LowRankConvolution)


def layer_class(base: nn.Module, dora: bool) -> type[LowRankLayer]:
    """The adapter layer for a base of one of the adaptable kinds."""
    if LowRankEmbedding.fits(base):
        return DoRAEmbedding if dora else LoRAEmbedding
    if LowRankConvolution.fits(base):
        return DoRAConvolution if dora else LoRAConvolution
    return DoRALinear if dora else LoRALinear


class TrainedCopy(TrainedPart):
    """A module of `modules_to_save`: a trained copy that stands in for its frozen base.

    Attributes:
        trained: the copy that trains and answers while `enabled`.
    """

    what = "trained whole"

    def __init__(self, base: nn.Module, adapter_name: str) -> None:
        trained = copy.deepcopy(base).requires_grad_(True)
        super().__init__(base.requires_grad_(False), adapter_name)
        self.trained = trained

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.trained if self.enabled else self.base)(*args, **kwargs)

    def merged(self, shared: dict[int, nn.Parameter]) -> nn.Module:
        return self.trained

    def __getattr__(self, name: str) -> Any:
        # Code that reads a head's or an embedding's weight finds the trained one.
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return getattr(nn.Module.__getattr__(self, "trained"), name)


AdapterLayer = LowRankLayer | TrainedPart


def pattern_value(pattern: Mapping[str, T], name: str, default: T) -> T:
    """The value whose key, a regular expression, is the whole name or its end after a dot; the first that fits."""
    for key, value in pattern.items():
        if re.fullmatch(ends_with(key), name):
            return value
    return default


def plan(model: nn.Module, config: LoRAConfig) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Which modules `attach` would adapt and which it would copy whole, by name; the model is not changed.

    Raises:
        ValueError: a target, an exclusion, a pattern or an entry of modules_to_save that matches nothing; an entry of
            modules_to_save that has an adapter in it.
    """
    saved: dict[str, nn.Module] = {}
    every = dict(model.named_modules(remove_duplicate=False))
    for entry in config.modules_to_save:
        found = {name: module for name, module in every.items() if matches(name, [entry])}
        if not found:
            raise ValueError(no_match(f'modules_to_save entry "{entry}"', entry, every))
        for name, module in found.items():
            if any(isinstance(inner, AdapterLayer) for inner in module.modules()):
                raise ValueError(f'modules_to_save entry "{entry}" matches {name}, which has an adapter in it already')
        saved |= found
    if config.ensure_weight_tying and config.dora:
        raise ValueError(
            "ensure_weight_tying with dora: DoRA's norms of an embedding run over its vocabulary and those of its head "
            "over the width, so one pair has no one meaning for both, and PEFT's files none at all; use dora=False, or "
            "ensure_weight_tying=False"
        )
    whole = tuple(f"{path}." for path in saved)
    selected = select(
        model,
        config.target_modules,
        config.exclude_modules,
        adaptable_kinds(),
        closed=(TrainedPart,),
        all_linear=linear_kinds(),
        fused_targets=config.fused_targets,
    )
    if config.layers_to_transform is not None:
        chosen = at_indices(selected, config.layers_to_transform, config.layers_pattern)
        selected = {path: module for path, module in selected.items() if path in chosen}
    if config.ensure_weight_tying:
        selected = add_tied(model, selected, config.exclude_modules, saved)
    targets = {path: m for path, m in selected.items() if path not in saved and not path.startswith(whole)}
    if not targets:
        raise ValueError(
            f"modules_to_save={list(config.modules_to_save)!r} holds every module that "
            f"target_modules={config.target_modules!r} means, which leaves none to adapt"
        )
    for what, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in pattern:
            if not any(pattern_value({key: True}, name, False) for name in targets):
                raise ValueError(no_match(f'{what} key "{key}"', key, targets))
    for name, module in targets.items():
        weight: Any = None if isinstance(module, NF4Linear | LowRankLayer) else module.weight
        if weight is not None and not weight.is_floating_point():
            raise TypeError(f"{name} has {weight.dtype} weights; adapters need a floating-point or NF4 layer")
        if config.init == "loftq" and not isinstance(module, nn.Linear):
            raise ValueError(
                f'init "loftq" codes dense nn.Linear layers to NF4 itself, and {name} is a {type(module).__name__}; '
                f"attach before quantizing, and to nn.Linear layers only"
            )
        if config.init in ("pissa", "olora") and not isinstance(module, linear_kinds()):
            raise ValueError(f'init "{config.init}" is for linear layers, and {name} is a {type(module).__name__}')
        layer_class(module, config.dora).pair_shapes(module, pattern_value(config.rank_pattern, name, config.rank))
    return targets, saved


def attach(model: nn.Module, config: LoRAConfig, name: str = "default") -> nn.Module:
    """Freezes a model and puts adapter layers in it, in place.

    Over a model that has adapters already, the new one adapts their sum, and it alone trains. With init "loftq" the
    base of each adapted layer becomes its NF4 code.

    Args:
        model: any module; its linear layers (nn.Linear, NF4Linear, transformers' Conv1D) can be adapted, and its
            nn.Embedding and nn.Conv1d, 2d and 3d where target_modules names them.
        config: which layers and how.
        name: of the adapter, for saving and switching.

    Returns:
        The model. Its parameters that require gradients are now the adapter's.

    Raises:
        ValueError: a target that matches nothing (with near misses), an adapter of this name that is there already, a
            merged model. The model is then unchanged.
        TypeError: a target whose weights are not floating-point; the model is then unchanged.
    """
    if name in {layer.adapter_name for _, layer in adapter_layers(model)}:
        raise ValueError(f'the model has an adapter named "{name}" already; give another name')
    if any(merged_layers(model)):
        raise ValueError("the model's adapters are merged; unmerge it before attaching another")
    targets, saved = plan(model, config)
    beside = parts_beside(model, config, name, targets, saved)
    layers: dict[nn.Module, nn.Module] = {}
    tied = owners_of_tied(model, targets) if config.ensure_weight_tying else {}
    for path, module in sorted(targets.items(), key=lambda item: item[0] in tied):  # which take the pairs of others
        if module in layers:  # a layer that stands in two places gets one adapter
            continue
        if path in tied:
            layers[module] = _tied_layer(module, cast(LoRAEmbedding, layers[targets[tied[path]]]), config)
            continue
        dense, base = module, module
        if config.init == "loftq":
            base = NF4Linear.from_linear(cast(nn.Linear, dense))
        layer = layer_class(module, config.dora)(
            base,
            pattern_value(config.rank_pattern, path, config.rank),
            pattern_value(config.alpha_pattern, path, config.alpha),
            config.dropout,
            rslora=config.rslora,
            init=config.init,
            dtype=config.adapter_dtype,
        )
        if config.init == "loftq":
            exact = cast(LowRankLinear, layer).dense_base()
            cast(LowRankLinear, layer).correct(cast(nn.Linear, dense).weight.detach().to(exact.dtype) - exact)
        layer.adapter_name = name
        if config.bias != "none" and has_bias(module):
            layer.trained_bias = new_bias(layer, config.adapter_dtype)
        layers[module] = layer
    copies = {module: TrainedCopy(module, name) for module in saved.values()}
    model.requires_grad_(False)
    for path, module in targets.items():
        replace(model, path, layers[module].requires_grad_(True))
        layers[module].base.requires_grad_(False)
    for path, module in saved.items():
        replace(model, path, copies[module])
        copies[module].trained.requires_grad_(True)
    for path, part in beside.items():
        replace(model, path, part)
        for parameter in part.parameters(recurse=False):
            parameter.requires_grad_(True)
    return model


def _tied_layer(module: nn.Module, owner: LoRAEmbedding, config: LoRAConfig) -> LowRankLayer:
    """The adapter of a layer that reads an adapted embedding's table, with the embedding's own pair."""
    if not LowRankEmbedding.fits(module):
        layer: LowRankLayer = TiedHead(module, owner, config.dropout)
    else:
        layer = LoRAEmbedding(module, owner.rank, owner.alpha, config.dropout, rslora=owner.rslora, init=owner.init)
        layer.lora_A, layer.lora_B = owner.lora_A, owner.lora_B
        layer.adapter_name = owner.adapter_name
    if config.bias != "none" and has_bias(module):
        layer.trained_bias = new_bias(layer, config.adapter_dtype)
    return layer


def parts_beside(
    model: nn.Module,
    config: LoRAConfig,
    name: str,
    targets: dict[str, nn.Module],
    saved: dict[str, nn.Module],
) -> dict[str, TrainedPart]:
    """What `attach` would put beside the low-rank layers and the trained copies, by name; the model is not changed.

    Raises:
        ValueError: biases or tokens that cannot be trained.
    """
    parts: dict[str, TrainedPart] = {}
    made: dict[nn.Module, TrainedPart] = {}
    for path, module in biases_beside(model, config.bias, targets, saved).items():
        if module not in made:  # a module that stands in two places has one trained bias
            made[module] = TrainedBias(module, name, config.adapter_dtype)
        parts[path] = made[module]
    taken = targets | saved | parts
    return parts | token_rows(model, config.trainable_token_indices, name, config.adapter_dtype, taken)


def adapter_layers(
    model: nn.Module, name: str | None = None, *, every_place: bool = False
) -> Iterator[tuple[str, AdapterLayer]]:
    """The adapter layers of a model with the names of the places they stand in, outermost first.

    Args:
        model: any module.
        name: only this adapter's.
        every_place: a layer that stands in two places comes twice.

    Yields:
        (name that the layer had before adapting, layer).
    """
    every = dict(model.named_modules(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=not every_place):
        if not isinstance(module, AdapterLayer) or (name is not None and module.adapter_name != name):
            continue
        parent, _, last = path.rpartition(".")
        while last == "base" and isinstance(every[parent], AdapterLayer):  # an adapter under another
            path = parent
            parent, _, last = path.rpartition(".")
        yield path, module


def merged_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, AdapterLayer]]:
    """The layers that `merge` made: name, merged layer, and the adapter layer that it stands for."""
    for path, module in model.named_modules(remove_duplicate=False):
        layer = module.__dict__.get("merged_from")
        if layer is not None:
            yield path, module, layer


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
        ValueError: the model has no adapter, or is merged already.
    """
    if any(merged_layers(model)):
        raise ValueError("the model is merged already")
    outermost: dict[str, AdapterLayer] = {}
    for path, layer in adapter_layers(model, every_place=True):
        outermost.setdefault(path, layer)
    if not outermost:
        raise ValueError("the model has no adapter to merge")
    made: dict[AdapterLayer, tuple[nn.Module, float]] = {}
    shared: dict[int, nn.Parameter] = {}
    for layer in outermost.values():
        if layer not in made:
            if isinstance(layer, TrainedPart):
                made[layer] = (layer.merged(shared), 0.0)
            else:
                made[layer] = _merged_once(layer, made) or _merged_layer(layer, requantize)
    for path, layer in outermost.items():
        merged, _ = made[layer]
        merged.__dict__["merged_from"] = layer  # past nn.Module's registry: not a submodule, not in state dicts
        replace(model, path, merged)
    return {path: made[layer][1] for path, layer in outermost.items()}


def _merged_once(
    layer: LowRankLayer, made: Mapping[AdapterLayer, tuple[nn.Module, float]]
) -> tuple[nn.Module, float] | None:
    """A merged layer with the very table of one that was merged before, if the two read one."""
    if isinstance(layer, TiedHead | LoRAEmbedding):
        for other, (merged, error) in made.items():
            if same_table(layer, other):
                like = base_layer.with_parameter(layer.innermost, "weight", cast(nn.Parameter, merged.weight))
                return _with_bias(like, layer).train(layer.training), error
    return None


def _merged_layer(layer: LowRankLayer, requantize: bool) -> tuple[nn.Module, float]:
    exact = layer.merged_weight()  # [out, in]
    innermost = layer.innermost
    if requantize and isinstance(innermost, NF4Linear):
        code = quantize(exact, innermost.block_size, innermost.double_quant)
        coded = NF4Linear.from_nf4(code, layer.bias)
        coded.dtype = innermost.dtype
        merged: nn.Module = coded
        stored: Tensor = code.dequantize(exact.dtype)
    else:
        weight = exact.to(layer.dtype)
        merged, stored = layer.plain(weight), weight.to(exact.dtype)
    norm = torch.linalg.vector_norm(exact)
    error = torch.linalg.vector_norm(stored - exact) / norm if norm > 0 else torch.linalg.vector_norm(stored)
    return _with_bias(merged, layer).train(layer.training), float(error)


def _with_bias(merged: nn.Module, layer: LowRankLayer) -> nn.Module:
    """A merged layer with the bias that its adapter trained, if it did."""
    bias = getattr(layer, "bias", None)  # an embedding has none
    if bias is not None and bias is not layer.innermost.bias:
        merged.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return merged


def unmerge(model: nn.Module) -> nn.Module:
    """Puts the adapter layers back that `merge` took out. The base is restored bit for bit: it was never touched.

    Raises:
        ValueError: the model is not merged.
    """
    found = list(merged_layers(model))
    if not found:
        raise ValueError("the model is not merged")
    for path, merged, layer in found:
        merged.__dict__.pop("merged_from", None)
        where = next((t.device for t in [*merged.parameters(), *merged.buffers()]), None)
        replace(model, path, layer.to(where).train(merged.training))
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, the base model alone answers: adapters are passed by.

    Raises:
        ValueError: the model has no adapter, or is merged.
    """
    layers = [layer for _, layer in adapter_layers(model)]
    if not layers or any(merged_layers(model)):
        raise ValueError("the model has no adapter that could be disabled" + (" (it is merged)" if not layers else ""))
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
