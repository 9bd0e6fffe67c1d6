"""Models that torch has wrapped for several ranks, and what adapters cannot do with them."""

from torch import nn

SHARDED = {"FullyShardedDataParallel", "FSDPModule"}  # the latter is fully_shard's
WRAPPERS = {"DistributedDataParallel", *SHARDED}


def check_not_wrapped(model: nn.Module) -> None:
    """Raises ValueError for a model whose gradients torch sums over ranks."""
    _refuse(
        model,
        WRAPPERS,
        "which sums the gradients of those parameters over ranks that it was made with, and not of an adapter; attach "
        "first, and wrap the model then",
    )


def check_not_sharded(model: nn.Module) -> None:
    """Raises ValueError for a model of whose weights each rank has a part, where whole ones are needed."""
    _refuse(
        model,
        SHARDED,
        "whose weights are in parts on ranks; load and merge adapters in a model that is not sharded (save_adapter, "
        "called on all ranks, writes whole tensors of what fully_shard has sharded)",
    )


def check_not_flattened(model: nn.Module) -> None:
    """Raises ValueError for a model whose parts on ranks have no shape, so that nothing tells them from the whole."""
    _refuse(
        model,
        {"FullyShardedDataParallel"},
        "which holds parts of flattened weights; shard by fully_shard, or load its full state (get_model_state_dict of "
        "torch.distributed.checkpoint.state_dict) into a model that is not sharded, and save that",
    )


def _refuse(model: nn.Module, kinds: set[str], reason: str) -> None:
    for path, module in model.named_modules():
        own = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.")}
        if found := own & kinds:
            raise ValueError(f"{path or 'the model'} is a {min(found)}, {reason}")
