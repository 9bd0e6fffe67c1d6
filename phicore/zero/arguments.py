"""What `ZeroOptimizer` is given beside parameters: what is accepted."""

from typing import Any

import torch


def check_choices(optimizer_class: Any, stage: Any, reduction: Any, bucket_bytes: Any) -> None:
    """Of the constructor's arguments those that are one of few things.

    Raises:
        TypeError, ValueError: see ZeroOptimizer.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
        is_class = isinstance(optimizer_class, type)
        got = f"the class {optimizer_class.__name__}" if is_class else f"an object of {type(optimizer_class).__name__}"
        raise TypeError(
            f"optimizer_class must be a class of torch optimizers, such as torch.optim.AdamW, and its options stand "
            f"beside it (lr=1e-3); got {got}"
        )
    if not (_is_int(stage) and stage in (1, 2)):
        raise ValueError(f"stage must be 1 (split the state) or 2 (and the gradients), got {stage!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    if not (_is_int(bucket_bytes) and bucket_bytes > 0):
        raise ValueError(f"bucket_bytes must be a whole number above 0, such as 25 * 2**20, got {bucket_bytes!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
