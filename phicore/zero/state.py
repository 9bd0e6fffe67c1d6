"""Optimizer state as files hold it: slices of parameters by name, from which a state for any world size is cut.

A shard's state (of `ZeroOptimizer.state_dict`) is a dict of

    format         "phicore-zero"
    rank, world_size
    shapes         {name of parameter: shape}, of all parameters
    slices         {name: [start, stop]}, the elements of the flattened parameter that this rank holds
    frozen         names of parameters that have no state, on any rank
    state          {name: {name of state: [stop - start] or a scalar}}; 16-bit parameters have a float32 "master" there
    param_groups   [{settings ..., "params": [names]}]

The full state is torch.optim's own format, with the parameters' names, and masters beside "state".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FORMAT = "phicore-zero"
MASTER = "master"
SCALARS = ("step", "mu_product", "eta", "mu")  # what torch's optimizers keep for a parameter, and not for its elements


@dataclass(slots=True)
class Slice:
    """Elements [start, stop) of one parameter's state."""

    start: int
    stop: int
    state: dict[str, Any]


@dataclass(slots=True)
class Source:
    """A state to be loaded, whatever it was saved as.

    Attributes:
        slices: by name of parameter; a parameter that never had a gradient has slices with an empty state.
        groups: the settings of each group.
    """

    slices: dict[str, list[Slice]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)


def is_sliced(value: Any, numel: int) -> bool:
    """Whether a state has an entry for each element, rather than one for the whole parameter."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.numel() == numel


def settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def read(
    given: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    shapes: Mapping[str, torch.Size],
    groups: Sequence[Sequence[str]],
) -> Source:
    """A source from a shard's state, those of several ranks (`read_shards`), or a full state (`read_full`)."""
    if isinstance(given, Mapping) and "format" not in given and "param_groups" in given:
        return read_full(given, shapes, groups)
    return read_shards([given] if isinstance(given, Mapping) else list(given), shapes, groups)


def read_shards(
    shards: Sequence[Mapping[str, Any]], shapes: Mapping[str, torch.Size], groups: Sequence[Sequence[str]]
) -> Source:
    """A source from states of any number of ranks.

    Raises:
        ValueError: they are of another format, of other parameters, or of other groups.
    """
    if not shards:
        raise ValueError("expected at least one state, got none")
    source = Source()
    for shard in shards:
        if shard.get("format") != FORMAT:
            raise ValueError(f"expected states from ZeroOptimizer.state_dict, got one with keys {sorted(shard)}")
        _check_names(dict(shard["shapes"]), shapes)
        saved = [group["params"] for group in shard["param_groups"]]
        if list(map(sorted, saved)) != list(map(sorted, groups)):
            raise ValueError(
                f"the state has parameter groups of {list(map(len, saved))} parameters, this optimizer of "
                f"{list(map(len, groups))}; make the groups as they were when it was saved"
            )
        source.groups = [settings(group) for group in shard["param_groups"]]
        for name in shard["frozen"]:
            source.slices[name] = [Slice(0, shapes[name].numel(), {})]
        for name, (start, stop) in shard["slices"].items():
            source.slices.setdefault(name, []).append(Slice(start, stop, dict(shard["state"].get(name, {}))))
    return source


def read_full(state: Mapping[str, Any], shapes: Mapping[str, torch.Size], groups: Sequence[Sequence[str]]) -> Source:
    """A source from a torch.optim state dict: parameters by "params" where these are names (as those of
    torch.distributed.checkpoint's get_optimizer_state_dict), by "param_names" where it has them, else by position.

    Raises:
        ValueError: groups, names or shapes differ.
    """
    saved = [group["params"] for group in state["param_groups"]]
    if list(map(len, saved)) != list(map(len, groups)):
        raise ValueError(
            f"the state has parameter groups of {list(map(len, saved))} parameters, this optimizer of "
            f"{list(map(len, groups))}; give both the same parameters"
        )
    source = Source(groups=[settings(group) for group in state["param_groups"]])
    for group, names in zip(state["param_groups"], groups, strict=True):
        named = all(isinstance(parameter, str) for parameter in group["params"])
        own = group["params"] if named else group.get("param_names") or names
        _check_names({name: shapes.get(name, torch.Size()) for name in own}, {name: shapes[name] for name in names})
        for index, name in zip(group["params"], own, strict=True):
            kept = state["state"].get(index, {})
            values = {key: _as_written_now(key, value) for key, value in kept.items() if value is not None}
            if name in state.get("masters", {}):
                values[MASTER] = state["masters"][name]
            for key, value in values.items():
                if isinstance(value, Tensor) and value.dim() and value.shape != shapes[name]:
                    raise ValueError(
                        f"state {key} of {name} has shape {list(value.shape)}, the parameter {list(shapes[name])}"
                    )
                if is_sliced(value, shapes[name].numel()) or (
                    not shapes[name] and isinstance(value, Tensor) and key not in SCALARS
                ):
                    values[key] = value.reshape(-1)
            source.slices[name] = [Slice(0, shapes[name].numel(), values)]
    return source


