"""One linear layer that holds several (q, k and v; gate and up), with a low-rank pair for each part.

The pairs together are one pair of the whole layer: A stacked, [sum of ranks, in], and B block-diagonal, [out, sum of
ranks]. So everything that a plain adapter does is done by the same code, with one pass through the base, and PEFT reads
such an adapter as a plain one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from phicore.adapters import base as base_layer
from phicore.adapters.attention import SEPARATE, layer_setting
from phicore.adapters.config import Init, LoRAConfig, pattern_value, scaling
from phicore.adapters.dora import DoRALinear
from phicore.adapters.lora import LoRALinear, LowRankLinear, Options
from phicore.adapters.starts import start_pair
from phicore.modules import matches, parts_meant, parts_of

if TYPE_CHECKING:
    from typing import Unpack  # new in Python 3.11


class Pair(nn.Module):
    """What adapts one part: lora_A [rank, in], lora_B [rows, rank] and, for DoRA, magnitude [rows]."""

    def __init__(self, inner: int, rows: int, rank: int, where: dict[str, Any]) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, inner, **where))
        self.lora_B = nn.Parameter(torch.empty(rows, rank, **where))
        self.register_parameter("magnitude", None)


class FusedLinear(LowRankLinear):
    """What LoRA and DoRA share over fused linear layers; see FusedLoRALinear.

    Attributes:
        sizes: name of each part -> its rows.
        parts: name of each adapted part -> its Pair.
        ranks, alphas: of the adapted parts, by name.
        rank, alpha, scaling: of the plain adapter that the pairs make together: the sum of the ranks, and the first
            pair's scaling.
        lora_A, lora_B: its matrices, [sum of ranks, in] and [out, sum of ranks], made anew at each access.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int | Mapping[str, int] = 16,
        alpha: float | Mapping[str, float] = 32.0,
        dropout: float = 0.0,
        *,
        parts: Mapping[str, int],
        rslora: bool = False,
        init: Init = "kaiming",
        **options: Any,
    ) -> None:
        ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(parts, rank)
        alphas = dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(ranks, alpha)
        _check_parts(base, parts, ranks, alphas)
        ranks = {name: ranks[name] for name in parts if name in ranks}
        if init not in ("kaiming", "gaussian"):
            raise ValueError(f'init "{init}" decomposes a whole weight, and cannot start the parts of a fused layer')
        first = next(iter(ranks))
        for name in ranks:
            LoRAConfig(rank=ranks[name], alpha=alphas[name])  # raises on what is out of range
        total = sum(ranks.values())
        ratio = total / ranks[first]
        self.sizes, self.ranks, self.alphas = dict(parts), ranks, alphas
        whole = alphas[first] * (ratio**0.5 if rslora else ratio)  # keeps the first pair's scaling
        super().__init__(base, total, whole, dropout, rslora=rslora, init=init, **options)

    def _make_pair(self, base: nn.Module, where: dict[str, Any]) -> None:
        (_, inner), _ = self.pair_shapes(base, self.rank)
        pairs = {name: Pair(inner, self.sizes[name], rank, where) for name, rank in self.ranks.items()}
        self.parts = nn.ModuleDict({name: pairs[name] for name in self.sizes if name in pairs})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for pair in self.parts.values():
            start_pair(pair.lora_A, pair.lora_B, self.init)  # type: ignore[arg-type]

    def relative(self, name: str) -> float:
        """A part's scaling in terms of the layer's."""
        ratio = scaling(self.ranks[name], self.alphas[name], self.rslora) / self.scaling
        return 1.0 if abs(ratio - 1) < 1e-12 else ratio  # the roots of rsLoRA are rounded

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        return torch.cat([pair.lora_A for pair in self.parts.values()])  # type: ignore[misc]

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]
        return torch.block_diag(*(self._block(name, rows) for name, rows in self.sizes.items()))

    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B

    def _block(self, name: str, rows: int) -> Tensor:
        """B of one part in the layer's scaling, [rows, rank]; [rows, 0] of a part without a pair."""
        if name not in self.parts:
            some: Any = next(iter(self.parts.values()))
            return some.lora_B.new_empty(rows, 0)
        B: Any = self.parts[name].lora_B
        ratio = self.relative(name)
        return B if ratio == 1 else B * ratio

    @torch.no_grad()
    def set_matrices(self, A: Tensor, B: Tensor) -> None:
        """Sets the pairs from the plain pair that they make together, as `lora_A` and `lora_B` give it.

        Raises:
            ValueError: B is not zero outside the parts.
        """
        blocks = diagonal_blocks(B, self.sizes, self.ranks)
        for name, a in zip(self.parts, A.split([self.ranks[name] for name in self.parts]), strict=True):
            pair: Any = self.parts[name]
            pair.lora_A.copy_(a)
            pair.lora_B.copy_(blocks[name] / self.relative(name))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, parts={self.sizes}, ranks={self.ranks}"


