"""What becomes of a checkpoint of DeepSpeed once it is read: another dtype, a safetensors file, what trains alone."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from phicore import atomic
from phicore.formats.deepspeed import DeepSpeedCheckpoint

WEIGHTS_FILE = "model.safetensors"


def in_dtype(found: DeepSpeedCheckpoint, dtype: torch.dtype) -> DeepSpeedCheckpoint:
    """The checkpoint with its floating-point parameters in a dtype, each rounded once from its float32 master where it
    has one. 16-bit parameters keep masters, float32 ones need none; buffers stay as they are."""
    trained = [name for group in found.optimizer["param_groups"] for name in group["param_names"]]
    masters: dict[str, Tensor] = found.optimizer.get("masters", {})
    exact = {name: masters[name] if name in masters else found.model[name].float() for name in trained}
    by_place = {_place(found.model[name]): exact[name] for name in trained}  # a tied weight has another name too
    model = {
        name: by_place.get(_place(t), t).to(dtype) if t.is_floating_point() and name not in found.buffers else t
        for name, t in found.model.items()
    }
    optimizer = {key: value for key, value in found.optimizer.items() if key != "masters"}
    return replace(
        found, model=model, optimizer=optimizer if dtype == torch.float32 else {**optimizer, "masters": exact}
    )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What two names of one tensor have in common, and views of it and empty tensors have not."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def trained_tensors(found: DeepSpeedCheckpoint) -> dict[str, Tensor]:
    """The trained parameters and the buffers, in the model's order."""
    names = {name for group in found.optimizer["param_groups"] for name in group["param_names"]} | set(found.buffers)
    return {name: tensor for name, tensor in found.model.items() if name in names}


def settings_told(found: DeepSpeedCheckpoint) -> list[str]:
    """What the optimizer was set to, a line for each parameter group."""
    told = ("lr", "betas", "eps", "weight_decay", "momentum")
    return [
        f"{len(group['param_names'])} parameters with " + ", ".join(f"{k} {group[k]}" for k in told if k in group)
        for group in found.optimizer["param_groups"]
    ]


def write_weights(found: DeepSpeedCheckpoint, output: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Writes the model's parameters and buffers as output/model.safetensors; tied weights under each of their names.

    Raises:
        FileExistsError: output is there, is not empty, and overwrite is not set.
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in found.model.items():
        # safetensors refuses tensors that share memory, as tied ones do.
        shared = (start := tensor.untyped_storage().data_ptr()) in seen
        kept = tensor.detach().contiguous()
        tensors[name] = kept.clone() if shared else kept
        seen.add(start)
    with atomic.new_directory(output, overwrite=overwrite) as directory:
        save_file(tensors, directory / WEIGHTS_FILE, {"format": "pt"})
    return Path(output) / WEIGHTS_FILE
