"""DeepSpeed's ZeRO-1 and ZeRO-2 checkpoints: weights and optimizer state out of the pickles of all its ranks.

A run's directory holds `latest`, which names one checkpoint's directory, and there

    mp_rank_00_model_states.pt                           weights as the model computes in them, under "module", and
                                                         "param_shapes": one {name: shape} for each parameter group
    [bf16_]zero_pp_rank_<N>_mp_rank_00_optim_states.pt   rank N's part of each group

The trained parameters of a group lie one after the other, in the order of its "param_shapes" and with
"param_alignment_paddings" between them, in one flat tensor; every rank holds an equal part of it, of the float32
masters and of each state of the inner optimizer. "param_slice_mappings" say the same, but with round_robin_gradients
they follow the order in which the parameters were given, and not the data's. What is read is checked against the
weights, which are the rounded masters.
"""

import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from phicore.formats.deepspeed_checks import check_model_state, check_rank_state

MODEL_FILE = "mp_rank_00_model_states.pt"
OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
# Files of what is not read: other ranks of tensor parallelism, stages of a pipeline, experts, ZeRO-3.
FOREIGN_FILES = re.compile(
    r"(?:.*mp_rank_(?!00_).*|layer_.*|.*expp_rank.*|zero_pp_rank_\d+_mp_rank_00_model_states)\.pt"
)


class _Plain:
    """Stands for the classes of DeepSpeed that its pickles name; holds their attributes and has no code."""


STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}


def _stage(owner: type, name: str) -> int:
    """Stands for getattr, by which some versions of Python (3.11.2) pickle members of an enum; it reaches no others."""
    if owner is not int or name not in STAGES:
        raise ValueError(f"it asks for {name!r} of a class, and members of ZeroStageEnum are {list(STAGES)}")
    return STAGES[name]


# All that its optimizer files name beyond tensors and plain values. A stage is an enum of an integer.
STAND_INS: list[tuple[Callable[..., Any], str]] = [
    (_stage, "builtins.getattr"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Plain, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Plain, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Plain, "deepspeed.utils.tensor_fragment.fragment_address"),
]


