"""The adapter format of PEFT: adapter_model.safetensors and adapter_config.json.

A key is "base_model.model." + the module's name + ".lora_A.weight" [rank, in], ".lora_B.weight" [out, rank],
".lora_magnitude_vector" [out] (DoRA); of an embedding ".lora_embedding_A" [rank, num], ".lora_embedding_B" [dim, rank];
of a convolution ".lora_A.weight" [rank, in, *kernel], ".lora_B.weight" [out, rank / groups, 1, ...] and a magnitude
[1, out, 1, ...]; of a trained bias ".base_layer.bias" [out], or ".bias" where the layer has no pair; of trained rows of
an embedding ".token_adapter.trainable_tokens_delta" [k, dim], which are values; or, for a module trained whole, the
name of one of its own tensors. The adapter's name is not in the file.

The pairs of a parameter of a module (target_parameters) are one, A [experts * rank, in] and B [out, rank * experts],
under the module's name. Where several of its parameters are adapted, PEFT nests a wrapper for each: that of the last
parameter stands at the module's name, and each other one a ".base_layer" further in.

nn.MultiheadAttention has the pair of in_proj under its own name and that of out_proj under ".base_layer.out_proj", both
of one rank; the smaller is filled up with zeros. PEFT computes with twice out_proj's product (it adds it to the weight,
and then merges it), so its B is half in the file, which is what a file means that PEFT wrote. PEFT refuses DoRA for it,
and kdim and vdim; such adapters are written with these keys, and those of q_proj, k_proj, v_proj and out_proj under
their names, for phicore alone.

An adapter for each part of a fused layer is written as the plain adapter that it amounts to. Which parts it has stands
in the metadata of the safetensors file, which other readers pass over.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from phicore import atomic
from phicore.adapters.attach import (
    AdapterLayer,
    TrainedCopy,
    adaptable_kinds,
    adapter_layers,
    attach,
    layer_class,
    linear_kinds,
    merged_layers,
    parts_beside,
    pattern_value,
    plan,
)
from phicore.adapters.attention import OpenAttention, is_packed, layer_setting, projections
from phicore.adapters.base import transposed_kinds
from phicore.adapters.config import BIASES, LoRAConfig
from phicore.adapters.convolution import LowRankConvolution
from phicore.adapters.dora import DoRALayer
from phicore.adapters.embedding import LowRankEmbedding
from phicore.adapters.experts import LoRAExperts, named_stacks, plan_parameters, stacked_shape
from phicore.adapters.fused import FusedLinear, Split, diagonal_blocks, part_paths, part_sizes, splits
from phicore.adapters.layer_index import as_patterns, described_by_indices, layer_index
from phicore.adapters.lora import LowRankLayer, LowRankLinear
from phicore.adapters.tied import TiedHead, owners_of_tied, tied_tables
from phicore.adapters.token_rows import TrainedRows, input_embedding, owners
from phicore.adapters.trained import TrainedBias, TrainedPart, has_bias
from phicore.expressions import check_bounded
from phicore.formats.safetensors_files import NO_PICKLE, TensorFile, parse_json, read_json
from phicore.modules import ALL_LINEAR, check_expression, ends_with, leaves, matches, output_heads

DEFAULT_RANK, DEFAULT_ALPHA = 8, 8  # PEFT's, for a file that does not say
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
BIAS, ROWS = ".base_layer.bias", ".token_adapter.trainable_tokens_delta"
PARTS = "phicore.parts"
"""Key of the metadata: JSON, name of a layer whose pair in the file is made of smaller ones -> its adapted parts (those
of a fused layer; or itself, under its last name) -> their [rank, alpha]."""

# Fields that say nothing about what the adapter computes once its weights are there.
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config",
    "megatron_core", "runtime_config", "ephemeral_gpu_offload", "qalora_group_size",
    "lora_dropout",
}  # fmt: skip
READ = {
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "use_dora", "use_rslora", "rank_pattern",
    "alpha_pattern", "modules_to_save", "bias", "fan_in_fan_out", "target_parameters", "layers_to_transform",
    "layers_pattern", "trainable_token_indices", "ensure_weight_tying",
}  # fmt: skip

MOST_WAYS = 1 << 26  # of matching all patterns of a file against a name
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # those that leave the base's weights as they are


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], name: str = "default") -> None:
    """Writes an adapter in PEFT's format; each file appears whole or not at all, the weights first.

    Args:
        model: a model with the adapter attached and not merged.
        directory: made if missing. Other files in it are left alone.
        name: which adapter.

    Raises:
        ValueError: the model has no such adapter, or is merged.
    """
    tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in adapter_tensors(model, name).items()}
    config = adapter_config(model, name)
    data = save(tensors, metadata={"format": "pt"})
    if parts := _split_parts(model, name):
        data = _with_metadata(data, PARTS, json.dumps(parts, sort_keys=True))
    atomic.write_bytes(Path(directory) / WEIGHTS, data)
    atomic.write_text(Path(directory) / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], name: str = "default") -> nn.Module:
    """Reads an adapter in PEFT's format into a model, in place; attaches it first if the model has none of this name.

    A, B and magnitude keep the dtype that they have in the file.

    Args:
        model: the base model, or one with this adapter attached.
        directory: holds adapter_model.safetensors and adapter_config.json.
        name: to give to the adapter.

    Returns:
        The model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that cannot be read, a setting that this library does not know, keys that are missing or
            unexpected, shapes that do not fit: all are listed, and the model is unchanged.
    """
    directory = Path(directory)
    raw = _read_config(directory)
    tensors = read_tensors(directory / WEIGHTS)
    parts = _read_parts(directory / WEIGHTS)
    present = name in {layer.adapter_name for _, layer in adapter_layers(model)}
    if any(merged_layers(model)):
        raise ValueError("the model's adapters are merged; unmerge it before loading one")
    if present:
        expected = adapter_tensors(model, name)
        config = None
        unlike = _differences(model, raw, parts, name)
        if unlike:
            raise ValueError(f'the adapter "{name}" of the model and {directory} differ: ' + "; ".join(unlike))
    else:
        config = _lora_config(model, raw, tensors, parts)
        expected = _expected_tensors(model, config)
    _drop_tables(model, tensors, directory)
    _check_keys(expected, tensors, directory)
    _check_parts(model, config, name, tensors, directory)
    _check_tied(model, config, name, tensors, directory)
    if config is not None:
        attach(model, config, name)
    with torch.no_grad():
        for path, layer in adapter_layers(model, name):
            if isinstance(layer, TrainedPart):
                for key, parameter in _part_tensors(path, layer).items():
                    parameter.copy_(tensors[key])
            elif isinstance(layer, LoRAExperts):
                _fill_experts(path, layer, tensors)
            else:
                _fill_pair(_place(model, path), layer, tensors)
                if _is_added_twice(model, path, layer):
                    layer.lora_B.mul_(2)
    for _, layer in adapter_layers(model):
        if isinstance(layer, DoRALayer) and isinstance(layer.base, LowRankLayer):
            layer.refresh_base_norm()  # the adapter under it may be the one that was loaded
    return model


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's own tensors (not copies) by their keys in PEFT's file; of a start that is taken off again (pissa,
    olora), of parameters and of the parts of a fused layer, the plain pairs that they amount to.

    Raises:
        ValueError: the model has no such adapter, or is merged.
    """
    layers = list(adapter_layers(model, name))
    if not layers:
        names = sorted({layer.adapter_name for _, layer in adapter_layers(model)})
        state = "is merged; unmerge it first" if any(merged_layers(model)) else f"has the adapters {names}"
        raise ValueError(f'no adapter named "{name}" to read: the model {state}')
    return {key: tensor for path, layer in layers for key, tensor in _layer_tensors(model, path, layer).items()}


