"""Loading a checkpoint of any number of ranks into a model and its sharded optimizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phicore.training.checkpoint import check_files
from phicore.training.distributed import everywhere, rank, together, world_size
from phicore.training.randomness import restore_random, seed_everything
from phicore.training.shards import OpenShard, Shard, open_shard
from phicore.zero import ZeroOptimizer
from phicore.zero.state import FORMAT

State = Mapping[str, Any]
"""Of `phicore.training.checkpoint.read_state`."""


def describe(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Shape and dtype of each tensor, as state.json holds them."""
    return {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()}


def changed_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each setting that is not what it was, in words."""
    return [
        f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]


def check_settings(newest: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError for a checkpoint of a run that had other settings, naming each."""
    if changed := changed_settings(then, now):
        raise ValueError(
            f"{newest} was written with other settings; {'; '.join(changed)}; set them back to go on, or give another "
            f"output for another run"
        )


def load_checkpoint(
    checkpoint: Path,
    state: State,
    optimizer: ZeroOptimizer,
    parameters: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    seed: int,
) -> None:
    """Sets the weights, the optimizer's state and the random states to a checkpoint's; every rank must call it.

    A rank beyond those that wrote the checkpoint, and any rank where another trainer wrote it, gets random states from
    the seed, see `seed_everything`.

    Args:
        checkpoint: its directory.
        state: its `read_state`.
        optimizer: over the parameters.
        parameters: those that train, by name.
        frozen: what else the model has, by name.
        seed: of the run.

    Raises:
        ValueError: a file is damaged, or the model is another. Nothing has been loaded then.
    """
    places = {**frozen, **parameters}
    everywhere(lambda: _check_fits(checkpoint, state, describe(places), parameters))
    together(lambda: check_files(checkpoint, state, rank(), world_size()))
    shards = optimizer_shards(checkpoint, state, optimizer.state_dict())
    with torch.no_grad():
        for number in range(state["world_size"]):
            with open_shard(checkpoint, number) as shard:
                _copy_weights(shard, places)
    optimizer.load_state_dict(shards)
    seed_everything(seed, state["step"], rank())
    if rank() < state["world_size"]:
        with open_shard(checkpoint, rank()) as shard:
            own = {name.partition("/")[2]: shard.read(f"rng/{name}") for name in shard.names.get("rng", ())}
            if own:  # a checkpoint of another trainer has none
                restore_random(own, shard.random)


def _check_fits(checkpoint: Path, state: State, found: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
    trained = {name for group in state["param_groups"] for name in group["params"]}
    other = trained ^ parameters.keys()  # trained then or now, and beside it, if at all, there or here
    saved = {name: kind for name, kind in state["tensors"].items() if name in trained or name not in other}
    found = {name: kind for name, kind in found.items() if name in parameters or name not in other}
    wrong = [name for name in sorted(saved.keys() | parameters.keys()) if saved.get(name) != found.get(name)]
    if wrong:
        first = wrong[0]
        there, here = (" ".join(map(str, of[first])) if first in of else "not trained" for of in (saved, found))
        raise ValueError(
            f"{checkpoint} does not fit the model: {', '.join(wrong[:10])} (of {len(wrong)} names); {first} is {there} "
            f"in it and {here} here. Resume with the model that it was written of, or train this one in another output"
        )


def _copy_weights(shard: OpenShard, places: Mapping[str, Tensor]) -> None:
    for name in shard.names.get("parameter", ()):
        start, stop = shard.range(f"parameter/{name}")
        places[name].view(-1)[start:stop] = shard.read(f"parameter/{name}").to(places[name].device)
    for name in shard.names.get("buffer", ()):
        places[name].copy_(shard.read(f"buffer/{name}"))


def optimizer_shards(checkpoint: Path, state: State, own: Shard) -> list[dict[str, Any]]:
    """What `ZeroOptimizer.load_state_dict` needs, of each rank that saved: only the elements that this rank holds.

    Args:
        checkpoint: its directory.
        state: its `read_state`.
        own: the optimizer's `state_dict`. Its settings stay as they are: they follow from the run's.
    """
    groups = own["param_groups"]
    if state["settings"] is not None:  # else another trainer's, whose groups say nothing here
        both = zip(groups, state["param_groups"], strict=True)
        groups = [{**group, "params": saved["params"]} for group, saved in both]
    shards: list[dict[str, Any]] = []
    scalars: dict[str, dict[str, Tensor]] = {}
    for number in range(state["world_size"]):
        slices: dict[str, list[int]] = {}
        states: dict[str, dict[str, Any]] = {}
        with open_shard(checkpoint, number) as shard:
            for name in shard.names.get("parameter", ()):
                start, stop = shard.range(f"parameter/{name}")
                kinds = shard.kinds.get(name, [])
                scalars.setdefault(name, {}).update(
                    {kind: shard.read(f"{kind}/{name}") for kind in kinds if shard.is_scalar(f"{kind}/{name}")}
                )
                first, last = own["slices"].get(name, (0, 0))
                start, stop = max(start, first), min(stop, last)
                if start < stop:
                    slices[name] = [start, stop]
                    states[name] = {
                        kind: shard.read(f"{kind}/{name}", start, stop)
                        for kind in kinds
                        if not shard.is_scalar(f"{kind}/{name}")
                    }
        fixed = {"format": FORMAT, "frozen": [], "shapes": own["shapes"], "param_groups": groups}
        shards.append({**fixed, "slices": slices, "state": states})
    for part in shards:
        for name, values in part["state"].items():
            values.update(scalars[name])
    return shards
