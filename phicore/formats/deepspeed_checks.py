"""Whether the files of a checkpoint of DeepSpeed hold what is read from them: a pickle that loads can hold anything."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phicore.formats.safetensors_files import are_sizes


def check_model_state(state: Mapping[str, Any], path: Path) -> None:
    """Looks at the content of a model file.

    Raises:
        ValueError: a part is of another kind than it must be, naming the file and the part.
    """
    _need(_is_named(state["module"]), path, "module", state["module"], "tensors by name")
    groups = state["param_shapes"]
    _need(
        _are(Mapping, groups) and all(map(_is_named, groups)), path, "param_shapes", groups, "a list of shapes by name"
    )
    for name, shape in (item for group in groups for item in group.items()):
        _need(_are_sizes(shape), path, f"param_shapes of {name}", shape, "a list of sizes")
        weight = state["module"].get(name)
        _need(weight is None or _is_dense(weight), path, f"module {name}", weight, "a dense tensor")
    _need(_is_count(state["global_steps"]), path, "global_steps", state["global_steps"], "a count")
    buffers = state.get("buffer_names")
    _need(buffers is None or _are(str, buffers), path, "buffer_names", buffers, "a list of names")


def check_rank_state(state: Any, path: Path, groups: Sequence[Mapping[str, Any]]) -> None:
    """Looks at the "optimizer_state_dict" of a rank's file, where `groups` are the model file's "param_shapes".

    Raises:
        ValueError: as `check_model_state`; or a ZeRO stage or a setting that is not read.
    """
    _need(isinstance(state, Mapping), path, "optimizer_state_dict", state, "a state by name")
    stage = state.get("zero_stage", 1)
    _need(isinstance(stage, int), path, "zero_stage", stage, "a number")
    if stage not in (1, 2):
        raise ValueError(f"{path} is of ZeRO stage {int(stage)}; stages 1 and 2 are read")
    base = state.get("base_optimizer_state")
    if not isinstance(base, Mapping):
        raise ValueError(
            f"{path} was saved with zero_optimization.elastic_checkpoint, which leaves out the settings of the "
            f"parameter groups; load it with DeepSpeed and save it without"
        )
    count = state.get("partition_count")
    _need(_is_count(count) or (_are(int, count) and any(count)), path, "partition_count", count, "a count, or some")
    _check_groups(state, path, groups)
    _check_optimizer(base, path, len(groups))
    scale = getattr(state.get("loss_scaler"), "cur_scale", 1.0)
    _need(_is_number(scale), path, "cur_scale", scale, "a number")


def _check_groups(state: Mapping[str, Any], path: Path, groups: Sequence[Mapping[str, Any]]) -> None:
    """The parts of a rank's state that are lists with one value for each group."""
    lists = f"a list of {len(groups)} (the groups in param_shapes of the model file)"
    parts = state.get("single_partition_of_fp32_groups")
    right = _are(Tensor, parts, len(groups)) and all(_is_flat(part) for part in parts or ())
    _need(right, path, "single_partition_of_fp32_groups", parts, f"{lists} flat tensors")
    for key in ("param_slice_mappings", "param_alignment_paddings"):
        values = state.get(key)
        if values is None or (isinstance(values, list) and not values):
            continue
        _need(_are(object, values, len(groups)), path, key, values, lists)
        for value, group in zip(values, groups, strict=True):
            if key == "param_slice_mappings":
                _need(value is None or _is_named(value), path, key, value, "by name")
            else:
                counts = _are(int, value) and all(map(_is_count, value))
                right = value is None or (counts and len(value) in (0, len(group)))
                _need(right, path, key, value, f"a list of sizes, {len(group)} of them")


def _check_optimizer(base: Mapping[str, Any], path: Path, groups: int) -> None:
    """The state of the inner optimizer."""
    settings, inner = base.get("param_groups"), base.get("state")
    lists = f"a list of {groups} (the groups in param_shapes of the model file)"
    _need(_are(Mapping, settings, groups), path, "param_groups", settings, lists)
    _need(isinstance(inner, Mapping), path, "state", inner, "states by number")
    assert settings is not None
    assert inner is not None
    for own in settings:
        params = own.get("params")
        _need(_are(int, params) and len(params) > 0, path, "params", params, "a list of numbers")
        values = inner.get(params[0], {})
        _need(_is_named(values), path, f"state {params[0]}", values, "tensors by name")
        for key, value in values.items():
            _need(_is_number(value) or _is_dense(value), path, f"state {params[0]} {key}", value, "a tensor or number")


def _need(right: bool, path: Path, key: str, value: Any, accepted: str) -> None:
    if not right:
        raise ValueError(f'{path} is damaged: its "{key}" must be {accepted}, and is {_shown(value)}')


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, list | tuple):
        return (
            f"{type(value).__name__} of {len(value)}: [{', '.join(map(_shown, value[:4]))}{', ...' * (len(value) > 4)}]"
        )
    return repr(value)[:80]


def _are(kind: type, values: Any, count: int | None = None) -> bool:
    """Whether it is a list of values of a kind, and of how many."""
    right = isinstance(values, list | tuple) and all(isinstance(value, kind) for value in values)
    return right and count in (None, len(values))


def _is_named(values: Any) -> bool:
    return isinstance(values, Mapping) and all(isinstance(name, str) for name in values)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list | tuple) and are_sizes(list(values))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _is_flat(value: Any) -> bool:
    return _is_dense(value) and value.dim() == 1 and value.is_floating_point()
