"""The NF4 operators, registered with torch.library so that torch.compile and the dispatcher see single opaque calls.

An NF4 weight enters as its parts (packed, absmax, nested_absmax, offset) and its [out, in] shape. The implementations
here are the torch reference and serve every device; phicore.nf4.kernels overrides them on GPUs, and CPUs decode as
machine code in time (phicore.nf4.compiled), to the same bits.
"""

from math import gcd, prod

import torch
from torch import Tensor

from phicore import products
from phicore.nf4.codec import decode_absmax
from phicore.nf4.compiled import decode

PARTS = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset"

torch.library.define(
    "phicore::nf4_dequantize", f"({PARTS}, SymInt[] shape, int block_size, ScalarType dtype) -> Tensor"
)
torch.library.define(
    "phicore::nf4_linear", f"(Tensor x, {PARTS}, Tensor? bias, SymInt[] shape, int block_size) -> Tensor"
)
torch.library.define(
    "phicore::nf4_project_with_rows",
    f"(Tensor x, Tensor rows, {PARTS}, SymInt[] shape, int block_size) -> (Tensor, Tensor)",
)
torch.library.define("phicore::nf4_linear_dx", f"(Tensor grad, {PARTS}, SymInt[] shape, int block_size) -> Tensor")

nf4_dequantize = torch.ops.phicore.nf4_dequantize
nf4_linear = torch.ops.phicore.nf4_linear
nf4_linear_dx = torch.ops.phicore.nf4_linear_dx
nf4_project_with_rows = torch.ops.phicore.nf4_project_with_rows


def flat(x: Tensor) -> Tensor:
    """[..., n] -> [rows, n]."""
    return x if x.dim() == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])


