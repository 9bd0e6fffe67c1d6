"""The training loop, its data, checkpoints and metrics."""

from phicore.training.config import TrainConfig
from phicore.training.trainer import Trainer, TrainResult

__all__ = ["TrainConfig", "TrainResult", "Trainer"]
