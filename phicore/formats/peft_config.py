"""adapter_config.json from a model's adapter, and the LoRAConfig that attaches what a file holds."""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from phicore.adapters.attention import OpenAttention, projections
from phicore.adapters.base import transposed_kinds
from phicore.adapters.config import LoRAConfig, pattern_value
from phicore.adapters.dora import DoRALayer
from phicore.adapters.experts import DoRAExperts, LoRAExperts
from phicore.adapters.fused import part_paths
from phicore.adapters.layer_index import as_patterns, described_by_indices, layer_index
from phicore.adapters.layers import adaptable_kinds, adapter_layers, linear_kinds
from phicore.adapters.lora import LowRankLayer, LowRankLinear
from phicore.adapters.tied import shared_pair, tied_tables
from phicore.adapters.token_rows import input_embedding, owners
from phicore.adapters.trained import TrainedBias, TrainedCopy, has_bias
from phicore.formats.peft_advice import advice
from phicore.formats.peft_fields import CONFIG, DEFAULT_ALPHA, DEFAULT_RANK
from phicore.formats.peft_keys import (
    PREFIX,
    adaptable_parameters,
    doubled_alpha,
    doubled_rank,
    ranks_and_alphas,
    start_is_taken_off,
)
from phicore.formats.peft_parts import Parts, filled_up, parts_of
from phicore.modules import ALL_LINEAR, ends_with, leaves, matches, output_heads

# End of a model's class -> PEFT's task, and the ends of names of the modules that PEFT then adds to modules_to_save
# (peft_model.py of peft 0.21.2).
HEADS = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}


def adapter_config(model: nn.Module, name: str = "default") -> dict[str, Any]:
    """adapter_config.json for an attached adapter: the fields that readers need and those that differ from default.

    Raises:
        ValueError: layers put in place by hand, some with DoRA or rsLoRA and some without.
    """
    layers = [(path, layer) for path, layer in adapter_layers(model, name) if isinstance(layer, LowRankLayer)]
    settings = [
        (path, doubled_rank(layer, rank), doubled_alpha(layer, alpha), layer)
        for path, layer, rank, alpha, _ in ranks_and_alphas(model, name)
    ]
    parameters = [path for path, _, _, layer in settings if isinstance(layer, LoRAExperts)]
    saved = [path for path, layer in adapter_layers(model, name) if isinstance(layer, TrainedCopy)]
    ranks = Counter(rank for _, rank, _, _ in settings)
    alphas = Counter(alpha for _, _, alpha, _ in settings)
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    endings = _endings(path for path, _, _, _ in settings)
    first = layers[0][1] if layers else None
    use_dora, use_rslora = (
        _of_all(name, what, {path: value(layer) for path, _, _, layer in settings})
        for what, value in (("DoRA", _has_dora), ("rsLoRA", lambda layer: layer.rslora))
    )
    linear = [layer.innermost for _, layer in layers if isinstance(layer, LowRankLinear)]
    base_config = getattr(model, "config", None)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(base_config, "_name_or_path", None) or None,
        "task_type": _task_type(model, saved),
        "r": rank,
        "lora_alpha": _integer_if_whole(alpha),
        "lora_dropout": first.dropout if first else 0.0,
        **_shortest_targets(model, sorted({_target(model, path) for path, _ in layers})),
        "use_dora": use_dora,
        "use_rslora": use_rslora,
        "rank_pattern": {_pattern(path, endings): r for path, r, _, _ in settings if r != rank},
        "alpha_pattern": {_pattern(path, endings): _integer_if_whole(a) for path, _, a, _ in settings if a != alpha},
        "modules_to_save": sorted(saved) or None,
        "bias": _bias(model, name),
        **({"ensure_weight_tying": True} if _ties(model, name) else {}),
        **({"trainable_token_indices": tokens} if (tokens := _tokens(model, name)) else {}),
        # PEFT warns where this is not what the layers are; it has one value for all of them.
        "fan_in_fan_out": bool(linear) and isinstance(linear[0], transposed_kinds()),
        "inference_mode": True,
    }
    if parameters:
        config["target_parameters"] = _shortest_parameters(model, parameters)
    return config


