"""Adapters for the programs that serve them: what each reader of PEFT's format takes, and adapters written for it.

Every reader computes scaling * B A, but most know one scaling only, lora_alpha / r of the configuration. What they do
not know they pass over without a word, or raise on. `check` says what a reader would make of an adapter; `export`
writes one of which the reader's own arithmetic makes the same, or refuses. Neither needs the base model.

How other scalings become lora_alpha / r:

- rsLoRA is baked: lora_alpha * sqrt(r) without use_rslora. Exact, and no tensor changes.
- Different ranks become the highest one: rows of zeros are added to A and columns of zeros to B. Exact.
- Different scalings become that of most layers, and B of the others is multiplied by the ratio. Exact where the ratio
  is a power of two, as it is for ranks and alphas that are; where B's dtype cannot hold the product, B becomes float32,
  which holds that of a 16-bit B and a short ratio (3/2) exactly and rounds once otherwise (relative 6e-8).
"""

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from phicore import atomic
from phicore.adapters.config import pattern_value
from phicore.formats.peft import read_tensors
from phicore.formats.peft_conversion import MODEL_TYPE, PAST, misread
from phicore.formats.peft_fields import (
    CONFIG,
    DEFAULT_ALPHA,
    DEFAULT_RANK,
    NEUTRAL,
    READ,
    WEIGHTS,
    leaves_the_base,
    read_raw_config,
    warn_of_order,
)
from phicore.formats.peft_keys import BIAS, PREFIX, ROWS
from phicore.formats.readers import MERGE, READERS, REMEDIES, SCALING, Reader, Target
from phicore.formats.safetensors_files import TensorFile, read_json
from phicore.modules import listed, matches

# ===== what an adapter is =====

PAIRS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B", "lora_A": "lora_B"}
_A_OR_B = re.compile(
    rf"{re.escape(PREFIX)}(?P<layer>.+)\.({'|'.join(re.escape(name) for pair in PAIRS.items() for name in pair)})"
)
_MAGNITUDE = re.compile(r".*\.lora_magnitude_vector(\.weight)?")
_PAIR_BIAS = ".lora_B.bias"  # end of the key of a bias that lora_bias adds
TABLE = ".base_layer.weight"  # end of the key of a table that PEFT saves beside the pair of an embedding
RESOLVED = {"exclude_modules", "layers_to_transform", "layers_pattern"}  # which layers they mean stands in the keys
KNOWN = NEUTRAL | READ | RESOLVED | {"lora_bias"}
BY_PEFT = ("transformers", "kaito")  # READERS that load adapters with peft
TRUE_BY_DEFAULT = {"init_lora_weights": True, "megatron_core": "megatron.core", "qalora_group_size": 16}


@dataclass(frozen=True, slots=True)
class Layer:
    """A pair A, B of an adapter: their keys, and the factor of B A squared, which is rational under rsLoRA too."""

    name: str
    A: str
    B: str
    rank: int
    alpha: float
    scaling_squared: Fraction


@dataclass(frozen=True, slots=True)
class Adapter:
    """What stands in an adapter's directory."""

    config: dict[str, Any]
    fields: set[str]
    """Those of the configuration, with those that are null."""
    tensors: dict[str, Tensor]
    layers: list[Layer]
    model_type: str | None
    """The base's, where the file says it; see `peft_conversion`."""
    read_past: list[str]
    """Layers whose pairs have no effect in PEFT, where the file says it; see `peft_conversion`."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something of an adapter that a reader does not read rightly."""

    what: str
    why: str
    remedy: str
    mended: bool
    """Whether `export` mends it."""

    def __str__(self) -> str:
        return f"{self.what}: {self.why}; {self.remedy}"