def _check_parts(
    base: nn.Module, parts: Mapping[str, int], ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> None:
    unknown = sorted({*ranks, *alphas} - {*parts})
    if unknown or not ranks or alphas.keys() != ranks.keys():
        raise ValueError(
            f"rank must be one number or name some of the parts {list(parts)}, and alpha those that rank names; got "
            f"rank for {list(ranks)}, alpha for {list(alphas)}"
        )
    if LowRankLinear.fits(base):
        _, out = base_layer.features(base)
        if sum(parts.values()) != out or min(parts.values()) < 1:
            raise ValueError(f"parts must share out the {out} rows of the layer in their order, got {dict(parts)}")


def diagonal_blocks(B: Tensor, sizes: Mapping[str, int], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """The blocks [rows, rank] of the adapted parts in a block-diagonal B [out, sum of ranks].

    Raises:
        ValueError: B is not zero outside them.
    """
    blocks, row, column = {}, 0, 0
    rest = B.clone()
    for name, rows in sizes.items():
        rank = ranks.get(name, 0)
        if rank:
            blocks[name] = B[row : row + rows, column : column + rank]
        rest[row : row + rows, column : column + rank] = 0
        row, column = row + rows, column + rank
    if rest.any():
        raise ValueError(
            f"the adapter mixes the parts {list(sizes)} of a fused layer, so that it cannot be split into one a part"
        )
    return blocks


class _TakesParts(LowRankLinear):
    """The constructor of both layers; in front of LoRALinear and DoRALinear, whose own knows no parts."""

    def __init__(
        self,
        base: nn.Module,
        parts: Mapping[str, int],
        rank: int | Mapping[str, int] = 16,
        alpha: float | Mapping[str, float] = 32.0,
        dropout: float = 0.0,
        **options: "Unpack[Options]",
    ) -> None:
        super().__init__(base, rank, alpha, dropout, parts=parts, **options)  # type: ignore[arg-type]


class FusedLoRALinear(_TakesParts, LoRALinear, FusedLinear):
    """A fused linear layer with a LoRA adapter for each part: y[part] = base(x)[part] + scaling * (x A^T) B^T.

    One pass through the base, one product with all A and one with all B; it costs what LoRALinear costs at the sum of
    the ranks.

    Args:
        base: as LoRALinear; its rows are those of the parts, one part behind the other.
        parts: name of each part -> its rows, in the layer's order.
        rank: of every pair, or of each by name; parts that are not named get no adapter.
        alpha: of every pair, or of each by name.
        dropout, rslora, dtype: as LoRALinear.
        init: "kaiming" or "gaussian".

    Raises:
        TypeError: base is no linear layer.
        ValueError: parts that do not make up the layer, names that are not among them, or a value out of range.

    Example:
        >>> qkv = nn.Linear(64, 128)  # 64 rows of q, 32 of k, 32 of v
        >>> layer = FusedLoRALinear(qkv, {"q": 64, "k": 32, "v": 32}, rank={"q": 8, "v": 4}, alpha=16)
        >>> layer(torch.randn(2, 64)).shape, layer.parts["v"].lora_B.shape
        (torch.Size([2, 128]), torch.Size([32, 4]))
    """


class FusedDoRALinear(_TakesParts, DoRALinear, FusedLinear):
    """A fused linear layer with a DoRA adapter for each part; the rows of other parts are the base's.

    Args and errors: as FusedLoRALinear.

    Attributes:
        magnitude: m, [out], of all rows, made anew at each access: a part's own where it has a pair, ||W|| elsewhere.
    """

    def _make_magnitude(self, out: int) -> None:
        for name, pair in self.parts.items():
            pair.magnitude = nn.Parameter(pair.lora_B.new_empty(self.sizes[name]))  # type: ignore[operator]

    @property
    def magnitude(self) -> Tensor:  # type: ignore[override]
        return self.magnitude_over(self.base_norm_squared.sqrt())

    def magnitude_over(self, norm: Tensor) -> Tensor:
        """m, [out]: ||V'|| itself in rows without a pair, whose scale is 1 to the last bit then."""
        norms = norm.split(list(self.sizes.values()))
        own = (self.parts[name].magnitude if name in self.parts else None for name in self.sizes)
        return torch.cat([n if m is None else m.to(n.dtype) for m, n in zip(own, norms, strict=True)])  # type: ignore

    @torch.no_grad()
    def set_magnitude(self, magnitude: Tensor) -> None:
        for name, m in zip(self.sizes, magnitude.split(list(self.sizes.values())), strict=True):
            if name in self.parts:
                self.parts[name].magnitude.copy_(m)  # type: ignore[operator]


# ===== which parts of a model's layers a configuration means =====


@dataclass(frozen=True)
class Split:
    """How one fused layer is adapted: rows of all parts, and rank and alpha of those that get a pair, by name."""

    sizes: dict[str, int]
    ranks: dict[str, int]
    alphas: dict[str, float]


def splits(model: nn.Module, config: LoRAConfig, targets: Iterable[str]) -> dict[str, Split]:
    """Which of the targets are fused layers of which config means parts only, by name; none unless it says "split".

    Raises:
        ValueError: a layer that is named whole and by a part, or whose rows cannot be told apart.
    """
    found: dict[str, Split] = {}
    if config.fused_targets != "split":
        return found
    every = dict(model.named_modules(remove_duplicate=False))
    for path in targets:
        if _is_packed_attention(model, path):
            meant = list(SEPARATE)
        else:
            meant = parts_meant(path, config.target_modules, every)
        if not meant:
            continue
        if matches(path, config.target_modules):
            raise ValueError(f"target_modules names {path} whole and its parts {meant}; name one or the other")
        names = part_paths(path)
        ranks, alphas = (
            {part: pattern_value(pattern, names[part], layer_setting(model, pattern, path, default)) for part in meant}
            for pattern, default in ((config.rank_pattern, config.rank), (config.alpha_pattern, config.alpha))
        )
        found[path] = Split(part_sizes(model, path), ranks, alphas)  # type: ignore[arg-type]
    return found


def part_paths(path: str) -> dict[str, str]:
    """The parts of a fused layer, in_proj of nn.MultiheadAttention among them: their own names -> whole names."""
    parent, dot, last = path.rpartition(".")
    return {part: f"{parent}{dot}{part}" for part in SEPARATE} if last == "in_proj" else parts_of(path)


def _is_packed_attention(model: nn.Module, path: str) -> bool:
    parent, _, last = path.rpartition(".")
    return last == "in_proj" and isinstance(model.get_submodule(parent), nn.MultiheadAttention)


UP_FIRST = {"Phi4MultimodalAudioMLP"}  # the one module of transformers whose gate_up_proj is up, then gate


def part_sizes(model: nn.Module, path: str) -> dict[str, int]:
    """The rows of each part of a fused layer of transformers (Phi-3, GLM and relatives) or of nn.MultiheadAttention.

    Raises:
        ValueError: a layer that is laid out in another way, or in one that cannot be told.
    """
    parent, _, last = path.rpartition(".")
    owner: Any = model.get_submodule(parent)
    if _is_packed_attention(model, path):
        return dict.fromkeys(SEPARATE, owner.embed_dim)
    _, out = base_layer.features(model.get_submodule(path))
    if last == "gate_up_proj" and out % 2 == 0:
        order = ("up_proj", "gate_proj") if type(owner).__name__ in UP_FIRST else ("gate_proj", "up_proj")
        return dict.fromkeys(order, out // 2)
    head, groups = getattr(owner, "head_dim", None), getattr(owner, "num_key_value_heads", None)
    if last == "qkv_proj" and head and groups and out % head == 0 and out > 2 * groups * head:
        rows = groups * head
        return {"q_proj": out - 2 * rows, "k_proj": rows, "v_proj": rows}
    raise ValueError(
        f'cannot tell which rows of {path} belong to {", ".join(parts_of(path))}; use fused_targets="map", or put '
        f"phicore.adapters.FusedLoRALinear(layer, parts) there yourself"
    )
