"""torch.func's transforms (vmap, grad, jvp, jacrev ...) and forward-mode differentiation.

They look into a function one operator of torch's at a time. phicore's own operators and gradients are made for the
backward pass and nothing else, so while a transform runs the layers compute the same in torch's operators, with more
memory and time.
"""

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
