"""torch.func's transforms (vmap, grad, jvp, jacrev ...) and forward-mode differentiation.

They look into a function one operator of torch's at a time. phicore's own operators and gradients are made for the
backward pass and nothing else, so while a transform runs the layers compute the same in torch's operators, with more
memory and time.
"""

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work."""
    return _transforms_active() or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0)


# is_grads_batched of torch.autograd.grad, and so vectorize of torch.autograd.functional, has a vmap of its own. Its key
# is looked up once, which takes longer than to ask whether it is there.
_VMAP = torch._C._dispatch_key_parse("VmapMode")


def _transforms_active() -> bool:
    return torch._C._are_functorch_transforms_active() or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP)


# torch.compile asks once, as it traces: its graphs are guarded by the transforms around them. Set as
# torch.compiler.assume_constant_result does, which imports the whole compiler.
_transforms_active._dynamo_marked_constant = True  # type: ignore[attr-defined]
