"""Telling that ranks were given different frozen weights, or a resumed run others than it began with, which nothing
else would: only what trains is made equal and kept.

Each tensor gets a sum of 64 bits over all its bytes, so that no weight may differ, in one pass with a few megabytes of
memory, on the device where it is:

    s = sum over words w_i of the chunk of w_i * m_i,    h = h * M + s,    all modulo 2^64

with odd multipliers. A word that differs then always changes the sum, as does exchanging two different words, but for
one pair of values in many; this finds mistakes, not attacks.
"""

import functools
import math
from collections.abc import Callable, Container
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from phicore.modules import unwrapped
from phicore.nf4 import NF4Linear
from phicore.nf4.codec import decode_absmax
from phicore.training.distributed import together

CHUNK = 2**18  # 8-byte words: 2 MiB stay in a core's cache
MULTIPLIER = 6364136223846793005  # of Knuth's linear congruential generator, modulo 2^64


def checksum(tensor: Tensor) -> int:
    """64 bits of a tensor's dtype-independent bytes, the same on any device; 0 for one without memory."""
    if (parts := _parts(tensor)) is not None:
        return functools.reduce(lambda h, part: (h * MULTIPLIER + checksum(part)) % 2**64, parts, 0)
    if tensor.is_meta or not tensor.numel():
        return 0
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = data.numel() // 8 * 8
    if data.data_ptr() % 8:  # a slice that begins within a word cannot be seen as words
        data = data.clone()
    words, rest = data[:whole].view(torch.int64), data[whole:]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in words.split(CHUNK):
        total = total * MULTIPLIER + (chunk * _multipliers(tensor.device)[: chunk.numel()]).sum()
    for byte in rest.to(torch.int64):
        total = total * MULTIPLIER + byte
    return int(total) % 2**64


def _parts(tensor: Tensor) -> tuple[Tensor, ...] | None:
    """The plain tensors that one of a class or a layout of its own is made of: another library's coded weight, or where
    a sparse tensor's elements are, and which. None for a plain one."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return tuple(getattr(tensor, name) for name in sorted(names))
    if tensor.layout == torch.strided:
        return None
    sparse = tensor.detach()
    if sparse.layout == torch.sparse_coo:
        sparse = sparse.coalesce()
        return sparse.indices(), sparse.values()
    if sparse.layout in (torch.sparse_csr, torch.sparse_bsr):
        return sparse.crow_indices(), sparse.col_indices(), sparse.values()
    return sparse.ccol_indices(), sparse.row_indices(), sparse.values()


@functools.cache
def _multipliers(device: torch.device) -> Tensor:
    """Odd numbers, int64 [CHUNK]."""
    steps = torch.arange(CHUNK, dtype=torch.int64)
    mixed = (steps + 1) * MULTIPLIER
    mixed = (mixed ^ (mixed >> 29)) * MULTIPLIER
    return (mixed | 1).to(device)


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that do not train, and buffers that belong to the model's state, each once."""
    persistent = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    return {name: t for name, t in (dict(model.named_parameters()) | buffers).items() if not t.requires_grad}


def describe_frozen(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Shape, dtype and checksum of each, in words."""
    return {
        name: f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')} with checksum {checksum(t):016x}"
        for name, t in tensors.items()
    }


def check_alike(by_rank: list[dict[str, str]]) -> None:
    """Raises ValueError for the first tensor that is not on all ranks what it is on rank 0."""
    for name in dict.fromkeys(name for found in by_rank for name in found):
        for rank, found in enumerate(by_rank):
            if found.get(name) != by_rank[0].get(name):
                raise ValueError(
                    f"{name}: rank {rank} has {found.get(name, 'nothing')} where rank 0 has "
                    f"{by_rank[0].get(name, 'nothing')}; it does not train, so it stays different: load "
                    f"the same base, quantized alike, on every rank"
                )


def check_same_frozen(model: nn.Module, trained: Callable[[], Container[str]]) -> dict[str, str]:
    """Compares what no rank will give another; every rank must call it.

    Args:
        model: of this rank.
        trained: gives the names of buffers that belong to what trains, which are rank 0's from the start.

    Returns:
        `describe_frozen` of all of it.

    Raises:
        ValueError: a tensor differs, on every rank, naming the first one.
    """

    def described() -> dict[str, str]:
        with unwrapped(model) as bare:
            shared = trained()
            return describe_frozen({name: t for name, t in frozen_tensors(bare).items() if name not in shared})

    by_rank = together(described)
    together(lambda: check_alike(by_rank))
    return by_rank[0]


MEAN = "scales of mean "
CLOSE = 1e-5  # relative; the last bits of a sum in float32, and no other scale


def described_base(model: nn.Module, described: dict[str, str]) -> dict[str, str]:
    """`describe_frozen` of a base as another process may have coded it: of NF4 layers the codes, and of their scales
    the mean, since the scales hang in their last bits on the number of threads that summed them."""
    with unwrapped(model) as bare:
        layers = {path: module for path, module in bare.named_modules() if isinstance(module, NF4Linear)}
    base = dict(described)
    for path, layer in layers.items():
        absmax, *more = (f"{path}.{part}".lstrip(".") for part in ("absmax", "nested_absmax", "offset"))
        for name in more:
            base.pop(name, None)
        if absmax in base and not layer.absmax.is_meta:
            base[absmax] = f"{MEAN}{_mean_scale(layer)!r}"
    return base


def _mean_scale(layer: NF4Linear) -> float:
    scales = layer.absmax
    if layer.nested_absmax is not None and layer.offset is not None:
        scales = decode_absmax(scales, layer.nested_absmax, layer.offset)
    return float(scales.mean(dtype=torch.float64))


def check_same_base(checkpoint: Path, saved: dict[str, str], now: dict[str, str]) -> None:
    """Compares the base that a checkpoint was written over with the one it would go on over, each a `described_base`.

    Raises:
        ValueError: a tensor differs or is gone, naming the first one.
    """
    wrong = [name for name, words in saved.items() if not _same(words, now.get(name, ""))]
    if wrong:
        raise ValueError(
            f"{checkpoint} was written over another base: {wrong[0]} (of {len(wrong)} tensors) is "
            f"{now.get(wrong[0], 'not there, or trains')} and was {saved[wrong[0]]}. Resume over that base, or train "
            f"over this one in another output"
        )


def _same(then: str, now: str) -> bool:
    if then.startswith(MEAN) and now.startswith(MEAN):
        return math.isclose(float(then.removeprefix(MEAN)), float(now.removeprefix(MEAN)), rel_tol=CLOSE)
    return then == now
