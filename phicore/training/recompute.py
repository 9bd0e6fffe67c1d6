"""Gradient checkpointing (Chen et al. 2016) of a model's repeated blocks."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: the members of the nn.ModuleList that holds the most weights.

    Raises:
        ValueError: the model has no nn.ModuleList.
    """

    def size(module: nn.Module) -> int:
        return sum(t.numel() for t in [*module.parameters(), *module.buffers()])

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ValueError(
            f"gradient_checkpointing needs repeated blocks in an nn.ModuleList; {type(model).__name__} has none. "
            "Put its blocks in one, or turn the option off"
        )
    largest: nn.ModuleList = max(lists, key=size)
    return list(largest)


@contextmanager
def checkpointed_blocks(model: nn.Module) -> Iterator[None]:
    """Within it, each block keeps only its inputs and computes its activations again in the backward pass.

    The non-reentrant form is used, which also trains adapters inside blocks whose inputs carry no gradient.
    """
    wrapped = blocks(model)
    before = [block.__dict__.get("forward") for block in wrapped]  # others hook in at the same place (accelerate, say)
    try:
        for block in wrapped:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        yield
    finally:
        for block, forward in zip(wrapped, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward
