"""DoRA (Liu et al. 2024): W' = m * V' / ||V'||, V' = W + scaling * B A, one norm and one magnitude per output row."""

from typing import Any

import torch
from torch import Tensor, nn

from phicore.adapters import base as base_layer
from phicore.adapters.dora_scale import fuses_scaling, scale_columns
from phicore.adapters.lora import LowRankLayer, LowRankLinear, dense_product, low_rank_update


def factored_norm_squared(base_norm_squared: Tensor, WA: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """||W + scale * B A||^2 per row, without the dense product.

    ||W||^2 + 2 scale rowsum((W A^T) o B) + scale^2 rowsum((B A A^T) o B), which costs rank / out of the dense way.

    Args:
        base_norm_squared: rowsum(W o W), [out].
        WA: W A^T, [out, rank].
        A: [rank, in].
        B: [out, rank].
        scale: factor of B A.

    Returns:
        [out] in base_norm_squared's dtype, in which everything is summed; not below zero.
    """
    A, B, WA = (t.to(base_norm_squared.dtype) for t in (A, B, WA))
    with base_layer.without_autocast(A.device):
        gram = A @ A.t()  # [rank, in] @ [in, rank] -> [rank, rank]
        both = torch.addmm(WA, B, gram, beta=2 * scale, alpha=scale**2)  # [out, rank]: 2 scale W A^T + scale^2 B A A^T
    return (base_norm_squared + (both * B).sum(1)).clamp_(min=0)


def row_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m / ||V'||, [out]; zero where the norm is zero, so that a zero row stays a finite zero row."""
    return torch.where(norm > 0, magnitude / norm.where(norm > 0, 1), 0)


class _ScaledRows(torch.autograd.Function):
    """v * scale, whose backward pass writes both of its products of v's size into one buffer."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(v, scale)
        return v * scale

    @staticmethod
    def backward(ctx, grad):
        v, scale = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        product = flat * v.reshape(flat.shape)
        grad_scale = product.sum(0)
        if torch.is_grad_enabled():  # the backward pass is itself differentiated
            return grad * scale, grad_scale
        return torch.mul(flat, scale, out=product).view(grad.shape), grad_scale


def scaled_rows(v: Tensor, scale: Tensor) -> Tensor:
    """v * scale: [..., out] * [out] -> [..., out]. Keeps v and scale for the backward pass."""
    if torch.compiler.is_compiling() or not (v.requires_grad and scale.requires_grad):
        return v * scale
    return _ScaledRows.apply(v, scale)


# The factored norm subtracts numbers of the size of ||W||^2, so its relative error grows as (||W|| / ||V'||)^2. Rows
# whose ||V'||^2 falls below this fraction of ||W||^2 are summed densely instead. In 16 bits W A^T itself is rounded.
CANCELLATION = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 0.25, torch.float16: 0.05}


class DoRALayer(LowRankLayer):
    """What DoRA layers share: a magnitude for each row of the base's [out, in] and the norms of V' = W + scaling * B A.

    The norm follows A and B in the forward pass and is a constant in the backward pass (section 4.3 of the paper). It
    comes from the factored form, so a step costs about what LoRA's costs.

    Attributes:
        magnitude: m, [out]; starts at ||W|| (at ||V'|| for an init whose B is not zero).
    """

    base_norm_squared: Tensor

    def __init__(self, base: nn.Module, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0, **options: Any):
        super().__init__(base, rank, alpha, dropout, **options)
        accumulate = base_layer.accumulate_dtype(self.dtype)
        norm_squared = torch.empty(self.lora_B.shape[0], dtype=accumulate, device=self.lora_A.device)
        self.register_buffer("base_norm_squared", norm_squared, persistent=False)
        self._make_magnitude(self.lora_B.shape[0])
        self.register_load_state_dict_post_hook(_refresh_after_load)
        self.reset_parameters()

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
            self.set_magnitude(torch.linalg.vector_norm(self._direction(), dim=1))

    @torch.no_grad()
    def set_magnitude(self, magnitude: Tensor) -> None:
        """Sets m, [out]."""
        self.magnitude.copy_(magnitude)

    @torch.no_grad()
    def refresh_base_norm(self) -> None:
        """Sums ||W||^2 anew. Needed only after the base's weight was changed by hand; loading and casting do it."""
        if not self.lora_A.is_meta:
            weight = self.dense_base()
            self.base_norm_squared = (weight * weight).sum(1)

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
        norm = torch.linalg.vector_norm(direction, dim=1)
        return self.weighed(base, row_scale(self.magnitude.to(norm.dtype), norm).unsqueeze(1) * direction)

    def scale(self, WA: Tensor, dtype: torch.dtype) -> Tensor:
        """m / ||V'||, [out] in dtype, with m differentiable; WA is W A^T [out, rank] as the base computed it."""
        norm = self._norm(WA)
        return row_scale(self.magnitude.to(norm.dtype), norm).to(dtype)

    def _direction(self) -> Tensor:
        return self.dense_base() + self.product()  # V', [out, in]

    @torch.no_grad()
    def _norm(self, WA: Tensor) -> Tensor:
        """||V'|| per row, [out], in base_norm_squared's dtype."""
        A, B = self.matrices()
        norm_squared = factored_norm_squared(self.base_norm_squared, WA, A, B, self.factor)
        cancelled = norm_squared < CANCELLATION[WA.dtype] * self.base_norm_squared  # [out]
        # Tensors, since torch.cond takes no numbers that differ between layers.
        factor = norm_squared.new_full((), self.factor) if torch.compiler.is_compiling() else self.factor

        def dense() -> Tensor:
            direction = self.dense_base() + dense_product(A, B, factor, base_layer.accumulate_dtype(self.dtype))
            return torch.where(cancelled, direction.to(norm_squared.dtype).square().sum(1), norm_squared)

        def factored() -> Tensor:
            return norm_squared.clone()

        if torch.compiler.is_compiling():  # a branch on data inside one graph
            return torch.cond(cancelled.any(), dense, factored, ()).sqrt()
        return (dense() if cancelled.any() else norm_squared).sqrt()

    def _apply(self, fn: Any, recurse: bool = True) -> "DoRALayer":
        dtype = self.dtype
        super()._apply(fn, recurse)
        if self.dtype != dtype:  # a cast rounds W, and must not round the sums
            self.refresh_base_norm()
        return self


def _refresh_after_load(layer: DoRALayer, _keys: Any) -> None:
    layer.refresh_base_norm()


class DoRALinear(DoRALayer, LowRankLinear):
    """A linear layer with a DoRA adapter: y = (m / ||V'||) * (x V'^T) + bias, V' = W + scaling * B A.

    The norm follows A and B in the forward pass and is a constant in the backward pass (section 4.3 of the paper). It
    comes from the factored form, so a step costs about what LoRA's costs. Dropout touches the low-rank path only;
    the bias is not scaled.

    Args and errors: as LoRALinear.

    Attributes:
        magnitude: m, [out]; starts at ||W|| (at ||V'|| for an init whose B is not zero).
    """

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        if not self.enabled:
            return self.base(x)
        if not self.whole:
            y = self.project(x)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        if self.fuses(x) or fuses_scaling(x):
            return self._fused(x)
        v, scale = self._project(x)
        if self.bias is None:
            return scaled_rows(v, scale)
        return torch.addcmul(self.bias.to(v.dtype), v, scale)

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
        scale = self.scale(wa.t(), z.dtype)

        def update(z: Tensor, x: Tensor) -> Tensor:
            return self.weighed(z, low_rank_update(z, x, A, B, self.factor, self.active_dropout) * scale)

        return self.updated(z, x, update)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x V'^T [..., out] and m / ||V'|| [out], both in the base's output dtype."""
        A, B = self.matrices()
        flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # so that the product can be added to in place
        z, wa = base_layer.project_with_rows(self.base, flat, A.detach().to(x.dtype))
        v = low_rank_update(z, flat, A, B, self.factor, self.active_dropout, in_place=True)
        return v.view(*x.shape[:-1], self.out_features), self.scale(wa.t(), z.dtype)

    # ===== on a GPU =====

    def _fused(self, x: Tensor) -> Tensor:
        """forward by operators that fuse its steps, as far as the base, dropout and torch.compile let them."""
        A, B = self.matrices()
        if self.fuses(x):
            v, wa = base_layer.low_rank(self.base, x, A, B, self.factor, with_rows=True)
        else:
            z, wa = base_layer.project_with_rows(self.base, x, A.detach().to(x.dtype))
            v = low_rank_update(z, x, A, B, self.factor, self.active_dropout)
        WA = wa.t()  # W A^T [out, rank]
        if fuses_scaling(x):
            y, norm_squared = scale_columns(v, self.base_norm_squared, WA, A, B, self.magnitude, self.bias, self.factor)
            if not self._cancelled(norm_squared, WA).any():
                return y
        y = v * self.scale(WA, v.dtype)  # in torch.compile; and, rarely, where some rows are summed densely
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _cancelled(self, norm_squared: Tensor, WA: Tensor) -> Tensor:
        """Rows, bool [out], whose factored norm lost too many digits."""
        return norm_squared < CANCELLATION[WA.dtype] * self.base_norm_squared
