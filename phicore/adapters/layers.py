"""The adapter layers: which there are, which one goes over what kind of layer, and finding them in a model."""

from collections.abc import Iterator, Mapping

from torch import nn

from phicore.adapters.attention import OpenAttention
from phicore.adapters.base import transposed_kinds
from phicore.adapters.convolution import CONVOLUTIONS, DoRAConvolution, LoRAConvolution, LowRankConvolution
from phicore.adapters.dora import DoRALinear
from phicore.adapters.embedding import DoRAEmbedding, LoRAEmbedding, LowRankEmbedding
from phicore.adapters.experts import LoRAExperts
from phicore.adapters.lora import LoRALinear, LowRankLayer, LowRankLinear
from phicore.adapters.trained import TrainedPart
from phicore.modules import around
from phicore.nf4.linear import NF4Linear

AdapterLayer = LowRankLayer | TrainedPart | LoRAExperts


def linear_kinds() -> tuple[type[nn.Module], ...]:
    """What "all-linear" can mean."""
    return (nn.Linear, NF4Linear, LowRankLinear, *transposed_kinds())


def adaptable_kinds() -> tuple[type[nn.Module], ...]:
    """What a target can name."""
    return (
        *linear_kinds(), nn.Embedding, LowRankEmbedding, *CONVOLUTIONS, LowRankConvolution, nn.MultiheadAttention,
    )  # fmt: skip


def layer_class(base: nn.Module, dora: bool) -> type[LowRankLayer]:
    """The adapter layer for a base of one of the adaptable kinds."""
    if LowRankEmbedding.fits(base):
        return DoRAEmbedding if dora else LoRAEmbedding
    if LowRankConvolution.fits(base):
        return DoRAConvolution if dora else LoRAConvolution
    return DoRALinear if dora else LoRALinear


def adapter_layers(
    model: nn.Module, name: str | None = None, *, every_place: bool = False
) -> Iterator[tuple[str, AdapterLayer]]:
    """The adapter layers of a model with the names of the places they stand in, outermost first.

    Args:
        model: any module.
        name: only this adapter's.
        every_place: a layer that stands in two places comes twice.

    Yields:
        (name that the layer had before adapting, layer).
    """
    every = dict(model.named_modules(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=not every_place):
        if not isinstance(module, AdapterLayer) or (name is not None and module.adapter_name != name):
            continue
        parent, _, last = path.rpartition(".")
        while last == "base" and isinstance(every[parent], AdapterLayer):  # an adapter under another
            path = parent
            parent, _, last = path.rpartition(".")
        yield path, module


def adapter_around(path: str, every: Mapping[str, nn.Module]) -> str | None:
    """The name of the outermost adapter layer that a module stands in, whatever it is there; None for one outside.

    Args:
        path: of the module.
        every: all modules by name.
    """
    return next((outer for outer in around(path) if outer != path and isinstance(every[outer], AdapterLayer)), None)


def merged_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, AdapterLayer | OpenAttention]]:
    """The layers that `merge` made: name, merged layer, and the adapter layer that it stands for."""
    for path, module in model.named_modules(remove_duplicate=False):
        layer = module.__dict__.get("merged_from")
        if layer is not None:
            yield path, module, layer
