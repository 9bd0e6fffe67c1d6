"""nn.MultiheadAttention with its projections as layers, so that adapters fit them.

torch's own module reads the weights of its projections and hands them to one function; a layer put in their place would
be passed by. OpenAttention holds the same parameters in linear layers that it calls, and does the rest in the same way.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from phicore.adapters.config import pattern_value
from phicore.adapters.experts import LoRAExperts
from phicore.adapters.lora import LowRankLayer
from phicore.adapters.trained import TrainedPart

SEPARATE = ("q_proj", "k_proj", "v_proj")

T = TypeVar("T")


def layer_setting(model: nn.Module, pattern: Mapping[str, T], path: str, default: T) -> T:
    """What a pattern says of a layer; of a projection of an attention, if nothing else what it says of that."""
    parent = path.rpartition(".")[0]
    if isinstance(model.get_submodule(parent), nn.MultiheadAttention):
        default = pattern_value(pattern, parent, default)
    return pattern_value(pattern, path, default)


def is_packed(attention: nn.MultiheadAttention) -> bool:
    """Whether q, k and v are one layer, in_proj; else (kdim, vdim) they are q_proj, k_proj and v_proj."""
    if isinstance(attention, OpenAttention):
        return hasattr(attention, "in_proj")
    return attention._qkv_same_embed_dim


def projections(attention: nn.MultiheadAttention) -> dict[str, Any]:
    """The linear layers of an attention by name; those of torch's own are made anew, over its parameters."""
    names = ("in_proj",) if is_packed(attention) else SEPARATE
    if isinstance(attention, OpenAttention):
        return {name: getattr(attention, name) for name in (*names, "out_proj")}
    bias = attention.in_proj_bias
    biases = [bias] if len(names) == 1 else [None] * 3 if bias is None else bias.detach().chunk(3)
    layers = {
        name: _linear(getattr(attention, f"{name}_weight"), b, attention.training)
        for name, b in zip(names, biases, strict=True)
    }
    return {**layers, "out_proj": attention.out_proj}


def _settings(attention: nn.MultiheadAttention) -> dict[str, Any]:
    """What a module holds beside tensors and submodules, hooks and all."""
    tensors = ("_parameters", "_buffers", "_modules", "bias_k", "bias_v")  # torch has the last two as None here
    own = (*tensors, "_compiled_call_impl")  # which calls the module that it was made for
    return {name: value for name, value in attention.__dict__.items() if name not in own}


def check_kind(attention: nn.MultiheadAttention, path: str) -> None:
    """Raises ValueError for a subclass or a replaced forward, which an OpenAttention would not know."""
    if "forward" in vars(attention):
        raise ValueError(
            f"the forward of {path} was replaced, as accelerate does to offload, and would pass adapters by; load the "
            f"model without that"
        )
    if type(attention) not in (nn.MultiheadAttention, OpenAttention):
        raise ValueError(
            f"{path} is a {type(attention).__name__}, a subclass of nn.MultiheadAttention with ways of its own; only "
            f"nn.MultiheadAttention itself can be adapted"
        )


def _linear(weight: nn.Parameter, bias: Tensor | None, training: bool) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    return layer.train(training)


