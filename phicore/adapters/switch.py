"""Which adapters of a model answer, how strongly, and for which rows of a batch."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from phicore.adapters.convolution import LowRankConvolution
from phicore.adapters.dora import DoRALayer
from phicore.adapters.experts import LoRAExperts
from phicore.adapters.layers import AdapterLayer, adapter_layers, merged_layers
from phicore.adapters.lora import LowRankLayer, Rows
from phicore.adapters.token_rows import TrainedRows
from phicore.adapters.trained import TrainedBias, TrainedPart
from phicore.modules import Model


def activate(model: Model, adapters: str | Sequence[str] | Mapping[str, float]) -> Model:
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
        ValueError: a name that the model does not have, a merged model, a strength that is no finite number, or one
            other than 1 for an adapter that holds more than low-rank pairs (modules_to_save, trained biases or
            tokens); a call within disabled() or mixed(), behind which it would be lost. The model is then unchanged.
    """
    named = [adapters] if isinstance(adapters, str) else adapters
    strengths = dict(named) if isinstance(named, Mapping) else dict.fromkeys(named, 1.0)
    for name, strength in strengths.items():
        if not isinstance(strength, int | float) or not math.isfinite(strength):
            raise ValueError(f'the strength of "{name}" must be a finite number, got {strength!r}')
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
    refresh_norms(model)
    return model


def refresh_norms(model: nn.Module) -> None:
    """Has each DoRA layer over another adapter sum the norms of what those under it now make of W: the innermost first,
    whose own norms stand in the weights of some (FusedDoRALinear)."""
    for layer in reversed(_stacked_dora(model)):
        layer.refresh_base_norm()


def _stacked_dora(model: nn.Module) -> list[DoRALayer]:
    """The DoRA layers over another adapter, outermost first."""
    layers = (layer for _, layer in adapter_layers(model))
    return [layer for layer in layers if isinstance(layer, DoRALayer) and isinstance(layer.base, LowRankLayer)]


def check_settled_by_none(model: nn.Module) -> None:
    """Raises ValueError within disabled() and mixed(): what is switched, attached or loaded there would be lost behind
    it, or hold norms of weights that are others then."""
    for within, found in (
        ("disabled", any(layer in _disabled for _, layer in adapter_layers(model))),
        ("mixed", _has_rows(model)),
    ):
        if found:
            raise ValueError(f"within {within}() it is settled which adapters answer; leave its `with` block first")


def check_not_mixed(model: nn.Module, what: str) -> None:
    """Raises ValueError within mixed(), for `what` batches its examples in an order of its own: rows would be answered
    by another's adapter."""
    if _has_rows(model):
        raise ValueError(
            f"within mixed() each row of a batch has its adapter, and {what} chooses which example is which row; call "
            f"the model itself there (of transformers also its own generate), or {what} once an adapter (activate)"
        )


def _has_rows(model: nn.Module) -> bool:
    return any(getattr(layer, "rows", None) is not None for _, layer in adapter_layers(model))


@contextmanager
def mixed(model: Model, names: Sequence[str | None]) -> Iterator[Model]:
    """Within it, each row of a batch is answered by an adapter of its own: one pass through the base for all rows.

    With gradient checkpointing, call backward() within it too: layers that run again behind it know no rows. A model's
    own generate answers within it; phicore's, and a Trainer, batch in an order of their own and refuse.

    Args:
        model: a model with adapters, not merged. Every adapted layer must see the batch as its input's first
            dimension.
        names: for each row, the adapter's name, or None for the base model alone.

    Raises:
        ValueError: a name that the model does not have; a merged model; an adapter that holds what would need a pass
            of its own (modules_to_save, target_parameters, and bias="all" of modules without a pair); a call within
            disabled() or mixed(); in the forward pass, a layer whose input has another number of rows.
        RuntimeError: in backward() behind it, of a forward pass of the model, where that runs adapted layers again.
    """
    names = list(names)
    layers = _layers(model, [name for name in names if name is not None])
    for path, layer in layers:
        if layer.adapter_name in names and (what := _needs_a_pass(layer)):
            raise ValueError(
                f'"{layer.adapter_name}" is more than low-rank pairs of layers: it holds {path} {what}, which '
                f"cannot be mixed with others in a batch"
            )
    before = [(layer, layer.enabled) for _, layer in layers]
    norms: list[tuple[DoRALayer, Tensor]] = []
    hooks: list[RemovableHandle] = []
    outermost: dict[str, AdapterLayer] = {}
    left: list[bool] = []
    try:
        hooks.append(model.register_forward_hook(_needs_backward_within([layer for _, layer in layers], left)))
        for path, layer in layers:
            mine = [row for row, name in enumerate(names) if name == layer.adapter_name]
            layer.enabled = bool(mine)
            outer = outermost.setdefault(path, layer)
            if not mine:
                continue
            if isinstance(layer, LowRankLayer):
                layer.rows = Rows(torch.tensor(mine, device=layer.lora_A.device), len(names))
                if layer.trained_bias is not None:  # all rows get the base's, and by the hook the difference
                    hooks.append(outer.register_forward_hook(_adds_bias(layer, layer.trained_bias, layer.rows)))
            elif isinstance(layer, TrainedRows):
                layer.rows = Rows(torch.tensor(mine, device=layer.trained.device), len(names))
        for _, layer in layers:
            if isinstance(layer, DoRALayer) and layer.enabled and isinstance(layer.base, LowRankLayer):
                norms.append((layer, layer.base_norm_squared))
                layer.refresh_base_norm()  # its rows go past the adapters under it
        yield model
    finally:
        left.append(True)
        for hook in hooks:
            hook.remove()
        for dora, norm in norms:
            dora.base_norm_squared = norm
        for layer, enabled in before:
            layer.enabled = enabled
            if isinstance(layer, LowRankLayer | TrainedRows):
                layer.rows = None