def _layer_tensors(model: nn.Module, path: str, layer: AdapterLayer) -> dict[str, Tensor]:
    if isinstance(layer, TrainedPart):
        return _part_tensors(path, layer)
    if isinstance(layer, LoRAExperts):
        return _expert_tensors(path, layer)
    rank = _doubled_rank(layer, _settings_of(model, path, layer)[1])
    tensors = _pair_tensors(_place(model, path), layer, rank)
    if _is_added_twice(model, path, layer):
        tensors = {key: tensor / 2 if ".lora_B" in key else tensor for key, tensor in tensors.items()}
    if layer.trained_bias is not None:
        tensors[_place(model, path) + BIAS] = layer.trained_bias
    return tensors


def _part_tensors(path: str, part: TrainedPart) -> dict[str, Tensor]:
    if isinstance(part, TrainedCopy):
        return {f"{PREFIX}{path}.{key}": tensor for key, tensor in part.trained.state_dict(keep_vars=True).items()}
    if isinstance(part, TrainedRows):
        return {PREFIX + path + ROWS: part.trained} if part.owner else {}
    assert isinstance(part, TrainedBias)
    return {f"{PREFIX}{path}.bias": part.trained}


def _pair_tensors(place: str, layer: LowRankLayer, rank: int) -> dict[str, Tensor]:
    """A pair and its magnitude by their keys, filled up to a rank if it is smaller."""
    key_A, key_B, magnitude = _endings(type(layer))
    A, B = layer.matrices() if _start_is_taken_off(layer) else (layer.lora_A, layer.lora_B)
    if missing := rank - A.shape[0]:
        A, B = nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))
    tensors: dict[str, Tensor] = {place + key_A: A, place + key_B: B}
    if isinstance(layer, DoRALayer):
        tensors[place + magnitude] = layer.magnitude.view(_magnitude_shape(type(layer), layer.lora_B.shape))
    if isinstance(layer, FusedLinear):  # whose magnitudes beside the parts are the base's norms, in float32
        tensors = {key: tensor.to(A.dtype) for key, tensor in tensors.items()}
    return tensors


def _fill_pair(place: str, layer: LowRankLayer, tensors: dict[str, Tensor]) -> None:
    key_A, key_B, magnitude = (place + ending for ending in _endings(type(layer)))
    A, B = tensors[key_A][: layer.rank], tensors[key_B]
    B = B[:, : layer.rank] if B.dim() == 2 else B
    if isinstance(layer, FusedLinear):
        layer.set_matrices(A, B)
    else:
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    if isinstance(layer, DoRALayer):
        layer.set_magnitude(tensors[magnitude].flatten())
    if layer.trained_bias is not None:
        layer.trained_bias.copy_(tensors[place + BIAS])