def check_settings(source: Source, defaults: Mapping[str, Any], optimizer: str) -> None:
    """Raises ValueError for groups that lack a setting of an optimizer, whose defaults these are."""
    # Of flags, those of this version of torch need not be in a state of another.
    flags = {key for key, value in defaults.items() if value is None or isinstance(value, bool)}
    for group in source.groups:
        if lacking := sorted(defaults.keys() - flags - group.keys()):
            raise ValueError(
                f"the state is of another optimizer than {optimizer}: it has no {', '.join(lacking)}, but "
                f"{', '.join(group)}; load it into an optimizer of its class, or begin without a state"
            )


def write_full(states: Mapping[str, dict[str, Any]], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The full state, with "param_names" and, if there are masters, "masters" by name.

    Args:
        states: of whole parameters, by name of parameter and of state; masters are taken out of them.
        groups: settings of each group, and in "params" the names of its parameters.
    """
    index = {name: i for i, name in enumerate(name for group in groups for name in group["params"])}
    masters = {name: states[name].pop(MASTER) for name in index if MASTER in states.get(name, {})}
    return {
        "state": {i: states[name] for name, i in index.items() if states.get(name)},
        "param_groups": [
            {**group, "params": [index[name] for name in group["params"]], "param_names": list(group["params"])}
            for group in groups
        ],
        **({"masters": masters} if masters else {}),
    }


def _as_written_now(key: str, value: Any) -> Any:
    """A state as torch writes it since 1.12: steps are tensors."""
    return torch.tensor(float(value)) if key == "step" and isinstance(value, int | float) else value


def _check_names(saved: Mapping[str, Sequence[int]], shapes: Mapping[str, torch.Size]) -> None:
    for name in [*saved, *shapes]:
        if name not in shapes:
            raise ValueError(f"the state holds {name}, which this optimizer does not have")
        if name not in saved:
            raise ValueError(f"the state lacks {name}")
        if tuple(saved[name]) != tuple(shapes[name]):
            raise ValueError(f"{name} has shape {list(saved[name])} in the state, {list(shapes[name])} here")


Cut = list[tuple[Slice, int, int]]
"""Parts of a source that one after the other are some elements of a parameter, with those taken of each: [begin, end),
counted in the parameter."""


def cut(source: Source, name: str, start: int, stop: int) -> Cut:
    """Where the state of the elements [start, stop) of a parameter lies; nothing is copied.

    Raises:
        ValueError: the source does not hold them all, or parts are of different steps.
    """
    parts: Cut = []
    at = start
    for part in sorted(source.slices.get(name, []), key=lambda part: part.start):
        if part.start <= at < part.stop and at < stop:
            parts.append((part, at, min(stop, part.stop)))
            at = min(stop, part.stop)
    if at < stop:
        raise ValueError(
            f"the state lacks elements {at} to {stop} of {name}; load the states of all ranks that saved it: "
            f"load_state_dict([state of rank 0, state of rank 1, ...])"
        )
    first = parts[0][0]
    for part, _, _ in parts:
        scalars = [
            {key: float(v) for key, v in p.state.items() if not is_sliced(v, p.stop - p.start)} for p in (first, part)
        ]
        if part.state.keys() != first.state.keys() or scalars[0] != scalars[1]:
            raise ValueError(f"the parts of the state of {name} are of different steps: {scalars[0]} and {scalars[1]}")
    return parts


def joined(parts: Cut) -> dict[str, Any]:
    """The state that lies there. What has an entry for each element is new memory, the rest is the source's own."""
    first = parts[0][0]
    return {
        key: torch.cat([part.state[key][begin - part.start : end - part.start] for part, begin, end in parts])
        if is_sliced(value, first.stop - first.start)
        else value
        for key, value in first.state.items()
    }


def as_kept(value: Any, piece: Tensor, group: Mapping[str, Any]) -> Any:
    """A state of `joined` on the device and in the dtype in which torch's optimizers keep it for a piece [n]."""
    if not isinstance(value, Tensor):
        return value
    if is_sliced(value, piece.numel()):
        return value.to(piece.device, piece.dtype if value.is_floating_point() else value.dtype)
    # Counters are on the CPU unless the update runs without it.
    return value.to(piece.device if group.get("capturable") or group.get("fused") else "cpu", copy=True)