_disabled: WeakKeyDictionary[AdapterLayer, list[int]] = WeakKeyDictionary()
"""Layers that are passed by -> whether they were enabled before, and how many disabled() they are in."""


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Within it, the base model alone answers: adapters are passed by.

    It is the model that changes, for all threads. Several at once (one in another, in threads, in generators that take
    turns) may end in any order: with the last one the adapters are back as they were before the first.

    Raises:
        ValueError: the model has no adapter, or is merged.
    """
    layers = [layer for _, layer in adapter_layers(model)]
    merged = any(merged_layers(model))
    if not layers or merged:
        raise ValueError("the model has no adapter that could be disabled" + (" (it is merged)" if merged else ""))
    norms = [(layer, layer.base_norm_squared) for layer in _stacked_dora(model)]
    entries = [(layer, _disabled.setdefault(layer, [layer.enabled, 0])) for layer in layers]
    for layer, entry in entries:
        entry[1] += 1
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, entry in entries:
            entry[1] -= 1
            if entry[1] == 0:
                layer.enabled = bool(entry[0])
                _disabled.pop(layer, None)
        if any(layer.base_norm_squared is not norm for layer, norm in norms):
            refresh_norms(model)  # a cast or a state that was loaded has summed those of a base without adapters


def _needs_backward_within(layers: Sequence[nn.Module], left: list[bool]) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook for a model that has backward(), once `left` holds something, raise where it runs one of these
    layers again."""

    def check(_gradient: Tensor) -> None:
        if left:
            backward = torch._C._current_graph_task_id()
            hooks: list[RemovableHandle] = []

            def done() -> None:
                for hook in hooks:
                    hook.remove()

            def refuse(_layer: nn.Module, _inputs: Any) -> None:
                done()
                if torch._C._current_graph_task_id() == backward:  # and not behind one that failed
                    raise RuntimeError(
                        "backward() of a forward pass in mixed() was called behind it, and gradient checkpointing runs "
                        "layers again, which no longer know their rows; call backward() within the `with` block"
                    )

            hooks += [layer.register_forward_pre_hook(refuse) for layer in layers]
            Variable._execution_engine.queue_callback(done)

    def watch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        for leaf in () if torch.compiler.is_compiling() else tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(check)

    return watch


def _adds_bias(layer: LowRankLayer, trained: Tensor, rows: Rows) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A forward hook for the outermost adapter of a layer: the trained bias in place of the frozen one in some rows.

    Where the adapters stand in each other, one at most answers for a row, and no bias is scaled, so that adding the
    difference behind all of them is the same.
    """

    def add(_layer: nn.Module, _inputs: Any, y: Tensor) -> Tensor:
        if not layer.enabled:  # by disabled(), within mixed()
            return y
        difference = (trained - layer.innermost.bias.to(trained.dtype)).to(y.dtype)  # [out]
        if isinstance(layer, LowRankConvolution):
            difference = layer.per_channel(difference)
        return y.index_add(0, rows.index, difference.expand(len(rows.index), *y.shape[1:]))

    return add


def _needs_a_pass(layer: AdapterLayer) -> str:
    """What of a layer cannot be mixed within a batch, in words; empty if it can."""
    if isinstance(layer, LoRAExperts):
        return "adapted in its parameters"
    return layer.what if isinstance(layer, TrainedPart) and not isinstance(layer, TrainedRows) else ""


def _beside(layer: AdapterLayer) -> str:
    """What of a layer trains that is no low-rank pair, in words; empty if nothing does."""
    if isinstance(layer, TrainedPart):
        return layer.what
    return TrainedBias.what if isinstance(layer, LowRankLayer) and layer.trained_bias is not None else ""


def _layers(model: nn.Module, names: list[str]) -> list[tuple[str, AdapterLayer]]:
    if any(merged_layers(model)):
        raise ValueError("the model's adapters are merged; unmerge it first")
    check_settled_by_none(model)
    layers = list(adapter_layers(model))
    known = sorted({layer.adapter_name for _, layer in layers})
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no adapter named {unknown[0]!r}; the model has {known}")
    return layers
