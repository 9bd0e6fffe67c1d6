"""16-bit matrix products on a CPU that has none: taken in float32, a piece at a time, and rounded once.

There torch multiplies 16-bit matrices in scalar loops, at a seventh of float32's speed and, for a product that is not
with a transposed matrix, at a hundredth of it; or, where the CPU has AVX-512 without its bfloat16 instructions, has
oneDNN imitate them, several times slower than float32. So operands are cast to float32 in pieces that fit the cache,
and the result is rounded as it is stored. A GPU's tensor cores do the same: 16 bits in and out, sums in float32.
"""

from collections.abc import Iterable, Iterator
from math import prod

import torch
from torch import Tensor

from phicore.transforms import transformed

PIECE = 1 << 19  # elements cast at once: 2 MiB in float32


def emulated_dtypes() -> tuple[torch.dtype, ...]:
    """The 16-bit dtypes in which this CPU has no matrix products.

    torch asks oneDNN the same before it hands a product over to it (bfloat16: AVX-512 or Arm's BF16; float16:
    AVX512-FP16, AMX-FP16 or Arm's FP16). A build without oneDNN lacks the question and the products. To bfloat16 oneDNN
    says yes on any AVX-512; whether it is at home there (Cooper Lake, Sapphire Rapids, Zen 4 and later) the CPU says.
    """
    bfloat16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)()
    float16 = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", bool)()
    if torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported():
        bfloat16 = False
    return tuple(dtype for dtype, there in ((torch.bfloat16, bfloat16), (torch.float16, float16)) if not there)


EMULATED = emulated_dtypes()


def emulated(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether products of x, cast to dtype if one is given, are those that this file is for."""
    return (dtype or x.dtype) in EMULATED and x.device.type == "cpu" and not transformed()


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over x are kept between two products: x's own, or float32 where they are emulated."""
    return torch.float32 if emulated(x) else x.dtype


# ===== products with a weight that is decoded or cast by rows =====

Blocks = Iterable[tuple[slice, Tensor]]
"""A weight [out, in], some rows after the other: which ones, and they in float32, [rows, in]."""


def row_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of a dense weight [out, in], in float32 or float64, each in the memory of the one before."""
    out, inner = weight.shape
    step = min(out, max(1, PIECE // max(1, inner)))
    wide = torch.promote_types(weight.dtype, torch.float32)
    piece = None if wide == weight.dtype else weight.new_empty(step, inner, dtype=wide)
    for start in range(0, out, step or 1):
        rows = slice(start, min(start + step, out))
        block = weight[rows]
        yield rows, block if piece is None else piece[: len(block)].copy_(block)


def linear(
    x: Tensor,
    blocks: Blocks,
    y: Tensor,
    bias: Tensor | None = None,
    pair: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    rows: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y = x W^T + bias + scale * u B^T, summed in float32 and rounded once to y's dtype.

    Args:
        x: [n, in].
        blocks: W.
        y: [n, out], written to.
        bias: [out] or None.
        pair: u [n, rank] and B [out, rank], or None.
        scale: factor of their product.
        rows: A [r, in] and a result [r, out] that takes A W^T, or None.

    Returns:
        y.
    """
    x = _wide(x)
    A, WA = (_wide(rows[0]), rows[1]) if rows is not None else (None, None)
    u, B = (_wide(pair[0]), pair[1]) if pair is not None else (None, None)
    with torch.autocast("cpu", enabled=False):
        for block, weight in blocks:
            w = weight.t()
            part = torch.mm(x, w) if bias is None else torch.addmm(_wide(bias[block]), x, w)  # [n, rows of the block]
            if u is not None and B is not None:
                part.addmm_(u, _wide(B[block]).t(), alpha=scale)
            y[:, block] = part
            if A is not None and WA is not None:
                WA[:, block] = torch.mm(A, w)
    return y


def linear_dx(
    grad: Tensor, blocks: Blocks, inner: int, left: Tensor | None = None, right: Tensor | None = None
) -> Tensor:
    """grad W + left right, summed in float32 and rounded once: [n, out], W [out, in], [n, rank], [rank, in] -> [n, in]
    in grad's dtype."""
    total = grad.new_zeros(len(grad), inner, dtype=torch.promote_types(grad.dtype, torch.float32))
    with torch.autocast("cpu", enabled=False):
        if left is not None and right is not None:
            total.addmm_(_wide(left), _wide(right), beta=0)
        for block, weight in blocks:
            total.addmm_(_wide(grad[:, block]), weight)
    return total.to(grad.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ===== products of two small or narrow matrices =====

torch.library.define("phicore::wide_addmm", "(Tensor? y, Tensor a, Tensor b, float scale, ScalarType dtype) -> Tensor")


def matmul(a: Tensor, b: Tensor, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """scale * a b, differentiable; where it would be emulated, summed in float32 and rounded once.

    Args:
        a: [..., k].
        b: [k, m].
        scale: factor of the product.
        dtype: of the result; None for a's.

    Returns:
        [..., m].
    """
    dtype = dtype or a.dtype
    if emulated(a) or emulated(b):
        flat = a.reshape(prod(a.shape[:-1]), a.shape[-1])
        return torch.ops.phicore.wide_addmm(None, flat, b, scale, dtype).view(*a.shape[:-1], b.shape[1])
    both = torch.promote_types(a.dtype, b.dtype)  # float32 and 16 bits: vmap over emulated products' backward pass
    product = a.to(both) @ b.to(both)
    return (product if scale == 1 else scale * product).to(dtype)


def addmm(y: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y + scale * a b in y's dtype, differentiable, summed in float32 and rounded once: [n, m], [n, k], [k, m]."""
    return torch.ops.phicore.wide_addmm(y, a, b, scale, y.dtype)


def _addmm(y: Tensor | None, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    (n, k), m = a.shape, b.shape[1]
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    with torch.autocast("cpu", enabled=False):
        if y is None and k > n:  # long sums of a small result
            total = a.new_zeros(n, m, dtype=wide)
            step = max(1, PIECE // max(n, m, 1))
            for left, right in zip(a.split(step, 1), b.split(step), strict=True):
                total.addmm_(left.to(wide), right.to(wide), alpha=scale)
            return total.to(dtype)
        out, b = a.new_empty(n, m, dtype=dtype), b.to(wide)
        step = max(1, PIECE // max(k, m, 1))
        for start in range(0, n, step):
            rows = slice(start, start + step)
            part = torch.mm(a[rows].to(wide), b)
            part = part.mul_(scale) if y is None else torch.add(y[rows].to(wide), part, alpha=scale, out=part)
            out[rows] = part
    return out


torch.library.impl("phicore::wide_addmm", "default", _addmm)


@torch.library.register_fake("phicore::wide_addmm")
def _(y, a, b, scale, dtype):
    return a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)


def _addmm_setup(ctx, inputs, output):
    y, a, b, scale, _ = inputs
    ctx.save_for_backward(a, b)
    ctx.scale, ctx.y_dtype = scale, None if y is None else y.dtype


def _addmm_backward(ctx, grad):
    a, b = ctx.saved_tensors
    operator, needs = torch.ops.phicore.wide_addmm, ctx.needs_input_grad
    grad_y = grad.to(ctx.y_dtype) if needs[0] else None
    grad_a = operator(None, grad, b.t(), ctx.scale, a.dtype) if needs[1] else None
    grad_b = operator(None, a.t(), grad, ctx.scale, b.dtype) if needs[2] else None
    return grad_y, grad_a, grad_b, None, None


torch.library.register_autograd("phicore::wide_addmm", _addmm_backward, setup_context=_addmm_setup)
