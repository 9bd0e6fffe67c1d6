"""torch's hooks on optimizers, where one works inside another: users know of the outer one only."""

import torch

# Of what torch wraps the step of each class in, to call hooks on it.
_WITH_HOOKS = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__


def step_without_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Its step, without the hooks that are registered for all optimizers."""
    step = type(optimizer).step
    if "step" in vars(optimizer) or step.__code__ is not _WITH_HOOKS:
        optimizer.step()  # wrapped once more by somebody: not for us to undo
    else:
        step.__wrapped__(optimizer)  # type: ignore[attr-defined]