def once_each(
    function: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A function of three tensors, called once where some are one. (By `is`: by id, torch.compile would make a graph
    for each new input.)"""
    of_query = function(query)
    of_key = of_query if key is query else function(key)
    of_value = of_query if value is query else of_key if value is key else function(value)
    return of_query, of_key, of_value


class OpenAttention(nn.MultiheadAttention):
    """An nn.MultiheadAttention whose projections are layers of their own.

    Its arguments and outputs are those of nn.MultiheadAttention (a float mask is added, a boolean one hides what is
    True). Where query, key and value are one tensor, in_proj is called once for all three; else once for each different
    tensor, of which a third of the rows is used.

    Args:
        attention: whose parameters it takes; it is not changed.

    Attributes:
        in_proj: a linear layer [3 * embed_dim, embed_dim] of q, k and v; or, with kdim or vdim,
        q_proj, k_proj, v_proj: three layers.
        out_proj: a linear layer.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(_settings(attention))
        self._qkv_same_embed_dim = False  # nn.TransformerEncoderLayer takes its fused path only where this is True
        for name in ("bias_k", "bias_v"):
            self.register_parameter(name, getattr(attention, name))
        for name, layer in projections(attention).items():
            setattr(self, name, layer)
        self.train(attention.training)

    @property
    def in_proj_weight(self) -> Any:  # type: ignore[override]
        return projections(self)["in_proj"].weight if is_packed(self) else None

    @property
    def in_proj_bias(self) -> Any:  # type: ignore[override]
        if is_packed(self):
            return projections(self)["in_proj"].bias
        biases = [getattr(self, name).bias for name in SEPARATE]
        return None if biases[0] is None else torch.cat(biases)

    def closed(self) -> nn.MultiheadAttention:
        """torch's own module over the same parameters; adapters are left out.

        Raises:
            ValueError: a projection that is not nn.Linear (its NF4 code, say).
        """
        plain = {name: _innermost(layer) for name, layer in projections(self).items()}
        other = [name for name, layer in plain.items() if not isinstance(layer, nn.Linear)]
        if other:
            raise ValueError(
                f"nn.MultiheadAttention cannot hold {other[0]}, which is a {type(plain[other[0]]).__name__}"
            )
        attention = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
        nn.Module.__init__(attention)
        attention.__dict__.update(_settings(self))
        attention._qkv_same_embed_dim = is_packed(self)
        for name in ("in_proj", *SEPARATE):
            attention.register_parameter(f"{name}_weight", plain[name].weight if name in plain else None)
        if is_packed(self):
            bias: Any = plain["in_proj"].bias
        else:
            biases: Any = [plain[name].bias for name in SEPARATE]
            bias = None if biases[0] is None else nn.Parameter(torch.cat(biases).detach(), requires_grad=False)
        attention.register_parameter("in_proj_bias", bias)
        for name in ("bias_k", "bias_v"):
            attention.register_parameter(name, getattr(self, name))
        attention.out_proj = plain["out_proj"]
        return attention.train(self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention; shapes below are those of batch_first.

        Args:
            query: [N, L, embed_dim], or [L, embed_dim] without a batch.
            key, value: [N, S, kdim] and [N, S, vdim].
            key_padding_mask: [N, S].
            need_weights: return the weights of attention too.
            attn_mask: [L, S] or [N * num_heads, L, S].
            average_attn_weights: return their mean over the heads.
            is_causal: a hint that attn_mask is causal.

        Returns:
            [N, L, embed_dim], and [N, L, S], [N, num_heads, L, S] or None.

        Raises:
            ValueError: is_causal without attn_mask, or a mask of another shape.
            TypeError: a mask of integers.
        """
        if not torch.compiler.is_compiling() and self._answers_as_torch():
            return self.closed().forward(  # past the hooks, which have been called
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = query.dim() == 3

        def arrange(x: Tensor) -> Tensor:
            return x.unsqueeze(0) if not batched else x if self.batch_first else x.transpose(0, 1)

        q, k, v = self._project(*once_each(arrange, query, key, value))  # one tensor stays one
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        appended = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, b.to(x.dtype).expand(len(x), 1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v))
            )
            appended += 1
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(len(x), 1, x.shape[-1])], 1) for x in (k, v))
            appended += 1
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))  # [N, H, L, D]
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, and needs it: give the causal mask too")
        # As in torch, which then takes the hint for the mask, and hides keys appended above from the first S queries.
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = None if hinted else self._mask(attn_mask, key_padding_mask, q, k.shape[2] - appended, appended)
        p = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            weights = (q / math.sqrt(self.head_dim)) @ k.mT  # [N, H, L, S]
            weights = functional.dropout((weights if mask is None else weights + mask).softmax(-1), p)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = functional.scaled_dot_product_attention(q, k, v, mask, p, is_causal=hinted)
        y = self.out_proj(y.transpose(1, 2).flatten(2))  # [N, L, embed_dim]
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _answers_as_torch(self) -> bool:
        """Whether no adapter takes part, so that torch's own module gives the answer, to the last bit."""
        layers = projections(self).values()
        plain = all(isinstance(_innermost(layer), nn.Linear) for layer in layers)
        return plain and not any(_takes_part(layer) for layer in layers)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layers = projections(self)
        if not is_packed(self):
            return layers["q_proj"](query), layers["k_proj"](key), layers["v_proj"](value)
        all_of_q, all_of_k, all_of_v = once_each(layers["in_proj"], query, key, value)
        return all_of_q.chunk(3, -1)[0], all_of_k.chunk(3, -1)[1], all_of_v.chunk(3, -1)[2]

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, keys: int, appended: int
    ) -> Tensor | None:
        """What is added to the scores: [1 or N, 1 or H, 1 or L, S + appended], or None; q is [N, H, L, D]."""
        batch, heads, length, _ = q.shape
        total: Tensor | None = None
        both: tuple[tuple[str, Tensor | None, list[tuple[tuple[int, ...], tuple[int, ...]]]], ...] = (
            (  # no dictionaries of shapes, at whose keys torch.compile would fix the sizes
                "attn_mask",
                attn_mask,
                [((length, keys), (1, 1, length, keys)), ((batch * heads, length, keys), (batch, heads, length, keys))],
            ),
            ("key_padding_mask", key_padding_mask, [((batch, keys), (batch, 1, 1, keys))]),
        )
        for name, mask, shapes in both:
            if mask is None:
                continue
            views = [view for shape, view in shapes if tuple(mask.shape) == shape]
            if not views:
                raise ValueError(
                    f"{name} must have shape {' or '.join(str(list(s)) for s, _ in shapes)}, got {list(mask.shape)}"
                )
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -math.inf)
            elif not mask.is_floating_point():
                raise TypeError(
                    f"{name} is {mask.dtype}; give a boolean one (True hides a key) or a float one, which is added"
                )
            mask = mask.to(q.dtype).reshape(views[0])
            total = mask if total is None else total + mask
        return total if total is None or not appended else functional.pad(total, (0, appended))


# ===== torch's fused paths =====

_ADAPTERS = (LowRankLayer, LoRAExperts, TrainedPart)
_FUSED = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}


def keep_off_fused_paths(model: nn.Module) -> None:
    """Lets each nn.TransformerEncoderLayer with an adapter in it, and its nn.TransformerEncoder, call their layers.

    In eval mode without gradients they would read the weights of the layers in them and pass by the adapters.
    """
    for module in model.modules():
        for kind, switch in _FUSED.items():
            if isinstance(module, kind) and any(isinstance(m, _ADAPTERS) for m in module.modules()):
                module.__dict__.setdefault("fused_path", getattr(module, switch, False))
                setattr(module, switch, 0)


def allow_fused_paths(model: nn.Module) -> None:
    """Takes `keep_off_fused_paths` back."""
    for module in model.modules():
        for kind, switch in _FUSED.items():
            if isinstance(module, kind) and "fused_path" in module.__dict__:
                setattr(module, switch, module.__dict__.pop("fused_path"))


def _innermost(layer: Any) -> Any:
    return layer.innermost if isinstance(layer, LowRankLayer) else layer


def _takes_part(layer: Any) -> bool:
    while isinstance(layer, LowRankLayer):
        if layer.enabled:
            return True
        layer = layer.base
    return False
