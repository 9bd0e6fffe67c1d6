"""DoRA's last step as one operator: y = (m / ||V'||) * v + bias, with the norm from its factored form.

Worth a call on a GPU, where it is one kernel in place of a dozen small ones and two passes over v. torch.compile fuses
the single steps itself, and there, as on a CPU, the layer takes those.
"""

import torch
from torch import Tensor

from phicore.adapters.base import without_autocast
from phicore.adapters.dora_norm import factored_norm_squared, row_scale
from phicore.nf4 import kernels
from phicore.nf4.ops import flat, unflat
from phicore.transforms import transformed

torch.library.define(
    "phicore::dora_scale",
    "(Tensor v, Tensor base_norm_squared, Tensor WA, Tensor A, Tensor B, Tensor magnitude, Tensor? bias, float scale) "
    "-> (Tensor, Tensor)",
)


def fuses_scaling(x: Tensor) -> bool:
    """Whether `scale_columns` gains for a layer's input."""
    return kernels.on_device(x) and not torch.compiler.is_compiling() and not transformed()


def scale_columns(
    v: Tensor,
    base_norm_squared: Tensor,
    WA: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y = (m / ||W + scale * B A||) * v + bias, summed in float32 and rounded once; the norm has no gradient.

    Args:
        v: x V'^T [..., out], float32, bfloat16 or float16, differentiable, as are magnitude and bias.
        base_norm_squared: rowsum(W o W), float32 [out].
        WA: W A^T, [out, rank].
        A, B: [rank, in], [out, rank].
        magnitude: m, [out].
        bias: [out], or None.
        scale: factor of B A.

    Returns:
        y [..., out] in v's dtype, and ||V'||^2 float32 [out], from which the caller sees where its terms cancelled.
    """
    A, B = A.detach(), B.detach()
    return torch.ops.phicore.dora_scale(v, base_norm_squared, WA, A, B, magnitude, bias, scale)


def reference(v, base_norm_squared, WA, A, B, magnitude, bias, scale):
    squared = factored_norm_squared(base_norm_squared, WA, A, B, scale)
    y = v * row_scale(magnitude.to(squared.dtype), squared.sqrt())
    return (y if bias is None else y + bias).to(v.dtype), squared


def kernel(v, base_norm_squared, WA, A, B, magnitude, bias, scale):
    if v.dtype not in kernels.DTYPES or not kernels.has_kernels(v.device):
        return reference(v, base_norm_squared, WA, A, B, magnitude, bias, scale)
    from phicore_kernels.dora import scale_columns as launch

    with without_autocast(v.device):  # A A^T is a product of torch's
        y, squared = launch(flat(v), base_norm_squared, WA, A, B, magnitude, scale, bias)
    return unflat(y, v), squared


def register(device_type: str) -> None:
    """Makes the operator run as a kernel for a device type that torch.library knows."""
    torch.library.impl("phicore::dora_scale", device_type, kernel)


torch.library.impl("phicore::dora_scale", "default", reference)
for _device_type in kernels.DEVICE_TYPES:
    register(_device_type)


@torch.library.register_fake("phicore::dora_scale")
def _(v, base_norm_squared, WA, A, B, magnitude, bias, scale):
    return v.new_empty(v.shape), base_norm_squared.new_empty(base_norm_squared.shape)


def _setup(ctx, inputs, output):
    v, _, _, _, _, magnitude, bias, _ = inputs
    _, squared = output
    ctx.save_for_backward(v, magnitude, squared)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(squared)


def _backward(ctx, grad, _grad_squared):
    v, magnitude, squared = ctx.saved_tensors
    norm = squared.sqrt()
    dv = dm = dbias = None
    if ctx.needs_input_grad[0]:
        dv = grad * row_scale(magnitude.to(norm.dtype), norm).to(grad.dtype)
    if ctx.needs_input_grad[5]:
        sums = (grad * v).reshape(-1, v.shape[-1]).sum(0, dtype=norm.dtype)  # [out]
        dm = row_scale(sums, norm).to(magnitude.dtype)
    if ctx.needs_input_grad[6]:
        dbias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return dv, None, None, None, None, dm, dbias, None


torch.library.register_autograd("phicore::dora_scale", _backward, setup_context=_setup)
