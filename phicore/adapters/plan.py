"""Which modules of a model `attach` would adapt, train whole or in parts, and which it refuses."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from phicore.adapters.attention import check_kind, projections
from phicore.adapters.config import LoRAConfig, pattern_value
from phicore.adapters.experts import LoRAExperts
from phicore.adapters.fused import part_paths, splits
from phicore.adapters.layer_index import at_indices
from phicore.adapters.layers import (
    AdapterLayer,
    adaptable_kinds,
    adapter_around,
    adapter_layers,
    layer_class,
    linear_kinds,
)
from phicore.adapters.lora import LowRankLayer
from phicore.adapters.parameters import named_stacks, plan_parameters
from phicore.adapters.tied import add_tied, check_same_settings, owners_of_tied
from phicore.adapters.token_rows import token_rows
from phicore.adapters.trained import TrainedBias, TrainedPart, biases_beside
from phicore.modules import check_not_in_peft, coded_elsewhere, matches, no_match, select, stands_in
from phicore.nf4.convert import check_layer
from phicore.nf4.linear import NF4Linear


def plan(model: nn.Module, config: LoRAConfig) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Which modules `attach` would adapt and which it would copy whole, by name; the model is not changed.

    Raises:
        ValueError: a target, an exclusion, a pattern or an entry of modules_to_save that matches nothing; an entry of
            modules_to_save that has an adapter in it or stands in one.
    """
    every = dict(model.named_modules(remove_duplicate=False))
    saved = _trained_whole(config, every)
    only_parameters = bool(config.target_parameters) and not config.target_modules
    chosen = {} if only_parameters else _chosen(model, config, saved)
    chosen = {path: module for path, module in chosen.items() if not stands_in(path, saved)}
    targets = _with_projections(chosen)
    if both := sorted(targets.keys() & saved.keys()):
        raise ValueError(
            f"target_modules means {both[0]}, as a projection of an attention, and so does modules_to_save"
        )
    if not targets and not only_parameters:
        raise ValueError(
            f"modules_to_save={list(config.modules_to_save)!r} holds every module that "
            f"target_modules={config.target_modules!r} means, which leaves none to adapt"
        )
    parts = splits(model, config, targets)
    paths_of_parts = [part_paths(path)[part] for path, split in parts.items() for part in split.ranks]
    stacks = plan_parameters(model, config, targets, saved)
    parameters = [f"{path}.{parameter}" for path, (_, ranks, _) in stacks.items() for parameter in ranks]
    _check_patterns(config, [*(chosen | targets), *paths_of_parts, *parameters])
    if config.ensure_weight_tying:
        check_same_settings(owners_of_tied(model, targets), config)
    all_meta = all(parameter.is_meta for parameter in model.parameters())
    for name, module in (targets | saved).items():
        offloaded = not all_meta or "forward" in vars(module)  # by accelerate, which may offload a model whole
        if offloaded and any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            raise ValueError(f"{name} has its weights on meta: it is offloaded; load the model whole")
    for name, module in targets.items():
        _check_target(name, module, config, all_meta, split=name in parts)
    return targets, saved


