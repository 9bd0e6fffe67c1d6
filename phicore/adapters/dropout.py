"""The low-rank path's dropout (Hinton et al. 2012), which keeps one bit an element for the backward pass.

torch's own dropout keeps its output, a float copy of x, for the gradient of A, and a byte an element for that of x.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from phicore.products import emulated, matmul

LEVELS = 1 << 16  # random bits an element: 16, so that one 64-bit word serves four

# Eight bytes of 0 or 1 in a 64-bit word, times PACK, hold the eight bits in the top byte; the way back spreads the
# byte over the word and leaves one bit in each.
PACK = 0x0102040810204080
SPREAD = 0x0101010101010101
ONE_EACH = 0x8040201008040201 - (1 << 64)  # as a signed word


def drop_levels(p: float) -> int:
    """How many of 65,536 equally likely values of an element mean that it is dropped; never all of them."""
    return min(round(p * LEVELS), LEVELS - 1)


def draw(n: int, p: float, device: torch.device) -> Tensor:
    """Which elements stay, bool [n rounded up to a multiple of 8]: each with probability 1 - p, to within 2^-17.

    From torch's generator of the device, so that torch.manual_seed fixes it.
    """
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (-(-n // 8) * 2,), dtype=torch.int64, device=device)
    return words.view(torch.int16) >= drop_levels(p) - LEVELS // 2


def pack(stays: Tensor) -> Tensor:
    """bool [8 n] -> uint8 [n]."""
    return ((stays.view(torch.int64) * PACK) >> 56).to(torch.uint8)


def unpack(bits: Tensor) -> Tensor:
    """uint8 [n] -> bool [8 n]."""
    return ((bits.to(torch.int64) * SPREAD) & ONE_EACH).view(torch.uint8) != 0


class _DroppedProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, A: Tensor, p: float) -> Tensor:
        stays = draw(x.numel(), p, x.device)
        ctx.save_for_backward(x, A, pack(stays))
        ctx.factor = LEVELS / (LEVELS - drop_levels(p))  # type: ignore[attr-defined]
        dropped = x * stays[: x.numel()].view(x.shape)
        if emulated(x):
            return matmul(dropped, A.t(), ctx.factor, torch.float32)  # type: ignore[attr-defined]
        return nn.functional.linear(dropped, A) * ctx.factor  # type: ignore[attr-defined]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, A, bits = ctx.saved_tensors
        stays = unpack(bits)[: x.numel()].view(x.shape)
        grad = grad * ctx.factor  # [..., rank]
        grad_x = grad_A = None
        if ctx.needs_input_grad[0]:
            grad_x = matmul(grad, A, dtype=x.dtype) * stays
        if ctx.needs_input_grad[1]:
            flat = grad.reshape(-1, grad.shape[-1])
            grad_A = matmul(
                flat.t(), (x * stays).reshape(-1, x.shape[-1]), dtype=A.dtype
            )  # [rank, tokens] @ [tokens, in]
        return grad_x, grad_A, None


def dropped_projection(x: Tensor, A: Tensor, p: float) -> Tensor:
    """dropout(x) A^T: each element of x is zeroed with probability p, and the others are scaled by 1 / (1 - p).

    Keeps x itself, A, and one bit an element of x for the backward pass. The probability is held to 16 bits, and the
    scale is that of the probability as held.

    Args:
        x: [..., in].
        A: [rank, in] in x's dtype.
        p: at least 0 and below 1.

    Returns:
        [..., rank] in x's dtype, or in float32 where products of x are emulated.
    """
    return _DroppedProjection.apply(x, A, p)