# ===== nn.MultiheadAttention =====


def _packed_attention(model: nn.Module, path: str) -> tuple[str, nn.MultiheadAttention] | None:
    """The attention, with its name, that PEFT has as one layer, if a layer of this name is its in_proj or out_proj."""
    parent, _, last = path.rpartition(".")
    owner = model.get_submodule(parent) if last in ("in_proj", "out_proj") else None
    return (parent, owner) if isinstance(owner, nn.MultiheadAttention) and is_packed(owner) else None


def _place(model: nn.Module, path: str) -> str:
    """What the keys of a layer start with."""
    found = _packed_attention(model, path)
    if found is None:
        return PREFIX + path
    return PREFIX + found[0] + ("" if path.endswith(".in_proj") else ".base_layer.out_proj")


def _is_added_twice(model: nn.Module, path: str, layer: LowRankLayer) -> bool:
    """Whether PEFT 0.21.2 computes with twice a layer's product: out_proj of an attention that it reads."""
    found = _packed_attention(model, path)
    return found is not None and path.endswith(".out_proj") and not isinstance(layer, DoRALayer)


def _settings_of(model: nn.Module, path: str, layer: LowRankLayer) -> tuple[str, int, float]:
    """The name by which a file knows a layer, and its rank and alpha there (of a start that is taken off, half of it).

    Raises:
        ValueError: in_proj and out_proj of an nn.MultiheadAttention have different scalings.
    """
    found = _packed_attention(model, path)
    if found is None:
        return path, layer.rank, layer.alpha
    both = [_of_adapter(outer, layer.adapter_name) for outer in projections(found[1]).values()]
    if abs(both[0].scaling / both[1].scaling - 1) > 1e-12:
        raise ValueError(
            f"PEFT's format has one rank and one alpha for in_proj and out_proj of {found[0]}, and here their scalings "
            f"are {both[0].scaling} and {both[1].scaling}; give them the same alpha / rank"
        )
    larger = max(both, key=lambda one: one.rank)
    return found[0], larger.rank, larger.alpha


def _of_adapter(layer: Any, name: str) -> LowRankLayer:
    while layer.adapter_name != name:
        layer = layer.base
    return layer


# ===== parameters, above all stacked experts =====


def _expert_paths(path: str, module: nn.Module, adapted: Iterable[str]) -> dict[str, str]:
    """Where the pairs of a module's parameters stand in the file, by the parameter's name."""
    names = [name for name, _ in module.named_parameters(recurse=False) if name in adapted]
    return {name: PREFIX + path + ".base_layer" * depth for depth, name in enumerate(reversed(names))}


def _expert_tensors(path: str, layer: LoRAExperts) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, place in _expert_paths(path, layer.innermost, layer.ranks).items():
        pair: Any = layer.pairs[name]
        tensors[place + ".lora_A.weight"] = pair.lora_A.flatten(0, 1)  # [experts * rank, in]
        tensors[place + ".lora_B.weight"] = pair.lora_B.permute(1, 2, 0).flatten(1)  # [out, rank * experts]
    return tensors


def _fill_experts(path: str, layer: LoRAExperts, tensors: dict[str, Tensor]) -> None:
    for name, place in _expert_paths(path, layer.innermost, layer.ranks).items():
        pair: Any = layer.pairs[name]
        experts, out, rank = pair.lora_B.shape
        pair.lora_A.copy_(tensors[place + ".lora_A.weight"].view(pair.lora_A.shape))
        pair.lora_B.copy_(tensors[place + ".lora_B.weight"].view(out, rank, experts).permute(2, 0, 1))


def _named_parameters(model: nn.Module) -> dict[str, str]:
    """Every parameter that `attach` could find by target_parameters -> its module's name."""
    stacks = named_stacks(model, (LowRankLayer, TrainedPart))
    return {f"{path}.{name}": path for path, _, own in stacks if path for name in own}


# ===== adapters for parts of fused layers =====


Parts = dict[str, dict[str, tuple[int, float]]]  # name of a fused layer -> its adapted parts -> their rank and alpha


def _parts_of(layer: LowRankLayer | LoRAExperts) -> dict[str, tuple[int, float]]:
    if not isinstance(layer, FusedLinear):
        return {}
    return {part: (rank, layer.alphas[part]) for part, rank in layer.ranks.items()}


def _itself(path: str, layer: LowRankLayer | LoRAExperts, parts: Parts) -> dict[str, tuple[int, float]]:
    """What the metadata would say of a layer that is filled up to a rank, if it says such a thing of it."""
    last = path.rpartition(".")[2]
    filled = isinstance(layer, LowRankLayer) and parts.get(path, {}).keys() == {last}
    return {last: (layer.rank, layer.alpha)} if filled else {}


