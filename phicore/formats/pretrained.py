"""What transformers' own methods do with a model that has NF4 or adapter layers: save_pretrained, whose names would be
phicore's own, and tie_weights, which would put a dense weight in a coded one's or an adapted one's place."""

import logging
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from phicore.adapters.attach import finishers as adapted_finishers
from phicore.adapters.layers import adapter_layers
from phicore.formats.bitsandbytes import packed_groups, quantization_config, tied_groups
from phicore.modules import replace
from phicore.nf4.convert import finishers
from phicore.nf4.linear import NF4Linear

logger = logging.getLogger(__name__)


class Method:
    """A method of one model, in the place of its class's.

    Args:
        model: of transformers. It is held weakly: else its memory would be freed only when the garbage collector runs.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles of the model have a method of their own
        return type(self), (self._model(),)


class Saver(Method):
    """A model's save_pretrained: NF4 layers are written in bitsandbytes' layout, which from_pretrained reads."""

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Any = None,
        **options: Any,
    ) -> None:
        model: Any = self._model()
        ours = [module for module in model.modules() if type(module).__module__.startswith("phicore.")]
        coded = [module for module in ours if isinstance(module, NF4Linear)]
        plain = len(coded) < len(ours) or state_dict is not None or getattr(model, "_hf_peft_config_loaded", False)
        settings = quantization_config(model) if coded and not plain else None
        if settings is None:
            if ours:
                logger.warning(
                    "%s: written with phicore's own names, which from_pretrained does not read; phicore.save_adapter "
                    "writes adapters, and save_pretrained without a state_dict a model whose adapters are merged",
                    save_directory,
                )
                state_dict = _once_each(model.state_dict() if state_dict is None else state_dict)
            type(model).save_pretrained(model, save_directory, is_main_process, state_dict, **options)
            return
        tensors = {key: tensor for group in packed_groups(model) for key, tensor in group.items()}
        options = {"save_original_format": False, **options}
        with tied_as_is(model):
            model.config.quantization_config = settings
            try:
                type(model).save_pretrained(model, save_directory, is_main_process, tensors, **options)
            finally:
                del model.config.quantization_config


def _once_each(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state without the further names of tensors that have several: transformers knows those of its own tied layers,
    and refuses to write others. Loaded into a model with the same adapters, the first name fills them all."""
    first: dict[tuple[Any, ...], str] = {}
    return {
        name: tensor
        for name, tensor in state.items()
        if type(tensor) not in (Tensor, Parameter)
        or not tensor.data_ptr()
        or first.setdefault(_place(tensor), name) == name
    }


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors of the same memory, read alike, have in common."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def of_transformers(model: Module) -> list[Any]:
    """The models of transformers in a model, itself or what it holds (as sentence-transformers' do), but no part of
    one. Models of other libraries have methods of the same names that take other arguments."""
    module = sys.modules.get("transformers.modeling_utils")
    if module is None:
        return []
    if isinstance(model, module.PreTrainedModel):
        return [model]
    return [found for child in model.children() for found in of_transformers(child)]


def save_in_layout(model: Module) -> None:
    """Has save_pretrained of models of transformers write NF4 layers so that from_pretrained reads them, and adapter
    layers too, if under phicore's names."""
    for found in of_transformers(model):
        found.save_pretrained = Saver(found)


def untie_coded(model: Any) -> None:
    """Has tie_weights of a model of transformers leave NF4 layers as they are: one that was tied to a dense weight
    when it was coded has a weight of its own since."""
    coded = {f"{path}.weight" for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, NF4Linear)}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        tied = getattr(module, "_tied_weights_keys", None)
        if isinstance(tied, dict) and any({prefix + a, prefix + b} & coded for a, b in tied.items()):
            module._tied_weights_keys = {a: b for a, b in tied.items() if not {prefix + a, prefix + b} & coded}


class Tier(Method):
    """A model's tie_weights: it ties the frozen layers under the adapters, whose own tensors stay as they are."""

    def __call__(self, *args: Any, **options: Any) -> None:
        model: Any = self._model()
        layers = list(adapter_layers(model, every_place=True))
        try:
            for path, layer in layers:  # the innermost of a place comes last
                replace(model, path, layer.base)
            type(model).tie_weights(model, *args, **options)
        finally:
            for path, layer in reversed(layers):
                replace(model, path, layer)


def tie_under_adapters(model: Module) -> None:
    """Has tie_weights of models of transformers pass their adapters by."""
    for found in of_transformers(model):
        found.tie_weights = Tier(found)


finishers += [save_in_layout, untie_coded]
adapted_finishers += [save_in_layout, tie_under_adapters]


@contextmanager
def tied_as_is(model: Any) -> Iterator[None]:
    """Within it, the config says that head and embedding are tied only if they are: a reader ties them otherwise."""
    head = model.get_output_embeddings()  # of MusicGen a list, which has no weight
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    tied = [config for config in configs if getattr(config, "tie_word_embeddings", False)]
    if not hasattr(head, "weight") or (tied and not isinstance(head, NF4Linear) and _is_tied(model, head)):
        tied = []
    for config in tied:
        config.tie_word_embeddings = False
    try:
        yield
    finally:
        for config in tied:
            config.tie_word_embeddings = True


def _is_tied(model: Any, head: Any) -> bool:
    """Whether the head's weight is that of all that its model ties it to, which need not be the input's embedding: in
    encoder-decoders it may be the decoder's own. Models of images may have no embedding of the input."""
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is head.weight}
    groups = [group for group in tied_groups(model) if group & names]
    stays = bool(groups) and all(group <= names for group in groups)
    return stays or _same(head.weight, model.get_input_embeddings().weight)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
