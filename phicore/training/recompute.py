"""Gradient checkpointing (Chen et al. 2016) of a model's repeated blocks."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
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

    The non-reentrant form is used, which also trains adapters inside blocks whose inputs carry no gradient. Norms that
    keep running means move them in the first run alone, as they do without checkpointing.
    """
    wrapped = blocks(model)
    before = [block.__dict__.get("forward") for block in wrapped]  # others hook in at the same place (accelerate, say)
    try:
        for block in wrapped:
            block.forward = _recomputed(block)
        yield
    finally:
        for block, forward in zip(wrapped, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward


def _recomputed(block: nn.Module) -> Callable[..., Any]:
    norms = [module for module in block.modules() if isinstance(module, _NormBase)]
    run = block.forward

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _own_buffers(norms)

    if norms:
        return functools.partial(checkpoint, run, use_reentrant=False, context_fn=contexts)

    @functools.wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:  # a frame of Python's: without one, block.compile() compiles nothing
        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    return forward


@contextmanager
def _own_buffers(norms: list[_NormBase]) -> Iterator[None]:
    """Within it, what norms write to their buffers (running means, the count of batches) goes to copies."""
    before = [dict(norm._buffers) for norm in norms]
    try:
        for norm, buffers in zip(norms, before, strict=True):
            norm._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
        yield
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            norm._buffers.update(buffers)