@dataclass(frozen=True, slots=True)
class DeepSpeedCheckpoint:
    """What a checkpoint of DeepSpeed holds, independent of its ranks.

    Attributes:
        model: for `model.load_state_dict`; in the dtypes in which the model computed.
        optimizer: the whole state in torch.optim's format, as `ZeroOptimizer.full_state_dict` gives it, float32 masters
            of 16-bit parameters included. It is for an optimizer over the trained parameters, in the groups that
            DeepSpeed had: `ZeroOptimizer([(n, p) for n, p in model.named_parameters() if p.requires_grad], ...)`, say.
        steps: optimizer steps done.
        loss_scale: of float16 training; 1.0 otherwise.
        buffers: which of `model` are no parameters.
        ranks: that saved it.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    steps: int
    loss_scale: float
    buffers: tuple[str, ...]
    ranks: int


def read_checkpoint(
    directory: str | os.PathLike[str],
    progress: Callable[[int, int], object] = lambda done, total: None,
    *,
    mapped: bool = False,
) -> DeepSpeedCheckpoint:
    """Reads a checkpoint that DeepSpeed's `save_checkpoint` wrote with ZeRO stage 1 or 2, of any number of ranks.

    The files are pickles. They are read with torch's weights_only unpickler, which makes tensors and plain values, and
    for four classes of DeepSpeed (and the members of one) objects without code; a file that names anything else is
    refused. DeepSpeed need not be installed.

    Args:
        directory: of the run, where `latest` is, or of one checkpoint in it.
        progress: called with how many of how many trained parameters have been read.
        mapped: leave the optimizer's state in the files, as the model always is, where a tensor lies in one of them.
            They must then stay as they are while it is used.

    Raises:
        FileNotFoundError: there is no checkpoint, or the file of one of its ranks is missing, naming it.
        ValueError: `latest` leads out of the directory; the checkpoint is of ZeRO stage 0 or 3, tensor or pipeline
            parallelism or experts; was saved with elastic_checkpoint; is damaged, or names what is not unpickled; or
            its parts contradict each other.
    """
    folder = _checkpoint_folder(Path(directory))
    foreign = sorted(path.name for path in folder.glob("*.pt") if FOREIGN_FILES.fullmatch(path.name))
    if foreign:
        raise ValueError(
            f"{folder} holds {foreign[0]}, which ZeRO-1 and ZeRO-2 do not write; checkpoints of ZeRO-3, of tensor or "
            f"pipeline parallelism and of experts are not read. Convert it with DeepSpeed's ds_to_universal or "
            f"zero_to_fp32 first"
        )
    state = _load(folder / MODEL_FILE)
    files = _optimizer_files(folder)
    check_model_state(state, folder / MODEL_FILE)
    ranks = _rank_states(folder, files, state["param_shapes"])
    shapes = [{name: torch.Size(shape) for name, shape in group.items()} for group in state["param_shapes"]]
    model = dict(state["module"])
    groups: list[dict[str, Any]] = []
    values: dict[int, dict[str, Tensor]] = {}
    masters: dict[str, Tensor] = {}
    for index, group in enumerate(shapes):
        numbers = {name: len(values) + i for i, name in enumerate(_given_order(ranks, index, group))}
        paddings = _of_group(ranks[0], "param_alignment_paddings", index) or [0] * len(group)
        base = [rank["base_optimizer_state"] for rank in ranks]
        own = [b["param_groups"][index] for b in base]
        inner = [b["state"].get(settings["params"][0], {}) for b, settings in zip(base, own, strict=True)]
        weights = _Flat([rank["single_partition_of_fp32_groups"][index] for rank in ranks])
        keys = sorted(inner[0])
        if any(sorted(part) != keys for part in inner):
            raise ValueError(f"{folder}: its optimizer files differ in what they hold of group {index}")
        parts = {key: [part[key] for part in inner] for key in keys if _is_split(inner[0][key], weights)}
        if any(not isinstance(part, Tensor) or part.dim() != 1 for every in parts.values() for part in every):
            raise ValueError(f"{folder}: its optimizer files differ in the kinds of what they hold of group {index}")
        split = {key: _Flat(every) for key, every in parts.items()}
        for (name, shape), start in zip(group.items(), _starts(group, paddings), strict=True):
            where = f"{folder}: {name}"
            master = weights.cut(start, shape, where, mapped)
            weight = model.get(name)
            if weight is None or weight.shape != shape or not torch.equal(master.to(weight.dtype), weight):
                raise ValueError(
                    f"{where}: the weight in {MODEL_FILE} is not the rounded master of the optimizer files; they are "
                    f"of different steps, or of a DeepSpeed with another layout"
                )
            if weight.dtype != torch.float32:
                masters[name] = master
            values[numbers[name]] = {
                key: split[key].cut(start, shape, where, mapped) if key in split else _counter(inner[0][key])
                for key in keys
            }
            progress(len(values), sum(map(len, shapes)))
        groups.append({**_settings(own[0], folder), "params": list(numbers.values()), "param_names": list(numbers)})
    optimizer = {"state": values, "param_groups": groups, **({"masters": masters} if masters else {})}
    scale = getattr(ranks[0].get("loss_scaler"), "cur_scale", 1.0)
    buffers = tuple(name for name in state.get("buffer_names") or () if name in model)
    return DeepSpeedCheckpoint(model, optimizer, int(state["global_steps"]), float(scale), buffers, len(ranks))


# Where the files are


def _checkpoint_folder(directory: Path) -> Path:
    latest = directory / "latest"
    name = latest.read_text("utf-8", errors="replace").strip() if latest.is_file() else ""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(
            f"{latest} names {name[:80]!r}, which is outside its directory; give the checkpoint's directory"
        )
    folder = directory / name
    if not (folder / MODEL_FILE).is_file() and not any(folder.glob("*_model_states.pt")):
        raise FileNotFoundError(
            f"{folder} holds no {MODEL_FILE}: it is no checkpoint of DeepSpeed; give the directory that its "
            f"save_checkpoint was given (where `latest` is), or one of those in it"
        )
    return folder


def _optimizer_files(folder: Path) -> dict[int, Path]:
    """The file of each rank."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := OPTIMIZER_FILE.fullmatch(path.name))}
    if not found:
        raise ValueError(f"{folder} has no optimizer files of ZeRO (zero_pp_rank_0_mp_rank_00_optim_states.pt)")
    return found


