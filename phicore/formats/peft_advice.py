"""What to do about keys of a file that fit no place in a model, where PEFT is known to have written them so."""

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from phicore.formats.peft_fields import CONFIG, WEIGHTS
from phicore.formats.peft_keys import PREFIX
from phicore.modules import output_heads


def advice(
    model: nn.Module,
    raw: dict[str, Any],
    unexpected: Iterable[str],
    missing: Collection[str] = frozenset(),
    misshapen: Iterable[str] = (),
) -> str:
    """What to put behind the error: clauses that start with "; ", or nothing.

    Args:
        model: the model, with or without the adapter.
        raw: adapter_config.json.
        unexpected: keys of the file that the model has no place for.
        missing: keys that the model has a place for and the file has not.
        misshapen: keys whose tensors have another shape than in the model.
    """
    keys = sorted(unexpected)
    found = []
    if extra := _put_in(keys, missing):
        found.append(
            f'without "{extra}" the unexpected keys are the missing ones: take it out of the keys of {WEIGHTS}'
        )
    elif extra := _put_in(sorted(missing), set(keys)):
        found.append(
            f'with "{extra}" put in the unexpected keys are the missing ones: put it into the keys of {WEIGHTS}'
        )
    if copies := [key[len(PREFIX) :].rpartition(".")[0] for key in keys if _is_copy(raw, key)]:
        found.append(
            f"with ensure_weight_tying PEFT trains {', '.join(copies)} together with what modules_to_save names; here "
            f"each is a copy of its own: in {CONFIG}, add {', '.join(copies)} to modules_to_save and set "
            f"ensure_weight_tying to false"
        )
    elif tables := [key for key in keys if _is_table(model, raw, key)]:
        found.append(
            f"{', '.join(tables)}: PEFT writes these beside an adapter of a model whose vocabulary was resized, and "
            f"they are not the tables of this model: load the base that the adapter was trained on, or resize the "
            f"vocabulary and put them into the model first"
        )
    if any(re.search(r"\.experts\.\d+\.", key) for key in keys) and not _numbered_experts(model):
        found.append(
            "the file has an adapter for each expert, as before transformers 5, which stacks them: load it once with "
            "peft on the present transformers (PeftModel.from_pretrained), save it again (save_pretrained), and load "
            "that"
        )
    if dead := sorted({path for key in keys if (path := within_attention(model, key))}):
        found.append(
            f"{', '.join(dead)} stands in an nn.MultiheadAttention, which reads its weight past it, so that the pair "
            f"has no effect in PEFT either: delete its keys from {WEIGHTS}"
        )
    if raw.get("ensure_weight_tying") and any(key.endswith(".lora_magnitude_vector") for key in misshapen):
        found.append(
            f"with ensure_weight_tying PEFT has a magnitude for each dimension of the embedding and one for each token "
            f"of the head, which is no adapter of one table: set ensure_weight_tying to false in {CONFIG}, and load it "
            f"into a model without this adapter; the two are then adapted apart"
        )
    return "".join(f"; {one}" for one in found)


def _put_in(longer: list[str], shorter: Collection[str]) -> str | None:
    """What all the longer keys have and the shorter ones have not: a wrapper's name (torch.compile's _orig_mod), an
    adapter's, a prefix for the second time."""
    known = set(shorter)
    for short in sorted(known) if longer else []:
        parts, fewer = longer[0].split("."), short.split(".")
        start = next((i for i, (a, b) in enumerate(zip(parts, fewer, strict=False)) if a != b), len(fewer))
        extra = ".".join([*parts[start : start + len(parts) - len(fewer)], ""])
        if all({key.replace(extra, "", 1), key.replace(extra, "")} & known for key in longer):
            return extra
    return None


def _is_copy(raw: dict[str, Any], key: str) -> bool:
    tied = raw.get("ensure_weight_tying") and raw.get("modules_to_save")
    return bool(tied) and key.startswith(PREFIX) and key.endswith(".weight") and ".lora_" not in key


def _is_table(model: nn.Module, raw: dict[str, Any], key: str) -> bool:
    """Whether a key is of an embedding, or of the output head, that the adapter has no part of."""
    path = key.removeprefix(PREFIX).removesuffix(".weight")
    module = dict(model.named_modules(remove_duplicate=False)).get(path)
    is_one = isinstance(module, nn.Embedding) or module in output_heads(model)
    return is_one and key == f"{PREFIX}{path}.weight" and not path.endswith(tuple(raw.get("modules_to_save") or ()))


def _numbered_experts(model: nn.Module) -> bool:
    return any(re.search(r"\.experts\.\d+$", path) for path, _ in model.named_modules())


def within_attention(model: nn.Module, key: str) -> str | None:
    """The name of a layer in an nn.MultiheadAttention whose adapter a key is of."""
    found = re.fullmatch(re.escape(PREFIX) + r"((.+)\.out_proj)\.lora_(?:[AB]\.weight|magnitude_vector)", key)
    if found is None or found[2] not in dict(model.named_modules()):
        return None
    return found[1] if isinstance(model.get_submodule(found[2]), nn.MultiheadAttention) else None
