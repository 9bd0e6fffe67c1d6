"""ZeRO stages 1 and 2: an optimizer whose state, and in stage 2 whose gradients, are split over the ranks."""

from phicore.zero.optimizer import ZeroOptimizer
from phicore.zero.scaler import GradScaler

__all__ = ["GradScaler", "ZeroOptimizer"]