def _rank_states(folder: Path, found: Mapping[int, Path], groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The "optimizer_state_dict" of each rank, in order."""
    states = {}
    for rank, path in sorted(found.items()):
        states[rank] = state = _load(path)["optimizer_state_dict"]
        check_rank_state(state, path, groups)
    count = states[min(states)]["partition_count"]
    count = max(count) if isinstance(count, list) else count
    missing = [rank for rank in range(min(count, len(states) + 1)) if rank not in states]
    if missing or len(states) != count:
        raise FileNotFoundError(
            f"{folder} is of {count} ranks and has optimizer files of ranks {sorted(states)}"
            + (f"; that of rank {missing[0]} is missing" if missing else "")
        )
    return [states[rank] for rank in range(count)]


def _load(path: Path) -> dict[str, Any]:
    try:
        with safe_globals(list(STAND_INS)):
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        with safe_globals(list(STAND_INS)):
            named = sorted(get_unsafe_globals_in_checkpoint(path))
        raise ValueError(
            f"{path} names {', '.join(named) or error}, which is not unpickled here, since doing so could run code; "
            f"load the checkpoint with DeepSpeed and save it without that (a client_state, say)"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    needed = ("module", "param_shapes", "global_steps") if path.name == MODEL_FILE else ("optimizer_state_dict",)
    for key in needed:
        if not isinstance(state, dict) or key not in state:
            raise ValueError(f'{path} has no "{key}": it is no file of a ZeRO-1 or ZeRO-2 checkpoint')
    return state


# What lies where in a group


class _Flat:
    """A group's flat tensor in the ranks' equal parts, of which the last may lack its padding."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts, self.size = parts, max(len(part) for part in parts)

    def cut(self, start: int, shape: torch.Size, where: str, mapped: bool) -> Tensor:
        """The parameter that begins at `start`, as a tensor of its own or, mapped, of the file if it lies in one."""
        pieces, stop = [], start + shape.numel()
        for rank, part in enumerate(self.parts):
            begin, end = max(start, rank * self.size), min(stop, (rank + 1) * self.size)
            if begin < end:
                pieces.append(part[begin - rank * self.size : end - rank * self.size])
        flat = pieces[0] if mapped and len(pieces) == 1 else torch.cat(pieces) if pieces else torch.zeros(0)
        if flat.numel() != shape.numel():
            raise ValueError(
                f"{where}: shape {list(shape)}, but the optimizer files hold {flat.numel()} elements of it"
            )
        return flat.view(shape)


def _starts(group: Mapping[str, torch.Size], paddings: Sequence[int]) -> Iterator[int]:
    sizes = [shape.numel() + padding for shape, padding in zip(group.values(), paddings, strict=True)]
    return accumulate([0, *sizes[:-1]])


def _given_order(ranks: Sequence[Mapping[str, Any]], index: int, group: Mapping[str, torch.Size]) -> list[str]:
    """A group's parameters as they were given to DeepSpeed, which round_robin_gradients deals out in another order."""
    mappings = [_of_group(rank, "param_slice_mappings", index) or {} for rank in ranks]
    names = list(dict.fromkeys(name for mapping in mappings for name in mapping))
    return names if set(names) == set(group) else list(group)


def _of_group(state: Mapping[str, Any], key: str, index: int) -> Any:
    values = state.get(key)
    return values[index] if values else None


def _is_split(value: Any, weights: _Flat) -> bool:
    # Masters come without the padding at the group's end, which a state of a single rank has.
    return isinstance(value, Tensor) and value.dim() == 1 and value.numel() >= weights.size


def _counter(value: Any) -> Tensor:
    """A step count as torch's optimizers hold it: float32 []; DeepSpeed's own optimizers have an integer."""
    return torch.as_tensor(value, dtype=torch.float32).clone()


def _settings(group: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A parameter group's settings for torch's optimizers."""
    if not group.get("bias_correction", True):
        raise ValueError(f"{folder} was trained without Adam's bias correction, which torch's Adam always has")
    return {key: value for key, value in group.items() if key not in ("params", "bias_correction", "step")}
