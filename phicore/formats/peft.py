"""The adapter format of PEFT, read and written: adapter_model.safetensors and adapter_config.json.

The keys and shapes of its tensors are in `peft_keys`, what stands in the file's metadata in `peft_parts`; the fields of
adapter_config.json are in `peft_fields`, and what they say of a model's adapter in `peft_config`.
"""

import json
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from phicore import atomic
from phicore.adapters.attach import STACKED, UNTIED, attach
from phicore.adapters.config import LoRAConfig
from phicore.adapters.experts import LoRAExperts
from phicore.adapters.layers import adapter_layers, merged_layers
from phicore.adapters.lora import LowRankLayer
from phicore.adapters.plan import plan
from phicore.adapters.switch import check_settled_by_none, refresh_norms
from phicore.adapters.tied import owners_of_tied, shared_pair
from phicore.adapters.trained import TrainedPart
from phicore.adapters.wrapped import check_not_flattened, check_not_sharded, check_not_wrapped
from phicore.formats.peft_advice import advice, within_attention
from phicore.formats.peft_config import adapter_config, differences, lora_config, tied_copies
from phicore.formats.peft_conversion import MODEL_TYPE, PAST, misread, normed_otherwise, padded_otherwise, read_past
from phicore.formats.peft_fields import CONFIG, WEIGHTS, read_config, read_raw_config, warn_of_order
from phicore.formats.peft_keys import (
    PREFIX,
    adapter_tensors,
    expected_tensors,
    fill_experts,
    fill_pair,
    is_added_twice,
    part_tensors,
    place_of,
)
from phicore.formats.peft_parts import PARTS, check_parts, read_parts, split_parts, with_metadata
from phicore.formats.safetensors_files import INDEX, NO_PICKLE, TensorFile
from phicore.formats.safetensors_files import WEIGHTS as MODEL
from phicore.modules import Model, listed, unwrapped

__all__ = [
    "CONFIG", "PREFIX", "WEIGHTS", "adapter_config", "adapter_tensors", "load_adapter", "read_raw_config",
    "read_tensors", "save_adapter",
]  # fmt: skip


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], name: str = "default") -> None:
    """Writes an adapter in PEFT's format.

    A reader, or a kill at any moment, finds the old adapter, the new one, or, where their adapter_config.json differ,
    weights without it, which PEFT and its kin refuse as no adapter: never one's weights with the other's settings.
    (But a reader that opens the one file before and the other after a save reads both adapters; let it wait.)

    Args:
        model: a model with the adapter attached and not merged. Of one that fully_shard has sharded all ranks must call
            this.
        directory: made if missing. Other files in it are left alone.
        name: which adapter.

    Raises:
        ValueError: the model has no such adapter, is merged, or holds the adapter without values (on meta), in parts
            that cannot be put together (FullyShardedDataParallel), or with NaN or infinity.

    Warns:
        UserWarning: layers that PEFT misreads on this type of model, or of a kind of which it computes something else;
            phicore reads them rightly. A directory that holds a model too.
    """
    check_not_flattened(model)
    with unwrapped(model) as bare:
        found = adapter_tensors(bare, name)
        if without := [key for key, tensor in found.items() if tensor.is_meta]:
            raise ValueError(
                f"{without[0]} is on meta, without values: it was never loaded, or accelerate has offloaded it; load "
                f"the model whole"
            )
        tensors = {key: _whole(tensor).contiguous().cpu() for key, tensor in found.items()}
        config, parts = adapter_config(bare, name), split_parts(bare, name)
        model_type = str(getattr(getattr(bare, "config", None), "model_type", ""))
        adapted = (path for path, layer in adapter_layers(bare, name) if isinstance(layer, LowRankLayer))
        lost = misread(model_type, adapted)
        padded, past = padded_otherwise(bare, tensors), read_past(bare, tensors)
    if spoilt := _not_finite(tensors):
        raise ValueError(f'nothing is written: the adapter "{name}" holds NaN or infinity, in {listed(spoilt)}')
    more = {PARTS: json.dumps(parts, sort_keys=True)} if parts else {}
    if lost:
        more[MODEL_TYPE] = model_type
    if past:
        more[PAST] = "\n".join(past)
    settings = Path(directory) / CONFIG
    with atomic.new_file(settings) as new_settings:  # and take their place after the weights
        new_settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        with atomic.new_file(Path(directory) / WEIGHTS) as temporary:
            save_file(_each_alone(tensors), temporary, metadata={"format": "pt"})  # bytes of it would be two copies
            for key, value in more.items():
                temporary.write_bytes(with_metadata(temporary.read_bytes(), key, value))
            with suppress(FileNotFoundError):  # there are none, or another rank has just removed them
                if settings.read_bytes() != new_settings.read_bytes():
                    atomic.fsync(temporary)  # a disk may say only here that it is full
                    settings.unlink()
                    atomic.fsync(directory)
    if any((Path(directory) / model_file).is_file() for model_file in (MODEL, INDEX)):
        warnings.warn(
            f"{directory} holds a model, too, which transformers will load with this adapter from now on; move the "
            f"adapter's files into a directory of their own",
            stacklevel=2,
        )
    if lost:
        warnings.warn(
            f"PEFT will misread this adapter: on {model_type} models it takes {listed(lost)} for experts, which "
            f"transformers stacks, and drops their pairs; phicore reads them. For other readers, merge the adapter",
            stacklevel=2,
        )
    _warn_of_layers(tensors, padded, past, stacklevel=3)


