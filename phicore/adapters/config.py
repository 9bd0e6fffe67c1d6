"""LoRAConfig: which layers are adapted and how."""

import functools
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, TypeVar, get_args

import torch

from phicore.adapters.layer_index import as_patterns
from phicore.modules import STRING_OR_NAMES, check_expression, check_names, ends_with
from phicore.settings import check_types

Init: TypeAlias = Literal["kaiming", "gaussian", "pissa", "olora", "loftq"]
FusedTargets: TypeAlias = Literal["raise", "map", "split"]
Bias: TypeAlias = Literal["none", "all", "lora_only"]

T = TypeVar("T")


@dataclass(kw_only=True, slots=True)
class LoRAConfig:
    """How `attach` adapts a model. Each setting is explained below it in this file, and by `phicore finetune --help`,
    which has them under the same names, but for dora, which its --method says, and adapter_dtype, float32 there.

    Raises:
        TypeError, ValueError: a setting of a wrong type or out of range, naming it.
    """

    rank: int = 16
    """Inner dimension of the low-rank product B A."""

    alpha: float = 32.0
    """Numerator of the scaling: alpha / rank, or alpha / sqrt(rank) with rslora."""

    target_modules: str | Sequence[str] = "all-linear"
    """Layers to adapt: "all-linear" (all but the output head), a list of names or ".name" suffixes, or a regular
    expression that matches whole names."""

    target_parameters: Sequence[str] = field(default_factory=list)
    """Parameters to adapt that stand in no layer of their own, as names or ".name" suffixes: the stacked weights of a
    mixture of experts (["experts.gate_up_proj", "experts.down_proj"]). In addition to target_modules, which can then be
    an empty list."""

    exclude_modules: Sequence[str] = field(default_factory=list)
    """Names or suffixes of layers, or of containers with all that is in them, to leave out."""

    fused_targets: FusedTargets = "raise"
    """What to do with target_modules that name a projection (q_proj) which the model fuses with others (qkv_proj of
    Phi-3): "raise" an error, "map" them to the whole fused layer, with a warning, or "split" the fused layer into its
    parts and give those that are named an adapter each (`phicore.adapters.FusedLoRALinear`)."""

    dropout: float = 0.0
    """Probability of zeroing an input of the low-rank path while training."""

    dora: bool = False
    """Weight-decomposed adaptation: train a magnitude per output row beside the low-rank direction."""

    rslora: bool = False
    """Rank-stabilised scaling, alpha / sqrt(rank)."""

    init: Init = "kaiming"
    """Start of A and B. "kaiming" (A uniform, a = sqrt(5)) and "gaussian" (A normal, std 1 / rank) have B at zero. Over
    linear layers also "pissa" (the largest singular vectors of W) and "olora" (the first of its QR decomposition),
    whose product is taken off again so that the model starts as its base, and "loftq", which codes dense layers to NF4
    and starts at the best correction of that."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some layers: regular expression that ends a layer's name -> rank."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas for some layers: regular expression that ends a layer's name -> alpha."""

    modules_to_save: Sequence[str] = field(default_factory=list)
    """Names or suffixes of modules that are trained whole, and saved with the adapter."""

    layers_to_transform: int | Sequence[int] | None = None
    """Only the target_modules in the blocks of these numbers, "layers.7." say; None for all. target_parameters are not
    chosen by it, and are refused beside it."""

    layers_pattern: str | Sequence[str] | None = None
    """Names of the numbered lists that layers_to_transform counts in ("layers", "h"); None for the first numbered list
    in a layer's name that itself stands in a module."""

    bias: Bias = "none"
    """Which biases train beside the adapter: "all" of the model, or those of the adapted layers ("lora_only"). A bias
    is a parameter of this very name, as in PEFT (so nn.MultiheadAttention's in_proj_bias is none, its out_proj's is);
    of a fused layer it trains whole."""

    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    """Tokens whose rows of the embedding train, the others staying frozen: their numbers, for the model's input
    embedding; or name or suffix of an embedding -> numbers. Heads tied to the embedding follow."""

    ensure_weight_tying: bool = False
    """If target_modules mean an embedding, or a head tied to it, adapt the two by one pair (and with dora one
    magnitude a token); else each name is adapted alone, which unties them, with a warning."""

    adapter_dtype: torch.dtype | None = None
    """Dtype of the adapter's weights in memory and on disk; None takes the base layer's. Over a base in 16 bits give
    torch.float32, as PEFT and `phicore finetune` do, unless a Trainer or ZeroOptimizer trains it, which keeps float32
    masters: AdamW's small steps are lost where weights in 16 bits are rounded."""

    def __post_init__(self) -> None:
        for what in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, what), Mapping):
                raise ValueError(f"{what} must be a dict of regular expressions, got {getattr(self, what)!r}")
        for what, rank in [("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
                raise ValueError(f"{what} must be a whole number above 0, got {rank!r}")
        for what, alpha in [
            ("alpha", self.alpha),
            *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()),
        ]:
            if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= sys.float_info.max:
                raise ValueError(f"{what} must be a number above 0, got {alpha!r}")
        for what, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key in pattern:
                check_expression(what, key)
                check_expression(f"{what}, which is put behind a prefix", ends_with(key))
        for what in ("target_parameters", "modules_to_save", "exclude_modules"):
            check_names(what, getattr(self, what))
        if self.target_modules and not isinstance(self.target_modules, str):
            check_names("target_modules", self.target_modules, STRING_OR_NAMES)
        for what, choices in (("init", Init), ("fused_targets", FusedTargets), ("bias", Bias)):
            if getattr(self, what) not in get_args(choices):
                raise ValueError(f"{what} must be one of {', '.join(get_args(choices))}, got {getattr(self, what)!r}")
        if self.layers_to_transform is None:
            if self.layers_pattern:
                raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, which is None")
        else:
            _check_indices("layers_to_transform", self.layers_to_transform)
            for name in as_patterns(self.layers_pattern):
                check_expression("layers_pattern", name)
                check_expression("layers_pattern, which is put behind a prefix", ends_with(name))
        check_types(self)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        dtype = self.adapter_dtype
        trains = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2
        if dtype is not None and not trains:
            raise ValueError(f"adapter_dtype must be a floating-point torch.dtype of 16 bits or more, got {dtype!r}")
        tokens = self.trainable_token_indices
        if isinstance(tokens, int) or (isinstance(tokens, Mapping) and not tokens):
            raise ValueError(f"trainable_token_indices must be a list of whole numbers, got {tokens!r}")
        if isinstance(tokens, Mapping):
            check_names("what trainable_token_indices are given for", list(tokens))
        for what, indices in tokens.items() if isinstance(tokens, Mapping) else [("", tokens)]:
            if indices is not None:
                _check_indices("trainable_token_indices" + (f"[{what!r}]" if what else ""), indices)


def _check_indices(what: str, indices: int | Sequence[int]) -> None:
    """Raises ValueError unless these are whole numbers from 0, each given once, and at least one."""
    if not isinstance(indices, int | Collection):
        raise ValueError(f"{what} must be whole numbers from 0, got {indices!r}")
    listed = [indices] if isinstance(indices, int) else list(indices)
    wrong = [i for i in listed if not isinstance(i, int) or isinstance(i, bool) or i < 0]
    if wrong or not listed or len(set(listed)) < len(listed):
        problem = f"{wrong[0]!r} is none" if wrong else "one comes twice" if listed else "there is none"
        raise ValueError(f"{what} must be whole numbers from 0, each given once: {problem}; got {indices!r}")


def pattern_value(pattern: Mapping[str, T], name: str, default: T) -> T:
    """The value whose key, a regular expression, is the whole name or its end after a dot; the first that fits."""
    for key, value in pattern.items():
        if _end(key).fullmatch(name):
            return value
    return default


# Kept here, since re keeps 512, and the file of an adapter with many ranks has a key for each of its layers.
@functools.lru_cache(maxsize=2**14)
def _end(key: str) -> re.Pattern[str]:
    return re.compile(ends_with(key))


def scaling(rank: int, alpha: float, rslora: bool) -> float:
    """Factor of B A: alpha / rank (Hu et al. 2021, section 4.1), or alpha / sqrt(rank) (Kalajdzievski 2023)."""
    return alpha / rank**0.5 if rslora else alpha / rank
