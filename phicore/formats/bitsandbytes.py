"""The 4-bit state of bitsandbytes: one NF4 weight as named tensors, and model directories that hold such weights.

A weight `w` is `w` uint8 [ceil(n / 2), 1], `w.absmax`, `w.quant_map` float32 [16], with double quantisation
`w.nested_absmax` and `w.nested_quant_map` float32 [256], and `w.quant_state.bitsandbytes__nf4`, a JSON text as uint8.
The directory's config.json says so in quantization_config, and transformers then loads it through bitsandbytes.
"""

import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phicore.adapters.base import transposed_kinds
from phicore.formats.safetensors_files import TensorFile, are_sizes, compare, model_tensors, parse_json, write_model
from phicore.modules import replace
from phicore.nf4.codebook import dynamic_map, levels
from phicore.nf4.codec import NESTED_BLOCK_SIZE
from phicore.nf4.linear import NF4Linear
from phicore.nf4.tensor import NF4Tensor

STATE = "quant_state.bitsandbytes__nf4"
STATE_LIMIT = 1 << 16  # bytes of its text, which is shorter than 300
NESTED = ("nested_absmax", "nested_quant_map")
PARTS = ("absmax", "quant_map", *NESTED)
METHOD = "bitsandbytes"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORAGE = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)  # transformers' choice
FLOAT32_MAX = torch.finfo(torch.float32).max
BEYOND_FLOAT16 = "and float16 ends at 65,504; choose bfloat16 or float32"
# A class beside a model's own in transformers -> what from_pretrained does to such a model that is coded
# (replace_with_bnb_linear of integrations/bitsandbytes.py, MODULES_TO_PATCH_FOR_QUANTIZATION of quantizers/base.py).
UNREAD = {
    "FalconLinear": "leaves the linear layers dense, since they have a class of their own",
    "Llama4TextExperts": "takes the experts apart and finds no weights for them",
}
OTHER_NAMES = (
    "where transformers reads these files by other names than its model's, give the full-precision original, which "
    "phicore quantizes itself"
)

logger = logging.getLogger(__name__)


def pack_weight(weight: NF4Tensor) -> dict[str, Tensor]:
    """The tensors by which bitsandbytes names a weight: "" for the codes, then the names behind the weight's own."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {"": weight.packed.view(-1, 1), "absmax": weight.absmax, "quant_map": levels(weight.device).clone()}
    if weight.nested_absmax is not None and weight.offset is not None:
        tensors |= {"nested_absmax": weight.nested_absmax, "nested_quant_map": dynamic_map(weight.device).clone()}
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": float(weight.offset),
        }
    tensors[STATE] = weight.packed.new_tensor(list(json.dumps(state).encode()))
    return tensors


def unpack_weight(tensors: Mapping[str, Tensor], name: str) -> NF4Tensor:
    """Inverse of `pack_weight`.

    Args:
        tensors: named as in `pack_weight`.
        name: of the weight, for errors.

    Raises:
        ValueError: not NF4 by bitsandbytes' tables, parts that are missing or do not fit, scales that are not finite.
    """
    state = _read_state(tensors, name)
    nested = state.get("nested_offset") is not None
    expected = {"", "absmax", "quant_map", STATE} | (set(NESTED) if nested else set())
    if tensors.keys() != expected:
        raise ValueError(
            f"{name} is no 4-bit weight of bitsandbytes: it has {_listed(tensors)}, not {_listed(expected)}"
        )
    if state["quant_type"] != "nf4" or not _is_table(tensors["quant_map"], levels(torch.device("cpu"))):
        raise ValueError(f"{name} has quant_type {state['quant_type']!r} with a table that is not NF4's")
    offset = None
    if nested:
        for key, read in (("nested_blocksize", NESTED_BLOCK_SIZE), ("nested_dtype", "float32")):
            if state.get(key) != read:
                raise ValueError(f"{name} has {key} {state.get(key)!r}; {read} is read")
        if not _is_table(tensors["nested_quant_map"], dynamic_map(torch.device("cpu"))):
            raise ValueError(f"{name} has a nested_quant_map that is not bitsandbytes' dynamic map")
        offset = tensors["absmax"].new_tensor(float(state["nested_offset"]), dtype=torch.float32)
    packed = tensors[""]
    if packed.dtype not in STORAGE:
        raise ValueError(f"{name} is held as {packed.dtype}; {', '.join(map(str, STORAGE))} are read")
    packed = packed.reshape(-1).view(torch.uint8)  # any quant_storage holds the same bytes
    shape, dtype = torch.Size(state["shape"]), DTYPES[state["dtype"]]
    try:
        weight = NF4Tensor(
            packed, tensors["absmax"], tensors.get("nested_absmax"), offset, shape, dtype, state["blocksize"]
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not tensors["nested_absmax" if nested else "absmax"].isfinite().all():
        raise ValueError(f"{name} has scales that are NaN or infinite, as no weight is coded; the file is damaged")
    return weight


def _read_state(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The JSON text among the tensors of a weight, with values of the right kinds."""
    text = tensors.get(STATE)
    if text is None or text.dtype != torch.uint8 or text.numel() > STATE_LIMIT:
        given = "none" if text is None else f"{text.dtype} {list(text.shape)}"
        raise ValueError(f"{name} is no 4-bit weight of bitsandbytes: {STATE} must be uint8 JSON, is {given}")
    try:
        state = parse_json(bytes(text.reshape(-1).tolist()))
    except ValueError as error:
        raise ValueError(f"{name} is no 4-bit weight of bitsandbytes: {STATE}: {error}") from error
    offset = state.get("nested_offset")
    right = {
        "quant_type": isinstance(state.get("quant_type"), str),
        "dtype": state.get("dtype") in DTYPES if isinstance(state.get("dtype"), str) else False,
        "shape": are_sizes(state.get("shape")),
        "blocksize": type(state.get("blocksize")) is int,
        "nested_offset": offset is None or (type(offset) in (int, float) and abs(offset) <= FLOAT32_MAX),
    }
    wrong = [f"{key}={state.get(key)!r}" for key, is_right in right.items() if not is_right]
    if wrong:
        raise ValueError(f"{name} is no 4-bit weight of bitsandbytes: {STATE} has {', '.join(wrong)}")
    return state