def _split_parts(model: nn.Module, name: str) -> Parts:
    """The layers of an adapter that `attach` would split as they are, and those that are filled up to a rank."""
    found: Parts = {}
    for path, layer in adapter_layers(model, name):
        if isinstance(layer, FusedLinear):
            try:
                known = part_sizes(model, path) == layer.sizes
            except ValueError:
                known = False  # put there by hand; a plain adapter of the same values is what a file can say
            if known:
                found[path] = _parts_of(layer)
        elif isinstance(layer, LowRankLayer) and _settings_of(model, path, layer)[1] != layer.rank:
            found[path] = {path.rpartition(".")[2]: (layer.rank, layer.alpha)}
    return found


def _with_metadata(data: bytes, key: str, value: str) -> bytes:
    """A safetensors file with one more text in its metadata. Its own writer would put them in a random order."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"][key] = value
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _read_parts(path: Path) -> Parts:
    text = TensorFile(path).metadata.get(PARTS, "{}")
    try:
        parts = parse_json(text.encode())
    except ValueError as error:
        raise ValueError(f"{path}: its metadata {PARTS} is no JSON: {error}") from error
    sound = all(
        isinstance(of, dict)
        and (of.keys() <= part_paths(name).keys() or of.keys() == {name.rpartition(".")[2]})
        and all(isinstance(v, list) and len(v) == 2 and _is_whole(v[0]) and _is_number(v[1]) for v in of.values())
        for name, of in parts.items()
    )
    if not sound:
        raise ValueError(f"{path}: its metadata {PARTS} must give rank and alpha of parts of layers, got {text[:200]}")
    return {name: {part: (rank, alpha) for part, (rank, alpha) in of.items()} for name, of in parts.items()}


def _check_parts(
    model: nn.Module, config: LoRAConfig | None, name: str, tensors: dict[str, Tensor], directory: Path
) -> None:
    """Raises ValueError where a part of a pair is to be loaded, and the file's pair is more than this part."""
    ranks: dict[str, int] = {}
    parts: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
    if config is not None:
        targets = plan(model, config)[0]
        split = splits(model, config, targets)
        ranks = {path: _own_rank(model, config, path, split) for path in targets if _packed_attention(model, path)}
        parts = {path: (of.sizes, of.ranks) for path, of in split.items()}
    else:
        for path, layer in adapter_layers(model, name):
            if isinstance(layer, LowRankLayer) and _packed_attention(model, path):
                ranks[path] = layer.rank
            if isinstance(layer, FusedLinear):
                parts[path] = layer.sizes, layer.ranks
    for path, rank in ranks.items():
        A, B = (tensors[f"{_place(model, path)}.lora_{which}.weight"] for which in "AB")
        if A[rank:].any() or B[:, rank:].any():
            raise ValueError(f"{directory}: the adapter of {path} has a higher rank than {rank}, which it has here")
    for path, (sizes, of) in parts.items():
        B = tensors[_place(model, path) + ".lora_B.weight"]
        try:
            diagonal_blocks(B[:, : sum(of.values())], sizes, of)
        except ValueError as error:
            raise ValueError(f"{directory}: {path}: {error}; load it into a model without this adapter") from error


def _own_rank(model: nn.Module, config: LoRAConfig, path: str, split: Mapping[str, Split]) -> int:
    """The rank that `attach` would give to a layer."""
    if path in split:
        return sum(split[path].ranks.values())
    return layer_setting(model, config.rank_pattern, path, config.rank)


def _start_is_taken_off(layer: LowRankLayer | LoRAExperts) -> bool:
    """Whether the layer computes W + scaling * (B A - its start): a plain pair of twice the rank, for a reader."""
    return isinstance(layer, LowRankLinear) and layer.start_A is not None


def _doubled_rank(layer: LowRankLayer | LoRAExperts, rank: int) -> int:
    return 2 * rank if _start_is_taken_off(layer) else rank


def _doubled_alpha(layer: LowRankLayer | LoRAExperts, alpha: float) -> float:
    """What gives the layer's scaling with the rank in the file."""
    if not _start_is_taken_off(layer):
        return alpha
    return alpha * (math.sqrt(2) if layer.rslora else 2)


def _endings(kind: type[LowRankLayer]) -> tuple[str, str, str]:
    """What stands behind a module's name in the keys of A, B and the magnitude."""
    if issubclass(kind, LowRankEmbedding):
        return ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector"
    return ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


def _magnitude_shape(kind: type[LowRankLayer], shape_B: tuple[int, ...]) -> tuple[int, ...]:
    """[out], or [1, out, 1, ...] of a convolution."""
    return (1, shape_B[0], *shape_B[2:]) if issubclass(kind, LowRankConvolution) else (shape_B[0],)


