"""The low-rank path's dropout (Hinton et al. 2012), which keeps one bit an element for the backward pass.

torch's own dropout keeps its output, a float copy of x, for the gradient of A, and a byte an element for that of x. It
multiplies x by its mask, too, which costs a CPU a conversion of every element; here it is a bitwise "and".
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from phicore.products import emulated, matmul
from phicore.transforms import transformed

LEVELS = 1 << 16  # random bits an element: 16, so that one 64-bit word serves four


def drop_levels(p: float) -> int:
    """How many of 65,536 equally likely values of an element mean that it is dropped; never all of them."""
    return min(round(p * LEVELS), LEVELS - 1)


def factor(p: float) -> float:
    """What the elements that stay are multiplied by: 1 / (1 - p), of the probability as it is held in 16 bits."""
    return LEVELS / (LEVELS - drop_levels(p))


def draw(n: int, p: float, device: torch.device) -> Tensor:
    """Which elements stay, int16 [n rounded up to a multiple of 8]: -1, all bits set, with probability 1 - p to within
    2^-17, else 0.

    From torch's generator of the device, so that torch.manual_seed fixes it.
    """
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (-(-n // 8) * 2,), dtype=torch.int64, device=device)
    dropped = drop_levels(p)
    if dropped == 0:
        return torch.full((len(words) * 4,), -1, dtype=torch.int16, device=device)
    largest = dropped - LEVELS // 2 - 1  # of the values that mean that an element is dropped
    return words.view(torch.int16).clamp_(largest, largest + 1).sub_(largest).neg_()


def pack(mask: Tensor) -> Tensor:
    """int16 [8 n] of -1 and 0 -> uint8 [n]; bit k of byte i is element k * n + i."""
    bit = 1 << torch.arange(8, dtype=torch.int16, device=mask.device)
    return (mask.view(8, -1) & bit[:, None]).sum(0, dtype=torch.int16).to(torch.uint8)


def unpack(bits: Tensor) -> Tensor:
    """uint8 [n] -> int16 [8 n] of -1 and 0."""
    to_sign = 15 - torch.arange(8, dtype=torch.int16, device=bits.device)
    return ((bits.to(torch.int16) << to_sign[:, None]) >> 15).view(-1)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of an element's size


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask, int16 of at least as many elements, is -1; elsewhere zero."""
    mask = mask[: x.numel()].view(x.shape)
    if torch.is_grad_enabled() or transformed():  # a backward pass that is itself differentiated, or under vmap
        return x * -mask
    return (x.view(_BITS[x.element_size()]) & mask).view(x.dtype)


class _DroppedProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, A: Tensor, p: float) -> Tensor:
        mask = draw(x.numel(), p, x.device)
        ctx.save_for_backward(x, A, pack(mask))
        ctx.factor = factor(p)  # type: ignore[attr-defined]
        dropped = masked(x, mask)
        if emulated(x):
            return matmul(dropped, A.t(), factor(p), torch.float32)
        return nn.functional.linear(dropped, A) * factor(p)

    @staticmethod
    def backward(ctx, grad):
        x, A, bits = ctx.saved_tensors
        mask = unpack(bits)
        grad = grad * ctx.factor  # [..., rank]
        grad_x = grad_A = None
        if ctx.needs_input_grad[0]:
            grad_x = masked(matmul(grad, A, dtype=x.dtype), mask)
        if ctx.needs_input_grad[1]:
            flat = grad.reshape(-1, grad.shape[-1])
            dropped = masked(x, mask).reshape(-1, x.shape[-1])
            grad_A = matmul(flat.t(), dropped, dtype=A.dtype)  # [rank, tokens] @ [tokens, in]
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
