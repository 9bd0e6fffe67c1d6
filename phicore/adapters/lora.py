"""LoRA (Hu et al. 2021): y = base(x) + scaling * (x A^T) B^T."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from phicore import products
from phicore.adapters import base as base_layer
from phicore.adapters.base import transposed_kinds
from phicore.adapters.config import Init, LoRAConfig, scaling
from phicore.adapters.starts import first_of_qr, start_pair, top_singular
from phicore.adapters.step import low_rank_step
from phicore.adapters.update import dense_product, low_rank_update
from phicore.lazy import lazy_weight
from phicore.modules import coded_elsewhere
from phicore.nf4.convert import with_hooks_of
from phicore.nf4.linear import NF4Linear, autocast


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch: their indices, int64 [k], and how many the batch has."""

    index: Tensor
    batch: int


def updated_rows(rows: Rows, y: Tensor, x: Tensor, update: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """update(y, x) of some rows, with y's other rows beside them.

    Raises:
        ValueError: x has another number of rows than the batch.
    """
    if x.shape[:1] != (rows.batch,):
        raise ValueError(
            f"an adapter was given a name for each of {rows.batch} rows, and a layer's input has shape "
            f"{list(x.shape)}: its first dimension must be the batch"
        )
    return y.index_copy(0, rows.index, update(y.index_select(0, rows.index), x.index_select(0, rows.index)))


class Options(TypedDict, total=False):
    """The keywords of every adapter layer beside its base, rank, alpha and dropout."""

    rslora: bool
    init: Init
    dtype: torch.dtype | None


class LowRankLayer(nn.Module):
    """What all adapter layers share: a frozen base and a low-rank pair A, B beside it.

    A subclass says what kinds of base it takes, the shapes of its pair, and how the two make a matrix of the base's
    [out, in]; see `phicore.adapters.base` for what that matrix is.

    Attributes:
        base: the frozen layer.
        lora_A, lora_B: the pair.
        rank, alpha, rslora, scaling: as in LoRAConfig.
        dropout: probability of zeroing an input of the low-rank path while training.
        adapter_name: which adapter of the model this layer belongs to.
        enabled: when False the layer is its base.
        strength: factor of the low-rank product beside scaling.
        rows: the rows of a batch that the adapter answers for; None for all.
        trained_bias: a bias that trains in place of the base's, which stays as it was; None for none. In some rows of a
            batch it stands only where `mixed` adds it.
    """

    accepts: str
    """The kinds of base, in words."""

    def __init__(
        self,
        base: nn.Module,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        *,
        rslora: bool = False,
        init: Init = "kaiming",
        dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        for name in unknown:  # Python's own error would name this class
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")
        super().__init__()
        if not self.fits(base):
            raise TypeError(f"{type(self).__name__} adapts {self.accepts}, got {type(base).__name__}")
        if coded := coded_elsewhere(base):
            raise TypeError(f"{type(self).__name__} adapts {self.accepts}, got {coded}")
        LoRAConfig(rank=rank, alpha=alpha, dropout=dropout, init=init)  # raises on what is out of range
        self.base = base
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.rslora, self.init = rslora, init
        self.scaling = scaling(rank, alpha, rslora)
        self.adapter_name = "default"
        self.enabled = True
        self.strength = 1.0
        self.rows: Rows | None = None
        where: dict[str, Any] = {
            "dtype": dtype or base_layer.compute_dtype(base),
            "device": base_layer.device(base),
        }
        self._make_pair(base, where)
        self.trained_bias: nn.Parameter | None
        self.register_parameter("trained_bias", None)
        self.train(base.training)
        self._complete()
        self.reset_parameters()
        base.requires_grad_(False)  # at the end: one that is refused stays as it was

    def _complete(self) -> None:
        """Makes what a kind of layer has beside its pair. In place of constructors, whose one signature is above."""

    def _make_pair(self, base: nn.Module, where: dict[str, Any]) -> None:
        shape_A, shape_B = self.pair_shapes(base, self.rank)
        self.lora_A = nn.Parameter(torch.empty(shape_A, **where))
        self.lora_B = nn.Parameter(torch.empty(shape_B, **where))

    @classmethod
    def fits(cls, base: nn.Module) -> bool:
        """Whether base is of a kind that this layer adapts."""
        raise NotImplementedError

    @classmethod
    def pair_shapes(cls, base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of lora_A and lora_B over a base.

        Raises:
            ValueError: the base cannot take this rank.
        """
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Starts A and B as `init` says, so that the layer equals its base.

        Raises:
            ValueError: an init that this kind of layer does not know, or one that decomposes a weight with NaN or Inf.
        """
        if self.init not in ("kaiming", "gaussian"):
            raise ValueError(f'init "{self.init}" is for linear layers, not for {type(self.base).__name__}')
        start_pair(self.lora_A, self.lora_B, self.init)

    @property
    def weight(self) -> Tensor:
        """The weight that this layer amounts to, of the base's shape and dtype and with gradients, for code that
        computes with a layer's weight past its forward: made when it is used, without dropout.

        Raises (when it is used):
            ValueError: the adapter answers for some rows of a batch, or a grouped convolution has an adapter, for
                which there is no one weight.
        """

        def make() -> Tensor:
            if not self.enabled:
                return self.base.weight  # type: ignore[return-value]
            if self.rows is not None:
                raise ValueError("a layer whose weight is read past its forward cannot mix adapters in a batch")
            return self.laid_out(self.dense_weight(self.dtype))

        return lazy_weight(self.innermost.weight.shape, self.dtype, self.lora_A.device, make)

    def laid_out(self, weight: Tensor) -> Tensor:
        """A weight [out, in] as the innermost base holds it.

        Raises:
            ValueError: the base cannot hold it.
        """
        raise NotImplementedError

    @property
    def bias(self) -> Tensor | None:
        """The bias that the layer adds now, [out] or None: its own trained one or the base's."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias if bias is None or not self.has_own_bias else cast(Tensor, self.trained_bias).to(bias.dtype)

    @property
    def has_own_bias(self) -> bool:
        """Whether the layer adds its trained bias to all rows now."""
        return self.trained_bias is not None and self.enabled and self.rows is None

    def through_base(self, x: Tensor) -> Tensor:
        """The base's output, with this layer's bias."""
        if base_layer.fuses_dense(self.base, x):
            return base_layer.dense_linear(self.base, x, self.bias)
        if not self.has_own_bias:
            return self.base(x)
        return functional_call(self.base, {_bias_key(self.base): cast(Tensor, self.bias)}, (x,))

    @property
    def dtype(self) -> torch.dtype:
        """The base's compute dtype."""
        return base_layer.compute_dtype(self.base)

    @property
    def innermost(self) -> Any:
        """The layer under this adapter and those under it."""
        return self.base.innermost if isinstance(self.base, LowRankLayer) else self.base

    @property
    def factor(self) -> float:
        """What the low-rank product is multiplied by: scaling * strength."""
        return self.scaling * self.strength

    def updated(self, y: Tensor, x: Tensor, update: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """update(y, x), of the rows that this adapter answers for, with y's other rows beside them; y if disabled."""
        if not self.enabled:
            return y
        return update(y, x) if self.rows is None else updated_rows(self.rows, y, x, update)

    def _update(self, y: Tensor, x: Tensor) -> Tensor:
        """What x becomes in this layer, given what it becomes in the base, y."""
        raise NotImplementedError

    @property
    def active_dropout(self) -> float:
        """The probability of dropout now: zero outside training."""
        return self.dropout if self.training else 0.0

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] as they multiply to a matrix of the base's shape."""
        return self.lora_A, self.lora_B

    def product(self) -> Tensor:
        """scaling * B A, [out, in], in float32 (float64 for a float64 layer)."""
        return dense_product(*self.matrices(), self.factor, base_layer.accumulate_dtype(self.dtype))

    def dense_base(self) -> Tensor:
        """The base's weight, [out, in], in float32 (float64 for a float64 layer)."""
        return base_layer.dense_weight(self.base, base_layer.accumulate_dtype(self.dtype))

    def held_base(self) -> base_layer.Held:
        """The base's weight [out, in] as it is held."""
        return base_layer.held_weight(self.base, base_layer.accumulate_dtype(self.dtype))

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight that this layer amounts to for whoever stands over it, [out, in], computed in float32 and rounded
        once to dtype: its base's if it answers for some rows of a batch, which are others than theirs."""
        return (self.merged_weight() if self.rows is None else self.dense_base()).to(dtype)

    def merged_weight(self) -> Tensor:
        """W + scaling * B A, [out, in], in float32 (float64 for a float64 layer)."""
        return self.dense_base() + self.product() if self.enabled else self.dense_base()

    def plain(self, weight: Tensor) -> nn.Module:
        """A layer without adapters, of the innermost base's kind, with this weight [out, in]."""
        return base_layer.with_weight(self.innermost, self.laid_out(weight).contiguous())

    def extra_repr(self) -> str:
        return (
            f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, rslora={self.rslora}, "
            f"adapter_name={self.adapter_name!r}"
        )


def _bias_key(layer: nn.Module) -> str:
    """The name within a layer, adapted or not, of the bias that it adds."""
    if not isinstance(layer, LowRankLayer):
        return "bias"
    return "trained_bias" if layer.has_own_bias else "base." + _bias_key(layer.base)


class LowRankLinear(LowRankLayer):
    """What LoRA and DoRA share over linear layers. lora_A is [rank, in], lora_B [out, rank].

    Attributes:
        start_A, start_B: buffers; the A and B of a start whose product is not zero (pissa, olora), None for others. The
            layer computes W + scaling * (B A - start_B start_A), so that it starts at W and W stays as it is. A file
            holds that as a plain pair of twice the rank.
    """

    accepts = "nn.Linear, NF4Linear, transformers' Conv1D or another adapter of these"

    def _complete(self) -> None:
        super()._complete()
        self.in_features, self.out_features = base_layer.features(self.base)
        self.start_A: Tensor | None
        self.start_B: Tensor | None
        shifted = self.init in ("pissa", "olora")
        self.register_buffer("start_A", torch.empty_like(self.lora_A) if shifted else None)
        self.register_buffer("start_B", torch.empty_like(self.lora_B) if shifted else None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.init in ("kaiming", "gaussian"):
            super().reset_parameters()
            return
        if self.lora_A.is_meta:
            return
        if self.init == "loftq":  # whoever knows the dense weight calls `correct`
            nn.init.zeros_(self.lora_A)
            nn.init.zeros_(self.lora_B)
            return
        W = self.dense_base()
        if not W.isfinite().all():
            raise ValueError(f'init "{self.init}" decomposes a weight, and this one holds NaN or Inf')
        B, A = (top_singular if self.init == "pissa" else first_of_qr)(W, self.rank)
        for parameter, start, value in ((self.lora_A, self.start_A, A), (self.lora_B, self.start_B, B)):
            parameter.copy_(value / self.scaling**0.5)
            assert start is not None
            start.copy_(parameter)

    @torch.no_grad()
    def correct(self, residual: Tensor) -> None:
        """Sets A and B so that scaling * B A is the best approximation of residual [out, in] by their rank (LoftQ)."""
        B, A = top_singular(residual, self.rank)
        self.lora_A.copy_(A / self.scaling**0.5)
        self.lora_B.copy_(B / self.scaling**0.5)

    def laid_out(self, weight: Tensor) -> Tensor:
        return weight.t() if isinstance(self.innermost, transposed_kinds()) else weight

    def fuses(self, x: Tensor) -> bool:
        """Whether the base's product takes the low-rank term along; dropout needs x once whole and once dropped."""
        return not self.active_dropout and base_layer.fuses_low_rank(self.base, x)

    def matrices(self) -> tuple[Tensor, Tensor]:
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], dim=1)

    @classmethod
    def fits(cls, base: nn.Module) -> bool:
        return isinstance(base, (nn.Linear, NF4Linear, LowRankLinear, *transposed_kinds()))

    @classmethod
    def pair_shapes(cls, base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inner, out = base_layer.features(base)
        return (rank, inner), (out, rank)

    def project_with_rows(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """For an adapter over this one: x and rows through this layer's weight. [..., out] and [r, out]."""
        if not self.enabled or self.rows is not None:  # which concerns none of the rows of A above
            y, above = base_layer.project_with_rows(self.base, x, rows)
            return self.updated(y, x, self._update), above
        y = self.project(x)
        with torch.no_grad():
            return y, products.matmul(rows, self.dense_weight(rows.dtype).t())

    def project(self, x: Tensor) -> Tensor:
        """x through this layer's weight, without the bias: [..., in] -> [..., out]."""
        raise NotImplementedError

    def plain(self, weight: Tensor) -> nn.Module:
        if isinstance(self.innermost, (nn.Linear, *transposed_kinds())):
            return super().plain(weight)
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")  # in place of a coded one
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach(), requires_grad=False)
        return with_hooks_of(self.innermost, layer)


class LoRALinear(LowRankLinear):
    """A linear layer with a LoRA adapter: y = base(x) + scaling * (dropout(x) A^T) B^T.

    Args:
        base: nn.Linear, NF4Linear, transformers' Conv1D or another adapter of these; it is frozen.
        rank: inner dimension of the pair.
        alpha: numerator of the scaling.
        dropout: probability of zeroing an input of the low-rank path while training.
        rslora: scale by alpha / sqrt(rank).
        init: start of A and B, see LoRAConfig; with "loftq" both are zero until `correct` is called.
        dtype: of A and B; None takes the base's compute dtype.

    Attributes:
        lora_A, lora_B: A [rank, in] and B [out, rank], which train.

    Raises:
        TypeError: base is no linear layer.
        ValueError: rank, alpha, dropout or init out of range.

    Source: Hu et al. 2021, "LoRA".

    Example:
        >>> layer = LoRALinear(nn.Linear(64, 32), rank=4, alpha=8)
        >>> layer(torch.randn(2, 64)).shape
        torch.Size([2, 32])
    """

    def forward(self, x: Tensor) -> Tensor:
        """x, float [..., in] in the base's dtype, to [..., out].

        Raises:
            ValueError: x's last dimension is not in.
        """
        if self.enabled and self.rows is None:
            if (weight := base_layer.frozen_weight(self.base, x)) is not None:
                A, B = self.matrices()
                return low_rank_step(autocast(x), A, B, self.factor, weight, self.bias, self.active_dropout)[0]
            if self.fuses(x):
                return base_layer.low_rank(self.base, x, *self.matrices(), self.factor, self.bias)[0]
        return self.updated(self.through_base(x), x, self._update)

    def project(self, x: Tensor) -> Tensor:
        """x @ (W + scaling * B A)^T, without the bias."""
        return self.updated(base_layer.project(self.base, x), x, self._update)

    def _update(self, y: Tensor, x: Tensor) -> Tensor:
        return low_rank_update(y, x, *self.matrices(), self.factor, self.active_dropout)