def read_adapter(directory: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter of any kind that PEFT's LoRA can be, without a model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that cannot be read, keys without the prefix, an A without its B or the reverse, shapes that
            do not fit each other or the ranks of the configuration, a rank or an alpha that is not above 0.
    """
    directory = Path(directory)
    config, tensors = read_raw_config(directory), read_tensors(directory / WEIGHTS)
    warn_of_order(directory, config, {found["layer"] for key in tensors if (found := _A_OR_B.fullmatch(key))})
    problems = [f"{key} does not start with {PREFIX!r}" for key in sorted(tensors) if not key.startswith(PREFIX)]
    layers = []
    for key in sorted(tensors):
        if (found := _A_OR_B.fullmatch(key)) is None:
            continue
        name, ending = found["layer"], key[found.end("layer") + 1 :]
        other = PAIRS.get(ending) or next(a for a, b in PAIRS.items() if b == ending)
        partner = f"{PREFIX}{name}.{other}"
        if partner not in tensors:
            problems.append(f"{key} is there and {partner} is not")
        elif ending in PAIRS:
            layer = _layer(config, name, key, partner, tensors)
            layers += [layer] if isinstance(layer, Layer) else []
            problems += [layer] if isinstance(layer, str) else []
    if not layers and not problems:
        problems.append("there is no A and no B in it")
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{directory} is no whole adapter: {'; '.join(problems[:10])}{more}")
    fields = set(read_json(directory / CONFIG))
    metadata = TensorFile(directory / WEIGHTS).metadata
    return Adapter(config, fields, tensors, layers, metadata.get(MODEL_TYPE), metadata.get(PAST, "").splitlines())


def _layer(config: dict[str, Any], name: str, A: str, B: str, tensors: dict[str, Tensor]) -> Layer | str:
    """A layer, or what is wrong with it."""
    a, b = tensors[A], tensors[B]
    if a.dim() < 2 or b.dim() != a.dim() or not a.is_floating_point() or not b.is_floating_point():
        return f"A and B of {name} are {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
    rank = a.shape[0]
    alpha = pattern_value(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", DEFAULT_ALPHA))
    if rank == 0 or not 0 < alpha < math.inf:
        return f"{name} has rank {rank} and lora_alpha {alpha}; both must be above 0"
    said = pattern_value(config.get("rank_pattern") or {}, name, config.get("r", DEFAULT_RANK))
    named = not _other_settings(config) and not config.get("target_parameters")
    if named and (rank != said or (a.dim() == 2 and b.shape[1] != rank)):
        return f"A and B of {name} are {list(a.shape)} and {list(b.shape)}, and {CONFIG} says rank {said}"
    squared = Fraction(alpha) ** 2 / (rank if config.get("use_rslora") else rank**2)
    return Layer(name, A, B, rank, alpha, squared)


def _other_settings(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sorted(config.items()) if value and key not in KNOWN}


def _kinds(adapter: Adapter) -> dict[str, list[str]]:
    """The keys of tensors that are no pair of a linear layer, by the entry of REMEDIES that they are about."""
    kinds: dict[str, list[str]] = {}
    ends = {end for layer in adapter.layers for end in (layer.A, layer.B)}
    for key in sorted(adapter.tensors.keys() - ends):
        if _MAGNITUDE.fullmatch(key):
            kind = "use_dora"
        elif key.endswith(_PAIR_BIAS):
            kind = "lora_bias"
        elif key.endswith(BIAS) or (key.endswith(".bias") and adapter.config.get("bias", "none") != "none"):
            kind = "bias"
        elif key.endswith(ROWS):
            kind = "tokens"
        elif key.endswith(TABLE):
            kind = "tables"
        else:
            kind = "modules_to_save"
        kinds.setdefault(kind, []).append(key)
    for layer in adapter.layers:
        if layer.A.endswith(".lora_embedding_A"):
            kinds.setdefault("embedding", []).append(layer.A)
        elif layer.A.endswith(".lora_A") or ".base_layer.out_proj.lora_A" in layer.A:
            kinds.setdefault("attention", []).append(layer.A)
        elif adapter.tensors[layer.A].dim() > 2:
            kinds.setdefault("convolution", []).append(layer.A)
    return kinds


def features(adapter: Adapter) -> dict[str, str]:
    """Which of REMEDIES an adapter has, and how it shows."""
    config, found = adapter.config, {kind: listed(keys, 3) for kind, keys in _kinds(adapter).items()}
    ranks, alphas = {layer.rank for layer in adapter.layers}, {layer.alpha for layer in adapter.layers}
    if ranks != {config.get("r", DEFAULT_RANK)}:
        found["rank_pattern"] = f"ranks {', '.join(map(str, sorted(ranks)))} by rank_pattern"
    if alphas != {config.get("lora_alpha", DEFAULT_ALPHA)}:
        found["alpha_pattern"] = f"alphas {', '.join(map(str, sorted(alphas)))} by alpha_pattern"
    for key in ("use_rslora", "use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias"):
        if config.get(key):
            found[key] = f"{key}={config[key]!r}"
    if config.get("bias", "none") != "none":
        found["bias"] = f"bias={config['bias']!r}"
    if not leaves_the_base(config.get("init_lora_weights", True)):
        found["init_lora_weights"] = f"init_lora_weights={config['init_lora_weights']!r}"
    if config.get("target_parameters"):
        found["parameters"] = f"target_parameters={config['target_parameters']!r}"
    if others := _other_settings(config):
        found["other settings"] = ", ".join(f"{key}={value!r}" for key, value in others.items())
    return found


# ===== check =====


def check(directory: str | os.PathLike[str], target: Target, *, max_rank: int | None = None) -> list[Finding]:
    """What a reader would not read rightly of an adapter as it is; nothing if it fits.

    Args:
        directory: holds adapter_model.safetensors and adapter_config.json.
        target: a name of READERS.
        max_rank: the highest rank that the server is set to take; by default what it takes unasked.

    Raises:
        ValueError: no such target; a max_rank that it cannot be set to; as `read_adapter`.
        FileNotFoundError: a file is missing.
    """
    return list(_misfits(read_adapter(directory), target, _reader(target, max_rank)).values())


def _reader(target: Target, max_rank: int | None) -> Reader:
    """The reader as it is set."""
    if target not in READERS:
        raise ValueError(f'no target "{target}"; there are: {", ".join(READERS)}')
    reader = READERS[target]
    if max_rank is None:
        return reader
    if max_rank not in reader.rank_settings:
        taken = ", ".join(map(str, reader.rank_settings)) or "none, since it takes any rank"
        raise ValueError(f"max_rank={max_rank}: {target} can be set to {taken}")
    return replace(reader, max_rank=max_rank)


def _misfits(adapter: Adapter, target: Target, reader: Reader) -> dict[str, Finding]:
    """The findings, by the entry of REMEDIES that they are about (or "converted", "read past")."""
    misfits: dict[str, Finding] = {}

    def find(feature: str, what: str, why: str) -> None:
        misfits[feature] = Finding(what, why, *REMEDIES[feature])

    if missing := [name for name in reader.required if name not in adapter.config]:
        find("missing", f"no {', '.join(missing)} in {CONFIG}", "it requires them")
    if reader.fields is not None and (unknown_fields := sorted(adapter.fields - reader.fields)):
        find("fields", f"fields {', '.join(unknown_fields)}", "its peft is older than these, and raises on them")
    for feature, what in features(adapter).items():
        if feature in reader.unread and not (feature == "modules_to_save" and _are_heads(adapter, reader.heads)):
            find(feature, what, reader.unread[feature])
    rank = max(layer.rank for layer in adapter.layers)
    if reader.max_rank is not None and rank > reader.max_rank:
        taken = ", ".join(map(str, reader.rank_settings))
        find("rank", f"rank {rank}", f"it takes at most {reader.max_rank} unless it is set to a higher one of {taken}")
    if reader.pads_ranks and rank != _padded(rank):
        why = "it pads ranks to 8 or a multiple of 16, and divides lora_alpha by the padded rank in some layers"
        find("padded rank", f"rank {rank}", why)
    if unknown := [layer.name for layer in adapter.layers if not re.fullmatch(reader.layers, layer.name)]:
        find("layers", listed(unknown, 3), "it has no such layers in its table and leaves them unused without a word")
    if reader.every_block and (partial := _partial_kinds(adapter)):
        why = "it drops a kind of layer that is not adapted in every block, without a word"
        find("blocks", listed(partial, 3), why)
    if target in BY_PEFT and (lost := misread(adapter.model_type, [layer.name for layer in adapter.layers])):
        why = f"on {adapter.model_type} models peft takes layers of such names for experts and drops their pairs"
        misfits["converted"] = Finding(listed(lost, 3), why, MERGE, mended=False)
    if target in BY_PEFT and adapter.read_past:
        why = "the model's code reads these layers' weights, where peft gives it the base's"
        misfits["read past"] = Finding(listed(adapter.read_past, 3), why, MERGE, mended=False)
    return misfits


def _are_heads(adapter: Adapter, heads: tuple[str, ...]) -> bool:
    """Whether all that an adapter trains whole are single layers of these names, which modules_to_save has."""
    saved = adapter.config.get("modules_to_save") or []
    key = re.compile(rf"{re.escape(PREFIX)}(.+\.)?({'|'.join(map(re.escape, saved))})\.(weight|bias)")
    return set(saved) <= set(heads) and all(key.fullmatch(one) for one in _kinds(adapter).get("modules_to_save", []))


def _padded(rank: int) -> int:
    return 8 if rank <= 8 else -(-rank // 16) * 16


def _partial_kinds(adapter: Adapter) -> list[str]:
    """Kinds of layers (names with * for the block's number) that some block up to the last adapted one lacks; all of
    them under layers_to_transform, which is there to leave blocks out, be they behind that one."""
    blocks: dict[str, set[int]] = {}
    for layer in adapter.layers:
        if number := re.search(r"(?<=\.)\d+(?=\.)", layer.name):
            kind = f"{layer.name[: number.start()]}*{layer.name[number.end() :]}"
            blocks.setdefault(kind, set()).add(int(number[0]))
    last = max((n for numbers in blocks.values() for n in numbers), default=-1)
    chosen = _is_set("layers_to_transform", adapter.config.get("layers_to_transform"))
    return sorted(kind for kind, numbers in blocks.items() if chosen or len(numbers) <= last)


# ===== export =====


def export(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    target: Target,
    *,
    max_rank: int | None = None,
    overwrite: bool = False,
) -> list[Finding]:
    """Writes an adapter that a reader reads rightly: the same scaling * B A, in fields and tensors that it takes.

    The two files are the same bytes from run to run. Other files of the directory (a tokenizer, a model card) are not
    taken along.

    Args:
        directory: of the adapter.
        output: to be made; must be missing or empty.
        target: a name of READERS.
        max_rank: as in `check`.
        overwrite: replace an output directory that is there.

    Returns:
        What had to be mended; nothing if the reader would have read the adapter as it was.

    Raises:
        ValueError: the adapter has something that the target does not take and that cannot be written otherwise: all of
            it is named; output is or holds directory; as `check`. Nothing is written then.
        FileExistsError: output is not empty and overwrite is False.
        FileNotFoundError: a file is missing.
    """
    reader = _reader(target, max_rank)
    adapter = read_adapter(directory)
    misfits = _misfits(adapter, target, reader)
    if refused := [finding for finding in misfits.values() if not finding.mended]:
        raise ValueError(f"{directory} cannot be written for {target}. " + ". ".join(map(str, refused)))
    atomic.check_apart(output, directory)
    config = _config(adapter, reader)
    tensors = {key: t for key, t in adapter.tensors.items() if "tables" not in misfits or not key.endswith(TABLE)}
    if misfits.keys() & SCALING:
        scaling, tensors = _rescaled(adapter, tensors, reader)
        config |= scaling
    with atomic.new_directory(output, overwrite=overwrite) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        # the order inside a pattern is its meaning, so only the fields are sorted
        atomic.write_text(temporary / CONFIG, json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    return list(misfits.values())


def _config(adapter: Adapter, reader: Reader) -> dict[str, Any]:
    """The fields that readers need; for a reader of all that PEFT writes, also those that differ from the default."""
    raw, targets = adapter.config, adapter.config.get("target_modules")
    config = {
        key: value
        for key, value in raw.items()
        if not reader.unread and _is_set(key, value) and value != TRUE_BY_DEFAULT.get(key) and key != "peft_version"
    }
    names = sorted(layer.name for layer in adapter.layers)
    if reader.unread and isinstance(targets, list) and not any(_is_set(key, raw.get(key)) for key in RESOLVED):
        targets = [target for target in targets if any(matches(name, [target]) for name in names)]
    elif reader.unread:
        targets = names
    return config | {
        "peft_type": "LORA",
        "base_model_name_or_path": raw.get("base_model_name_or_path"),
        "task_type": raw.get("task_type"),
        "inference_mode": True,
        "r": raw.get("r", DEFAULT_RANK),
        "lora_alpha": raw.get("lora_alpha", DEFAULT_ALPHA),
        "lora_dropout": raw.get("lora_dropout", 0.0),
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
        "use_dora": bool(raw.get("use_dora")),
        "use_rslora": bool(raw.get("use_rslora")),
        "rank_pattern": raw.get("rank_pattern") or {},
        "alpha_pattern": raw.get("alpha_pattern") or {},
        "modules_to_save": sorted(raw.get("modules_to_save") or []) or None,
        "bias": raw.get("bias", "none"),
    }


def _is_set(key: str, value: Any) -> bool:
    """Whether a field says something; 0 is the number of a layer."""
    return bool(value) or (key == "layers_to_transform" and value == 0)


def _rescaled(adapter: Adapter, tensors: dict[str, Tensor], reader: Reader) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields and tensors with one lora_alpha and plain scaling, and one rank unless the reader takes each tensor's."""
    tensors, rank = dict(tensors), max(layer.rank for layer in adapter.layers)
    one_rank = "rank_pattern" in reader.unread
    rank = _padded(rank) if reader.pads_ranks else rank
    # the alpha that each layer would have, squared
    squares = {layer: layer.scaling_squared * (rank if one_rank else layer.rank) ** 2 for layer in adapter.layers}
    common = Counter(squares.values()).most_common(1)[0][0]
    for layer, square in squares.items():
        A, B = tensors[layer.A], tensors[layer.B]
        if one_rank:
            A = nn.functional.pad(A, (0, 0, 0, rank - layer.rank))  # [r, in] -> [rank, in]
            B = nn.functional.pad(B, (0, rank - layer.rank))  # [out, r] -> [out, rank]
        tensors[layer.A] = A
        tensors[layer.B] = B if square == common else _times(B, _root(square / common))
    alpha = _root(common)
    scaling: dict[str, Any] = {
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "use_rslora": False,
        "alpha_pattern": {},
    }
    return scaling | ({"r": rank, "rank_pattern": {}} if one_rank else {}), tensors


def _root(square: Fraction) -> float:
    """The square root: exact, or correctly rounded division, if it is rational."""
    n, d = math.isqrt(square.numerator), math.isqrt(square.denominator)
    return n / d if n * n == square.numerator and d * d == square.denominator else math.sqrt(square)


def _times(B: Tensor, factor: float) -> Tensor:
    """B * factor in B's dtype if that holds it exactly, else in float32 (float64 for a float64 B)."""
    exact = B.double() * factor
    product = exact.to(B.dtype)
    return product if torch.equal(product.double(), exact) else exact.to(torch.promote_types(B.dtype, torch.float32))
