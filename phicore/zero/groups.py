"""Parameter groups as users give them: what is accepted, and the description that ranks compare."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phicore.zero.layout import Named
from phicore.zero.reduction import is_watched
from phicore.zero.state import settings

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def named_groups(params: Any, known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups with a list of (name, parameter) each; of a tied parameter's names, the first.

    Raises:
        TypeError, ValueError: see ZeroOptimizer.
    """
    given = _listed(params, "the parameters")
    if not given:
        raise ValueError(
            "ZeroOptimizer got no parameters; if they are a generator, such as model.named_parameters(), something has "
            "taken them out of it already"
        )
    groups = [as_group(group) for group in (given if isinstance(given[0], dict) else [{"params": given}])]
    owners: dict[int, tuple[int, str]] = {}  # of a parameter: its group and name
    memory: dict[int, str] = {}
    names = set(known)
    for index, group in enumerate(groups):
        named: list[Named] = []
        if "params" not in group:
            raise TypeError(f'parameter group {index} has no "params", only {", ".join(map(str, group)) or "nothing"}')
        for entry in _listed(group["params"], f"parameter group {index}"):
            if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)):
                raise TypeError(
                    f"expected (name, parameter), got {type(entry).__name__}; pass model.named_parameters() in place "
                    f"of model.parameters(): state is saved by name"
                )
            name, parameter = entry
            if not isinstance(parameter, Tensor):
                raise TypeError(f"{name} is a {type(parameter).__name__}, expected a parameter")
            owner = owners.setdefault(id(parameter), (index, name))
            if owner == (index, name) and name not in names:
                named.append((name, parameter))
                names.add(name)
            elif owner[0] != index or name in names:
                raise ValueError(f"{name} is given twice (or under another name in another group)")
            else:
                continue  # tied: another name of a parameter that this group has
            _check_parameter(name, parameter, memory)
        group["params"] = named
    return groups


def _listed(params: Any, what: str) -> list[Any]:
    if isinstance(params, str | Mapping | Tensor | nn.Module) or not isinstance(params, Iterable):
        raise TypeError(f"{what} must be model.named_parameters() or the like, got {type(params).__name__}")
    return list(params)


def as_group(group: Any) -> dict[str, Any]:
    if not isinstance(group, dict):
        raise TypeError(
            f'expected a parameter group {{"params": named parameters, settings ...}}, got {type(group).__name__}'
        )
    return dict(group)


def _check_parameter(name: str, parameter: Tensor, memory: dict[int, str]) -> None:
    if is_watched(parameter):
        raise ValueError(f"{name} is in another ZeroOptimizer (or already in this one); drop that one first")
    if not parameter.requires_grad:
        return
    if not parameter.is_leaf:
        raise ValueError(f"{name} was computed from other tensors; only leaves can be optimized")
    if parameter.dtype not in DTYPES:
        raise ValueError(f"{name} is {parameter.dtype}; trained parameters must be {', '.join(map(str, DTYPES))}")
    if any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
        raise ValueError(
            f"{name} has elements that share memory, as expand makes them, which flat buckets would part; make it a "
            f"parameter of its own memory (.clone()), or expand in the forward pass what trains as one"
        )
    if parameter.numel() and not parameter.is_meta:
        other = memory.setdefault(parameter.data_ptr(), name)
        if other != name:
            raise ValueError(
                f"{other} and {name} share memory but are two Parameters, which flat buckets would part; tie them by "
                f"giving both modules one Parameter"
            )


def describe(groups: Sequence[Mapping[str, Any]], optimizer_class: type, options: Mapping[str, Any]) -> list[str]:
    """What must be equal on all ranks, an item a line."""
    lines = [f"{optimizer_class.__name__}({shown(options)})"]
    for index, group in enumerate(groups):
        lines.append(f"parameter group {index} with settings ({shown(settings(group))})")
        for name, p in group["params"]:
            kind = "trained" if p.requires_grad else "frozen"
            lines.append(f"{name} ({kind}, {list(p.shape)}, {p.dtype}) in parameter group {index}")
    return lines


def shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_shown(value)}" for key, value in sorted(options.items()))


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return repr(value.tolist())
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text  # an address is another on each rank
