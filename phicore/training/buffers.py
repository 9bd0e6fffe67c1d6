"""Which of a model's buffers belong to what is trained."""

import weakref

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from phicore.adapters.lora import LowRankLinear
from phicore.modules import unwrapped
from phicore.training.distributed import on_first_rank, world_size
from phicore.zero.agreement import copy_from_first_rank


class TrainedBuffers:
    """Buffers that are part of a checkpoint: those that training writes (running means, say), not the frozen base's,
    nor those that torch itself would not save (persistent=False).

    The kernel of batch norm writes past the version counter. The start of a PiSSA or OLoRA layer counts too: it belongs
    to the A and B that were trained, and another machine's decomposition could differ.
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

    def find(self) -> dict[str, Tensor]:
        """They, by name."""
        found: dict[str, Tensor] = {}
        with unwrapped(self.model) as bare:
            passing = {  # made anew when it is needed, as a cache is
                f"{path}.{name}" if path else name
                for path, module in bare.named_modules()
                for name in module._non_persistent_buffers_set
            }
            every = dict(bare.named_buffers())
        for name, buffer in every.items():
            if name in passing:
                continue
            at_start, version = self._at_start.get(name, (None, None))
            if at_start is None or at_start() is not buffer or buffer._version != version:
                found[name] = buffer
        return found

    def share(self) -> None:
        """Gives every rank rank 0's, as DistributedDataParallel does; every rank must call it at the same point."""
        if world_size() > 1:
            names = on_first_rank(lambda: list(self.find()))
            with unwrapped(self.model) as bare:
                buffers = dict(bare.named_buffers())
            copy_from_first_rank([buffers[name] for name in names], None)