def _differences(model: nn.Module, raw: dict[str, Any], parts: "Parts", name: str) -> list[str]:
    """Settings of the file that differ from those of the attached layers, each with the first layer it differs at.

    They are compared layer by layer, since patterns that are written differently can mean the same.
    """
    unlike: dict[str, str] = {}
    for path, layer, rank, alpha, own_path in _ranks_and_alphas(model, name):
        for key, there, here in (
            ("r", pattern_value(raw.get("rank_pattern") or {}, path, raw.get("r", DEFAULT_RANK)), rank),
            ("start", "plain", layer.init if _start_is_taken_off(layer) else "plain"),
            (
                "lora_alpha",
                pattern_value(raw.get("alpha_pattern") or {}, path, raw.get("lora_alpha", DEFAULT_ALPHA)),
                alpha,
            ),
            ("use_dora", bool(raw.get("use_dora")), isinstance(layer, DoRALayer)),
            ("use_rslora", bool(raw.get("use_rslora")), layer.rslora),
            ("parts", parts.get(own_path, _parts_of(layer)), _parts_of(layer) or _itself(own_path, layer, parts)),
        ):
            if there != here:
                unlike.setdefault(key, f"{key} of {path}: {there!r} in the file, {here!r} here")
    tokens, filed = owners(list(adapter_layers(model, name))), _tokens_of_file(model, raw)
    if {path: filed.get(path) for path in tokens} != tokens or (filed and not tokens):
        unlike["tokens"] = f"trainable_token_indices: {filed!r} in the file, {tokens!r} here"
    return list(unlike.values())


def _ranks_and_alphas(model: nn.Module, name: str) -> Iterator[tuple[str, LowRankLayer | LoRAExperts, int, float, str]]:
    """Each layer or parameter that an adapter adapts, by the name that the file has for it: layer, rank, alpha, and
    the layer's own name."""
    for path, layer in adapter_layers(model, name):
        if isinstance(layer, LoRAExperts):
            for parameter in layer.pairs:
                yield f"{path}.{parameter}", layer, layer.ranks[parameter], layer.alphas[parameter], path
        elif isinstance(layer, LowRankLayer):
            known_as, rank, alpha = _settings_of(model, path, layer)
            yield known_as, layer, rank, alpha, path


def adapter_config(model: nn.Module, name: str = "default") -> dict[str, Any]:
    """adapter_config.json for an attached adapter: the fields that readers need and those that differ from default."""
    layers = [(path, layer) for path, layer in adapter_layers(model, name) if isinstance(layer, LowRankLayer)]
    settings = [
        (path, _doubled_rank(layer, rank), _doubled_alpha(layer, alpha), layer)
        for path, layer, rank, alpha, _ in _ranks_and_alphas(model, name)
    ]
    parameters = [path for path, _, _, layer in settings if isinstance(layer, LoRAExperts)]
    saved = [path for path, layer in adapter_layers(model, name) if isinstance(layer, TrainedCopy)]
    ranks = Counter(rank for _, rank, _, _ in settings)
    alphas = Counter(alpha for _, _, alpha, _ in settings)
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    first = layers[0][1] if layers else None
    linear = [layer.innermost for _, layer in layers if isinstance(layer, LowRankLinear)]
    base_config = getattr(model, "config", None)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(base_config, "_name_or_path", None) or None,
        "task_type": _task_type(model),
        "r": rank,
        "lora_alpha": _integer_if_whole(alpha),
        "lora_dropout": first.dropout if first else 0.0,
        **_shortest_targets(model, sorted({_target(model, path) for path, _ in layers})),
        "use_dora": isinstance(first, DoRALayer),
        "use_rslora": settings[0][3].rslora,
        "rank_pattern": {re.escape(path): r for path, r, _, _ in settings if r != rank},
        "alpha_pattern": {re.escape(path): _integer_if_whole(a) for path, _, a, _ in settings if a != alpha},
        "modules_to_save": sorted(saved) or None,
        "bias": _bias(model, name),
        **({"ensure_weight_tying": True} if any(isinstance(layer, TiedHead) for _, layer in layers) else {}),
        **({"trainable_token_indices": tokens} if (tokens := _tokens(model, name)) else {}),
        # PEFT warns where this is not what the layers are; it has one value for all of them.
        "fan_in_fan_out": bool(linear) and isinstance(linear[0], transposed_kinds()),
        "inference_mode": True,
    }
    if parameters:
        config["target_parameters"] = _shortest_parameters(model, parameters)
    return config


def _target(model: nn.Module, path: str) -> str:
    """What a reader must target: the layer, or the attention that it is a projection of."""
    parent = path.rpartition(".")[0]
    return parent if isinstance(model.get_submodule(parent), OpenAttention) else path


def _bias(model: nn.Module, name: str) -> str:
    """Which biases an adapter trains, in LoRAConfig's words."""
    layers = [layer for _, layer in adapter_layers(model, name)]
    if any(isinstance(layer, TrainedBias) for layer in layers):
        return "all"
    only = any(isinstance(layer, LowRankLayer) and layer.trained_bias is not None for layer in layers)
    return "lora_only" if only else "none"


def _tokens(model: nn.Module, name: str) -> list[int] | dict[str, list[int]] | None:
    """trainable_token_indices of an adapter: a list for the input embedding alone."""
    tokens = owners(list(adapter_layers(model, name)))
    try:
        alone = input_embedding(model, dict(model.named_modules(remove_duplicate=False)))
    except ValueError:
        alone = ""
    return tokens[alone] if list(tokens) == [alone] else tokens or None


