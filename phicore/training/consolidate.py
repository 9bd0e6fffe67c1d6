"""A checkpoint of any number of ranks as whole tensors, for plain torch."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phicore.training.checkpoint import check_files, read_state
from phicore.training.shards import open_shard
from phicore.zero.state import write_full


def consolidate(checkpoint: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint of the Trainer in one process; the result takes the memory of what was trained.

    Args:
        checkpoint: a directory such as runs/mine/checkpoints/step-00000040.

    Returns:
        The trained parameters and buffers by name, in their shapes, for `model.load_state_dict(..., strict=False)`.
        The optimizer's state in torch.optim's format, for torch.optim.AdamW over the same parameters in the same
        groups, or for `ZeroOptimizer.load_state_dict`: names stand in its "param_names", float32 masters of 16-bit
        parameters in its "masters".

    Raises:
        FileNotFoundError, ValueError: there is no checkpoint, or it is damaged.
    """
    checkpoint = Path(checkpoint)
    state = read_state(checkpoint)
    check_files(checkpoint, state)
    shapes = {name: torch.Size(shape) for name, (shape, _) in state["tensors"].items()}
    tensors: dict[str, Tensor] = {
        name: torch.empty(shapes[name], dtype=getattr(torch, dtype), device="cpu")
        for name, (_, dtype) in state["tensors"].items()
    }
    states: dict[str, dict[str, Tensor]] = {}
    for number in range(state["world_size"]):
        with open_shard(checkpoint, number) as shard:
            for name in shard.names.get("buffer", ()):
                tensors[name].copy_(shard.read(f"buffer/{name}"))
            for name in shard.names.get("parameter", ()):
                start, stop = shard.range(f"parameter/{name}")
                tensors[name].view(-1)[start:stop] = shard.read(f"parameter/{name}")
                found = states.setdefault(name, {})
                for kind in shard.kinds.get(name, ()):
                    value = shard.read(f"{kind}/{name}")
                    if shard.is_scalar(f"{kind}/{name}"):
                        found[kind] = value.clone()  # a view would keep the whole file mapped
                    else:
                        whole = found.setdefault(kind, value.new_empty(shapes[name]))
                        whole.view(-1)[start:stop] = value
    return tensors, write_full(states, state["param_groups"])
