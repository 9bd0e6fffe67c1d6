"""A rank's file of a checkpoint: slices of flattened tensors in safetensors.

Keys are "kind/name": the slice of a trained parameter ("parameter/lm.lora_A"), of each state that the optimizer keeps
of it ("exp_avg/lm.lora_A", "master/lm.lora_A"), all 1-D; states that are one value for the parameter ("step/lm.lora_A",
in the file that holds its first element); whole buffers ("buffer/name", rank 0); torch's random state
("rng/rank-0/cpu"). Where a slice begins stands in the file's metadata as torch.distributed.checkpoint's
HuggingFaceStorageReader expects it, which reads the directory as whole 1-D tensors. Python's and NumPy's random states
are in the metadata too.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from phicore.training.randomness import random_json, random_tensors
from phicore.zero.state import is_sliced

SHARDING = "DCP_SHARDING_INFO"  # of torch.distributed.checkpoint._hf_utils, with "saved_offsets"
RANDOM = "random"

Shard = Mapping[str, Any]
"""What `ZeroOptimizer.state_dict` gives."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor to be saved: whole, or elements from `start` on of a flattened one."""

    tensor: Tensor
    start: int = 0


def file_name(rank: int) -> str:
    """Of a rank's file."""
    return f"rank-{rank}.safetensors"


def trained_parts(shard: Shard, parameters: Mapping[str, Tensor]) -> dict[str, Part]:
    """What this rank saves of the parameters and of their optimizer state; the tensors are the live ones."""
    parts: dict[str, Part] = {}
    for name, (start, stop) in shard["slices"].items():
        parts[f"parameter/{name}"] = Part(parameters[name].detach().reshape(-1)[start:stop], start)
        for kind, value in shard["state"].get(name, {}).items():
            if is_sliced(value, stop - start):
                parts[f"{kind}/{name}"] = Part(value, start)
            elif start == 0:
                parts[f"{kind}/{name}"] = Part(torch.as_tensor(value, device="cpu"))
    return parts


def random_parts(rank: int) -> dict[str, Part]:
    """torch's random states of this process."""
    return {f"rng/rank-{rank}/{device}": Part(state) for device, state in random_tensors().items()}


def to_memory(parts: Mapping[str, Part]) -> dict[str, Part]:
    """Copies on the CPU, which training does not write to."""
    return {key: Part(part.tensor.detach().to("cpu", copy=True), part.start) for key, part in parts.items()}


def write_shard(directory: Path, rank: int, parts: Mapping[str, Part], random: str | None = None) -> tuple[str, str]:
    """Writes a rank's file, to the disk itself.

    Args:
        directory: of the checkpoint.
        rank: of this process.
        parts: what it holds.
        random: Python's and NumPy's random states, from `random_json`; by default those of this moment.

    Returns:
        The file's name and the SHA-256 of its contents.

    Raises:
        OSError: it cannot be written.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not there; output must be on a file system that all ranks share")
    path = directory / file_name(rank)
    offsets = {
        key: {"saved_offsets": [part.start] if part.start else [0] * part.tensor.dim()} for key, part in parts.items()
    }
    metadata = {SHARDING: json.dumps(offsets), RANDOM: random_json() if random is None else random}
    tensors = {key: part.tensor.detach().cpu().contiguous() for key, part in parts.items()}
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # a full disk, say
        raise OSError(str(error)) from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return path.name, digest(path)


def digest(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            total.update(block)
    return total.hexdigest()


class OpenShard:
    """A rank's file, of which only what is asked for is read.

    Attributes:
        starts: where each 1-D tensor begins in its flattened whole, by key.
        names: behind "kind/", by kind.
        kinds: the optimizer's states of a parameter, by its name.
        random: Python's and NumPy's random states.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        metadata = file.metadata()
        self.starts = {key: (info["saved_offsets"] or [0])[0] for key, info in json.loads(metadata[SHARDING]).items()}
        self.random: str = metadata[RANDOM]
        self.names: dict[str, list[str]] = {}
        self.kinds: dict[str, list[str]] = {}
        for key in self.starts:
            kind, _, name = key.partition("/")
            self.names.setdefault(kind, []).append(name)
            if kind not in ("parameter", "buffer", "rng"):
                self.kinds.setdefault(name, []).append(kind)

    def range(self, key: str) -> tuple[int, int]:
        """First element and last + 1, in the flattened whole."""
        shape = self.file.get_slice(key).get_shape()
        return self.starts[key], self.starts[key] + (shape[0] if shape else 1)

    def is_scalar(self, key: str) -> bool:
        """Whether it is one value for the whole parameter."""
        return not self.file.get_slice(key).get_shape()

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """A tensor, or elements [start, stop) of its flattened whole."""
        if start is None or stop is None:
            return self.file.get_tensor(key)
        return self.file.get_slice(key)[start - self.starts[key] : stop - self.starts[key]]


@contextmanager
def open_shard(checkpoint: Path, rank: int) -> Iterator[OpenShard]:
    """Opens the file that a rank wrote.

    Raises:
        ValueError: it is damaged.
    """
    path = checkpoint / file_name(rank)
    try:
        with safe_open(path, "pt") as file:
            yield OpenShard(file)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
