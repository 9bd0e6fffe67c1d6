"""The whole state out of the ranks' pieces, a bucket at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from phicore.zero.collectives import Collectives
from phicore.zero.layout import Bucket, Slot
from phicore.zero.state import is_sliced

States = dict[str, dict[str, Any]]  # by name of parameter, then of state


@torch.no_grad()
def gather_states(
    buckets: Sequence[Bucket],
    own: States,
    collectives: Callable[[torch.device], Collectives],
    group: dist.ProcessGroup | None,
    world_size: int,
    *,
    keep: bool,
) -> States:
    """States of whole parameters on the CPU, from the states of each rank's pieces.

    Args:
        buckets: of all ranks.
        own: states of this rank's pieces.
        collectives: for a device.
        group, world_size: the ranks.
        keep: whether this rank wants them; else it helps and gets none.
    """
    sizes = {piece.name: piece.stop - piece.start for bucket in buckets for piece in bucket.pieces}
    # What there is of each parameter: a dtype in place of a tensor of elements, and other values as they are.
    local = {
        name: {key: value.dtype if is_sliced(value, sizes[name]) else _own(value) for key, value in values.items()}
        for name, values in own.items()
    }
    of_ranks: list[States] = [local]
    if world_size > 1:
        of_ranks = [{}] * world_size
        dist.all_gather_object(of_ranks, local, group=group)
    kinds: States = {}
    for found in of_ranks:
        kinds.update(found)
    whole: States = {name: dict(values) for name, values in kinds.items()}
    for bucket in buckets:
        split = {
            (key, kind)
            for slot in bucket.slots
            for key, kind in kinds.get(slot.name, {}).items()
            if isinstance(kind, torch.dtype)
        }
        for key, dtype in sorted(split, key=str):
            flat = torch.zeros(bucket.flat.shape, dtype=dtype, device=bucket.flat.device)
            shard = flat[bucket.shard.storage_offset() :][: bucket.shard.numel()]
            for piece in bucket.pieces:
                if key in own.get(piece.name, {}):
                    shard[piece.place] = own[piece.name][key]
            collectives(flat.device).gather(flat)()
            for slot, value in _cut(bucket, flat) if keep else ():
                if key in kinds.get(slot.name, {}):
                    whole[slot.name][key] = value
    return whole if keep else {}


def _own(value: Any) -> Any:
    """A value that later steps do not change, on the CPU."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _cut(bucket: Bucket, flat: Tensor) -> Iterator[tuple[Slot, Tensor]]:
    for slot in bucket.slots:
        shape = slot.parameter.shape
        # a copy: a view would keep the whole bucket
        yield slot, flat[slot.offset : slot.offset + shape.numel()].view(shape).to("cpu", copy=True)