def _is_table(given: Tensor, table: Tensor) -> bool:
    return given.dtype == table.dtype and given.shape == table.shape and torch.equal(given.cpu(), table)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(name or "codes" for name in names))


def packed_groups(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The tensors of a model that stand in its files: each dense one, then each NF4 weight as bitsandbytes names it."""
    every = {path: m for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, NF4Linear)}
    parts = {f"{path}.{part}" if path else part for path, layer in every.items() for part in layer.nf4.parts()}
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, NF4Linear)}
    seen: set[Any] = set()
    for key, tensor in model.state_dict().items():
        same = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if key not in parts and (same not in seen or not tensor.numel()):
            seen.add(same)  # a tied head is written once, as its embedding
            yield {key: tensor.detach().cpu().contiguous()}
    for path, layer in layers.items():
        yield name_parts(f"{path}.weight" if path else "weight", layer.nf4)


def name_parts(name: str, weight: NF4Tensor) -> dict[str, Tensor]:
    """`pack_weight` under whole names, on the CPU."""
    return {f"{name}.{part}" if part else name: tensor.cpu() for part, tensor in pack_weight(weight).items()}


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """What config.json says of a model with NF4 layers, in transformers' words. A warning is logged for layers that
    transformers leaves dense whatever it says.

    Raises:
        ValueError: the model has no NF4 layer, or its layers differ in double quantisation.
    """
    coded = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    layers = list(coded.values())
    if len({layer.double_quant for layer in layers}) != 1:
        raise ValueError(f"{len(layers)} NF4 layers: there must be some, alike in double quantisation")
    # transformers would code Conv1D layers too
    dense = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, *transposed_kinds()))}
    defined_in = sys.modules.get(type(model).__module__)
    if unread := [why for name, why in UNREAD.items() if hasattr(defined_in, name)]:
        logger.warning(
            "from_pretrained of transformers will not read %s in NF4, of which it %s; phicore reads it",
            type(model).__name__,
            unread[0],
        )
    elif left := _left_dense(coded, [*dense, *(getattr(model, "_keep_in_fp32_modules", None) or ())]):
        logger.warning(
            "transformers leaves %s of %s dense, whose from_pretrained will not read their codes; for it, quantize "
            "with exclude_modules=%r",
            ", ".join(left[:10]),
            type(model).__name__,
            sorted({name.rpartition(".")[2] for name in left}),
        )
    return {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": layers[0].double_quant,
        "bnb_4bit_compute_dtype": str(layers[0].dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(dense),  # None would mean the output head, to transformers
    }


def _left_dense(names: Iterable[str], patterns: list[str]) -> list[str]:
    """Names of modules that these patterns mean, by should_convert_module of transformers 5."""
    starts = [re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))") for pattern in patterns]
    ends = tuple(patterns)
    return [name for name in names if name.endswith(ends) or any(start.match(name) for start in starts)]


def save_quantized(model: Any, directory: Path) -> None:
    """Writes weights and configuration of a transformers model that has NF4 layers into an existing directory."""
    write_model(packed_groups(model), directory)
    write_config(model, directory)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)


def write_config(model: Any, directory: Path) -> None:
    """Writes config.json of a transformers model that has NF4 layers, which may be on the meta device."""
    settings = quantization_config(model)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"quantization_config": settings}, indent=2) + "\n", encoding="utf-8")


def load_quantized(directory: Path, config: Any, dtype: torch.dtype) -> Any:
    """A causal language model of transformers from a directory in bitsandbytes' NF4, without decoding a weight.

    Args:
        directory: a model directory.
        config: its configuration, as AutoConfig reads it.
        dtype: of what is not quantized, and the compute dtype of the NF4 layers.

    Raises:
        ValueError: as `load_weights`.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    weights = model_tensors(directory)
    del config.quantization_config  # or transformers would build bitsandbytes' own layers
    with no_init_weights():  # memory that is never written is never taken
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    load_weights(model, weights, dtype)
    # Tables of positions, which no file holds, were computed in dtype: the class computes those again. The rest is told
    # to be done: classes zero the row of the padding, and draw numbers, whatever their tensors are marked as.
    for module in model.modules():
        module._is_hf_initialized = not module._non_persistent_buffers_set
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    model.initialize_weights()
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model


def load_weights(model: nn.Module, weights: Mapping[str, TensorFile], dtype: torch.dtype) -> None:
    """Fills a model from safetensors files, with NF4Linear where they hold 4-bit weights. Nothing is decoded, and no
    more memory is used than the filled model takes and one tensor. Tensors that the model does not use are left in
    the files, and a warning names them.

    Args:
        model: of the architecture that the files belong to, with nn.Linear layers, whose contents do not matter.
        weights: the file of each tensor; each is read once.
        dtype: of the tensors that are not coded, and the compute dtype of the NF4 layers.

    Raises:
        ValueError: a 4-bit weight that is damaged or belongs to no linear layer; tensors that are missing or of another
            shape or kind, or that look like parts of a 4-bit weight and are none. All is looked at before the model is
            touched, which is then unchanged.
    """
    layers, plain_keys = _coded_layers(model, weights)
    expected = model.state_dict()
    places = _places(model, layers, plain_keys)
    for place in (place for owner in layers for place in places[owner]):
        del expected[f"{place}.weight"]
    one_of = [*tied_groups(model), *_names_of_one_tensor(model, places)]
    missing, unused, unlike = compare(expected, {key: weights[key] for key in plain_keys}, one_of)
    # Beside what is missing, one that is not used may be it under a wrong name.
    unexpected = unused if missing else [key for key in unused if _is_stray_part(model, key)]
    problems = [
        f"{what}: {keys[:10]}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("unlike", unlike))
        if keys
    ]
    if problems:
        todo = f"; {OTHER_NAMES}" if missing and unexpected else ""
        raise ValueError(f"the files do not fit the model; {', '.join(problems)}{todo}")
    if unused:
        where = weights[unused[0]].path.parent
        logger.warning("%s: weights that the model does not use: %s", where, unused[:10])
    kept = dtypes_kept(model, dtype)
    read: dict[str, dict[str, Tensor]] = {owner: {} for owner in layers}
    ready: dict[str, NF4Linear] = {}
    plain: dict[str, Tensor] = {}
    owners = {key: owner for owner, keys in layers.items() for key in keys}
    for key, file in weights.items():
        if key in unused:
            continue
        tensor = file.read(key)
        if (path := owners.get(key)) is None:
            plain[key] = cast(tensor, kept(key), f"{file.path}: {key}")
            continue
        read[path][key[len(f"{path}.weight.") :]] = tensor  # "" for the codes
        if len(read[path]) == len(layers[path]):
            name = f"{file.path}: {path}.weight"
            ready[path] = _nf4_linear(model.get_submodule(path), unpack_weight(read.pop(path), name), name, dtype)
    for owner, layer in ready.items():
        for place in places[owner]:
            replace(model, place, layer)
    model.load_state_dict(plain, strict=False, assign=True)
    if callable(tie := getattr(model, "tie_weights", None)):
        # Which of two tied weights is there, and whether they are equal where both are, decides what is tied.
        tie(missing_keys=set(expected) - plain_keys, recompute_mapping=False)


def dtypes_kept(model: nn.Module, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """The dtype of a model's floating tensor by its name, where transformers loads the model in this dtype: float32
    for what the model's class keeps so, such as the bias of a router, and its own for what is made in another."""
    strict, loose = "_keep_in_fp32_modules_strict", "_keep_in_fp32_modules"
    kinds = {torch.float16: (strict, loose), torch.bfloat16: (strict,)}.get(dtype, ())
    wide = [name.replace("*", ".*") for kind in kinds for name in getattr(model, kind, None) or ()]
    made = model.state_dict() if getattr(model, "dtype", None) == dtype else {}

    def kept(key: str) -> torch.dtype:
        if any(re.search(name, key) for name in wide):
            return torch.float32
        return made[key].dtype if key in made and made[key].is_floating_point() else dtype

    return kept


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A floating tensor in dtype, another as it is.

    Raises:
        ValueError: a finite value is beyond dtype, naming the tensor.
    """
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    found = tensor.to(dtype)
    if dtype != torch.float16 or torch.finfo(tensor.dtype).max < torch.finfo(dtype).max:  # most of 8 bits
        return found
    if not torch.equal(found.isfinite(), tensor.isfinite()):
        raise ValueError(f"{name} holds values up to {tensor.double().abs().max().item():.4g}, {BEYOND_FLOAT16}")
    return found


def _coded_layers(model: nn.Module, weights: Mapping[str, TensorFile]) -> tuple[dict[str, set[str]], set[str]]:
    """The layers whose weight is coded, each with the keys of its parts; and all other keys."""
    names = {key.removesuffix(f".{STATE}") for key in weights if key.endswith(f".{STATE}")}
    layers: dict[str, set[str]] = {}
    for name in sorted(names):
        path, where = name.removesuffix(".weight"), weights[f"{name}.{STATE}"].path
        try:
            linear = model.get_submodule(path) if path != name else None
        except AttributeError:
            linear = None
            if _ignores(model, name):
                continue
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f"{where}: {name} is a 4-bit weight, and the model has no linear layer of that name; {OTHER_NAMES}"
            )
        if any(name in group for group in tied_groups(model)):
            raise ValueError(f"{where}: {name} is a 4-bit weight, and the model ties it to another")
        every = {name, *(f"{name}.{part}" for part in (*PARTS, STATE))}
        layers[path] = every & weights.keys()
    return layers, set(weights).difference(*layers.values())


def _is_stray_part(model: nn.Module, key: str) -> bool:
    """Whether a key that the model does not use is, or looks like, part of a 4-bit weight without the others."""
    name, _, part = key.partition(".weight.")
    of_linear = part and isinstance(dict(model.named_modules(remove_duplicate=False)).get(name), nn.Linear)
    return not _ignores(model, key) and (of_linear or part.startswith("quant_state.") or part in PARTS)


def _ignores(model: nn.Module, key: str) -> bool:
    """Whether the model's class says that files may hold this key for others, such as layers that predict further."""
    return any(re.search(name, key) for name in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())


def _places(model: nn.Module, coded: Iterable[str], dense: Set[str]) -> dict[str, list[str]]:
    """The places of each module by its first name, those of a coded layer by the name that is coded; where the files
    have a dense weight for one of its places too, this is left to itself."""
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(path)
    places: dict[str, list[str]] = {}
    for owner in coded:
        together = names[model.get_submodule(owner)]
        places[owner] = [path for path in together if f"{path}.weight" not in dense]
        together[:] = [path for path in together if path not in places[owner]]
    return places | {paths[0]: paths for paths in names.values() if paths}


def _names_of_one_tensor(model: nn.Module, places: Mapping[str, list[str]]) -> list[set[str]]:
    """Names of tensors of modules that stand in several places: files need to hold one."""
    return [
        {f"{path}.{name}" for path in paths}
        for first, paths in places.items()
        if len(paths) > 1
        for name in [*model.get_submodule(first)._parameters, *model.get_submodule(first)._buffers]
    ]


def _nf4_linear(linear: Any, weight: NF4Tensor, name: str, dtype: torch.dtype) -> NF4Linear:
    """What takes the place of linear. Its bias is linear's own."""
    if tuple(weight.shape) != tuple(linear.weight.shape):
        raise ValueError(
            f"{name} is a 4-bit weight of shape {list(weight.shape)}, the model's is {list(linear.weight.shape)}"
        )
    layer = NF4Linear.from_nf4(weight, linear.bias)
    layer.dtype = dtype
    return layer.train(linear.training)


def tied_groups(model: Any) -> list[set[str]]:
    """Names of a transformers model that are one tensor, of which files need to hold one."""
    groups: dict[str, set[str]] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        groups.setdefault(source, {source}).add(target)
    return list(groups.values())
