"""What an adapter asks of its base layer.

A base is any module with `in_features` and `out_features` that maps [..., in] to [..., out]. An adapter calls it, and
beyond that only these functions, so that it works alike over nn.Linear, NF4Linear or another adapter. A base with a
method of the same name answers by it; a plain linear layer, by its weight and bias.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Base: TypeAlias = Any  # an nn.Module as described above; nn.Module's own typing would hide its attributes


def project(base: Base, x: Tensor) -> Tensor:
    """x @ W^T, without the bias: [..., in] -> [..., out]."""
    method = getattr(base, "project", None)
    return method(x) if method is not None else nn.functional.linear(x, base.weight)


def project_with_rows(base: Base, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Both x @ W^T and rows @ W^T, decoding W once if it is coded.

    Args:
        x: [..., in], differentiable.
        rows: [r, in] in x's dtype; no gradient flows into them.

    Returns:
        [..., out] and [r, out].
    """
    method = getattr(base, "project_with_rows", None)
    if method is not None:
        return method(x, rows)
    y = project(base, x)
    with torch.no_grad():
        return y, project(base, rows)


def dense_weight(base: Base, dtype: torch.dtype) -> Tensor:
    """W [out, in] as a dense tensor in dtype."""
    method = getattr(base, "dense_weight", None)
    return method(dtype) if method is not None else base.weight.to(dtype)


def compute_dtype(base: Base) -> torch.dtype:
    """The dtype that the base computes in when its input does not say otherwise."""
    dtype = getattr(base, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else base.weight.dtype


def device(base: Base) -> torch.device:
    """Where the base lies."""
    return next(tensor.device for tensors in (base.parameters(), base.buffers()) for tensor in tensors)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums over a row: float32, or float64 if dtype is."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context for sums that must keep their dtype: autocast would take their matrix products in 16 bits."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # the meta device knows no autocast
