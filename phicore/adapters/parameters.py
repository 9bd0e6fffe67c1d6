"""Which parameters of a model `LoRAConfig.target_parameters` means."""

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from torch import nn

from phicore.adapters.config import LoRAConfig, pattern_value
from phicore.adapters.experts import LoRAExperts, check_init, check_parameter
from phicore.adapters.layers import adapter_layers
from phicore.adapters.lora import LowRankLayer
from phicore.adapters.trained import TrainedPart
from phicore.modules import check_exclusion, matches, no_match, stands_in, within

Stacks: TypeAlias = dict[str, tuple[nn.Module, dict[str, int], dict[str, float]]]
"""Names of modules -> each module, and the ranks and alphas of those of its parameters that are adapted."""


def named_stacks(model: nn.Module, closed: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Each module that has parameters of its own, with its name and theirs, not descending into a closed kind; of a
    LoRAExperts those of the module under it."""

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, list[str]]]:
        inner = module.innermost if isinstance(module, LoRAExperts) else module
        if own := [name for name, _ in inner.named_parameters(recurse=False)]:
            yield path, module, own
        if module is not inner or isinstance(module, closed):
            return
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, closed):
                yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, "")


def plan_parameters(
    model: nn.Module, config: LoRAConfig, targets: Mapping[str, nn.Module], saved: Mapping[str, nn.Module]
) -> Stacks:
    """The modules with parameters that config.target_parameters means.

    Args:
        model: is not changed.
        config: names the parameters.
        targets, saved: what else it adapts and copies whole.

    Raises:
        ValueError: an entry that matches nothing, or a parameter that cannot be adapted, or not together with the rest
            of the configuration.
        TypeError: a parameter that is not floating-point.
    """
    if not config.target_parameters:
        return {}
    if config.dropout:
        raise ValueError(
            "target_parameters cannot have dropout: a parameter's product has no input of its own that could be dropped"
        )
    if config.layers_to_transform is not None:
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform!r} chooses among target_modules, and target_parameters "
            f"are adapted in all blocks (by PEFT too); name the parameters with the numbers of their blocks instead"
        )
    check_init(config.init)
    stacks = list(named_stacks(model, (LowRankLayer, TrainedPart)))
    every = {f"{path}.{name}" if path else name for path, _, own in stacks for name in own}
    for entry in config.target_parameters:
        if not any(matches(name, [entry]) for name in every):
            raise ValueError(no_match(f'target_parameters entry "{entry}"', entry, sorted(every)))
    if not config.target_modules:  # else the choice of these checks it
        for excluded in config.exclude_modules:
            check_exclusion(
                excluded, dict(model.named_modules(remove_duplicate=False)), [path for path, _, _ in stacks]
            )
    found: Stacks = {}
    for path, module, own in stacks:
        names = {name: f"{path}.{name}" if path else name for name in own}
        names = {n: full for n, full in names.items() if matches(full, config.target_parameters)}
        if not names or stands_in(path, saved) or within(path, config.exclude_modules):
            continue
        if not path:
            raise ValueError(f"{', '.join(names)} stands in the model itself; put the model into another module first")
        for what, others in (("target_modules", targets), ("modules_to_save", saved)):
            if inside := [other for other in others if other == path or other.startswith(f"{path}.")]:
                raise ValueError(f"target_parameters names {names[next(iter(names))]}, and {what} {inside[0]}")
        inner = module.innermost if isinstance(module, LoRAExperts) else module
        if adapted := [name for name, layer in adapter_layers(inner) if layer is not inner]:
            raise ValueError(
                f"target_parameters names {names[next(iter(names))]}, and {path}.{adapted[0]}, in the same module, has "
                f"an adapter already"
            )
        for name, full in names.items():
            check_parameter(inner, name, full)
        found[path] = (
            module,
            {n: pattern_value(config.rank_pattern, full, config.rank) for n, full in names.items()},
            {n: pattern_value(config.alpha_pattern, full, config.alpha) for n, full in names.items()},
        )
    if not found:
        raise ValueError(f"nothing is left of target_parameters={list(config.target_parameters)!r} to adapt")
    return found