def _trained_whole(config: LoRAConfig, every: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that modules_to_save means, by each of their names."""
    saved: dict[str, nn.Module] = {}
    for entry in config.modules_to_save:
        found = {name: module for name, module in every.items() if matches(name, [entry])}
        if not found:
            raise ValueError(no_match(f'modules_to_save entry "{entry}"', entry, every))
        for name, module in found.items():
            if any(isinstance(inner, AdapterLayer) for inner in module.modules()):
                raise ValueError(f'modules_to_save entry "{entry}" matches {name}, which has an adapter in it already')
            if around := adapter_around(name, every):
                raise ValueError(
                    f'modules_to_save entry "{entry}" matches {name}, which stands in {around}, where an adapter is'
                )
            _check_trains_whole(entry, name, module)
        saved |= found
    check_not_in_peft(saved, every)
    saved = _in_every_name(saved, every)
    whole = tuple(f"{path}." for path in saved)
    return {path: module for path, module in saved.items() if not path.startswith(whole)}  # what is in one trains there


def _check_patterns(config: LoRAConfig, names: list[str]) -> None:
    """Raises ValueError for a key of rank_pattern or alpha_pattern that means none of the adapted names."""
    for what, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in pattern:
            if not any(pattern_value({key: True}, name, False) for name in names):
                raise ValueError(no_match(f'{what} key "{key}"', key, names))


def _check_target(name: str, module: nn.Module, config: LoRAConfig, all_meta: bool, *, split: bool) -> None:
    """Raises what `attach` does for a module that cannot be adapted, or not with this init or rank."""
    weight: Any = None if isinstance(module, NF4Linear | LowRankLayer) else module.weight
    if weight is not None and not weight.is_floating_point():
        what = coded_elsewhere(module) or f"a {type(module).__name__} with {weight.dtype} weights"
        raise TypeError(f"adapters need a floating-point or NF4 layer, and {name} is {what}")
    if weight is not None and config.adapter_dtype is None and weight.dtype.itemsize < 2:
        raise TypeError(f"{name} has {weight.dtype} weights, in which no adapter trains; set adapter_dtype")
    if config.init == "loftq":
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f'init "loftq" codes dense nn.Linear layers to NF4 itself, and {name} is a '
                f"{type(module).__name__}; attach before quantizing, and to nn.Linear layers only"
            )
        check_layer(name, module, all_meta)
    if config.init in ("pissa", "olora") and not isinstance(module, linear_kinds()):
        raise ValueError(f'init "{config.init}" is for linear layers, and {name} is a {type(module).__name__}')
    if config.init not in ("kaiming", "gaussian") and split:
        raise ValueError(
            f'init "{config.init}" decomposes a whole weight and cannot start the parts of {name}; use "kaiming" '
            f'or "gaussian", or fused_targets="map"'
        )
    try:
        layer_class(module, config.dora).pair_shapes(module, pattern_value(config.rank_pattern, name, config.rank))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _check_trains_whole(entry: str, path: str, module: nn.Module) -> None:
    """Raises ValueError for a module of modules_to_save of which some weight, or everything, cannot train."""
    for inner, part in module.named_modules(prefix=path):
        integers = [name for name, p in part.named_parameters(recurse=False) if not p.is_floating_point()]
        if integers or isinstance(part, NF4Linear):
            raise ValueError(
                f'modules_to_save entry "{entry}" matches {path}, and {inner} is a {type(part).__name__} whose weight '
                f"is coded and cannot train; leave it out where the model is quantized (exclude_modules of quantize_)"
            )
    if not any(True for _ in module.parameters()):
        raise ValueError(
            f'modules_to_save entry "{entry}" matches {path}, a {type(module).__name__} without parameters'
        )


def _in_every_name(named: dict[str, nn.Module], every: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules by name, and by the other names of their places, which they have where a module around them stands in
    several."""

    def place(name: str) -> tuple[nn.Module, str]:
        parent, _, last = name.rpartition(".")
        return every[parent], last

    places = {place(name) for name in named if name}
    return {name: module for name, module in every.items() if name in named or (name and place(name) in places)}


def _chosen(model: nn.Module, config: LoRAConfig, saved: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that target_modules means, in the blocks that are to be adapted, with what is tied to them."""
    chosen = select(
        model,
        config.target_modules,
        config.exclude_modules,
        adaptable_kinds(),
        closed=(TrainedPart, LoRAExperts),
        all_linear=linear_kinds(),
        fused_targets=config.fused_targets,
        excludable=[path for path, _, _ in named_stacks(model, (LowRankLayer, TrainedPart))]
        if config.target_parameters
        else (),
    )
    if config.layers_to_transform is not None:
        there = at_indices(chosen, config.layers_to_transform, config.layers_pattern)
        chosen = {path: module for path, module in chosen.items() if path in there}
    return add_tied(model, chosen, config.exclude_modules, saved) if config.ensure_weight_tying else chosen


def _with_projections(targets: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The targets with the projections of each nn.MultiheadAttention in its place."""
    found: dict[str, nn.Module] = {}
    made: dict[nn.Module, dict[str, nn.Module]] = {}
    for path, module in targets.items():
        if isinstance(module, nn.MultiheadAttention):
            check_kind(module, path)
            layers = made.setdefault(module, projections(module))
            found |= {f"{path}.{name}": layer for name, layer in layers.items()}
        else:
            found[path] = module
    return found


def parts_beside(
    model: nn.Module,
    config: LoRAConfig,
    name: str,
    targets: dict[str, nn.Module],
    saved: dict[str, nn.Module],
    stacks: Collection[str],
) -> dict[str, TrainedPart]:
    """What `attach` would put beside the low-rank layers and the trained copies, by name; the model is not changed.

    Args:
        model, config, name: as `attach`.
        targets, saved: of `plan`.
        stacks: names of the modules of which parameters are adapted (target_parameters).

    Raises:
        ValueError: biases or tokens that cannot be trained.
    """
    if config.bias == "all" and any(adapter_layers(model)):
        raise ValueError(
            'bias="all" trains the biases of the whole model, which has an adapter already; use bias="lora_only"'
        )
    parts: dict[str, TrainedPart] = {}
    made: dict[nn.Module, TrainedPart] = {}
    for path, module in biases_beside(model, config.bias, targets, saved, stacks).items():
        if module not in made:  # a module that stands in two places has one trained bias
            made[module] = TrainedBias(module, name, config.adapter_dtype)
        parts[path] = made[module]
    taken = {*targets, *saved, *parts, *stacks}
    return parts | token_rows(model, config.trainable_token_indices, name, config.adapter_dtype, taken)
