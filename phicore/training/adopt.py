"""A checkpoint of the Trainer made of whole tensors: a run that another trainer began goes on here."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phicore import atomic
from phicore.training.checkpoint import latest_checkpoint, save_checkpoint
from phicore.training.resume import describe
from phicore.training.shards import Part
from phicore.zero.state import MASTER

ADAM_STATES = ("exp_avg", "exp_avg_sq", "step")


def adopt(
    tensors: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    step: int,
    output: str | os.PathLike[str],
    *,
    origin: str,
    overwrite: bool = False,
) -> Path:
    """Writes a checkpoint that a Trainer with this output and `resume` goes on from, on any number of ranks.

    It is the reverse of `phicore.training.consolidate.consolidate`. What only the other trainer knew is left to the
    Trainer: learning rate, its schedule and the data are those of its own settings at this step, which are not compared
    with any, and random numbers are drawn from its seed.

    Args:
        tensors: the trained parameters and those buffers that training writes, by name, in the model's dtypes.
        optimizer: the state of Adam or AdamW in torch.optim's format with "param_names", the names of all that trains;
            float32 masters of 16-bit parameters under "masters".
        step: optimizer steps done.
        output: of the run; gets checkpoints/.
        origin: who trained before, for messages.
        overwrite: whether a run that is there may be written over. It is removed last.

    Returns:
        The checkpoint's directory.

    Raises:
        FileExistsError: the output holds a run.
        ValueError: the optimizer's state is not Adam's, or names what is not in tensors.
    """
    checkpoints = Path(output) / "checkpoints"
    if not overwrite and (found := latest_checkpoint(checkpoints)) is not None:
        raise FileExistsError(f"{output} holds a run ({found.name}); choose another output, or overwrite it")
    trained: set[str] = set()
    parts: dict[str, Part] = {}
    for group in optimizer["param_groups"]:
        for number, name in zip(group["params"], group["param_names"], strict=True):
            states = dict(optimizer["state"].get(number, {}))
            if states.keys() - set(ADAM_STATES):
                raise ValueError(
                    f"the optimizer keeps {', '.join(sorted(states))} of {name}, and the Trainer's AdamW keeps "
                    f"{', '.join(ADAM_STATES)}; take over the weights alone"
                )
            if name not in tensors:
                raise ValueError(f"the optimizer trains {name}, of which there is no tensor")
            if name in optimizer.get("masters", {}):
                states[MASTER] = optimizer["masters"][name]
            trained.add(name)
            parts |= {f"{kind}/{name}": Part(_flat(value)) for kind, value in states.items()}
    for name, tensor in tensors.items():
        parts[f"parameter/{name}" if name in trained else f"buffer/{name}"] = Part(
            tensor.reshape(-1) if name in trained else tensor
        )
    state = {
        "step": step,
        "tokens": 0,
        "settings": None,  # unknown: whatever the Trainer is given counts
        "origin": origin,
        "tensors": describe(tensors),
        "param_groups": [{"params": [name for name in tensors if name in trained]}],
    }
    if not (overwrite and checkpoints.exists()):
        return save_checkpoint(checkpoints, state, parts, keep=1)
    with atomic.new_directory(checkpoints, overwrite=True) as temporary:  # the old run goes last
        new = save_checkpoint(temporary, state, parts, keep=1)
    (Path(output) / "metrics.jsonl").unlink(missing_ok=True)
    return checkpoints / new.name


def _flat(value: Any) -> Tensor:
    """[n], or [] for one value for the whole parameter."""
    tensor = torch.as_tensor(value)
    return tensor.reshape(-1) if tensor.dim() else tensor
