"""The columns of a product scaled and shifted, as DoRA's last step: y = v * scale + bias, rounded once to v's dtype.

On a CPU the 16-bit v is widened some rows at a time, so that float32 copies stay in cache, or, as soon as
`phicore.native` has compiled the same formulas, in registers.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from phicore.native import Formula
from phicore.nf4.ops import flat
from phicore.transforms import transformed

SCALED = 1 << 18  # elements of v that torch's operators scale at once
GROUP = 16  # rows whose products a formula sums
PAYS = 1 << 32  # elements


def scaled_rows(v: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """v * scale + bias in scale's dtype, rounded once to v's: [..., out] * [out] + [out] -> [..., out]. Keeps v and
    scale for the backward pass."""
    plain = v.dtype == scale.dtype and not (v.requires_grad and scale.requires_grad)
    if torch.compiler.is_compiling() or transformed() or plain:
        y = v * scale
        return (y if bias is None else y + bias).to(v.dtype)
    return _ScaledRows.apply(v, scale, bias)


class _ScaledRows(torch.autograd.Function):
    """v * scale + bias; the backward pass makes one tensor of v's size."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(v, scale)
        ctx.bias_dtype = None if bias is None else bias.dtype
        bias = None if bias is None else bias.to(scale.dtype)
        if v.dtype == scale.dtype:
            return v * scale if bias is None else torch.addcmul(bias, v, scale)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        if (run := _machine_code(SCALE, v, scale)) is not None:
            # x + -0.0 is x, for zeros of both signs.
            run(flat(v), scale, scale.new_full(scale.shape, -0.0) if bias is None else bias.contiguous(), flat(out))
        else:
            for rows in _pieces(v):
                _scale(flat(v)[rows], scale, bias, flat(out)[rows])
        return out

    @staticmethod
    def backward(ctx, grad):
        v, scale = ctx.saved_tensors
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = flat(grad).sum(0).to(ctx.bias_dtype)
        if torch.is_grad_enabled() or transformed():  # of the backward pass itself
            return (grad * scale).to(v.dtype), flat(grad * v.to(scale.dtype)).sum(0), grad_bias
        if v.dtype == scale.dtype:
            product = flat(grad) * flat(v)
            grad_scale = product.sum(0)
            return torch.mul(flat(grad), scale, out=product).view(grad.shape), grad_scale, grad_bias
        grad_v = torch.empty_like(grad, memory_format=torch.contiguous_format)
        return grad_v, _gradients(flat(v), flat(grad), scale, flat(grad_v)), grad_bias


def _gradients(v: Tensor, grad: Tensor, scale: Tensor, grad_v: Tensor) -> Tensor:
    """Writes grad * scale to grad_v, and returns the sum over all rows of grad * v, [out] in scale's dtype."""
    whole, out = len(v) // GROUP * GROUP, v.shape[-1]
    sums = scale.new_empty(-(-len(v) // GROUP), out)
    if whole < len(v):
        wide = grad[whole:].to(scale.dtype)
        sums[-1] = (wide * v[whole:]).sum(0)
        grad_v[whole:] = wide.mul_(scale)

    def groups(rows: slice) -> tuple[Tensor, ...]:
        v_rows, grad_rows, grad_v_rows = (t[rows].reshape(-1, GROUP, out) for t in (v, grad, grad_v))
        return v_rows, grad_rows, scale, grad_v_rows, sums[rows.start // GROUP : rows.stop // GROUP]

    if whole and (run := _machine_code(GRADIENTS, v, scale, grad)) is not None:
        run(*groups(slice(0, whole)))
    else:
        for rows in _pieces(v[:whole]):
            GRADIENTS.function(*groups(rows))
    return sums.sum(0)


def _pieces(v: Tensor) -> Iterator[slice]:
    """Rows of v [..., out] to take at once, whole groups of them."""
    elements = SCALED if v.device.type == "cpu" else 64 * SCALED
    n = v.numel() // max(1, v.shape[-1])
    step = max(1, elements // max(1, v.shape[-1] * GROUP)) * GROUP
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


# ===== formulas: run by torch's operators on some rows, or as machine code on all =====


def _scale(v: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """[rows, out] * [out] + [out]."""
    wide = v.to(scale.dtype).mul_(scale)
    out.copy_(wide if bias is None else wide.add_(bias))


def _scale_gradients(v: Tensor, grad: Tensor, scale: Tensor, grad_v: Tensor, sums: Tensor) -> None:
    """grad * scale, [n, 16, out], and the sums of grad * v over each 16 rows, [n, out]."""
    wide = grad.to(scale.dtype)
    products = wide * v
    for half in (8, 4, 2, 1):  # an order of its own, since that of Tensor.sum differs between shapes and compilers
        products = products[:, :half] + products[:, half:]
    sums.copy_(products[:, 0])
    grad_v.copy_(wide.mul_(scale))


def _numbers(*shape: int) -> Tensor:
    """bfloat16 [..., 40], or float32 [40], of several sizes and signs."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device="cpu").sin().mul_(7.0).view(shape)
    return numbers if len(shape) == 1 else numbers.to(torch.bfloat16)


_MATRIX, _ROW, _GROUPS = {0: "rows", 1: "out"}, {0: "out"}, {0: "groups", 2: "out"}
SCALE = Formula(
    f"{__name__}:SCALE",
    _scale,
    lambda: (_numbers(6, 40), _numbers(40), _numbers(40).mul_(-0.3), _numbers(6, 40)),
    (_MATRIX, _ROW, _ROW, _MATRIX),
    PAYS,
)
GRADIENTS = Formula(
    f"{__name__}:GRADIENTS",
    _scale_gradients,
    lambda: (
        *(_numbers(3, GROUP, 40).mul_(factor) for factor in (1, -0.3)),
        _numbers(40),
        _numbers(3, GROUP, 40),
        _numbers(3, 40).float(),
    ),
    (_GROUPS, _GROUPS, _ROW, _GROUPS, {0: "groups", 1: "out"}),
    PAYS,
)


def _machine_code(formula: Formula, v: Tensor, *others: Tensor) -> Any:
    """The formula as machine code, where there is some for v, the scale and others that all are to be contiguous."""
    fits = v.dtype == torch.bfloat16 and others[0].dtype == torch.float32 and v.numel()
    if not fits or not all(t.is_contiguous() for t in (v, *others)):
        return None
    return formula.ready(v.numel(), v, *others)
