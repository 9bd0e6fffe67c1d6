"""The optimizer that a Trainer makes."""

import weakref
from collections.abc import Mapping

import torch
from torch import nn

from phicore.adapters.lora_plus import lora_plus_groups
from phicore.modules import unwrap
from phicore.training.config import TrainConfig
from phicore.zero import ZeroOptimizer

# Of each model, so that a newer Trainer may take over its parameters.
_optimizers: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[ZeroOptimizer]]" = weakref.WeakKeyDictionary()


def make_optimizer(model: nn.Module, parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> ZeroOptimizer:
    """AdamW over the ranks, in the place of the one that an earlier Trainer made for this model.

    Args:
        model: whose parameters they are.
        parameters: those that train, by name; all on one device.
        config: learning rates, betas, weight decay and ZeRO stage are read.
    """
    model = unwrap(model)
    before = _optimizers.get(model)
    if before is not None and (optimizer := before()) is not None:
        optimizer.release()
    names = {p: name for name, p in parameters.items()}
    groups = lora_plus_groups(parameters.items(), config.learning_rate, config.lora_plus_ratio)
    optimizer = ZeroOptimizer(
        [{**group, "params": [(names[p], p) for p in group["params"]]} for group in groups],
        torch.optim.AdamW,
        stage=config.zero_stage,
        reduction="sum",
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        # On a CPU a quarter of the time: one pass over a parameter, its gradient and its moments.
        fused=True if next(iter(names)).device.type == "cpu" else None,
    )
    _optimizers[model] = weakref.ref(optimizer)
    return optimizer
