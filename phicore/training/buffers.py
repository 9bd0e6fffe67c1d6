"""What a model holds that belongs to what is trained, beside the parameters that require gradients."""

import weakref

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from phicore.adapters.lora import LowRankLinear
from phicore.modules import unwrapped
from phicore.training.distributed import on_first_rank, world_size
from phicore.training.frozen import checksum, frozen_tensors
from phicore.zero.agreement import copy_from_first_rank

SMALL = 2**16  # elements that are looked at one by one
SAMPLE = 2**12  # those that are looked at of more


class TrainedBuffers:
    """Buffers that are part of a checkpoint: those that training writes (running means, say), not the frozen base's,
    nor those that torch itself would not save (persistent=False). Parameters without gradients that training writes
    (a teacher that follows the student) are among them.

    The kernel of batch norm writes past the version counter. The start of a PiSSA or OLoRA layer counts too: it belongs
    to the A and B that were trained, and another machine's decomposition could differ. `buffer.data.mul_()` writes past
    the counter as well, so contents are compared, those of a large tensor by a sample.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        kept = {
            buffer
            for module in model.modules()
            if isinstance(module, _NormBase | LowRankLinear)
            for name, buffer in module.named_buffers(recurse=False)
            if name != "base_norm_squared"
        }
        with unwrapped(model) as bare:
            self._at_start = {
                name: (weakref.ref(buffer), buffer._version)
                for name, buffer in bare.named_buffers()
                if buffer not in kept
            }
            self._contents = {name: _content(tensor) for name, tensor in frozen_tensors(bare).items()}

    def find(self) -> dict[str, Tensor]:
        """They, by name."""
        found: dict[str, Tensor] = {}
        with unwrapped(self.model) as bare:
            every, buffers = frozen_tensors(bare), dict(bare.named_buffers())
        for name, tensor in every.items():
            changed = name in self._contents and self._contents[name] != _content(tensor)
            if name in buffers:
                at_start, version = self._at_start.get(name, (None, None))
                changed |= at_start is None or at_start() is not tensor or tensor._version != version
            if changed:
                found[name] = tensor
        return found

    def share(self) -> None:
        """Gives every rank rank 0's, as DistributedDataParallel does; every rank must call it at the same point."""
        if world_size() > 1:
            names = on_first_rank(lambda: list(self.find()))
            with unwrapped(self.model) as bare:
                tensors = frozen_tensors(bare)
            copy_from_first_rank([tensors[name] for name in names], None)


def _content(tensor: Tensor) -> int | None:
    """What tells a tensor's content from another; None for those of a layout or a class of their own."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return None
    flat = tensor.detach().reshape(-1)
    return checksum(flat if len(flat) <= SMALL else flat[:: len(flat) // SAMPLE])
