"""Putting adapters into a model."""

import warnings
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from phicore.adapters.attention import OpenAttention, keep_off_fused_paths, layer_setting
from phicore.adapters.config import LoRAConfig
from phicore.adapters.embedding import LowRankEmbedding
from phicore.adapters.experts import DoRAExperts, LoRAExperts
from phicore.adapters.fused import FusedDoRALinear, FusedLoRALinear, Split, splits
from phicore.adapters.layers import adapter_layers, layer_class, merged_layers
from phicore.adapters.lora import LowRankLayer, LowRankLinear
from phicore.adapters.parameters import Stacks, plan_parameters
from phicore.adapters.plan import parts_beside, plan
from phicore.adapters.switch import check_settled_by_none
from phicore.adapters.tied import TiedDoRAEmbedding, keep_ties, owners_of_tied, tied_embedding, tied_head, untied
from phicore.adapters.trained import TrainedCopy, has_bias, new_bias, trains_bias
from phicore.adapters.wrapped import check_not_wrapped
from phicore.modules import ALL_LINEAR, Model, replace, unwrapped
from phicore.nf4.convert import coded, stacks_beside
from phicore.nf4.pages import Freed

finishers: list[Callable[[nn.Module], None]] = []
"""Called with each model that attach has changed, as those of quantize_."""

UNTIED, STACKED = "have one weight", "all-linear leaves out stacked parameters"
"""By which `load_adapter` tells attach's warnings: it gives none of them, since a file says what was trained."""


def attach(model: Model, config: LoRAConfig, name: str = "default") -> Model:
    """Freezes a model and puts adapter layers in it, in place.

    Over a model that has adapters already, the new one adapts their sum, and it alone trains. With init "loftq" the
    base of each adapted layer becomes its NF4 code. Names are those without torch.compile's; a layer that is compiled
    alone is so no more once it is adapted.

    Args:
        model: any module; its linear layers (nn.Linear, NF4Linear, transformers' Conv1D) can be adapted, and its
            nn.Embedding, nn.Conv1d, 2d and 3d and nn.MultiheadAttention where target_modules names them, and the
            parameters that target_parameters names.
        config: which layers and how.
        name: of the adapter, for saving and switching.

    Returns:
        The model. Its parameters that require gradients are now the adapter's.

    Raises:
        ValueError: a target that matches nothing (with near misses), an adapter of this name that is there already, a
            merged model, one that torch has wrapped for several ranks; a call within disabled() or mixed(). The model
            is then unchanged.
        TypeError: a target whose weights are not floating-point, a config that is no LoRAConfig, a name that is no
            text; the model is then unchanged.

    Warns:
        UserWarning: a layer that is adapted or trained without those that its weight is tied to; what "all-linear"
            leaves out, above all the experts of a mixture where they stand in stacked parameters.
    """
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"attach takes a LoRAConfig, got a {type(config).__name__}")
    if not isinstance(name, str):
        raise TypeError(f"the name of an adapter must be a text, got {name!r}")  # None means the base model in mixed
    if name in {layer.adapter_name for _, layer in adapter_layers(model)}:
        raise ValueError(f'the model has an adapter named "{name}" already; give another name')
    if any(merged_layers(model)):
        raise ValueError("the model's adapters are merged; unmerge it before attaching another")
    check_not_wrapped(model)
    check_settled_by_none(model)
    everything = config.target_modules == ALL_LINEAR and not config.target_parameters
    share, stacks = stacks_beside(model) if everything else (0, "")
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with unwrapped(model) as bare:
            apart = _attach(bare, config, name)
    except BaseException:  # a layer freezes its base when it is made
        for parameter in training:
            parameter.requires_grad_(True)
        raise
    if stacks:
        warnings.warn(
            f"{STACKED}, {share:.0%} of the model, which get no adapter unless target_parameters names them: {stacks}",
            stacklevel=2,
        )
    for together, alone in apart:
        warnings.warn(
            f"{', '.join(together)} {UNTIED}, and {', '.join(alone)} will not any more: adapted or trained alone, and "
            f"what reads the weight elsewhere does not follow. ensure_weight_tying=True adapts all of them by one pair "
            f"(target_modules), and trainable_token_indices trains rows in all of them",
            stacklevel=2,
        )
    return model


