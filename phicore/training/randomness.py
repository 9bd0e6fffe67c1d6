"""The random states of a process: seeding them, saving them, and setting them again."""

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor


def seed_everything(seed: int, step: int = 0, rank: int = 0) -> None:
    """Seeds torch, Python and NumPy.

    Rank 0 takes the seed itself before the first step. Other ranks, and a rank that joins a run at a later step because
    it goes on with more ranks than before, take the first 8 bytes of SHA-256 of "seed/step/rank".
    """
    if step or rank:
        digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little") % 2**63
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def random_tensors() -> dict[str, Tensor]:
    """torch's states: uint8 [n] by device type."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def random_json() -> str:
    """Python's and NumPy's states."""
    state: Any = numpy.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = state
    return json.dumps({"python": random.getstate(), "numpy": [kind, keys.tolist(), position, has_gauss, cached]})


@contextmanager
def kept_random() -> Iterator[None]:
    """Whatever draws random numbers within it, the states are afterwards what they were."""
    tensors, states = random_tensors(), random_json()
    try:
        yield
    finally:
        restore_random(tensors, states)


def restore_random(tensors: dict[str, Tensor], states: str) -> None:
    """Sets what `random_tensors` and `random_json` gave."""
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    values = json.loads(states)
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = values["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
