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
    Writing to it raises, but through .data, which torch does not tell of.

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
        return _computed(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        return _computed(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyWeight(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """func of the tensors that lazy weights make. RuntimeError if it has written to one, which would be lost."""
    made: list[tuple[Tensor, int]] = []

    def make(weight: LazyWeight) -> Tensor:
        tensor = weight.make()
        if type(tensor) is Tensor and not tensor.is_inference():  # no layer's own, and one that counts writes
            made.append((tensor, tensor._version))
        return tensor

    args, kwargs = tree_map_only(LazyWeight, make, (args, kwargs))
    result = func(*args, **kwargs)
    if any(tensor._version != version for tensor, version in made):
        raise RuntimeError(
            f"{getattr(func, '__name__', func)} writes to the weight of a layer that is adapted or in NF4, which is "
            f"made anew for each use, so nothing would change; initialise a model before it is adapted or quantized"
        )
    return result


def lazy_weight(shape: torch.Size, dtype: torch.dtype, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """A LazyWeight; the tensor itself while torch.compile traces, which leaves out what is not used."""
    return make() if torch.compiler.is_compiling() else LazyWeight(shape, dtype, device, make)