def _tokens_of_file(model: nn.Module, raw: dict[str, Any]) -> dict[str, list[int]]:
    """trainable_token_indices of a file by names that the model has, or that of the file where it has none."""
    tokens = raw.get("trainable_token_indices") or {}
    every = dict(model.named_modules(remove_duplicate=False))
    if isinstance(tokens, list):
        return {input_embedding(model, every): tokens}
    named = {path: value for key, value in tokens.items() for path in every if matches(path, [key])}
    return named if named else tokens


def _integer_if_whole(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else alpha  # PEFT declares lora_alpha an int


def _task_type(model: nn.Module) -> str | None:
    for ending, task in (
        ("ForCausalLM", "CAUSAL_LM"),
        ("LMHeadModel", "CAUSAL_LM"),
        ("ForSequenceClassification", "SEQ_CLS"),
        ("ForTokenClassification", "TOKEN_CLS"),
        ("ForQuestionAnswering", "QUESTION_ANS"),
        ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ):
        if type(model).__name__.endswith(ending):
            return task
    return None


def _shortest_targets(model: nn.Module, paths: list[str]) -> dict[str, Any]:
    """target_modules: last names if they mean just these modules, if need be with the numbers of their blocks, whole
    names otherwise; sorted, since PEFT's own order is a hash's."""
    last = sorted({path.rsplit(".", 1)[-1] for path in paths})
    inside = tuple(f"{path}." for path in [*paths, *(path for path, _ in adapter_layers(model))])
    meant = {name for name, _ in model.named_modules() if matches(name, last) and not name.startswith(inside)}
    if meant == set(paths):
        return {"target_modules": last}
    # PEFT takes a target that is a whole name at any index.
    if not meant & set(last) and (described := described_by_indices(paths, meant)) is not None:
        indices, pattern = described
        return {"target_modules": last, "layers_to_transform": indices, "layers_pattern": pattern}
    return {"target_modules": sorted(paths)}


def _shortest_parameters(model: nn.Module, paths: list[str]) -> list[str]:
    """Names of parameters with their module's last name if they mean just these, whole names otherwise; sorted."""
    last = sorted({".".join(path.rsplit(".", 2)[-2:]) for path in paths})
    meant = {name for name in _named_parameters(model) if matches(name, last)}
    return last if meant == set(paths) else sorted(paths)


def read_raw_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter as it stands, less the fields that are null; types are checked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not JSON, another kind of adapter, values of a wrong type or size.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no {CONFIG}; an adapter directory has {CONFIG} and {WEIGHTS}")
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


def _read_config(directory: Path) -> dict[str, Any]:
    raw, path = read_raw_config(directory), directory / CONFIG
    if (start := raw.get("init_lora_weights", True)) not in PLAIN_STARTS:
        raise ValueError(
            f"{path}: init_lora_weights={start!r} changed the base's weights too, which only peft repeats; convert the "
            f"adapter to a plain LoRA with peft (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    unknown = sorted(key for key, value in raw.items() if value and key not in NEUTRAL | READ)
    if unknown:
        raise ValueError(
            f"{path}: settings that this library does not support: " + ", ".join(f"{k}={raw[k]!r}" for k in unknown)
        )
    return raw


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _are_whole(value: Any) -> bool:
    return isinstance(value, list) and all(_is_whole(number) for number in value)


def _is_number(value: Any) -> bool:
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
    "r": _is_whole,
    "lora_alpha": _is_number,
    "lora_dropout": _is_number,
    "target_modules": lambda value: _is_expression(value) or _are_names(value),
    "exclude_modules": lambda value: _is_expression(value) or _are_names(value),
    "modules_to_save": _are_names,
    "target_parameters": _are_names,
    "bias": lambda value: value in BIASES,
    "trainable_token_indices": lambda value: (
        _are_whole(value) or (isinstance(value, dict) and all(_are_whole(tokens) for tokens in value.values()))
    ),
    "layers_to_transform": lambda value: _is_whole(value) or _are_whole(value),
    "layers_pattern": lambda value: all(_is_expression(v) for v in (value if isinstance(value, list) else [value])),
    "rank_pattern": lambda value: (
        isinstance(value, dict) and all(_is_expression(k) and _is_whole(v) for k, v in value.items())
    ),
    "alpha_pattern": lambda value: (
        isinstance(value, dict) and all(_is_expression(k) and _is_number(v) for k, v in value.items())
    ),
}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by key.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not whole.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}; {NO_PICKLE}")
    file = TensorFile(path)
    return {key: file.read(key) for key in file.entries}


