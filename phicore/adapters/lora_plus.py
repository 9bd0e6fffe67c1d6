"""LoRA+ (Hayou et al. 2024): B learns at a multiple of A's rate."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def lora_plus_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], learning_rate: float, ratio: float
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: every lora_B at ratio * learning_rate, everything else at learning_rate.

    Args:
        named_parameters: those that train; others, which require no gradient, are left out.
        learning_rate: of A, magnitudes and whatever else trains.
        ratio: of B's rate to it. Hayou et al. 2024 find 2 ** 4 good for large widths, with a smaller learning_rate.

    Returns:
        Groups with "params" and "lr"; one that would be empty is left out.

    Raises:
        ValueError: ratio is not above 0, or nothing trains, or no B does and ratio is not 1.

    Example:
        >>> model = attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), LoRAConfig(rank=2, target_modules=["0"]))
        >>> groups = lora_plus_groups(model.named_parameters(), learning_rate=1e-4, ratio=16)
        >>> [(len(group["params"]), group["lr"]) for group in groups]
        [(1, 0.0001), (1, 0.0016)]
    """
    if not ratio > 0:
        raise ValueError(f"the ratio of B's learning rate to A's must be above 0, got {ratio!r}")
    training = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not training:
        raise ValueError("no parameter requires a gradient; attach an adapter first")
    names = ("lora_B", "embedding_B")  # the latter where a tied head stands before its embedding
    b = [parameter for name, parameter in training if name.rpartition(".")[2] in names]
    if not b and ratio != 1:
        raise ValueError(
            f"a ratio of B's learning rate to A's of {ratio!r} has no effect: no lora_B trains (of {len(training)} "
            f"parameters that do the first is {training[0][0]}); attach LoRA first, or leave the ratio at 1"
        )
    rest = [parameter for name, parameter in training if name.rpartition(".")[2] not in names]
    groups = ({"params": rest, "lr": learning_rate}, {"params": b, "lr": ratio * learning_rate})
    return [group for group in groups if group["params"]]
