"""An NF4 weight for code that reads `layer.weight`: T5 its dtype, Mamba and nn.TransformerEncoder all of it."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from phicore.nf4.tensor import NF4Tensor


class DecodedWeight(Tensor):
    """An NF4 weight as a tensor that is decoded when something computes with it."""

    nf4: NF4Tensor

    @staticmethod
    def __new__(cls, nf4: NF4Tensor) -> "DecodedWeight":
        made = torch.Tensor._make_wrapper_subclass(cls, nf4.shape, dtype=nf4.dtype, device=nf4.device)
        made.nf4 = nf4
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda weight: weight.nf4.dequantize(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:
        return f"DecodedWeight({self.nf4})"