def _warn_of_layers(tensors: dict[str, Tensor], padded: list[str], past: list[str], stacklevel: int) -> None:
    """Warns of layers of which PEFT computes something else, in silence."""
    if layers := normed_otherwise(tensors):
        warnings.warn(
            f"in DoRA of convolutions with groups ({listed(layers)}) PEFT divides by another norm: what it computes of "
            f"this adapter is not what phicore does; use it where it was trained, or train these layers without DoRA",
            stacklevel=stacklevel,
        )
    if padded:
        warnings.warn(
            f"PEFT leaves the padding mode and the dilation of convolutions ({listed(padded)}) out of A's: what it "
            f"computes of this adapter is not what phicore does; use it where it was trained, or merge it",
            stacklevel=stacklevel,
        )
    if past:
        warnings.warn(
            f"in PEFT the pairs of {listed(past)} have no effect: the model's code reads these layers' weights, which "
            f"are the base's there; what it computes of this adapter is not what phicore does; use it where it was "
            f"trained, or merge it",
            stacklevel=stacklevel,
        )


def _whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def _each_alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with a copy of each tensor that shares memory with another, as a tied pair of rank 1 does."""
    seen: set[int] = set()
    alone: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        alone[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return alone


def load_adapter(model: Model, directory: str | os.PathLike[str], name: str = "default") -> Model:
    """Reads an adapter in PEFT's format into a model, in place; attaches it first if the model has none of this name.

    A, B and magnitude keep the dtype that they have in the file; if they have several, all get one that holds them.

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

    Warns:
        UserWarning: the order of the file's patterns decides a rank or an alpha, and PEFT does not keep it; layers of
            a kind of which PEFT computes something else.
    """
    if name not in {layer.adapter_name for _, layer in adapter_layers(model)}:
        check_not_wrapped(model)
    with unwrapped(model) as bare:
        _load(bare, Path(directory), name)
    return model


def _load(model: nn.Module, directory: Path, name: str) -> None:
    raw = read_config(directory)
    tensors = read_tensors(directory / WEIGHTS)
    parts = read_parts(directory / WEIGHTS)
    warn_of_order(directory, raw, {key[len(PREFIX) : key.index(".lora_")] for key in tensors if ".lora_" in key})
    present = name in {layer.adapter_name for _, layer in adapter_layers(model)}
    if any(merged_layers(model)):
        raise ValueError("the model's adapters are merged; unmerge it before loading one")
    check_settled_by_none(model)
    if present:
        check_not_sharded(model)
        expected = adapter_tensors(model, name)
        config, together = None, []
        unlike = differences(model, raw, parts, name)
        if unlike:
            raise ValueError(f'the adapter "{name}" of the model and {directory} differ: ' + "; ".join(unlike))
    else:
        try:
            config = lora_config(model, raw, tensors, parts)
            expected, together = expected_tensors(model, config), tied_copies(model, raw, tensors)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error
    _drop_untrained(model, expected, tensors)
    _drop_tables(model, expected, tensors, directory)
    _check_keys(model, raw, expected, tensors, directory)
    check_parts(model, config, name, tensors, directory)
    _check_tied(model, config, name, tensors, directory)
    _warn_of_layers(tensors, padded_otherwise(model, tensors), read_past(model, tensors), stacklevel=4)
    if config is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f".* {UNTIED}|{STACKED}")
            attach(model, config, name)
    with torch.no_grad():
        for path, layer in adapter_layers(model, name):
            if isinstance(layer, TrainedPart):
                for key, parameter in part_tensors(path, layer).items():
                    parameter.copy_(tensors[key])
            elif isinstance(layer, LoRAExperts):
                fill_experts(path, layer, tensors)
            else:
                fill_pair(place_of(model, path), layer, tensors)
                if is_added_twice(model, path, layer):
                    layer.lora_B.mul_(2)
    for first, *others in together:
        owner: Any = model.get_submodule(first)
        for path in others:
            copied: Any = model.get_submodule(path)
            copied.trained.weight = owner.trained.weight
    refresh_norms(model)  # of DoRA over the adapter that was loaded


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by key.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not whole, or holds NaN or infinity.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}; {NO_PICKLE}")
    file = TensorFile(path)
    tensors = {key: file.read(key) for key in file.entries}
    if spoilt := _not_finite(tensors):
        raise ValueError(f"{path} holds NaN or infinity, in {listed(spoilt)}: its run diverged, or it is damaged")
    return tensors


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """The keys of pairs that hold NaN or infinity, and of others that hold NaN: a module that is trained whole may have
    a mask of infinities."""
    floating = {key: t.float() if t.dtype.itemsize == 1 else t for key, t in tensors.items() if t.is_floating_point()}
    return [key for key, t in floating.items() if not (t.isfinite() if ".lora_" in key else ~t.isnan()).all()]


# ===== checks before a model is changed =====


def _drop_untrained(model: nn.Module, expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Takes out adapters of out_proj in an nn.MultiheadAttention, which reads its weight past them, if they are as
    PEFT's all-linear leaves them: without a gradient, B stays zero."""
    for path in {within_attention(model, key) for key in tensors.keys() - expected.keys()} - {None}:
        B = tensors.get(f"{PREFIX}{path}.lora_B.weight")
        if B is not None and not B.any():
            for key in [key for key in tensors if key.startswith(f"{PREFIX}{path}.lora_")]:
                del tensors[key]


