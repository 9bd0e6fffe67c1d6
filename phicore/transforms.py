"""torch.func's transforms (vmap, grad, jvp, jacrev ...), forward-mode differentiation and torch.jit.trace.

They look into a function one operator of torch's at a time. phicore's own operators and gradients are made for the
backward pass and nothing else, so while a transform runs the layers compute the same in torch's operators, with more
memory and time. What is traced so can be saved, and runs where phicore is not (NF4 weights, where it is imported).
"""

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a transform of torch.func, forward-mode differentiation or torch.jit.trace is at work."""
    return _transforms_active() or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0)


# is_grads_batched of torch.autograd.grad, and so vectorize of torch.autograd.functional, has a vmap of its own. Its key
# is looked up once, which takes longer than to ask whether it is there.
_VMAP = torch._C._dispatch_key_parse("VmapMode")


def _transforms_active() -> bool:
    vmapped = torch._C._dispatch_tls_is_dispatch_key_included(_VMAP)
    return vmapped or torch._C._are_functorch_transforms_active() or torch._C._is_tracing()


# torch.compile asks once, as it traces: its graphs are guarded by the transforms around them. Set as
# torch.compiler.assume_constant_result does, which imports the whole compiler.
_transforms_active._dynamo_marked_constant = True  # type: ignore[attr-defined]
