"""Which adapters of a model answer, how strongly, and for which rows of a batch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from phicore.adapters.attach import AdapterLayer, adapter_layers, merged_layers
from phicore.adapters.dora import DoRALayer
from phicore.adapters.experts import LoRAExperts
from phicore.adapters.lora import LowRankLayer, Rows
from phicore.adapters.trained import TrainedBias, TrainedPart


def activate(model: nn.Module, adapters: str | Sequence[str] | Mapping[str, float]) -> nn.Module:
    """Lets these adapters answer, and no others; which of them train stays as it is.

    Several LoRA adapters add up: W + sum of strength * scaling * B A. A DoRA adapter stands over what those attached
    before it make of W: of that weight U it makes U + strength * (U' - U), where the rows of U' have the norms m and
    the directions of U + scaling * B A. At 0 it is not there, at 1 whole, and the way is straight.

    Args:
        model: a model with adapters, not merged.
        adapters: a name, names, or names with strengths.

    Returns:
        The model.

    Raises:
        ValueError: a name that the model does not have, a merged model, or a strength other than 1 for an adapter that
            holds more than low-rank pairs (modules_to_save, trained biases or tokens). The model is then unchanged.
    """
    named = [adapters] if isinstance(adapters, str) else adapters
    strengths = dict(named) if isinstance(named, Mapping) else dict.fromkeys(named, 1.0)
    layers = _layers(model, list(strengths))
    for path, layer in layers:
        strength = strengths.get(layer.adapter_name, 1.0)
        if strength != 1 and (what := _beside(layer)):
            raise ValueError(
                f'"{layer.adapter_name}" holds {path} {what}, which has no strength; give it 1, not {strength}'
            )
    for _, layer in layers:
        layer.enabled = layer.adapter_name in strengths
        if isinstance(layer, LowRankLayer | LoRAExperts):
            layer.strength = float(strengths.get(layer.adapter_name, 1.0))
    for _, layer in layers:
        if isinstance(layer, DoRALayer) and isinstance(layer.base, LowRankLayer):
            layer.refresh_base_norm()  # of what the adapters under it now make of W
    return model


@contextmanager
def mixed(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within it, each row of a batch is answered by an adapter of its own: one pass through the base for all rows.

    Args:
        model: a model with adapters, not merged. Every adapted layer must see the batch as its input's first
            dimension.
        names: for each row, the adapter's name, or None for the base model alone.

    Raises:
        ValueError: a name that the model does not have; a merged model; an adapter that holds more than low-rank pairs
            of layers (modules_to_save and target_parameters, which would need a pass of their own; trained biases or
            tokens); in the forward pass, a layer whose input has another number of rows.
    """
    layers = _layers(model, [name for name in names if name is not None])
    for path, layer in layers:
        what = "adapted in its parameters" if isinstance(layer, LoRAExperts) else _beside(layer)
        if layer.adapter_name in names and what:
            raise ValueError(
                f'"{layer.adapter_name}" is more than low-rank pairs of layers: it holds {path} {what}, which '
                f"cannot be mixed with others in a batch"
            )
    before = [(layer, layer.enabled) for _, layer in layers]
    norms: list[tuple[DoRALayer, torch.Tensor]] = []
    try:
        for _, layer in layers:
            mine = [row for row, name in enumerate(names) if name == layer.adapter_name]
            layer.enabled = bool(mine)
            if isinstance(layer, LowRankLayer) and mine:
                layer.rows = Rows(torch.tensor(mine, device=layer.lora_A.device), len(names))
        for _, layer in layers:
            if isinstance(layer, DoRALayer) and layer.enabled and isinstance(layer.base, LowRankLayer):
                norms.append((layer, layer.base_norm_squared))
                layer.refresh_base_norm()  # its rows go past the adapters under it
        yield model
    finally:
        for dora, norm in norms:
            dora.base_norm_squared = norm
        for layer, enabled in before:
            layer.enabled = enabled
            if isinstance(layer, LowRankLayer):
                layer.rows = None


def _beside(layer: AdapterLayer) -> str:
    """What of a layer trains that is no low-rank pair, in words; empty if nothing does."""
    if isinstance(layer, TrainedPart):
        return layer.what
    return TrainedBias.what if isinstance(layer, LowRankLayer) and layer.trained_bias is not None else ""


def _layers(model: nn.Module, names: list[str]) -> list[tuple[str, AdapterLayer]]:
    if any(merged_layers(model)):
        raise ValueError("the model's adapters are merged; unmerge it first")
    layers = list(adapter_layers(model))
    known = sorted({layer.adapter_name for _, layer in layers})
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no adapter named {unknown[0]!r}; the model has {known}")
    return layers
