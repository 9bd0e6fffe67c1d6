"""Checkpoints of a run: trained tensors, optimizer state, random state and position.

A checkpoint is a directory step-00000040 with

    state.json            step, tokens, settings, format version
    model.safetensors     trained parameters (and buffers that training changed) by name, not the frozen base
    rank-0.safetensors    this rank's optimizer state, "name of the state" / "name of the parameter", and torch's RNG
    rank-0.json           Python's and NumPy's RNG

written under a temporary name and renamed when whole. `latest` names the newest and is written after it, so a kill at
any moment leaves a run that loads. Nothing in it is pickled.
"""

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from phicore import atomic

FORMAT = 1
LATEST = "latest"


def save_checkpoint(
    directory: str | os.PathLike[str],
    state: Mapping[str, Any],
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    keep: int,
    rank: int = 0,
) -> Path:
    """Writes a checkpoint and then removes the oldest beyond `keep`.

    Args:
        directory: of all checkpoints of the run.
        state: what state.json shall hold; needs "step".
        model: trained tensors by name.
        optimizer: this rank's optimizer state, from `optimizer_tensors`.
        keep: how many of the newest stay.
        rank: of this process.

    Returns:
        The new checkpoint's directory.
    """
    directory = Path(directory)
    name = f"step-{state['step']:08d}"
    with atomic.new_directory(directory / name, overwrite=True) as new:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in model.items()}, new / "model.safetensors")
        save_file(
            {**{key: tensor.detach().cpu().contiguous() for key, tensor in optimizer.items()}, **_torch_rng()},
            new / f"rank-{rank}.safetensors",
        )
        (new / f"rank-{rank}.json").write_text(json.dumps(_python_rng()))
        (new / "state.json").write_text(json.dumps({"format": FORMAT, **state}, indent=2))
    atomic.write_text(directory / LATEST, name + "\n")
    # Not beyond this one: after going back to an earlier checkpoint there are later ones, which will be written again.
    for old in sorted(path for path in directory.glob("step-*") if path.name <= name)[:-keep]:
        shutil.rmtree(old)
    for leftover in directory.glob(".step-*"):  # of writes that were killed
        shutil.rmtree(leftover)
    for leftover in directory.glob(f".{LATEST}.*"):
        leftover.unlink()
    return directory / name


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The checkpoint that `latest` names; None where there is none yet.

    Raises:
        ValueError: `latest` does not hold the name of a checkpoint.
        FileNotFoundError: `latest` names a directory that is gone.
    """
    directory = Path(directory)
    if not (directory / LATEST).exists():
        return None
    name = (directory / LATEST).read_text(errors="replace").strip()
    if not re.fullmatch(r"step-\d{8,}", name):
        raise ValueError(f"{directory / LATEST} is damaged: it holds {name!r}, not the name of a checkpoint")
    # A kill while the same step is saved again can leave it where `atomic.new_directory` put it aside.
    for path in (directory / name, *directory.glob(f".{name}.old.*/{name}")):
        if path.is_dir():
            return path
    raise FileNotFoundError(f"{directory / LATEST} names {name}, which is not there")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The contents of a checkpoint's state.json.

    Raises:
        ValueError: it is damaged, or was written in another format.
    """
    state = _read_json(checkpoint / "state.json")
    if state.get("format") != FORMAT:
        raise ValueError(f"{checkpoint} has checkpoint format {state.get('format')!r}; this version reads {FORMAT}")
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one of a checkpoint's files.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_rng(checkpoint: Path, rank: int = 0) -> dict[str, Any]:
    """Python's and NumPy's random state, for `restore_rng`.

    Raises:
        ValueError: the file is damaged.
    """
    return _read_json(checkpoint / f"rank-{rank}.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return value


def restore_rng(tensors: Mapping[str, Tensor], states: Mapping[str, Any]) -> None:
    """Sets torch's (from the rank's tensors), Python's and NumPy's random state (from `read_rng`)."""
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))


def _torch_rng() -> dict[str, Tensor]:
    state = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng/cuda"] = torch.cuda.get_rng_state()
    return state


def _python_rng() -> dict[str, Any]:
    state: Any = numpy.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = state
    return {"python": random.getstate(), "numpy": [kind, keys.tolist(), position, has_gauss, cached]}


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's state by "state/parameter", for parameters whose name is given."""
    return {
        f"{key}/{names[parameter]}": value if isinstance(value, Tensor) else torch.tensor(value)
        for parameter, states in optimizer.state.items()
        for key, value in states.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> None:
    """Inverse of `optimizer_tensors`: each state goes to its parameter's device; "rng/" entries are passed over.

    Raises:
        ValueError: a state of a parameter that the model does not train, or of another shape.
    """
    loaded: dict[Tensor, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        state, _, name = key.partition("/")
        if state == "rng":
            continue
        parameter = parameters.get(name)
        if parameter is None or (value.dim() and value.shape != parameter.shape):
            shape = None if parameter is None else list(parameter.shape)
            raise ValueError(
                f"optimizer state {state} of {name}: {list(value.shape)} in the file, {shape} in the model"
            )
        # AdamW keeps its step count on the CPU.
        loaded.setdefault(parameter, {})[state] = value if state == "step" else value.to(parameter.device)
    for parameter, states in loaded.items():
        optimizer.state[parameter] = states