def _attach(model: nn.Module, config: LoRAConfig, name: str) -> list[tuple[list[str], list[str]]]:
    """Does what `attach` says; gives the names of layers that are tied and of those among them that are so no more."""
    targets, saved = plan(model, config)
    apart = [] if config.ensure_weight_tying else untied(model, targets, saved)
    parts = splits(model, config, targets)
    stacks = plan_parameters(model, config, targets, saved)
    beside = parts_beside(model, config, name, targets, saved, stacks)
    targets, opened = _opened(model, targets)
    layers = _layers(model, targets, parts, config, name)
    experts = _experts(stacks, config, name)
    copies = {module: TrainedCopy(module, name) for module in saved.values()}
    model.requires_grad_(False)
    for path, attention in opened.items():
        replace(model, path, attention)
    for path, module in targets.items():
        replace(model, path, layers[module].requires_grad_(True))
        layers[module].base.requires_grad_(False)
    for path, (module, _, _) in stacks.items():
        replace(model, path, experts[module])
        experts[module].pairs.requires_grad_(True)
    for path, module in saved.items():
        replace(model, path, copies[module])
        copies[module].trained.requires_grad_(True)
    for path, part in beside.items():
        replace(model, path, part)
        for parameter in part.parameters(recurse=False):
            parameter.requires_grad_(True)
    keep_off_fused_paths(model)
    keep_ties(model)
    for finish in finishers:
        finish(model)
    return apart


def _opened(model: nn.Module, targets: dict[str, nn.Module]) -> tuple[dict[str, nn.Module], dict[str, OpenAttention]]:
    """The targets with projections of nn.MultiheadAttention as layers of an OpenAttention each, and these by the name
    of the place that they are to take; the model is not changed."""
    found, opened = dict(targets), {}
    made: dict[nn.Module, OpenAttention] = {}
    for path in targets:
        parent, _, last = path.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(owner, nn.MultiheadAttention) and not isinstance(owner, OpenAttention):
            if owner not in made:
                made[owner] = OpenAttention(owner)
            opened[parent] = made[owner]
            found[path] = getattr(made[owner], last)
    return found, opened


def _layers(
    model: nn.Module, targets: dict[str, nn.Module], parts: dict[str, Split], config: LoRAConfig, name: str
) -> dict[nn.Module, LowRankLayer]:
    """The adapter layers for the targets, by the modules that they adapt."""
    layers: dict[nn.Module, LowRankLayer] = {}
    tied = owners_of_tied(model, targets) if config.ensure_weight_tying else {}
    freed = Freed()  # DoRA's norms and some starts are computed of dense weights
    for path, module in sorted(targets.items(), key=lambda item: item[0] in tied):  # which take the pairs of others
        if module in layers:  # a layer that stands in two places gets one adapter
            continue
        if path in tied:
            layers[module] = _tied_layer(module, cast(LowRankEmbedding, layers[targets[tied[path]]]), config)
            continue
        try:
            layer = _layer(model, path, module, parts.get(path), config, shared=path in tied.values())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        layer.adapter_name = name
        if trains_bias(model, config.bias, path, module):
            layer.trained_bias = new_bias(layer, config.adapter_dtype)
        layers[module] = layer
        freed.add(4 * layer.innermost.weight.numel())
    return layers


def _layer(
    model: nn.Module, path: str, module: nn.Module, split: Split | None, config: LoRAConfig, *, shared: bool
) -> LowRankLayer:
    """The adapter layer for a target; with a pair a part if it is split, or one that others share."""
    options: dict[str, Any] = {"rslora": config.rslora, "init": config.init, "dtype": config.adapter_dtype}
    if split is not None:
        fused = FusedDoRALinear if config.dora else FusedLoRALinear
        return fused(module, split.sizes, split.ranks, split.alphas, config.dropout, **options)
    rank = layer_setting(model, config.rank_pattern, path, config.rank)
    alpha = layer_setting(model, config.alpha_pattern, path, config.alpha)
    base = coded(cast(nn.Linear, module)) if config.init == "loftq" else module
    kind = TiedDoRAEmbedding if config.dora and shared else layer_class(base, config.dora)
    layer = kind(base, rank, alpha, config.dropout, **options)
    if config.init == "loftq":
        exact = cast(LowRankLinear, layer).dense_base()
        cast(LowRankLinear, layer).correct(cast(nn.Linear, module).weight.detach().to(exact.dtype) - exact)
    return layer


def _experts(stacks: Stacks, config: LoRAConfig, name: str) -> dict[nn.Module, LoRAExperts]:
    """The adapters of stacked parameters, by the modules that hold these."""
    kind = DoRAExperts if config.dora else LoRAExperts
    experts: dict[nn.Module, LoRAExperts] = {}
    for module, ranks, alphas in stacks.values():
        if module not in experts:
            experts[module] = kind(
                module, ranks, alphas, rslora=config.rslora, init=config.init, dtype=config.adapter_dtype
            )
            experts[module].adapter_name = name
    return experts


def _tied_layer(module: nn.Module, owner: LowRankEmbedding, config: LoRAConfig) -> LowRankLayer:
    """The adapter of a layer that reads an adapted embedding's table, with the embedding's own pair."""
    is_embedding = LowRankEmbedding.fits(module)
    layer = tied_embedding(module, owner) if is_embedding else tied_head(module, owner, config.dropout)
    if config.bias != "none" and has_bias(module):
        layer.trained_bias = new_bias(layer, config.adapter_dtype)
    return layer
