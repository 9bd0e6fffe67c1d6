"""What a Trainer is given: what it refuses, and what must be equal on all ranks."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from phicore.adapters.switch import check_not_mixed
from phicore.modules import unwrapped
from phicore.training.batches import Indexed, check_indexed, lengths_of
from phicore.training.config import TrainConfig, fixed_settings
from phicore.training.distributed import world_size


def check_given(
    model: nn.Module,
    config: TrainConfig,
    train_data: Indexed,
    eval_data: Indexed | None,
    identity: Mapping[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, nn.Parameter], list[int] | None]:
    """The identity as a checkpoint gives it back, the parameters that train, and examples' lengths if needed.

    Raises:
        TypeError, ValueError: see Trainer.
    """
    with unwrapped(model) as bare:  # so that a run goes on whether its model is compiled or not
        parameters = {name: p for name, p in bare.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(f"no parameter of {type(model).__name__} requires a gradient; attach an adapter first")
    if world_size() > 1 and isinstance(model, DistributedDataParallel):
        raise TypeError(
            "the Trainer reduces gradients itself, in the place of DistributedDataParallel; give it the model that "
            "is in there, model.module"
        )
    check_indexed("train_data", train_data)
    if eval_data is not None:
        check_indexed("eval_data", eval_data)
    if not len(train_data):
        raise ValueError("train_data is empty")
    if config.eval_every and (eval_data is None or not len(eval_data)):
        raise ValueError(f"eval_every is {config.eval_every}, but there is no eval_data to evaluate on")
    lengths = lengths_of(train_data) if config.group_by_length else None
    given = json.loads(json.dumps(dict(identity or {})))
    own = json.loads(json.dumps({**fixed_settings(config), "examples": len(train_data)}))
    if hidden := [key for key in own.keys() & given.keys() if given[key] != own[key]]:
        raise ValueError(
            f"identity has {hidden[0]}={given[hidden[0]]!r}, which is also the name of a setting that is compared "
            f"when the run is resumed ({own[hidden[0]]!r}); give it another name"
        )
    return given, parameters, lengths


def check_parameters(model: nn.Module, known: Collection[nn.Parameter]) -> None:
    """Raises ValueError for a parameter that trains and is none of those that did when the Trainer was made, and
    within mixed()."""
    check_not_mixed(model, "fit")
    known = set(known)
    with unwrapped(model) as bare:
        new = [name for name, p in bare.named_parameters() if p.requires_grad and p not in known]
    if new:
        raise ValueError(
            f"{new[0]} (of {len(new)}) requires a gradient and did not when the Trainer was made, or was not "
            f"there, so it would not train; make the Trainer once the model is as it shall train"
        )


def describe_given(model: nn.Module, settings: Mapping[str, Any]) -> list[str]:
    """What must be equal on all ranks, an item a line."""
    with unwrapped(model) as bare:
        parameters = [
            f"{name} ({'trained' if p.requires_grad else 'frozen'}, {list(p.shape)}, {p.dtype})"
            for name, p in bare.named_parameters()
        ]
    return [*(f"{key}={value!r}" for key, value in settings.items()), *parameters]
