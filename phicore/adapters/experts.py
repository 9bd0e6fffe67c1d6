"""LoRA over parameters that stand in no layer of their own, above all the stacked weights of experts.

transformers holds the experts of a mixture in one parameter [experts, out, in] (Mixtral, Qwen-MoE), or [experts, in,
out] where the module says is_transposed (GPT-OSS). Their module reads it in its forward pass in ways of its own, so an
adapter cannot stand beside a product: it adapts the weight, and the module runs with that in its place.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phicore.adapters import base as base_layer
from phicore.adapters.config import LoRAConfig, pattern_value, scaling
from phicore.adapters.lora import LowRankLayer, start_pair
from phicore.adapters.trained import TrainedPart
from phicore.modules import check_exclusion, matches, no_match


class ExpertPairs(nn.Module):
    """The pairs of one parameter: lora_A [experts, rank, in] and lora_B [experts, out, rank]."""

    def __init__(self, weight: Tensor, transposed: bool, rank: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        experts, out, inner = stacked_shape(weight, transposed)
        where: dict[str, Any] = {"dtype": dtype or weight.dtype, "device": weight.device}
        self.lora_A = nn.Parameter(torch.empty(experts, rank, inner, **where))
        self.lora_B = nn.Parameter(torch.empty(experts, out, rank, **where))


def stacked_shape(weight: Tensor, transposed: bool) -> tuple[int, int, int]:
    """(experts, out, in) of a parameter [experts, out, in], or [experts, in, out] if transposed; [out, in] is one."""
    experts, out, inner = weight.shape if weight.dim() == 3 else (1, *weight.shape)
    return (experts, inner, out) if transposed and weight.dim() == 3 else (experts, out, inner)


def add_products(weight: Tensor, A: Tensor, B: Tensor, scale: float, transposed: bool) -> Tensor:
    """weight + scale * B A of each expert, in weight's dtype and shape.

    Args:
        weight: [experts, out, in], [experts, in, out] if transposed, or [out, in] of one.
        A: [experts, rank, in].
        B: [experts, out, rank].
        scale: factor of the products.
        transposed: how the weight lies.
    """
    A, B = A.to(weight.dtype), B.to(weight.dtype)
    left, right = (A.mT, B.mT) if transposed and weight.dim() == 3 else (B, A)
    stacked = weight if weight.dim() == 3 else weight.unsqueeze(0)
    with base_layer.without_autocast(weight.device):
        return torch.baddbmm(stacked, left, right, alpha=scale).view(weight.shape)


class LoRAExperts(nn.Module):
    """A module some of whose parameters have a LoRA adapter: it runs with W + scaling * B A, of each expert, for W.

    A forward pass forms each adapted weight once, in W's dtype, and the products of the module keep it for the backward
    pass, which forms a gradient of the same size. So the layer costs one copy of each adapted parameter in memory
    (activation checkpointing holds one layer's at a time), and experts * out * in * rank multiplications a pass,
    however few tokens there are. In 16 bits the sum is rounded to W's dtype, as a merged weight would be.

    There is no dropout (the products have no input of their own), and no DoRA: PEFT's format has no magnitudes for
    parameters.

    Args:
        base: any module, or another LoRAExperts; it is frozen.
        rank: of the pairs of each parameter, by the parameter's name.
        alpha: of all, or of each by name.
        rslora, init, dtype: as LoRALinear; init is "kaiming" or "gaussian".

    Attributes:
        pairs: name of the parameter -> its ExpertPairs, lora_A [experts, rank, in] and lora_B [experts, out, rank].
        transposed: whether the base holds its weights as [experts, in, out] (its is_transposed).
        adapter_name, enabled, strength: as LowRankLayer.

    Raises:
        ValueError: a name that is no parameter of the base, a parameter that is neither [experts, out, in] nor [out,
            in], or a value out of range.
        TypeError: a parameter that is not floating-point.

    Example:
        >>> experts = nn.Module()  # MixtralExperts of transformers, say
        >>> experts.down_proj = nn.Parameter(torch.randn(4, 32, 16))  # [experts, out, in]
        >>> layer = LoRAExperts(experts, {"down_proj": 8}, alpha=16)
        >>> layer.pairs["down_proj"].lora_A.shape, layer.weights()["down_proj"].shape
        (torch.Size([4, 8, 16]), torch.Size([4, 32, 16]))
    """

    def __init__(
        self,
        base: nn.Module,
        rank: Mapping[str, int],
        alpha: float | Mapping[str, float] = 32.0,
        *,
        rslora: bool = False,
        init: str = "kaiming",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        innermost = base.innermost if isinstance(base, LoRAExperts) else base
        self.ranks = dict(rank)
        self.alphas = dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(rank, alpha)
        if not rank or self.alphas.keys() != self.ranks.keys():
            raise ValueError(
                f"rank must name parameters and alpha the same, got {list(self.ranks)} and {list(self.alphas)}"
            )
        for name in rank:
            LoRAConfig(rank=self.ranks[name], alpha=self.alphas[name])  # raises on what is out of range
            check_parameter(innermost, name, f"{type(innermost).__name__}.{name}")
        check_init(init)
        self.base = base.requires_grad_(False)
        self.transposed = bool(getattr(innermost, "is_transposed", False))
        self.rslora, self.init = rslora, init
        self.adapter_name = "default"
        self.enabled = True
        self.strength = 1.0
        own = dict(innermost.named_parameters(recurse=False))
        self.pairs = nn.ModuleDict(
            {name: ExpertPairs(own[name], self.transposed, self.ranks[name], dtype) for name in own if name in rank}
        )
        self.reset_parameters()
        self.train(base.training)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts A and B as `init` says, so that the module equals its base."""
        pair: Any
        for pair in self.pairs.values():
            for A, B in zip(pair.lora_A, pair.lora_B, strict=True):
                start_pair(A, B, self.init)

    @property
    def innermost(self) -> nn.Module:
        """The module under this adapter and those under it."""
        return self.base.innermost if isinstance(self.base, LoRAExperts) else self.base

    def factor(self, name: str) -> float:
        """What the products of a parameter are multiplied by: scaling * strength."""
        return scaling(self.ranks[name], self.alphas[name], self.rslora) * self.strength

    def weights(self, *, exact: bool = False) -> dict[str, Tensor]:
        """The parameters as this adapter and those under it make them, by name; those that are not adapted are missing.

        Args:
            exact: compute them in float32 (float64 ones in float64), in place of their own dtype.
        """
        found = self.base.weights(exact=exact) if isinstance(self.base, LoRAExperts) else {}
        if not self.enabled:
            return found
        own = dict(self.innermost.named_parameters(recurse=False))
        for name, pair in self.pairs.items():
            weight = found.get(name, own[name])
            if exact:
                weight = weight.to(base_layer.accumulate_dtype(weight.dtype))
            A: Any = pair.lora_A
            B: Any = pair.lora_B
            found[name] = add_products(weight, A, B, self.factor(name), self.transposed)
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights = self.weights()
        if not weights:
            return self.innermost(*args, **kwargs)
        return torch.func.functional_call(self.innermost, weights, args, kwargs)

    def merged(self) -> tuple[nn.Module, float]:
        """A module of the base's kind with the adapted weights, summed in float32 and rounded once, and the largest
        relative error of that rounding. Everything else is shared with the base."""
        innermost = self.innermost
        module = copy.copy(innermost)
        for registry in ("_parameters", "_buffers", "_modules"):
            module.__dict__[registry] = dict(innermost.__dict__[registry])
        errors = [0.0]
        for name, exact in self.weights(exact=True).items():
            weight = exact.to(innermost.get_parameter(name).dtype)
            norm = torch.linalg.vector_norm(exact)
            error = torch.linalg.vector_norm(weight.to(exact.dtype) - exact)
            errors.append(float(error / norm if norm > 0 else error))
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
        return module, max(errors)

    def __getattr__(self, name: str) -> Any:
        # Code around it reads the module's own attributes (num_experts, say).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def extra_repr(self) -> str:
        return (
            f"ranks={self.ranks}, alphas={self.alphas}, rslora={self.rslora}, transposed={self.transposed}, "
            f"adapter_name={self.adapter_name!r}"
        )


def check_init(init: str) -> None:
    """Raises ValueError for an init that decomposes a linear layer's weight."""
    if init not in ("kaiming", "gaussian"):
        raise ValueError(f'init "{init}" is for linear layers, not for parameters (target_parameters)')


def check_parameter(module: nn.Module, name: str, shown: str) -> None:
    """Raises ValueError or TypeError unless a module has a parameter of this name that can be adapted."""
    own = dict(module.named_parameters(recurse=False))
    if name not in own:
        raise ValueError(f"{shown} is no parameter; {type(module).__name__} has {list(own)}")
    if own[name].dim() not in (2, 3):
        raise ValueError(
            f"{shown} has shape {list(own[name].shape)}; a parameter that is adapted is [experts, out, in] or [out, in]"
        )
    if not own[name].is_floating_point():
        raise TypeError(f"{shown} has {own[name].dtype} weights; adapters need floating-point ones")


# ===== which parameters of a model a configuration means =====


def named_stacks(model: nn.Module, closed: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Each module that has parameters of its own, with its name and theirs, not descending into a closed kind; of a
    LoRAExperts those of the module under it."""

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, list[str]]]:
        inner = module.innermost if isinstance(module, LoRAExperts) else module
        if own := [name for name, _ in inner.named_parameters(recurse=False)]:
            yield path, module, own
        if module is not inner or isinstance(module, closed):
            return
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, closed):
                yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, "")


def plan_parameters(
    model: nn.Module, config: LoRAConfig, targets: Mapping[str, nn.Module], saved: Mapping[str, nn.Module]
) -> dict[str, tuple[nn.Module, dict[str, int], dict[str, float]]]:
    """The modules with parameters that config.target_parameters means: name -> module, ranks and alphas by parameter.

    Args:
        model: is not changed.
        config: names the parameters.
        targets, saved: what else it adapts and copies whole.

    Raises:
        ValueError: an entry that matches nothing, or a parameter that cannot be adapted, or not together with the rest
            of the configuration.
        TypeError: a parameter that is not floating-point.
    """
    if not config.target_parameters:
        return {}
    for what, given, reason in (
        ("dora=True", config.dora, "PEFT's format has no magnitudes for parameters"),
        ("dropout", config.dropout, "a parameter's product has no input of its own that could be dropped"),
    ):
        if given:
            raise ValueError(f"target_parameters cannot have {what}: {reason}")
    if config.layers_to_transform is not None:
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform!r} chooses among target_modules, and target_parameters "
            f"are adapted in all blocks (by PEFT too); name the parameters with the numbers of their blocks instead"
        )
    check_init(config.init)
    stacks = list(named_stacks(model, (LowRankLayer, TrainedPart)))
    every = {f"{path}.{name}" if path else name for path, _, own in stacks for name in own}
    for entry in config.target_parameters:
        if not any(matches(name, [entry]) for name in every):
            raise ValueError(no_match(f'target_parameters entry "{entry}"', entry, sorted(every)))
    if not config.target_modules:  # else the choice of these checks it
        for excluded in config.exclude_modules:
            check_exclusion(
                excluded, dict(model.named_modules(remove_duplicate=False)), [path for path, _, _ in stacks]
            )
    found: dict[str, tuple[nn.Module, dict[str, int], dict[str, float]]] = {}
    whole = tuple(f"{path}." for path in saved)
    for path, module, own in stacks:
        names = {name: f"{path}.{name}" if path else name for name in own}
        names = {n: full for n, full in names.items() if matches(full, config.target_parameters)}
        if not names or path in saved or path.startswith(whole) or _excluded(path, config.exclude_modules):
            continue
        if not path:
            raise ValueError(f"{', '.join(names)} stands in the model itself; put the model into another module first")
        inside = [target for target in targets if target == path or target.startswith(f"{path}.")]
        if inside:
            raise ValueError(f"target_parameters names {names[next(iter(names))]}, and target_modules {inside[0]}")
        inner = module.innermost if isinstance(module, LoRAExperts) else module
        for name, full in names.items():
            check_parameter(inner, name, full)
        found[path] = (
            module,
            {n: pattern_value(config.rank_pattern, full, config.rank) for n, full in names.items()},
            {n: pattern_value(config.alpha_pattern, full, config.alpha) for n, full in names.items()},
        )
    if not found:
        raise ValueError(f"nothing is left of target_parameters={list(config.target_parameters)!r} to adapt")
    return found


def _excluded(path: str, excluded: Sequence[str]) -> bool:
    parts = path.split(".")
    return any(matches(".".join(parts[: i + 1]), excluded) for i in range(len(parts)))
