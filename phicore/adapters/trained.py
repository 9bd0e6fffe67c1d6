"""Parts of a model that train beside the low-rank pairs: what such parts share, whole modules, and biases.

Each stands in the place of a frozen module, which it holds as `base`, so that the base model is there unchanged.
"""

import copy
import warnings
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from phicore.adapters import base as base_layer
from phicore.adapters.lora import LowRankLayer
from phicore.modules import stands_in


class TrainedPart(nn.Module):
    """A module of which something trains, in the place of the frozen one.

    Attributes:
        base: the module as it was, which `attach` freezes.
        adapter_name: which adapter of the model it belongs to.
        enabled: when False the layer is its base.
    """

    what: str
    """What trains, for messages: "... trained whole"."""

    def __init__(self, base: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base = base
        self.adapter_name = adapter_name
        self.enabled = True
        self.train(base.training)

    def merged(self, shared: dict[int, nn.Parameter]) -> nn.Module:
        """A frozen module of the base's kind that computes the same.

        Args:
            shared: parameters made for merged modules so far, by the id of what they replace; those of tied modules
                are made once.
        """
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        # Code that reads a module's attributes finds those of the base.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class TrainedCopy(TrainedPart):
    """A module of `modules_to_save`: a trained copy that stands in for its frozen base.

    Attributes:
        trained: the copy that trains and answers while `enabled`.
    """

    what = "trained whole"

    def __init__(self, base: nn.Module, adapter_name: str) -> None:
        trained = copy.deepcopy(base).requires_grad_(True)
        super().__init__(base.requires_grad_(False), adapter_name)
        self.trained = trained

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.trained if self.enabled else self.base)(*args, **kwargs)

    def merged(self, shared: dict[int, nn.Parameter]) -> nn.Module:
        answering = self.trained if self.enabled else self.base
        kept: dict[int, Any] = {id(buffer): buffer for buffer in answering.buffers()}
        for p in answering.parameters():
            kept[id(p)] = shared.setdefault(id(p), nn.Parameter(p.detach(), requires_grad=False))
        return copy.deepcopy(answering, kept)  # its tensors are shared with the copy that trains

    def __getattr__(self, name: str) -> Any:
        # Code that reads a head's or an embedding's weight finds that of the module that answers.
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            answering = "trained" if vars(self).get("enabled") else "base"  # it is missing while a copy is made
            return getattr(nn.Module.__getattr__(self, answering), name)


class TrainedBias(TrainedPart):
    """A module whose bias trains.

    Attributes:
        trained: the bias; the base's own stays as it was.
    """

    what = "trained in its bias"

    def __init__(self, base: nn.Module, adapter_name: str, dtype: torch.dtype | None = None) -> None:
        super().__init__(base, adapter_name)
        self.trained = new_bias(base, dtype)

    @property
    def bias(self) -> Tensor:
        """The bias that the module adds now."""
        frozen: Tensor = self.base.bias  # type: ignore[assignment]
        return self.trained.to(frozen.dtype) if self.enabled else frozen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.base(*args, **kwargs)
        return functional_call(self.base, {"bias": self.bias}, args, kwargs)

    def merged(self, shared: dict[int, nn.Parameter]) -> nn.Module:
        bias = shared.setdefault(id(self.trained), nn.Parameter(self.bias.detach().clone(), requires_grad=False))
        return base_layer.with_parameter(self.base, "bias", bias)


def new_bias(layer: Any, dtype: torch.dtype | None) -> nn.Parameter:
    """A parameter that starts as a layer's bias, in dtype or the bias's own."""
    return nn.Parameter(layer.bias.detach().to(dtype or layer.bias.dtype, copy=True))


def has_bias(module: nn.Module) -> bool:
    """Whether a layer, adapted or not, has a parameter named bias."""
    module = module.innermost if isinstance(module, LowRankLayer) else module
    return isinstance(module._parameters.get("bias"), nn.Parameter)


def trains_bias(model: nn.Module, bias: str, path: str, layer: nn.Module) -> bool:
    """Whether `LoRAConfig.bias` trains the bias of an adapted layer: of an nn.MultiheadAttention only out_proj's, since
    in_proj_bias is not called bias, and PEFT goes by that name."""
    parent, _, name = path.rpartition(".")
    in_attention = isinstance(model.get_submodule(parent), nn.MultiheadAttention)
    return bias != "none" and has_bias(layer) and (not in_attention or name == "out_proj")


def _other_biases(path: str, module: nn.Module) -> list[str]:
    """Names of a module's parameters that are biases but not called so, which no TrainedBias can train."""
    own = (name for name, _ in module.named_parameters(recurse=False))
    return [f"{path}.{name}" for name in own if "bias" in name and name not in ("bias", "trained_bias")]


def biases_beside(
    model: nn.Module, bias: str, targets: Mapping[str, nn.Module], saved: Container[str], stacks: Iterable[str]
) -> dict[str, nn.Module]:
    """The modules outside the adapted layers whose biases `LoRAConfig.bias` trains, by name.

    Args:
        model: the model, not changed yet.
        bias: "none", "all" or "lora_only".
        targets: the layers that are adapted.
        saved: names of the modules that are trained whole.
        stacks: names of the modules of which parameters are adapted.

    Raises:
        ValueError: there is no bias to train; the model has adapters already beside which all biases cannot train; a
            module of its own bias that also holds layers; a bias in a module of which parameters are adapted.

    Warns:
        UserWarning: biases under other names, which stay frozen (an nn.MultiheadAttention's in_proj_bias).
    """
    for module in model.modules():
        if isinstance(module, TrainedBias):
            raise ValueError(
                f'"{module.adapter_name}" trains all biases of the model, which leaves no room for another'
            )
    if bias == "none":
        return {}
    for stack in stacks:
        for name, module in model.get_submodule(stack).named_modules(prefix=stack):
            if has_bias(module):
                raise ValueError(
                    f'bias="{bias}": the bias of {name} cannot be trained, since target_parameters means parameters of '
                    f'{stack}; use bias="none", or target_modules'
                )
    found: dict[str, nn.Module] = {}
    left = [
        f"{path.rpartition('.')[0]}.in_proj_bias"
        for path, layer in targets.items()
        if has_bias(layer) and not trains_bias(model, bias, path, layer)
    ]
    if bias == "all":
        for path, module in model.named_modules(remove_duplicate=False):
            if path in targets or stands_in(path, saved):
                continue
            left += _other_biases(path, module)
            if not has_bias(module):
                continue
            if any(True for _ in module.children()) or not path:
                raise ValueError(
                    f'bias="all": {path or "the model itself"} ({type(module).__name__}) has a bias of its own beside '
                    f'the layers in it, which cannot be trained alone; use bias="lora_only", or modules_to_save'
                )
            found[path] = module
    if left := list(dict.fromkeys(left)):
        warnings.warn(
            f'bias="{bias}" leaves {", ".join(left[:5])}{" ..." if len(left) > 5 else ""} frozen, since only what is '
            f'called "bias" can be trained alone; name their modules in modules_to_save to train them',
            stacklevel=5,
        )
    if not found and not any(trains_bias(model, bias, path, layer) for path, layer in targets.items()):
        raise ValueError(
            f'bias="{bias}": {"no module" if bias == "all" else "no adapted layer"} has a bias; use "none"'
        )
    return found