def _has_dora(layer: Any) -> bool:
    return isinstance(layer, DoRALayer | DoRAExperts)


def _of_all(name: str, what: str, values: dict[str, bool]) -> bool:
    """What is so of each layer, by its name, of an adapter."""
    if len(set(values.values())) > 1:
        one, other = (next(path for path, value in values.items() if value is which) for which in (True, False))
        raise ValueError(
            f'{one} of the adapter "{name}" has {what} and {other} has not, and PEFT\'s format says it once for all '
            f"layers of an adapter; give them names of their own (their adapter_name), and save each adapter"
        )
    return next(iter(values.values()))


def _ties(model: nn.Module, name: str) -> bool:
    """Whether layers of an adapter have one pair, or one trained weight, together."""
    layers = [layer for _, layer in adapter_layers(model, name)]
    shared = [id(pair) for layer in layers if (pair := shared_pair(layer)) is not None]
    shared += [
        id(weight) for layer in layers if isinstance(layer, TrainedCopy) for weight in layer.trained.parameters()
    ]
    return len(set(shared)) < len(shared)


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
    """trainable_token_indices of an adapter: a list for the input embedding alone, if the model says which that is."""
    tokens = owners(list(adapter_layers(model, name)))
    if not tokens or not hasattr(model, "get_input_embeddings"):  # for PEFT a list then means "embed_tokens"
        return tokens or None
    try:
        alone = input_embedding(model, dict(model.named_modules(remove_duplicate=False)))
    except ValueError:
        alone = ""
    return tokens[alone] if list(tokens) == [alone] else tokens


