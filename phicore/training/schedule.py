"""The learning rate as a pure function of the step: a resumed run needs no scheduler state."""

import math

from phicore.training.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine decay (Loshchilov & Hutter 2017) to min_learning_rate.

    Args:
        step: counted from 0; the rate that this step's update uses. The first warm-up step is not zero; the first
            step after the warm-up is at learning_rate, and the last of two or more such steps at min_learning_rate.
        config: learning_rate, min_learning_rate, warmup_steps and steps are read.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(config.steps - 1 - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine
