"""A tied Llama whose greedy answers vary from token to token, for the tests of model directories and of answers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VOCABULARY = 300
WIDE = {"initializer_range": 0.3}
PROMPTS = ["a", "What is the capital of France?", "Tag: 12 Main St.", "hello there", "x" * 60]


def tied_llama(tiny: Callable[..., nn.Module]) -> Any:
    """In float32, made by the fixture `tiny`."""
    return tiny("llama", tied=True, dtype=torch.float32, vocab_size=VOCABULARY, max_position_embeddings=256, **WIDE)
