"""Memory of the CPU that is used again, step after step.

The system hands out fresh memory a page at a time, each at its first touch. For a bucket that costs as much as copying
it, and malloc gives blocks of this size back to the system whenever it can. GPUs have torch's caching allocator.
"""

import torch
from torch import Tensor


class Scratch:
    """Lends uninitialised tensors, and keeps what comes back.

    Args:
        keep_bytes: what is kept at most, in all; the largest blocks are.
    """

    def __init__(self, keep_bytes: int) -> None:
        self.keep_bytes = keep_bytes
        self._free: list[Tensor] = []  # uint8, smallest first

    def take(self, like: Tensor) -> Tensor:
        """[n] for a tensor [n], of its dtype and device."""
        if like.device.type != "cpu":
            return torch.empty_like(like)
        fitting = next((place for place, block in enumerate(self._free) if block.nbytes >= like.nbytes), None)
        block = like.new_empty(like.nbytes, dtype=torch.uint8) if fitting is None else self._free.pop(fitting)
        return block[: like.nbytes].view(like.dtype)

    def give(self, tensor: Tensor) -> None:
        """Takes a tensor back that `take` has lent; nobody may use it any more."""
        if tensor.device.type != "cpu" or tensor.untyped_storage().nbytes() > self.keep_bytes:
            return
        block = tensor.new_empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        self._free = sorted([*self._free, block], key=lambda block: block.nbytes)
        while sum(block.nbytes for block in self._free) > self.keep_bytes:
            self._free.pop(0)
