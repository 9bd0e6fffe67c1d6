"""The two collectives of ZeRO, as each backend does them best.

A rank's share of either is (W - 1) / W of the elements, so a step sends 2 (W - 1) / W elements for each parameter:
what an all-reduce of the gradients sends (Rajbhandari et al. 2019, section 7.1).
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from phicore.zero.blame import Blame
from phicore.zero.scratch import Scratch
from phicore.zero.shared_memory import SharedMemory, open_shared_memory

# torch 2.13 renames these and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Collectives(ABC):
    """Starts collectives of one group; what they return waits for the end.

    Args:
        scratch: where tensors on their way lie.
        group: the ranks; default all.
    """

    def __init__(self, scratch: Scratch, group: dist.ProcessGroup | None = None) -> None:
        self.scratch, self.group = scratch, group

    @abstractmethod
    def reduce(self, full: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        """full [W * shard] -> this rank's shard of the sum over ranks, [shard] in dtype."""

    @abstractmethod
    def gather(self, full: Tensor) -> Callable[[], None]:
        """full [W * shard] with this rank's shard in its place -> None; all shards are in place."""

    def maximum(self, flags: Tensor) -> Tensor:
        """flags, integers [n] -> the greatest of all ranks', each; waits for them."""
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        return flags

    def prepare(self, size: int) -> None:  # noqa: B027 (most have nothing to do)
        """Makes ready for tensors of at most so many bytes; every rank must call it at the same point."""

    def take(self, like: Tensor) -> Tensor:
        """Uninitialised memory [n], of the dtype and device of a tensor [n], that is best to `reduce`."""
        return self.scratch.take(like)

    def give(self, tensor: Tensor) -> None:
        """Takes memory back that `take` has lent, when the sum that it went to is there."""
        self.scratch.give(tensor)


def choose_collectives(
    group: dist.ProcessGroup | None, world_size: int, device: torch.device, scratch: Scratch, blame: Blame
) -> Collectives:
    """The collectives for a group's backend on a device. What is not finite is reported to `blame`.

    NCCL (and any backend that is not gloo): reduce-scatter and all-gather, which it implements with the optimal
    traffic. gloo: its reduce-scatter is an all-reduce of which a slice is kept, twice the traffic, and its all-gather
    takes 1.7 times an all-reduce. An all-to-all followed by a local sum moves the optimal (W - 1) / W, and so do W
    broadcasts that run side by side, in 0.7 and 0.6 times an all-reduce at W = 4. Where all ranks run on one host,
    memory that they share moves the same without gloo's threads and the kernel's copies. The local sum also runs in
    the order of ranks and in float32: the result depends neither on bucket sizes nor, for 16-bit gradients, on
    rounding between ranks. It sees whose part is not finite as well, for a sum over what it has just summed; where the
    backend sums, each rank looks at all that it sends.
    """
    if world_size == 1:
        return _Alone(scratch)
    if backend(group, device) == "gloo":
        return _Gloo(scratch, group, device, blame)
    return _Native(scratch, group, blame)


def backend(group: dist.ProcessGroup | None, device: torch.device) -> str:
    """Name of the backend that serves a group's tensors on a device; "cpu:gloo,cuda:nccl" is torch's form."""
    backends = dict(entry.split(":") for entry in dist.get_backend_config(group).split(","))
    return backends.get(device.type, dist.get_backend(group))


class _Alone(Collectives):
    def reduce(self, full: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        return lambda: full.to(dtype)

    def gather(self, full: Tensor) -> Callable[[], None]:
        return lambda: None


class _Native(Collectives):
    """The backend's own."""

    def __init__(self, scratch: Scratch, group: dist.ProcessGroup | None, blame: Blame) -> None:
        super().__init__(scratch, group)
        self.blame = blame

    def reduce(self, full: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        self.blame.of_given(full, dtype)
        return _reduce_scatter_shard(full, dtype, self.group)

    def gather(self, full: Tensor) -> Callable[[], None]:
        return _all_gather_shards(full, self.group)


class _Gloo(Collectives):
    """Through memory that the ranks share, where `prepare` finds that they can, else through sockets."""

    def __init__(self, scratch: Scratch, group: dist.ProcessGroup | None, device: torch.device, blame: Blame) -> None:
        super().__init__(scratch, group)
        self.blame = blame
        self.may_share = device.type == "cpu"
        self.memory: SharedMemory | None = None

    def prepare(self, size: int) -> None:
        if self.may_share and (self.memory is None or self.memory.block_bytes < size):
            self.memory = open_shared_memory(self.group, size, functools.partial(_sum, blame=self.blame))
            self.may_share = self.memory is not None

    def take(self, like: Tensor) -> Tensor:
        block = None if self.memory is None else self.memory.take(like)
        return super().take(like) if block is None else block

    def give(self, tensor: Tensor) -> None:
        if self.memory is None or not self.memory.holds(tensor):
            super().give(tensor)

    def reduce(self, full: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        if self.memory is None:
            return _sum_after_all_to_all(full, dtype, self.group, self.scratch, self.blame)
        return self.memory.reduce(full, dtype)

    def maximum(self, flags: Tensor) -> Tensor:
        if self.memory is None or flags.nbytes > self.memory.block_bytes:
            return super().maximum(flags)
        return self.memory.maximum(flags)

    def gather(self, full: Tensor) -> Callable[[], None]:
        return _broadcast_each_shard(full, self.group) if self.memory is None else self.memory.gather(full)


def _sum_after_all_to_all(
    full: Tensor, dtype: torch.dtype, group: dist.ProcessGroup | None, scratch: Scratch, blame: Blame
) -> Callable[[], Tensor]:
    received = scratch.take(full)
    work = dist.all_to_all_single(received, full, group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        total = _sum(received.view(dist.get_world_size(group), -1).unbind(), dtype, blame)
        scratch.give(received)
        return total

    return finish


def _sum(parts: Sequence[Tensor], dtype: torch.dtype, blame: Blame) -> Tensor:
    """Of [shard] each, from rank 0, 1, ..."""
    first, *others = parts
    total = first + others.pop(0) if dtype == first.dtype else first.to(dtype)
    for part in others:
        total += part
    blame.of_sum(total, parts)
    return total


def _broadcast_each_shard(full: Tensor, group: dist.ProcessGroup | None) -> Callable[[], None]:
    shards = full.view(dist.get_world_size(group), -1)
    works = [dist.broadcast(shard, group=group, group_src=r, async_op=True) for r, shard in enumerate(shards)]

    def finish() -> None:
        for work in works:
            work.wait()

    return finish


def _reduce_scatter_shard(full: Tensor, dtype: torch.dtype, group: dist.ProcessGroup | None) -> Callable[[], Tensor]:
    world_size = dist.get_world_size(group)
    # The backend sums in the gradients' dtype, and float16 ends at 65,504: there it sums their share of the mean.
    shrink = world_size if full.dtype == torch.float16 else 1
    shard = full.new_empty(full.numel() // world_size)
    work = _reduce_scatter(shard, full if shrink == 1 else full / shrink, group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return shard.to(dtype) if shrink == 1 else shard.to(dtype).mul_(shrink)

    return finish


def _all_gather_shards(full: Tensor, group: dist.ProcessGroup | None) -> Callable[[], None]:
    shard = full.view(dist.get_world_size(group), -1)[dist.get_rank(group)]
    work = _all_gather(full, shard, group=group, async_op=True)

    def finish() -> None:
        work.wait()

    return finish