def _integer_if_whole(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else alpha  # PEFT declares lora_alpha an int


def _task_type(model: nn.Module, saved: Collection[str]) -> str | None:
    """PEFT's task_type, where the class that PEFT takes for it reads this adapter and calls this model rightly.

    For classification PEFT adds heads to modules_to_save, and then expects them in the file. It passes the input on as
    input_ids.
    """
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    kind = type(model).__name__
    for ending, (task, heads) in HEADS.items():
        if kind.endswith(ending):
            added = {path for path, _ in model.named_modules(remove_duplicate=False) if path.endswith(heads)}
            return task if added and added <= set(saved) else None
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if not kind.endswith("ForConditionalGeneration"):
        return None
    # those that read images beside a text have a decoder alone
    return "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else "CAUSAL_LM"


def _endings(names: Iterable[str]) -> set[str]:
    """What stands behind a dot in one of these names: a target or pattern that says so means this one too."""
    return {name[dot.end() :] for name in names for dot in re.finditer(r"\.", name)}


def _pattern(path: str, endings: Collection[str]) -> str:
    """The key of rank_pattern or alpha_pattern that means this name and none that ends in it."""
    return f"{'^' if path in endings else ''}{re.escape(path)}"


def _shortest_targets(model: nn.Module, paths: list[str]) -> dict[str, Any]:
    """target_modules: last names if they mean just these modules, if need be with the numbers of their blocks, whole
    names otherwise; sorted, since PEFT's own order is a hash's. Where one is the end of another module's name, a
    regular expression."""
    last = sorted({path.rsplit(".", 1)[-1] for path in paths})
    inside = tuple(f"{path}." for path in [*paths, *(path for path, _ in adapter_layers(model))])
    outside = [name for name, _ in model.named_modules() if not name.startswith(inside)]
    meant = {name for name in outside if matches(name, last)}
    if meant == set(paths):
        return {"target_modules": last}
    # PEFT takes a target that is a whole name at any index.
    if not meant & set(last) and (described := described_by_indices(paths, meant)) is not None:
        indices, pattern = described
        return {"target_modules": last, "layers_to_transform": indices, "layers_pattern": pattern}
    if _endings({*outside} - {*paths}) & {*paths}:
        return {"target_modules": "|".join(map(re.escape, paths))}
    return {"target_modules": paths}


def _shortest_parameters(model: nn.Module, paths: list[str]) -> list[str]:
    """Names of parameters with their module's last name if they mean just these, whole names otherwise; sorted."""
    last = sorted({".".join(path.rsplit(".", 2)[-2:]) for path in paths})
    meant = {name for name in adaptable_parameters(model) if matches(name, last)}
    return last if meant == set(paths) else sorted(paths)


# ===== from a file to a model =====


def lora_config(model: nn.Module, raw: dict[str, Any], tensors: dict[str, Tensor], parts: Parts) -> LoRAConfig:
    """The configuration that attaches what the file holds: its own modules, by their whole names.

    PEFT passes over targets that match nothing, so target_modules alone does not say what was adapted.
    """
    endings = r"\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)$"
    adapted = sorted({re.sub(endings, "", key[len(PREFIX) :]) for key in tensors if re.search(endings, key)})
    candidates = dict(leaves(model, adaptable_kinds()))
    parameters = [n for n in adaptable_parameters(model) if matches(n, raw.get("target_parameters") or [])]
    owners = {name.rpartition(".")[0] for name in parameters}
    meant = set(adapted) | _meant(model, raw, candidates)
    known = sorted(path for path in meant if path in candidates and path not in owners)
    if not known and not parameters:
        raise ValueError(
            f"no key of the adapter names a layer of {type(model).__name__}; keys start like {sorted(tensors)[:2]}, "
            f"the model's layers like {list(candidates)[:2]}, and each key must start with {PREFIX!r}"
            f"{advice(model, raw, tensors)}"
        )
    # Of the pairs, since PEFT leaves biases and whole modules in the base's dtype; the widest if they have several, and
    # as in PEFT float32 if that has 8 bits.
    floating = {t.dtype for key, t in tensors.items() if ".lora_" in key and t.is_floating_point()}
    widest = {dtype for dtype in floating if dtype.itemsize == max(other.itemsize for other in floating)}
    attentions = {path for path in known if isinstance(candidates[path], nn.MultiheadAttention)}
    layers = [cast(Any, candidates[path]).out_proj if path in attentions else candidates[path] for path in known]
    biased = any(map(has_bias, model.modules() if raw.get("bias") == "all" else layers))
    inside = [f"{path}.{name}" for path in attentions for name in projections(candidates[path])]  # type: ignore[arg-type]
    together = [path for group in tied_copies(model, raw, tensors) for path in group]
    saved = _saved(model, [*(raw.get("modules_to_save") or []), *together], tensors)
    patterned = [path for path in (*known, *inside, *parameters) if not matches(path, saved)]
    parts = {path: of for path, of in parts.items() if path in known or path.rpartition(".")[0] in attentions}
    named = {part_paths(path).get(part, path): values for path, of in parts.items() for part, values in of.items()}
    ends = _endings([*patterned, *named])
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
        rank_pattern={_pattern(path, ends): rank for path, (rank, _) in named.items()}
        | {k: v for k, v in (raw.get("rank_pattern") or {}).items() if _ends_some(k, patterned)},
        alpha_pattern={_pattern(path, ends): alpha for path, (_, alpha) in named.items()}
        | {k: v for k, v in (raw.get("alpha_pattern") or {}).items() if _ends_some(k, patterned)},
        modules_to_save=saved,
        bias=raw.get("bias", "none") if biased else "none",
        trainable_token_indices=raw.get("trainable_token_indices") or None,
        # PEFT passes over the flag where nothing that it adapts is tied.
        ensure_weight_tying=bool(raw.get("ensure_weight_tying")) and bool(_tied_here(model, known)),
        adapter_dtype=dtype if len(widest) == 1 and (dtype := widest.pop()).itemsize > 1 else torch.float32,
    )


