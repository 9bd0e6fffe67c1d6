"""DoRA (Liu et al. 2024): W' = m * V' / ||V'||, V' = W + scaling * B A, one norm and one magnitude per output row."""

from typing import Any

import torch
from torch import Tensor, nn

from phicore.adapters import base as base_layer
from phicore.adapters.dora_norm import cancelled, compiled_norm_squared, exact_norm_squared, row_scale
from phicore.adapters.dora_scale import fuses_scaling, scale_columns
from phicore.adapters.lora import LowRankLayer, LowRankLinear
from phicore.adapters.scaled_rows import scaled_rows
from phicore.adapters.step import low_rank_step
from phicore.adapters.update import low_rank_update
from phicore.modules import has_own_forward
from phicore.nf4.linear import autocast
from phicore.nf4.ops import flat
from phicore.transforms import transformed


class DoRALayer(LowRankLayer):
    """What DoRA layers share: a magnitude for each row of the base's [out, in] and the norms of V' = W + scaling * B A.

    Attributes:
        magnitude: m, [out]; starts at ||W|| (at ||V'|| for an init whose B is not zero).
    """

    base_norm_squared: Tensor
    norm_dim = 1  # of [out, in], along which norms are taken

    @classmethod
    def pair_shapes(cls, base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        innermost = base.innermost if isinstance(base, LowRankLayer) else base
        if has_own_forward(innermost):
            raise ValueError(
                f"a {type(innermost).__name__} has a forward of its own; DoRA computes with its weight, and would pass "
                f"that over"
            )
        return super().pair_shapes(base, rank)

    def _complete(self) -> None:
        super()._complete()
        accumulate = base_layer.accumulate_dtype(self.dtype)
        norm_squared = torch.empty(self.lora_B.shape[0], dtype=accumulate, device=self.lora_A.device)
        self.register_buffer("base_norm_squared", norm_squared, persistent=False)
        self._make_magnitude(self.lora_B.shape[0])
        self.register_load_state_dict_post_hook(_refresh_after_load)

    def _make_magnitude(self, out: int) -> None:
        self.magnitude = nn.Parameter(torch.empty(out, dtype=self.lora_A.dtype, device=self.lora_A.device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts A and B as LoRA does and m at the norms, so that the layer equals its base."""
        super().reset_parameters()
        self.refresh_base_norm()
        self.reset_magnitude()

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Sets m to ||V'||."""
        if not self.lora_A.is_meta:
            self.set_magnitude(torch.linalg.vector_norm(self._direction(), dim=self.norm_dim))

    @torch.no_grad()
    def set_magnitude(self, magnitude: Tensor) -> None:
        """Sets m, [out]."""
        self.magnitude.copy_(magnitude)

    def magnitude_over(self, norm: Tensor) -> Tensor:
        """m, [out] in the dtype of ||V'||."""
        return self.magnitude.to(norm.dtype)

    @torch.no_grad()
    def refresh_base_norm(self) -> None:
        """Sums ||W||^2 anew. Needed only after the base's weight was changed by hand; loading and casting do it, and so
        does each pass over a base that trains (frozen again, it needs this once more)."""
        if not self.lora_A.is_meta:
            weight = self.dense_base()
            squared = (weight * weight).sum(1)
            # FSDP2 shards parameters and leaves buffers whole.
            self.base_norm_squared = squared.full_tensor() if hasattr(squared, "full_tensor") else squared

    @property
    def factor(self) -> float:
        """What the low-rank product is multiplied by; the strength weighs W' and not V'."""
        return self.scaling

    @property
    def whole(self) -> bool:
        """Whether the layer computes W' for all rows, at its full strength."""
        return self.enabled and self.rows is None and self.strength == 1

    def weighed(self, z: Tensor, y: Tensor) -> Tensor:
        """W x + strength * (W' x - W x), [..., out], of z = W x and y = W' x."""
        return y if self.strength == 1 else torch.lerp(z, y, self.strength)

    def merged_weight(self) -> Tensor:
        """W + strength * (W' - W), [out, in], in float32 (float64 for a float64 layer)."""
        base = self.dense_base()
        if not self.enabled:
            return base
        direction = base + self.product()
        norm = torch.linalg.vector_norm(direction.detach(), dim=self.norm_dim)
        return self.weighed(base, row_scale(self.magnitude_over(norm), norm).unsqueeze(self.norm_dim) * direction)

    def scale(self, WA: Tensor) -> Tensor:
        """m / ||V'||, [out] in float32 or float64, with m differentiable; WA is W A^T [out, rank] as the base computed
        it."""
        norm, positive = self._norm(WA)
        return row_scale(self.magnitude_over(norm), norm, positive)

    def _direction(self) -> Tensor:
        return self.dense_base() + self.product()  # V', [out, in]

    def _follow_base(self) -> None:
        """Sums ||W||^2 anew where W trains, which `attach` has none do, or is computed: spectral_norm moves it in each
        pass of training."""
        base = self.base  # of most, the parameters are its own, and seen at once
        parameters = base.named_parameters() if base._modules else base._parameters.items()
        if base_layer.computes_weight(self.innermost) or any(
            p is not None and p.requires_grad and not name.endswith("bias") for name, p in parameters
        ):
            self.refresh_base_norm()

    @torch.no_grad()
    def _norm(self, WA: Tensor) -> tuple[Tensor, bool]:
        """||V'|| per row, [out], in base_norm_squared's dtype; and whether it is known that none is zero."""
        A, B = self.matrices()
        if transformed():  # which know no branch on data, and go past no_grad in forward mode
            return torch.linalg.vector_norm(self._direction().detach(), dim=1), False
        self._follow_base()
        terms = self.base_norm_squared, WA, A, B, self.factor
        if torch.compiler.is_compiling():
            return compiled_norm_squared(*terms, self.held_base()).sqrt(), False
        norm_squared = exact_norm_squared(*terms, self.dense_base)
        if norm_squared.is_meta:  # there is nothing to branch on
            return norm_squared.sqrt(), False
        return norm_squared.sqrt(), not (norm_squared == 0).any()  # a NaN is not zero, and stays one

    def _apply(self, fn: Any, recurse: bool = True) -> "DoRALayer":
        dtype, norms = self.dtype, self.base_norm_squared
        super()._apply(fn, recurse)
        # A cast rounds W, and must not round the sums: it does where W has its dtype already, too.
        if self.dtype != dtype or (norms is not None and self.base_norm_squared.dtype != norms.dtype):
            self.refresh_base_norm()
        return self


def _shown(layer: nn.Module) -> bool:
    """Whether hooks may hold a layer's product: its own, or those of a layer under it, whose product a disabled adapter
    hands on."""
    return base_layer.has_hooks(layer) or (isinstance(layer, LowRankLayer) and _shown(layer.base))


def _refresh_after_load(layer: DoRALayer, _keys: Any) -> None:
    layer.refresh_base_norm()


class DoRALinear(DoRALayer, LowRankLinear):
    """A linear layer with a DoRA adapter: y = (m / ||V'||) * (x V'^T) + bias, V' = W + scaling * B A.

    The norm follows A and B in the forward pass and is a constant in the backward pass. It comes from the factored
    form, so a step costs about what LoRA's costs. Dropout touches the low-rank path only; the bias is not scaled.

    Args and errors: as LoRALinear.

    Attributes:
        lora_A, lora_B: as LoRALinear.
        magnitude: m, [out]; starts at ||W|| (at ||V'|| for an init whose B is not zero).

    Source: Liu et al. 2024, "DoRA", section 4.3.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x, float [..., in] in the base's dtype, to [..., out].

        Raises:
            ValueError: x's last dimension is not in.
        """
        if not self.enabled:
            return self.through_base(x)
        if not self.whole:
            y = self.project(x)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        if fuses_scaling(x):
            return self._fused(x)
        return scaled_rows(*self._project(x), self.bias)

    def correct(self, residual: Tensor) -> None:
        super().correct(residual)
        self.reset_magnitude()

    def project(self, x: Tensor) -> Tensor:
        """x @ W'^T, without the bias."""
        if not self.enabled:
            return base_layer.project(self.base, x)
        if not self.whole:
            A = self.matrices()[0].detach()
            z, wa = base_layer.project_with_rows(self.base, x, A.to(x.dtype))
            return self._weighed_rows(z, x, wa)
        return scaled_rows(*self._project(x))

    def project_with_rows(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        if not self.enabled or self.rows is None:
            return super().project_with_rows(x, rows)
        A = self.matrices()[0].detach().to(x.dtype)
        z, products = base_layer.project_with_rows(self.base, x, torch.cat([A, rows.to(x.dtype)]))
        return self._weighed_rows(z, x, products[: A.shape[0]]), products[A.shape[0] :]

    def _weighed_rows(self, z: Tensor, x: Tensor, wa: Tensor) -> Tensor:
        """x W'^T, of the strength and the rows of the batch that the layer has, given z = x W^T and wa = A W^T."""
        A, B = self.matrices()
        scale = self.scale(wa.t())

        def update(z: Tensor, x: Tensor) -> Tensor:
            v = low_rank_update(z, x, A, B, self.factor, self.active_dropout)
            return self.weighed(z, scaled_rows(v, scale))

        return self.updated(z, x, update)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x V'^T [..., out] in the base's output dtype and m / ||V'|| [out]."""
        v, WA = self._direction_product(x)
        return v, self.scale(WA)

    def _direction_product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x V'^T [..., out] and W A^T [out, rank], by one operator if the base has one and dropout lets it."""
        A, B = self.matrices()
        if (weight := base_layer.frozen_weight(self.base, x)) is not None:
            v, wa = low_rank_step(autocast(x), A, B, self.factor, weight, dropout=self.active_dropout, with_rows=True)
            return v, wa.t()
        if self.fuses(x):
            v, wa = base_layer.low_rank(self.base, x, A, B, self.factor, with_rows=True)
            return v, wa.t()
        own = not _shown(self.base)  # the product is nobody else's
        rows = flat(x) if own else x  # flat, so that it can be added to in place
        z, wa = base_layer.project_with_rows(self.base, rows, A.detach().to(x.dtype))
        v = low_rank_update(z, rows, A, B, self.factor, self.active_dropout, in_place=own)
        return v.view(*x.shape[:-1], self.out_features), wa.t()

    # ===== on a GPU =====

    def _fused(self, x: Tensor) -> Tensor:
        """forward by operators that fuse its steps, as far as the base, dropout and torch.compile let them."""
        self._follow_base()
        A, B = self.matrices()
        v, WA = self._direction_product(x)
        y, norm_squared = scale_columns(v, self.base_norm_squared, WA, A, B, self.magnitude, self.bias, self.factor)
        if cancelled(norm_squared, self.base_norm_squared, WA.dtype).any():  # rarely: some rows are summed densely
            return scaled_rows(v, self.scale(WA), self.bias)
        return y
