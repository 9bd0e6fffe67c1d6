"""Loss scaling for float16: torch's GradScaler with the gradients where ZeRO keeps them."""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from phicore.zero.optimizer import ZeroOptimizer


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler for a ZeroOptimizer: a gradient that overflowed on one rank skips the step on all.

    Example:
        >>> scaler = GradScaler(device="cpu", init_scale=4.0)
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = ZeroOptimizer(model.named_parameters(), torch.optim.SGD, lr=0.1)
        >>> scaler.scale(model(torch.ones(3, 2)).sum()).backward()
        >>> scaler.unscale_(optimizer)  # before clipping; step would do it otherwise
        >>> norm = optimizer.clip_grad_norm_(1.0)
        >>> scaler.step(optimizer)  # drops the gradients, updated or not
        >>> scaler.update()
    """

    def unscale_(self, optimizer: "ZeroOptimizer") -> None:  # type: ignore[override]
        """Divides the reduced gradients by the scale and agrees with all ranks on whether they are finite."""
        if not self.is_enabled():
            return
        optimizer.finish_reduction()
        super().unscale_(optimizer)
        optimizer._reducer.scaled = True
        found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        assert self._scale is not None
        # A rank may own nothing that has a gradient; it still has a say, and torch wants an answer.
        overflow = sum((inf.to(self._scale.device) for inf in found.values()), torch.zeros_like(self._scale).view(1))
        if optimizer.world_size > 1:
            dist.all_reduce(overflow, op=dist.ReduceOp.MAX, group=optimizer.process_group)
        found.clear()
        found[self._scale.device] = overflow

    def step(self, optimizer: "ZeroOptimizer", *args: Any, **kwargs: Any) -> float | None:  # type: ignore[override]
        """Takes the step, or skips it on all ranks, and drops the gradients."""
        optimizer.overflows_are_shared = True
        return super().step(optimizer, *args, **kwargs)

    def _maybe_opt_step(self, optimizer: Any, optimizer_state: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super()._maybe_opt_step(optimizer, optimizer_state, *args, **kwargs)
        # step consumes the gradients, and one that was skipped must not leave the overflow for the next.
        if any(inf.item() for inf in optimizer_state["found_inf_per_device"].values()):
            optimizer.zero_grad()
        return loss