def _saved(model: nn.Module, entries: list[str], tensors: dict[str, Tensor]) -> list[str]:
    """What modules_to_save of a file means here. PEFT takes an entry for the end of any name, so that "norm" means
    input_layernorm too; and for some tasks it writes the names that a head can have, of which the model has one."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    here = [entry for entry in entries if any(matches(path, [entry]) for path in paths)]
    longer = [path for path in paths if path.endswith(tuple(entries)) and not matches(path, here)]
    for path in longer:
        keys = [key for key in tensors if key.startswith(f"{PREFIX}{path}.")]
        if keys and not any(".lora_" in key for key in keys):
            here.append(path)
    return here


def tied_copies(model: nn.Module, raw: dict[str, Any], tensors: dict[str, Tensor]) -> list[list[str]]:
    """Names of tied modules, each with the others of its table, that a file holds copies of: with ensure_weight_tying,
    PEFT trains what is tied to an entry of modules_to_save as one copy with it, and writes it under each name.

    Raises:
        ValueError: copies that are not the same.
    """
    entries = (raw.get("ensure_weight_tying") and raw.get("modules_to_save")) or []
    found = []
    for places in tied_tables(model).values():
        group = [path for path in places if f"{PREFIX}{path}.weight" in tensors]
        if len(group) < 2 or not any(matches(path, entries) for path in places):
            continue
        first, *others = (tensors[f"{PREFIX}{path}.weight"] for path in group)
        if not all(first.dtype == other.dtype and torch.equal(first, other) for other in others):
            raise ValueError(
                f"ensure_weight_tying means one weight for {', '.join(group)}, and the file has several that differ; "
                f"to load each as it is, name all in modules_to_save and set ensure_weight_tying to false in {CONFIG}"
            )
        found.append(group)
    return found


def _tied_here(model: nn.Module, paths: list[str]) -> list[str]:
    """Which of these layers are tied to another of them."""
    return [path for places in tied_tables(model).values() for path in places if places.keys() <= set(paths)]


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


def differences(model: nn.Module, raw: dict[str, Any], parts: Parts, name: str) -> list[str]:
    """Settings of the file that differ from those of the attached layers, each with the first layer it differs at.

    They are compared layer by layer, since patterns that are written differently can mean the same.
    """
    unlike: dict[str, str] = {}
    for path, layer, rank, alpha, own_path in ranks_and_alphas(model, name):
        for key, there, here in (
            ("r", pattern_value(raw.get("rank_pattern") or {}, path, raw.get("r", DEFAULT_RANK)), rank),
            ("start", "plain", layer.init if start_is_taken_off(layer) else "plain"),
            (
                "lora_alpha",
                pattern_value(raw.get("alpha_pattern") or {}, path, raw.get("lora_alpha", DEFAULT_ALPHA)),
                alpha,
            ),
            ("use_dora", bool(raw.get("use_dora")), _has_dora(layer)),
            ("use_rslora", bool(raw.get("use_rslora")), layer.rslora),
            ("parts", parts.get(own_path, parts_of(layer)), parts_of(layer) or filled_up(own_path, layer, parts)),
        ):
            if there != here:
                unlike.setdefault(key, f"{key} of {path}: {there!r} in the file, {here!r} here")
    tokens, filed = owners(list(adapter_layers(model, name))), _tokens_of_file(model, raw)
    if {path: filed.get(path) for path in tokens} != tokens or (filed and not tokens):
        unlike["tokens"] = f"trainable_token_indices: {filed!r} in the file, {tokens!r} here"
    return list(unlike.values())


def _tokens_of_file(model: nn.Module, raw: dict[str, Any]) -> dict[str, list[int]]:
    """trainable_token_indices of a file by names that the model has, or that of the file where it has none."""
    tokens = raw.get("trainable_token_indices") or {}
    every = dict(model.named_modules(remove_duplicate=False))
    if isinstance(tokens, list):
        return {input_embedding(model, every): tokens}
    named = {path: value for key, value in tokens.items() for path in every if matches(path, [key])}
    return named if named else tokens
