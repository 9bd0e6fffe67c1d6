"""The loss of a causal language model, as a sum and a count: whoever sums over batches and ranks divides once."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from phicore.training.encoding import IGNORE_INDEX


def causal_lm_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy over the labelled tokens.

    Args:
        model: called with input_ids (by position, unless its forward names it) and, where its forward takes them,
            attention_mask, use_cache=False and logits_to_keep; returns logits [B, T, V] or an object with `.logits`.
        batch: input_ids int64 [B, T], labels int64 [B, T] (-100 where no loss), attention_mask int64 [B, T].

    Returns:
        The summed loss, float32 [], and the number of labelled tokens, int64 [].
    """
    accepted = inspect.signature(model.forward).parameters
    labels = batch["labels"][:, 1:]  # position t predicts the label at t + 1: [B, T - 1]
    # The output head is a fifth of a small model's work: it runs only where some row of the batch has a label.
    positions = (labels != IGNORE_INDEX).any(0).nonzero().squeeze(1)  # [K]
    inputs: dict[str, Any] = {}
    if "attention_mask" in accepted and "attention_mask" in batch:
        inputs["attention_mask"] = batch["attention_mask"]
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = positions
    if "input_ids" in accepted:
        output = model(input_ids=batch["input_ids"], **inputs)
    else:
        output = model(batch["input_ids"], **inputs)
    logits = output if isinstance(output, Tensor) else output.logits
    if "logits_to_keep" not in accepted:
        logits = logits[:, positions]  # [B, T, V] -> [B, K, V]
    targets = labels[:, positions].reshape(-1)  # [B * K]
    loss = nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), targets, ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return loss, (targets != IGNORE_INDEX).sum()


def masked_mean(total: float, count: float, where: str) -> float:
    """total / count, refusing a batch without a single labelled token."""
    if count == 0:
        raise ValueError(
            f"{where}: no token carries loss; are the examples cut off before the answer? Raise the sequence length"
        )
    return total / count