def _drop_tables(model: nn.Module, expected: dict[str, Tensor], tensors: dict[str, Tensor], directory: Path) -> None:
    """Takes out what PEFT saves beside an adapter: tables of embeddings that are adapted or were resized, which are
    the base's, and with bias="all" the biases of modules that are saved whole once more.

    Raises:
        ValueError: a table that is not the model's.
    """
    for key in [key for key in tensors if key.endswith((".original_module.bias", ".modules_to_save.bias"))]:
        if key.replace(".original_module", "").replace(".modules_to_save", "") in tensors:
            del tensors[key]
    every = dict(model.named_modules(remove_duplicate=False))
    for key in [key for key in tensors if key.startswith(PREFIX) and key.endswith(".weight") and key not in expected]:
        path = key[len(PREFIX) : -len(".weight")].removesuffix(".base_layer")
        module: Any = every.get(path)
        if isinstance(module, LowRankLayer):
            module = module.innermost
        if isinstance(module, nn.Embedding | nn.Linear):
            here: Tensor = module.weight
            if here.shape == tensors[key].shape and torch.equal(tensors[key].to(here), here):
                del tensors[key]
            elif key.endswith(".base_layer.weight"):
                raise ValueError(
                    f"{directory}: {key} is another table than the model's embedding {path}: the adapter was trained "
                    f"over another base. Load that base model, or put this table into the model first"
                )


def _check_tied(
    model: nn.Module, config: LoRAConfig | None, name: str, tensors: dict[str, Tensor], directory: Path
) -> None:
    """Raises ValueError where one pair is to be loaded for tied layers, and the file has several."""
    tied: dict[str, str] = {}  # name of a layer -> of the first with the same pair
    if config is None:
        first: dict[nn.Parameter, str] = {}
        for path, layer in adapter_layers(model, name):
            if (pair := shared_pair(layer)) is not None:
                tied[path] = first.setdefault(pair, path)
    elif config.ensure_weight_tying:
        tied = owners_of_tied(model, plan(model, config)[0])
    for path, owner in tied.items():
        here, there = _table_pair(tensors, path), _table_pair(tensors, owner)
        if here and not all(torch.equal(one, other.to(one.dtype)) for one, other in zip(here, there, strict=True)):
            raise ValueError(
                f"{directory}: ensure_weight_tying means one pair for {owner} and {path}, and the file has two that "
                f"differ; load it into a model without this adapter, with ensure_weight_tying false in {CONFIG}"
            )


def _table_pair(tensors: dict[str, Tensor], path: str) -> list[Tensor]:
    """A [rank, num] and B [dim, rank] of an embedding or a tied head of a file, and the magnitude; none for a layer
    that is filed under another name."""
    keys = [f"{PREFIX}{path}.lora_embedding_{part}" for part in "AB"]
    head = [f"{PREFIX}{path}.lora_{part}.weight" for part in "BA"]
    pair = [tensors[key] for key in keys if key in tensors] or [tensors[key].t() for key in head if key in tensors]
    magnitude = f"{PREFIX}{path}.lora_magnitude_vector"
    return pair + ([tensors[magnitude].flatten()] if magnitude in tensors else [])


def _check_keys(
    model: nn.Module, raw: dict[str, Any], expected: dict[str, Tensor], tensors: dict[str, Tensor], directory: Path
) -> None:
    both = [(key, tensors[key], expected[key]) for key in sorted(expected.keys() & tensors.keys())]
    misshapen = {
        key: f"{key}: {list(there.shape)} in the file, {list(here.shape)} in the model"
        for key, there, here in both
        if there.shape != here.shape
    }
    problems = [
        _listed("missing keys", sorted(expected.keys() - tensors.keys())),
        _listed("unexpected keys", sorted(tensors.keys() - expected.keys())),
        _listed("shapes that do not fit", list(misshapen.values())),
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
            f"{directory} does not fit the model, which is unchanged: "
            + "; ".join(filter(None, problems))
            + advice(model, raw, tensors.keys() - expected.keys(), expected.keys() - tensors.keys(), misshapen)
        )


def _listed(what: str, names: list[str]) -> str:
    return f"{what}: {listed(names)}" if names else ""
