"""The 4-bit state of bitsandbytes: one NF4 weight as named tensors, and model directories that hold such weights.

A weight `w` is `w` uint8 [ceil(n / 2), 1], `w.absmax`, `w.quant_map` float32 [16], with double quantisation
`w.nested_absmax` and `w.nested_quant_map` float32 [256], and `w.quant_state.bitsandbytes__nf4`, a JSON text as uint8.
The directory's config.json says so in quantization_config, and transformers then loads it through bitsandbytes.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phicore.modules import replace
from phicore.nf4.codebook import dynamic_map, levels
from phicore.nf4.codec import NESTED_BLOCK_SIZE
from phicore.nf4.linear import NF4Linear
from phicore.nf4.tensor import NF4Tensor

STATE = "quant_state.bitsandbytes__nf4"
METHOD = "bitsandbytes"


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
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def unpack_weight(tensors: Mapping[str, Tensor], name: str) -> NF4Tensor:
    """Inverse of `pack_weight`.

    Args:
        tensors: named as in `pack_weight`.
        name: of the weight, for errors.

    Raises:
        ValueError: not NF4 by bitsandbytes' tables, or parts that are missing or do not fit.
    """
    try:
        state = json.loads(bytes(tensors[STATE].tolist()))
        dtype = getattr(torch, state["dtype"])
        shape, block_size = torch.Size(state["shape"]), state["blocksize"]
        packed, absmax = tensors[""], tensors["absmax"]
        nested = tensors.get("nested_absmax")
        offset = None if nested is None else torch.tensor(state["nested_offset"], dtype=torch.float32)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is no 4-bit weight of bitsandbytes: {error!r}") from error
    table = tensors.get("quant_map")
    if state["quant_type"] != "nf4" or table is None or not torch.equal(table.cpu(), levels(torch.device("cpu"))):
        raise ValueError(f"{name} has quant_type {state['quant_type']!r} with a table that is not NF4's")
    if nested is not None:
        table = tensors.get("nested_quant_map")
        if state.get("nested_blocksize") != NESTED_BLOCK_SIZE or table is None:
            raise ValueError(
                f"{name} has nested_blocksize {state.get('nested_blocksize')!r}; {NESTED_BLOCK_SIZE} is read"
            )
        if not torch.equal(table.cpu(), dynamic_map(torch.device("cpu"))):
            raise ValueError(f"{name} has a nested_quant_map that is not bitsandbytes' dynamic map")
    packed = packed.reshape(-1).view(torch.uint8)  # a 16-bit quant_storage holds the same bytes
    return NF4Tensor(packed, absmax, nested, offset, shape, dtype, block_size)


def pack_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict with each NF4Linear as bitsandbytes names it; everything else unchanged."""
    tensors = dict(model.state_dict())
    for path, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, NF4Linear):
            continue
        prefix = f"{path}." if path else ""
        for part in layer.nf4.parts():
            del tensors[prefix + part]
        for ending, tensor in pack_weight(layer.nf4).items():
            tensors[f"{prefix}weight" + (f".{ending}" if ending else "")] = tensor
    return tensors


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """What config.json says of a model with NF4 layers, in transformers' words.

    Raises:
        ValueError: the model has no NF4 layer, or its layers differ in double quantisation.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, NF4Linear)]
    if len({layer.double_quant for layer in layers}) != 1:
        raise ValueError(f"{len(layers)} NF4 layers: there must be some, alike in double quantisation")
    dense = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": layers[0].double_quant,
        "bnb_4bit_compute_dtype": str(layers[0].dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(dense) or None,
    }


def save_quantized(model: Any, directory: Path) -> None:
    """Writes weights and configuration of a transformers model that has NF4 layers into an existing directory."""
    settings = quantization_config(model)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in pack_state_dict(model).items():
        if tensor.data_ptr() not in seen or not tensor.numel():  # a tied head is written once, as its embedding
            seen.add(tensor.data_ptr())
            tensors[key] = tensor.detach().cpu().contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"quantization_config": settings}, indent=2) + "\n", encoding="utf-8")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)


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

    del config.quantization_config  # or transformers would build bitsandbytes' own layers
    with no_init_weights():  # memory that is never written is never taken
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    load_weights(model, weight_files(directory), dtype)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model


def load_weights(model: nn.Module, files: list[str | os.PathLike[str]], dtype: torch.dtype) -> None:
    """Fills a model from safetensors files, with NF4Linear where they hold 4-bit weights. Nothing is decoded.

    Args:
        model: of the architecture that the files belong to, with nn.Linear layers, whose contents do not matter.
        files: each tensor is read once.
        dtype: of the tensors that are not coded, and the compute dtype of the NF4 layers.

    Raises:
        ValueError: a 4-bit weight that is damaged or belongs to no linear layer; missing or unexpected tensors.
    """
    plain: dict[str, Tensor] = {}
    coded: dict[str, dict[str, Tensor]] = {}
    tensors = {key: tensor for file in files for key, tensor in load_file(file).items()}
    names = {key.removesuffix(f".{STATE}") for key in tensors if key.endswith(f".{STATE}")}
    for key, tensor in tensors.items():
        owner = next((name for name in (key, *_prefixes(key)) if name in names), None)
        if owner is not None:
            coded.setdefault(owner, {})[key[len(owner) + 1 :]] = tensor
        else:
            plain[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    for name, parts in coded.items():
        path = name.rpartition(".")[0]
        try:
            linear = model.get_submodule(path)
        except AttributeError:
            linear = None
        weight = unpack_weight(parts, name)
        if not isinstance(linear, nn.Linear) or tuple(weight.shape) != tuple(linear.weight.shape):
            raise ValueError(
                f"{name} is a 4-bit weight of shape {list(weight.shape)}, which no layer of the model fits"
            )
        layer = NF4Linear.from_nf4(weight, linear.bias)
        layer.dtype = dtype
        replace(model, path, layer.train(linear.training))
    absent, unexpected = model.load_state_dict(plain, strict=False, assign=True)
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = [key for key in absent if not key.endswith(_PARTS) and key not in tied]
    if missing or unexpected:
        raise ValueError(f"the files do not fit the model; missing: {missing[:10]}, unexpected: {unexpected[:10]}")


_PARTS = (".packed", ".absmax", ".nested_absmax", ".offset")  # of NF4 layers, which are filled already


def _prefixes(key: str) -> list[str]:
    pieces = key.split(".")
    return [".".join(pieces[:end]) for end in range(len(pieces) - 1, 0, -1)]


def weight_files(directory: Path) -> list[str | os.PathLike[str]]:
    """The safetensors files of a model directory.

    Raises:
        ValueError: the index names a file outside the directory.
    """
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return [directory / "model.safetensors"]
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{index} names files outside its directory: {', '.join(outside)}")
    return [directory / name for name in names]
