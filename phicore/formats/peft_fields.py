"""adapter_config.json as it stands: which fields there are, and what is wrong with a file."""

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

from phicore.adapters.config import Bias, pattern_value
from phicore.adapters.layer_index import as_patterns
from phicore.expressions import check_bounded
from phicore.formats.links import check_links
from phicore.formats.safetensors_files import read_json
from phicore.modules import check_expression, ends_with

DEFAULT_RANK, DEFAULT_ALPHA = 8, 8  # PEFT's, for a file that does not say
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Fields that say nothing about what the adapter computes once its weights are there.
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config",
    "megatron_core", "runtime_config", "ephemeral_gpu_offload", "qalora_group_size", "lora_dropout",
}  # fmt: skip
READ = {
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "use_dora", "use_rslora", "rank_pattern",
    "alpha_pattern", "modules_to_save", "bias", "fan_in_fan_out", "target_parameters", "layers_to_transform",
    "layers_pattern", "trainable_token_indices", "ensure_weight_tying",
}  # fmt: skip

MOST_WAYS = 1 << 26  # of matching all patterns of a file against a name
PLAIN_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")  # that leave the base's weights as they are


def read_raw_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter as it stands, less the fields that are null; types are checked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not JSON, another kind of adapter, values of a wrong type or size, links that lead out of directory.
    """
    path = directory / CONFIG
    if not path.is_file():
        lacking = f"holds no {CONFIG}" if directory.is_dir() else "is no directory on this machine"
        raise FileNotFoundError(f"{directory} {lacking}; an adapter directory has {CONFIG} and {WEIGHTS}")
    check_links(directory)
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise ValueError(f'{path}: peft_type must be "LORA", got {raw.get("peft_type")!r}')
    wrong = [key for key, right in _RIGHT.items() if raw.get(key) is not None and not right(raw[key])]
    if wrong:
        raise ValueError(f"{path}: values of a wrong type or size: " + ", ".join(f"{k}={raw[k]!r}" for k in wrong))
    _check_patterns(path, raw)
    return {key: value for key, value in raw.items() if value is not None}


def _check_patterns(path: Path, raw: dict[str, Any]) -> None:
    """Raises ValueError for regular expressions of a file that might take very long to match."""
    patterns = [(key, raw[key]) for key in ("target_modules", "exclude_modules") if isinstance(raw.get(key), str)]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns += [(key, ends_with(pattern)) for pattern in raw.get(key) or {}]
    patterns += [("layers_pattern", ends_with(pattern)) for pattern in as_patterns(raw.get("layers_pattern"))]
    ways = sum(check_bounded(f"{path}: {key}", pattern) for key, pattern in patterns)
    if ways > MOST_WAYS:
        raise ValueError(f"{path}: its {len(patterns)} patterns might take very long to match; write them more plainly")


def read_config(directory: Path) -> dict[str, Any]:
    raw, path = read_raw_config(directory), directory / CONFIG
    if not leaves_the_base(start := raw.get("init_lora_weights", True)):
        raise ValueError(
            f"{path}: init_lora_weights={start!r} changed the base's weights too, which only peft repeats; convert the "
            f"adapter to a plain LoRA with peft (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if low := [f"{key}={raw[key]!r}" for key in ("r", "lora_alpha") if raw.get(key, 1) <= 0]:
        raise ValueError(f"{path}: the rank and the alpha must be above 0, got {', '.join(low)}")
    unknown = sorted(key for key, value in raw.items() if value and key not in NEUTRAL | READ)
    if unknown:
        raise ValueError(
            f"{path}: settings that this library does not support: " + ", ".join(f"{k}={raw[k]!r}" for k in unknown)
        )
    return raw


def warn_of_order(directory: Path, raw: dict[str, Any], layers: Iterable[str]) -> None:
    """Warns where two keys of rank_pattern or alpha_pattern mean one of these layers and differ. The first counts, but
    PEFT trains by the order that it was given and sorts the keys when it saves: a sorted file may not say which it was.
    """
    layers = sorted(layers)
    for what in ("rank_pattern", "alpha_pattern"):
        pattern: dict[str, Any] = raw.get(what) or {}
        for layer in layers if list(pattern) == sorted(pattern) and len(set(pattern.values())) > 1 else ():
            meant = {key: value for key, value in pattern.items() if pattern_value({key: True}, layer, False)}
            if len(set(meant.values())) > 1:
                said = ", ".join(f"{key!r}: {value}" for key, value in meant.items())
                warnings.warn(
                    f"{directory / CONFIG}: several keys of {what} mean {layer} ({said}), and the first is taken; PEFT "
                    f"sorts them when it saves, so if the run had them in another order, put that into the file",
                    stacklevel=4,
                )
                break


def leaves_the_base(start: Any) -> bool:
    """Whether an init_lora_weights changes no weight of the base; its case says nothing."""
    return str(start).lower() in PLAIN_STARTS


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _are_whole(value: Any) -> bool:
    return isinstance(value, list) and all(is_whole(number) for number in value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63  # not NaN either


def _is_expression(value: Any) -> bool:
    try:
        check_expression("", value)
        check_expression("", ends_with(value))
    except (ValueError, TypeError):
        return False
    return True


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_RIGHT: dict[str, Callable[[Any], bool]] = {
    "r": is_whole,
    "lora_alpha": is_number,
    "lora_dropout": is_number,
    "target_modules": lambda value: _is_expression(value) or _are_names(value),
    "exclude_modules": lambda value: _is_expression(value) or _are_names(value),
    "modules_to_save": _are_names,
    "target_parameters": _are_names,
    "bias": lambda value: value in get_args(Bias),
    # a text that says "false" would be taken for true
    **dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out", "ensure_weight_tying"), lambda value: value in (0, 1)),
    "trainable_token_indices": lambda value: (
        _are_whole(value) or (isinstance(value, dict) and all(_are_whole(tokens) for tokens in value.values()))
    ),
    "layers_to_transform": lambda value: is_whole(value) or _are_whole(value),
    "layers_pattern": lambda value: all(_is_expression(v) for v in (value if isinstance(value, list) else [value])),
    "rank_pattern": lambda value: (
        isinstance(value, dict) and all(_is_expression(k) and is_whole(v) for k, v in value.items())
    ),
    "alpha_pattern": lambda value: (
        isinstance(value, dict) and all(_is_expression(k) and is_number(v) for k, v in value.items())
    ),
}
