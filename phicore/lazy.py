"""A layer's weight for code that reads it past the layer's forward.

T5 reads a weight's dtype; Mamba's scan, WavLM's attention and nn.TransformerEncoder compute with one. Where the weight
is coded, or an adapter belongs to it, there is no tensor to hand out, so one is made when it is used.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

PROPERTIES = ("device", "dtype", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_nested", "is_quantized", "is_sparse")
FACTS: set[Any] = {
    *(getattr(Tensor, name).__get__ for name in (*PROPERTIES, "layout", "ndim", "requires_grad", "shape")),
    *(getattr(Tensor, name) for name in ("dim", "element_size", "is_complex", "is_floating_point", "numel", "size")),
    torch.is_complex,
    torch.is_floating_point,
    torch.numel,
}


class LazyWeight(Tensor):
    """A tensor that is made when something computes with it, and made anew each time; what FACTS asks costs nothing.

    Args:
        shape, dtype, device: what it will have.
        make: gives the tensor, with its gradients.
    """

    make: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, shape: torch.Size, dtype: torch.dtype, device: torch.device, make: Callable[[], Tensor]
    ) -> "LazyWeight":
        weight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight.make = make
        return weight

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*_made(args), **_made(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        return func(*_made(args), **_made(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyWeight(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"


def _made(arguments: Any) -> Any:
    return tree_map_only(LazyWeight, lambda weight: weight.make(), arguments)


def lazy_weight(shape: torch.Size, dtype: torch.dtype, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """A LazyWeight; the tensor itself while torch.compile traces, which leaves out what is not used."""
    return make() if torch.compiler.is_compiling() else LazyWeight(shape, dtype, device, make)