def _lora_config(model: nn.Module, raw: dict[str, Any], tensors: dict[str, Tensor], parts: "Parts") -> LoRAConfig:
    """The configuration that attaches what the file holds: its own modules, by their whole names.

    PEFT passes over targets that match nothing, so target_modules alone does not say what was adapted.
    """
    endings = r"\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)$"
    adapted = sorted({re.sub(endings, "", key[len(PREFIX) :]) for key in tensors if re.search(endings, key)})
    candidates = dict(leaves(model, adaptable_kinds()))
    parameters = [n for n in _named_parameters(model) if matches(n, raw.get("target_parameters") or [])]
    owners = {name.rpartition(".")[0] for name in parameters}
    meant = set(adapted) | _meant(model, raw, candidates)
    known = sorted(path for path in meant if path in candidates and path not in owners)
    if not known and not parameters:
        raise ValueError(
            f"no key of the adapter names a layer of {type(model).__name__}; keys start like {sorted(tensors)[:2]}, "
            f"the model's layers like {list(candidates)[:2]}, and each key must start with {PREFIX!r}"
        )
    # A pair's dtype before that of biases or whole modules, which PEFT leaves in the base's.
    floating = [t.dtype for _, t in sorted(tensors.items(), key=lambda item: ".lora_" not in item[0]) if _floats(t)]
    biased = any(map(has_bias, model.modules() if raw.get("bias") == "all" else [candidates[path] for path in known]))
    attentions = {path for path in known if isinstance(candidates[path], nn.MultiheadAttention)}
    parts = {path: of for path, of in parts.items() if path in known or path.rpartition(".")[0] in attentions}
    named = {part_paths(path).get(part, path): values for path, of in parts.items() for part, values in of.items()}
    split = [path for path, of in parts.items() if of.keys() <= part_paths(path).keys()]
    targets = [p for p in known if p not in split]
    targets += [part_paths(path)[part] for path in split if path in known for part in parts[path]]
    return LoRAConfig(
        rank=raw.get("r", DEFAULT_RANK),
        alpha=raw.get("lora_alpha", DEFAULT_ALPHA),
        target_modules="|".join(re.escape(path) for path in targets),
        target_parameters=parameters,
        fused_targets="split" if split else "raise",
        dropout=raw.get("lora_dropout") or 0.0,
        dora=bool(raw.get("use_dora")),
        rslora=bool(raw.get("use_rslora")),
        rank_pattern={re.escape(path): rank for path, (rank, _) in named.items()}
        | {k: v for k, v in (raw.get("rank_pattern") or {}).items() if _ends_some(k, [*known, *parameters])},
        alpha_pattern={re.escape(path): alpha for path, (_, alpha) in named.items()}
        | {k: v for k, v in (raw.get("alpha_pattern") or {}).items() if _ends_some(k, [*known, *parameters])},
        # For some tasks PEFT writes the names that a head can have, of which the model has one.
        modules_to_save=[
            entry
            for entry in raw.get("modules_to_save") or []
            if any(matches(path, [entry]) for path, _ in model.named_modules(remove_duplicate=False))
        ],
        bias=raw.get("bias", "none") if biased else "none",
        trainable_token_indices=raw.get("trainable_token_indices") or None,
        # PEFT passes over the flag where nothing that it adapts is tied.
        ensure_weight_tying=bool(raw.get("ensure_weight_tying")) and bool(_tied_here(model, known)),
        adapter_dtype=floating[0] if floating else None,
    )


def _tied_here(model: nn.Module, paths: list[str]) -> list[str]:
    """Which of these layers are tied to another of them."""
    return [path for places in tied_tables(model).values() for path in places if places.keys() <= set(paths)]


def _floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _ends_some(pattern: str, paths: list[str]) -> bool:
    return any(re.fullmatch(ends_with(pattern), path) for path in paths)


def _meant(model: nn.Module, raw: dict[str, Any], candidates: dict[str, nn.Module]) -> set[str]:
    """The layers of the model that the file's target_modules names, so that a key missing from the file is seen."""
    targets, excluded = raw.get("target_modules") or [], raw.get("exclude_modules") or []
    if targets == ALL_LINEAR:
        heads = output_heads(model)
        meant = {p for p, m in candidates.items() if m not in heads and isinstance(m, linear_kinds())}
    else:
        meant = {path for path in candidates if matches(path, targets)}
    if (wanted := _indices(raw)) is not None:
        patterns = as_patterns(raw.get("layers_pattern"))
        meant = {path for path in meant if layer_index(path, patterns) in wanted}
    return {path for path in meant if not matches(path, excluded)}


def _indices(raw: dict[str, Any]) -> list[int] | None:
    """layers_to_transform as a list; None, as for an empty one, for all."""
    indices = raw.get("layers_to_transform")
    return [indices] if isinstance(indices, int) else indices or None