def unflat(y: Tensor, x: Tensor) -> Tensor:
    """[rows, n] -> [..., n] with x's leading sizes. No view in autograd's eyes, which lets nobody write in place to a
    view that an operator with a gradient of its own returns."""
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, as an operator may return it: [..., in], [out, in], [out] -> [..., out]."""
    return unflat(torch.nn.functional.linear(flat(x), weight, bias), x)


def reference_dequantize(packed, absmax, nested_absmax, offset, shape, block_size, dtype):
    return decode(packed, absmax, nested_absmax, offset, prod(shape), block_size, dtype).view(shape)


def dequantize(packed, absmax, nested_absmax, offset, shape, block_size, dtype):
    """nf4_dequantize, past the dispatcher where nobody needs it: a call through it takes as long as to decode 40,000
    weights. Compilers, torch.jit.trace and fake tensors need it."""
    watched = torch.compiler.is_compiling() or torch._C._is_tracing()
    direct = packed.device.type == "cpu" and type(packed) is Tensor and not watched
    decode = reference_dequantize if direct else nf4_dequantize
    return decode(packed, absmax, nested_absmax, offset, shape, block_size, dtype)


def row_blocks(packed, absmax, nested_absmax, offset, shape, block_size):
    """The weight as `phicore.products` takes it: some rows after the other, decoded to float32 and not rounded."""
    if nested_absmax is not None:
        absmax = decode_absmax(absmax, nested_absmax, offset)
    out, inner = shape
    whole = block_size // gcd(inner, block_size)  # rows after which a block of weights ends with a row
    step = max(1, products.PIECE // max(1, inner * whole)) * whole
    for start in range(0, out, step):
        rows = slice(start, min(start + step, out))
        first, last = rows.start * inner, rows.stop * inner
        codes, scales = packed[first // 2 : (last + 1) // 2], absmax[first // block_size : -(-last // block_size)]
        weights = decode(codes, scales, None, None, last - first, block_size, torch.float32)
        yield rows, weights.view(rows.stop - rows.start, inner)


def reference_linear(x, packed, absmax, nested_absmax, offset, bias, shape, block_size):
    if products.emulated(x):
        blocks = row_blocks(packed, absmax, nested_absmax, offset, shape, block_size)
        y = x.new_empty(*x.shape[:-1], shape[0])
        products.linear(flat(x), blocks, flat(y), bias)
        return y
    weight = nf4_dequantize(packed, absmax, nested_absmax, offset, shape, block_size, x.dtype)  # [out, in]
    return product(x, weight, bias)


def reference_project_with_rows(x, rows, packed, absmax, nested_absmax, offset, shape, block_size):
    if products.emulated(x):
        blocks = row_blocks(packed, absmax, nested_absmax, offset, shape, block_size)
        y, above = x.new_empty(*x.shape[:-1], shape[0]), rows.new_empty(len(rows), shape[0])
        products.linear(flat(x), blocks, flat(y), rows=(rows, above))
        return y, above
    weight = nf4_dequantize(packed, absmax, nested_absmax, offset, shape, block_size, x.dtype)  # [out, in]
    return product(x, weight), product(rows, weight)


def reference_linear_dx(grad, packed, absmax, nested_absmax, offset, shape, block_size):
    if products.emulated(grad):
        blocks = row_blocks(packed, absmax, nested_absmax, offset, shape, block_size)
        return unflat(products.linear_dx(flat(grad), blocks, shape[1]), grad)
    weight = nf4_dequantize(packed, absmax, nested_absmax, offset, shape, block_size, grad.dtype)  # [out, in]
    return grad @ weight


for _name, _reference in (
    ("dequantize", reference_dequantize),
    ("linear", reference_linear),
    ("project_with_rows", reference_project_with_rows),
    ("linear_dx", reference_linear_dx),
):
    torch.library.impl(f"phicore::nf4_{_name}", "default", _reference)


@torch.library.register_fake("phicore::nf4_dequantize")
def _(packed, absmax, nested_absmax, offset, shape, block_size, dtype):
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("phicore::nf4_linear")
def _(x, packed, absmax, nested_absmax, offset, bias, shape, block_size):
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.register_fake("phicore::nf4_project_with_rows")
def _(x, rows, packed, absmax, nested_absmax, offset, shape, block_size):
    return x.new_empty((*x.shape[:-1], shape[0])), rows.new_empty((rows.shape[0], shape[0]))


@torch.library.register_fake("phicore::nf4_linear_dx")
def _(grad, packed, absmax, nested_absmax, offset, shape, block_size):
    return grad.new_empty((*grad.shape[:-1], shape[1]))


# The products are linear in x: their backward needs the packed weight only, neither x nor a decoded copy of W.


def _save(ctx, parts, shape, block_size):
    ctx.save_for_backward(*parts)
    ctx.shape, ctx.block_size = shape, block_size


def _linear_setup(ctx, inputs, output):
    _, *parts, _, shape, block_size = inputs
    _save(ctx, parts, shape, block_size)


def _linear_backward(ctx, grad):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = nf4_linear_dx(grad, *ctx.saved_tensors, ctx.shape, ctx.block_size)
    if ctx.needs_input_grad[5]:
        grad_bias = flat(grad).sum(0)
    return grad_x, None, None, None, None, grad_bias, None, None


def _project_setup(ctx, inputs, output):
    _, _, *parts, shape, block_size = inputs
    _save(ctx, parts, shape, block_size)
    ctx.mark_non_differentiable(output[1])


def _project_backward(ctx, grad, _grad_rows):
    grad_x = nf4_linear_dx(grad, *ctx.saved_tensors, ctx.shape, ctx.block_size) if ctx.needs_input_grad[0] else None
    return grad_x, None, None, None, None, None, None, None


def _linear_dx_setup(ctx, inputs, output):
    _, *parts, shape, block_size = inputs
    _save(ctx, parts, shape, block_size)


def _linear_dx_backward(ctx, grad):
    # dx = g W is linear in g, so its own backward is the forward product again.
    grad_g = nf4_linear(grad, *ctx.saved_tensors, None, ctx.shape, ctx.block_size) if ctx.needs_input_grad[0] else None
    return grad_g, None, None, None, None, None, None


torch.library.register_autograd("phicore::nf4_linear", _linear_backward, setup_context=_linear_setup)
torch.library.register_autograd("phicore::nf4_project_with_rows", _project_backward, setup_context=_project_setup)
torch.library.register_autograd("phicore::nf4_linear_dx", _linear_dx_backward, setup_context=_linear_dx_setup)
