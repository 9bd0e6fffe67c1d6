"""LoRA and DoRA over parameters that stand in no layer of their own, above all the stacked weights of experts.

transformers holds the experts of a mixture in one parameter [experts, out, in] (Mixtral, Qwen-MoE), or [experts, in,
out] where the module says is_transposed (GPT-OSS). Their module reads it in its forward pass in ways of its own, so an
adapter cannot stand beside a product: it adapts the weight, and the module runs with that in its place.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from phicore.adapters import base as base_layer
from phicore.adapters.config import LoRAConfig, scaling
from phicore.adapters.dora_norm import row_scale
from phicore.adapters.starts import start_pair


class ExpertPairs(nn.Module):
    """The pairs of one parameter: lora_A [experts, rank, in], lora_B [experts, out, rank]; for DoRA magnitude [experts,
    out]."""

    def __init__(self, weight: Tensor, transposed: bool, rank: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        experts, out, inner = stacked_shape(weight, transposed)
        where: dict[str, Any] = {"dtype": dtype or weight.dtype, "device": weight.device}
        self.lora_A = nn.Parameter(torch.empty(experts, rank, inner, **where))
        self.lora_B = nn.Parameter(torch.empty(experts, out, rank, **where))
        self.register_parameter("magnitude", None)


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


def with_row_norms(direction: Tensor, magnitude: Tensor, transposed: bool) -> Tensor:
    """m * V' / ||V'|| of each expert's rows, as DoRA has it: the norm has no gradient. In V's dtype and shape.

    The norm is summed over V' itself, which is there; its factored form would save nothing and lose digits.

    Args:
        direction: V' [experts, out, in], [experts, in, out] if transposed, or [out, in] of one.
        magnitude: m [experts, out].
        transposed: how V' lies.
    """
    inner = -2 if transposed and direction.dim() == 3 else -1
    norm = row_norms(direction.detach(), transposed)
    scale = row_scale(magnitude.to(norm.dtype), norm).to(direction.dtype).unsqueeze(inner)
    return direction * (scale if direction.dim() == 3 else scale.squeeze(0))


def row_norms(weight: Tensor, transposed: bool) -> Tensor:
    """The norm of each row of each expert's matrix, [experts, out] in float32 (float64 of a float64 weight)."""
    stacked = weight if weight.dim() == 3 else weight.unsqueeze(0)
    inner = -2 if transposed and weight.dim() == 3 else -1
    return torch.linalg.vector_norm(stacked, dim=inner, dtype=base_layer.accumulate_dtype(weight.dtype))


class LoRAExperts(nn.Module):
    """A module some of whose parameters have a LoRA adapter: it runs with W + scaling * B A, of each expert, for W.

    A forward pass forms each adapted weight once, in W's dtype, and the products of the module keep it for the backward
    pass, which forms a gradient of the same size. So the layer costs one copy of each adapted parameter in memory
    (activation checkpointing holds one layer's at a time), and experts * out * in * rank multiplications a pass,
    however few tokens there are. In 16 bits the sum is rounded to W's dtype, as a merged weight would be.

    There is no dropout: the products have no input of their own.

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
        for name in self.pairs:
            weight = found.get(name, own[name])
            if exact:
                weight = weight.to(base_layer.accumulate_dtype(weight.dtype))
            found[name] = self._updated(name, weight)
        return found

    def _updated(self, name: str, weight: Tensor) -> Tensor:
        """A parameter as this adapter makes it of one that those under it made, or of the base's."""
        pair: Any = self.pairs[name]
        return add_products(weight, pair.lora_A, pair.lora_B, self.factor(name), self.transposed)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base answers with the adapted weights in its parameters' place."""
        weights = self.weights()
        if not weights:
            return self.innermost(*args, **kwargs)
        return torch.func.functional_call(self.innermost, weights, args, kwargs)

    def merged(self) -> tuple[nn.Module, float]:
        """A module of the base's kind with the adapted weights, summed in float32 and rounded once, and the largest
        relative error of that rounding. Everything else is shared with the base."""
        innermost = self.innermost
        module = base_layer.shallow_copy(innermost)
        errors = [0.0]
        for name, exact in self.weights(exact=True).items():
            weight = exact.to(innermost.get_parameter(name).dtype)
            errors.append(base_layer.rounding_error(weight, exact))
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


class DoRAExperts(LoRAExperts):
    """A module some of whose parameters have a DoRA adapter: it runs with m * V' / ||V'||, V' = W + scaling * B A, one
    norm and one magnitude for each row of each expert.

    As LoRAExperts, but the products of the module and the gradient of m keep a copy of each adapted parameter each.
    PEFT has no DoRA for parameters and refuses a file of it.

    Args and errors: as LoRAExperts.

    Attributes:
        pairs: name of the parameter -> its ExpertPairs, which have a magnitude [experts, out] too.

    Example:
        >>> experts = nn.Module()
        >>> experts.down_proj = nn.Parameter(torch.randn(4, 32, 16))  # [experts, out, in]
        >>> DoRAExperts(experts, {"down_proj": 8}, alpha=16).pairs["down_proj"].magnitude.shape
        torch.Size([4, 32])
    """

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts A and B as LoRA does and m at the norms, so that the module equals its base."""
        super().reset_parameters()
        under = self.base.weights(exact=True) if isinstance(self.base, LoRAExperts) else {}
        pair: Any
        for name, pair in self.pairs.items():
            weight = under.get(name, self.innermost.get_parameter(name))
            norms = row_norms(weight, self.transposed).to(pair.lora_B.dtype)
            if pair.magnitude is None:
                pair.magnitude = nn.Parameter(norms)
            else:
                pair.magnitude.copy_(norms)

    def _updated(self, name: str, weight: Tensor) -> Tensor:
        pair: Any = self.pairs[name]
        scale = scaling(self.ranks[name], self.alphas[name], self.rslora)  # the strength weighs W' and not V'
        direction = add_products(weight, pair.lora_A, pair.lora_B, scale, self.transposed)
        updated = with_row_norms(direction, pair.magnitude, self.transposed)
        return updated if self.strength == 1 else torch.lerp(weight, updated, self.strength)


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