def _expected_tensors(model: nn.Module, config: LoRAConfig) -> dict[str, Tensor]:
    """Keys of the adapter that config would attach, with tensors of the right shapes and kinds (on the meta device)."""
    targets, saved = plan(model, config)
    split = splits(model, config, targets)
    stacks = plan_parameters(model, config, targets, saved)
    beside = parts_beside(model, config, "", targets, saved, stacks)
    dtype = config.adapter_dtype or torch.get_default_dtype()
    tensors: dict[str, Tensor] = {}
    owner = owners_of_tied(model, targets) if config.ensure_weight_tying else {}
    seen: set[nn.Module] = set()
    for path, module in (targets | saved).items():
        if module in seen:  # a module that stands in two places is stored for the first
            continue
        seen.add(module)
        if path in saved:
            tensors |= {f"{PREFIX}{path}.{key}": t.to("meta") for key, t in module.state_dict().items()}
            continue
        kind = layer_class(module, config.dora)
        key_A, key_B, magnitude = _endings(kind)
        rank = _own_rank(model, config, owner.get(path, path), split)
        if found := _packed_attention(model, path):
            rank = max(_own_rank(model, config, f"{found[0]}.{which}", split) for which in ("in_proj", "out_proj"))
        shape_A, shape_B = kind.pair_shapes(module, rank)
        shapes = {key_A: shape_A, key_B: shape_B}
        if config.dora:
            shapes[magnitude] = _magnitude_shape(kind, shape_B)
        if config.bias != "none" and has_bias(module):
            shapes[BIAS] = tuple(module.bias.shape)  # type: ignore[arg-type]
        for ending, shape in shapes.items():
            tensors[_place(model, path) + ending] = torch.empty(shape, dtype=dtype, device="meta")
    for path, (module, ranks, _) in stacks.items():
        if module not in seen:
            seen.add(module)
            inner: Any = module.innermost if isinstance(module, LoRAExperts) else module
            for name, place in _expert_paths(path, inner, ranks).items():
                transposed = getattr(inner, "is_transposed", False)
                experts, out, width = stacked_shape(inner.get_parameter(name), transposed)
                rank = ranks[name]
                tensors[place + ".lora_A.weight"] = torch.empty(experts * rank, width, dtype=dtype, device="meta")
                tensors[place + ".lora_B.weight"] = torch.empty(out, rank * experts, dtype=dtype, device="meta")
    for path, part in beside.items():
        if part not in seen:
            seen.add(part)
            tensors |= {key: tensor.to("meta") for key, tensor in _part_tensors(path, part).items()}
    return tensors


def _drop_tables(model: nn.Module, tensors: dict[str, Tensor], directory: Path) -> None:
    """Takes out what PEFT saves beside an adapter: tables of embeddings, which are the base's, and with bias="all"
    the biases of modules that are saved whole once more.

    Raises:
        ValueError: a table that is not the model's.
    """
    for key in [key for key in tensors if key.endswith((".original_module.bias", ".modules_to_save.bias"))]:
        if key.replace(".original_module", "").replace(".modules_to_save", "") in tensors:
            del tensors[key]
    ending = ".base_layer.weight"
    for key in [key for key in tensors if key.startswith(PREFIX) and key.endswith(ending)]:
        path = key[len(PREFIX) : -len(ending)]
        module: Any = dict(model.named_modules(remove_duplicate=False)).get(path)
        if isinstance(module, LowRankLayer):
            module = module.innermost
        if isinstance(module, nn.Embedding | nn.Linear):
            here: Tensor = module.weight
            if here.shape != tensors[key].shape or not torch.equal(tensors[key].to(here), here):
                raise ValueError(
                    f"{directory}: {key} is another table than the model's embedding {path}: the adapter was trained "
                    f"over another base. Load that base model, or put this table into the model first"
                )
            del tensors[key]


def _check_tied(
    model: nn.Module, config: LoRAConfig | None, name: str, tensors: dict[str, Tensor], directory: Path
) -> None:
    """Raises ValueError where one pair is to be loaded for an embedding and its head, and the file has two."""
    if config is None:
        heads = {path: layer for path, layer in adapter_layers(model, name) if isinstance(layer, TiedHead)}
        places = {
            path: other
            for path, head in heads.items()
            for other, layer in adapter_layers(model, name)
            if isinstance(layer, LowRankEmbedding) and layer.lora_A is head.embedding_A
        }
    else:
        targets = plan(model, config)[0]
        tied = owners_of_tied(model, targets) if config.ensure_weight_tying else {}
        places = {path: first for path, first in tied.items() if not LowRankEmbedding.fits(targets[path])}
    for path, first in places.items():
        head = [tensors[f"{PREFIX}{path}.lora_{part}.weight"] for part in "AB"]
        embedding = [tensors[f"{PREFIX}{first}.lora_embedding_{part}"] for part in "BA"]
        if not all(torch.equal(one, other.t().to(one.dtype)) for one, other in zip(head, embedding, strict=True)):
            raise ValueError(
                f"{directory}: ensure_weight_tying means one pair for {first} and {path}, and the file has two that "
                f"differ; load it into a model without this adapter, with ensure_weight_tying false in {CONFIG}"
            )


def _check_keys(expected: dict[str, Tensor], tensors: dict[str, Tensor], directory: Path) -> None:
    both = [(key, tensors[key], expected[key]) for key in sorted(expected.keys() & tensors.keys())]
    problems = [
        _listed("missing keys", sorted(expected.keys() - tensors.keys())),
        _listed("unexpected keys", sorted(tensors.keys() - expected.keys())),
        _listed(
            "shapes that do not fit",
            [
                f"{key}: {list(there.shape)} in the file, {list(here.shape)} in the model"
                for key, there, here in both
                if there.shape != here.shape
            ],
        ),
        _listed(
            "dtypes that do not fit",
            [
                f"{key}: {there.dtype} in the file, {here.dtype} in the model"
                for key, there, here in both
                if there.is_floating_point() != here.is_floating_point()
            ],
        ),
    ]
    if any(problems):
        raise ValueError(
            f"{directory} does not fit the model, which is unchanged: " + "; ".join(filter(None, problems))
        )


def _listed(what: str, names: list[str], most: int = 10) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what}: {', '.join(names[:most])}{more}"
