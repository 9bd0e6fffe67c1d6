"""DeepSpeed's JSON configuration: what of it means something here, and an error for all else."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from phicore.training.config import TrainConfig

AUTO = "auto"
ABSENT = object()

# Keys that change no result: what DeepSpeed prints, and how it schedules the same collectives.
NO_EFFECT = (
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "memory_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
ZERO_NO_EFFECT = (
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "reduce_scatter",
    "contiguous_gradients",
    "round_robin_gradients",
    "use_multi_rank_bucket_allreduce",
    "ignore_unused_parameters",
    "parameter_alignment",
    "sub_group_size",
    "elastic_checkpoint",
    "load_from_fp32_weights",
)
# Blocks that may be there as long as they are turned off.
TURNED_OFF = (
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "flops_profiler",
    "comms_logger",
    "torch_autocast",
    "amp",
    "elasticity",
    "curriculum_learning",
    "eigenvalue",
    "progressive_layer_drop",
)


@dataclass(frozen=True, slots=True)
class DeepSpeedConfig:
    """What a configuration of DeepSpeed says in phicore's words.

    Attributes:
        train: the settings of a Trainer.
        optimizer: keyword arguments beside the parameters: `ZeroOptimizer(named, torch.optim.AdamW, **optimizer)`.
        dtype: of the model, where the file turns bf16 or fp16 on.
        scaler: keyword arguments of `phicore.zero.GradScaler` for fp16; the Trainer trains in no float16.
        notes: what the file says that has no effect here, or a slightly different one.
    """

    train: TrainConfig
    optimizer: dict[str, Any]
    dtype: torch.dtype | None
    scaler: dict[str, Any] | None
    notes: tuple[str, ...]


def read_config(
    source: str | os.PathLike[str] | Mapping[str, Any], train: TrainConfig | None = None, world_size: int = 1
) -> DeepSpeedConfig:
    """Reads a DeepSpeed configuration (https://www.deepspeed.ai/docs/config-json).

    Only what the file says is taken; what it leaves out, or gives as "auto", stays as `train` has it. A value that both
    give, and give differently, is an error; `train` gives what differs from TrainConfig's defaults.

    Schedules are taken where the Trainer's is of the same form: WarmupLR (linear, then constant) and WarmupCosineLR.
    DeepSpeed makes its first two updates at a rate of zero and stays up to two steps behind, so that rates differ by up
    to 2 / warmup_num_steps of the peak while they rise.

    Args:
        source: a JSON file, or what it holds.
        train: settings for what the file leaves open.
        world_size: ranks that the batch is for.

    Raises:
        ValueError: the file is no JSON object; a key that is not known, or of a feature that is not here (ZeRO-3,
            offloading, ...), naming it and what is accepted; values that contradict each other.
    """
    where, content = "the DeepSpeed configuration", source
    if not isinstance(source, Mapping):
        where = str(source)
        content = _parse(Path(source))
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must hold a JSON object, holds {type(content).__name__}")
    top = _Block(where, "", dict(content))
    settings = _Settings(where, train or TrainConfig())
    for key in NO_EFFECT:
        top.no_effect(key)
    for key in TURNED_OFF:
        top.turned_off(key)
    top.only("gradient_predivide_factor", 1.0)
    top.only("prescale_gradients", False)
    top.only("sparse_gradients", False)
    top.only("communication_data_type", None)
    settings.set("max_norm", top.number("gradient_clipping", least=0), "gradient_clipping")
    dtype, scaler = _precision(top)
    optimizer = _zero(top.block("zero_optimization"), dtype, settings)
    _optimizer(top.block("optimizer"), settings)
    _schedule(top.block("scheduler"), settings)
    _batch(top, settings, world_size)
    top.check_all_taken()

    try:
        config = replace(settings.train, **settings.values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    optimizer |= {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    optimizer |= {"weight_decay": config.weight_decay}
    notes = list(top.notes)
    if top.without_effect:
        notes.append(f"without effect here: {', '.join(top.without_effect)}")
    return DeepSpeedConfig(config, optimizer, dtype, scaler, tuple(notes))


def _parse(path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = [key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i])]
        if repeated:
            raise ValueError(f'the key "{repeated[0]}" stands there twice')
        return dict(pairs)

    try:
        return json.loads(path.read_bytes(), object_pairs_hook=unique)
    except ValueError as error:
        raise ValueError(f"{path} is not the JSON of a DeepSpeed configuration: {error}") from error


# What each part of the file means


def _precision(top: "_Block") -> tuple[torch.dtype | None, dict[str, Any] | None]:
    bf16 = top.block("bfloat16" if "bfloat16" in top.values and "bf16" not in top.values else "bf16")
    fp16 = top.block("fp16")
    for key in ("immediate_grad_update", "check_grad_overflow"):
        bf16.no_effect(key)
    for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        bf16.only(key, False)
    for key in ("auto_cast", "fp16_master_weights_and_grads"):
        fp16.only(key, False)
    fp16.only("loss_scale", 0)
    power, window = fp16.integer("initial_scale_power"), fp16.integer("loss_scale_window")
    for key in ("hysteresis", "consecutive_hysteresis", "min_loss_scale"):
        fp16.no_effect(key)
    half, brain = fp16.flag("enabled"), bf16.flag("enabled")
    if half and brain:
        raise ValueError(f"{top.where}: bf16.enabled and fp16.enabled exclude each other")
    bf16.check_all_taken()
    fp16.check_all_taken()
    if brain:
        return torch.bfloat16, None
    if half:
        return torch.float16, {"init_scale": 2.0 ** (power or 16), "growth_interval": window or 1000}
    return None, None


def _zero(zero: "_Block", dtype: torch.dtype | None, settings: "_Settings") -> dict[str, Any]:
    for key in (*ZERO_NO_EFFECT, *[key for key in zero.values if key.startswith("stage3_")]):
        zero.no_effect(key)
    for key in ("offload_optimizer", "offload_param"):
        if zero.values.get(key) is not None:
            offload = zero.block(key)
            offload.only("device", "none")
            for rest in ("pin_memory", "nvme_path", "buffer_count", "fast_init", "ratio"):
                offload.no_effect(rest)
            offload.check_all_taken()
        zero.take(key)
    zero.only("cpu_offload", False)
    stage = zero.take("stage")
    if stage not in (ABSENT, AUTO) and (isinstance(stage, bool) or stage not in (0, 1, 2)):
        raise ValueError(f"{zero.name('stage')}: got {stage!r}; accepted: 0, 1 and 2 (ZeRO-3 is not here)")
    elements = zero.integer("reduce_bucket_size")
    zero.check_all_taken()
    found: dict[str, Any] = {}
    if stage == 0:
        zero.notes.append("zero_optimization.stage 0 runs as stage 1, which computes the same")
    if stage in (0, 1, 2):
        settings.set("zero_stage", max(1, stage), zero.path + "stage")
    found["stage"] = settings.get("zero_stage")
    if elements is not None:
        found["bucket_bytes"] = elements * (2 if dtype is not None else 4)
    return found


def _optimizer(block: "_Block", settings: "_Settings") -> None:
    kind = block.take("type")
    if kind not in (ABSENT, AUTO) and str(kind).lower() not in ("adam", "adamw"):
        raise ValueError(f"{block.name('type')}: got {kind!r}; accepted: AdamW, Adam")
    params = block.block("params")
    for key, names in (("lr", ("learning_rate",)), ("weight_decay", ("weight_decay",))):
        settings.set(names[0], params.number(key, least=0), params.path + key)
    betas = params.take("betas")
    if betas not in (ABSENT, AUTO):
        if not isinstance(betas, list | tuple) or len(betas) != 2 or not all(map(_is_number, betas)):
            raise ValueError(f"{params.name('betas')}: got {betas!r}; accepted: two numbers")
        for name, value in zip(("beta1", "beta2"), betas, strict=True):
            settings.set(name, float(value), params.path + "betas")
    params.only("eps", 1e-8)
    params.only("bias_correction", True)
    params.only("amsgrad", False)
    for key in ("torch_adam", "fused", "foreach"):
        params.no_effect(key)
    decoupled = params.flag("adam_w_mode") is not False or str(kind).lower() == "adamw"
    decay = settings.get("weight_decay")
    if decay and not decoupled:
        raise ValueError(
            f"{params.name('adam_w_mode')} is false, so that the weight decay of {decay} would be added to the gradient"
            f"; accepted: true, AdamW's decoupled decay, or a weight decay of 0"
        )
    block.only("legacy_fusion", False)
    params.check_all_taken()
    block.check_all_taken()


def _schedule(block: "_Block", settings: "_Settings") -> None:
    kind = block.take("type")
    params = block.block("params")
    if kind in (ABSENT, AUTO):
        for key in params.values:
            if params.take(key) != AUTO:
                raise ValueError(f"{params.name(key)} is given, but {block.name('type')} is not")
        block.check_all_taken()
        return
    if kind not in ("WarmupLR", "WarmupCosineLR"):
        raise ValueError(
            f"{block.name('type')}: got {kind!r}; accepted: WarmupLR and WarmupCosineLR, which the Trainer's schedule "
            f"(a linear rise, then a cosine) can say"
        )
    rise = params.take("warmup_type")
    if rise != "linear":
        given = "log, DeepSpeed's default" if rise is ABSENT else repr(rise)
        raise ValueError(f"{params.name('warmup_type')}: got {given}; accepted: linear")
    settings.set("warmup_steps", params.integer("warmup_num_steps", default=1000), params.path + "warmup_num_steps")
    if kind == "WarmupLR":
        params.only("warmup_min_lr", 0)
        settings.set("learning_rate", params.number("warmup_max_lr", least=0), params.path + "warmup_max_lr")
        settings.set("min_learning_rate", settings.get("learning_rate"), f"{block.path}type {kind}")
    else:
        params.only("warmup_min_ratio", 0)
        settings.set("steps", params.integer("total_num_steps"), params.path + "total_num_steps")
        ratio = params.number("cos_min_ratio", least=0, default=1e-4)
        if ratio is not None:
            settings.set("min_learning_rate", ratio * settings.get("learning_rate"), params.path + "cos_min_ratio")
    block.notes.append(
        f"scheduler: DeepSpeed's {kind} is up to two steps behind this learning rate while it rises, and makes its "
        f"first two updates at a rate of 0"
    )
    params.check_all_taken()
    block.check_all_taken()


def _batch(top: "_Block", settings: "_Settings", world_size: int) -> None:
    """train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * ranks, of which any may be
    left out."""
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, passes = (top.integer(key) for key in keys)
    given = [key for key, value in zip(keys, (total, micro, passes), strict=True) if value is not None]
    if not given:
        return
    if total is not None and micro is not None and passes is None:
        passes = total // (micro * world_size)
    if passes is None:
        passes = settings.get("accumulation")
    if total is None:
        total = settings.get("batch_size") if micro is None else micro * passes * world_size
    if micro is None:
        micro = total // (passes * world_size)
    if passes * micro * world_size != total or not total:
        raise ValueError(
            f"{top.where}: a train_batch_size of {total} is not a train_micro_batch_size_per_gpu of {micro} times "
            f"{passes} gradient_accumulation_steps times {world_size} ranks; where the file leaves one open, it is "
            f"batch_size {settings.train.batch_size} or accumulation {settings.train.accumulation}"
        )
    settings.set("batch_size", total, " and ".join(given))
    settings.set("accumulation", passes, " and ".join(given))


# How the file is read


@dataclass
class _Block:
    """An object of the file. What is asked for is accepted; `check_all_taken` refuses the rest."""

    where: str
    path: str  # "zero_optimization."
    values: dict[str, Any]
    taken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    without_effect: list[str] = field(default_factory=list)

    def name(self, key: str) -> str:
        return f"{self.where}: {self.path}{key}"

    def take(self, key: str) -> Any:
        self.taken.append(key)
        return self.values.get(key, ABSENT)

    def block(self, key: str) -> "_Block":
        """An inner object; an empty one if it is absent. Notes are shared."""
        value = self.take(key)
        if value in (ABSENT, None):
            value = {}
        if not isinstance(value, Mapping):
            raise ValueError(f"{self.name(key)}: got {value!r}; accepted: an object")
        return _Block(self.where, f"{self.path}{key}.", dict(value), [], self.notes, self.without_effect)

    def number(self, key: str, *, least: float, default: float | None = None) -> float | None:
        value = self.take(key)
        if value is ABSENT:
            return default
        if value == AUTO or value is None:
            return None
        if not _is_number(value) or value < least:
            raise ValueError(f'{self.name(key)}: got {value!r}; accepted: a number of at least {least}, or "auto"')
        return float(value)

    def integer(self, key: str, *, default: int | None = None) -> int | None:
        value = self.take(key)
        if value is ABSENT:
            return default
        if value == AUTO or value is None:
            return None
        if not _is_number(value) or value < 1 or value != int(value):
            raise ValueError(f'{self.name(key)}: got {value!r}; accepted: an integer of at least 1, or "auto"')
        return int(value)

    def flag(self, key: str) -> bool | None:
        value = self.take(key)
        if value is ABSENT or value == AUTO:
            return None
        if not isinstance(value, bool):
            raise ValueError(f'{self.name(key)}: got {value!r}; accepted: true, false, or "auto"')
        return value

    def only(self, key: str, accepted: Any) -> None:
        value = self.take(key)
        if value in (ABSENT, AUTO):
            return
        if isinstance(value, bool) != isinstance(accepted, bool) or value != accepted:
            raise ValueError(f"{self.name(key)}: got {json.dumps(value)}; accepted: {json.dumps(accepted)}")

    def no_effect(self, key: str) -> None:
        if self.take(key) is not ABSENT:
            self.without_effect.append(self.path + key)

    def turned_off(self, key: str) -> None:
        if self.take(key) is not ABSENT:
            inner = self.block(key)
            if inner.flag("enabled"):
                raise ValueError(f"{inner.name('enabled')}: got true; accepted: false, since there is no {key} here")

    def check_all_taken(self) -> None:
        unknown = [key for key in self.values if key not in self.taken]
        if unknown:
            raise ValueError(
                f'{self.where}: "{self.path}{unknown[0]}" is no key that is known here; accepted'
                f"{' in ' + self.path[:-1] if self.path else ''}: {', '.join(sorted(set(self.taken)))}"
            )


@dataclass
class _Settings:
    """Fields of TrainConfig as the file sets them, over those that were given."""

    where: str
    train: TrainConfig
    values: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        return self.values.get(name, getattr(self.train, name))

    def set(self, name: str, value: Any, key: str) -> None:
        """Takes a value that the file has under a key; None is none."""
        if value is None:
            return
        (default,) = [f.default for f in fields(TrainConfig) if f.name == name]
        given = getattr(self.train, name)
        other = self.values.get(name, value if given == default else given)
        if other != value:
            raise ValueError(
                f"{self.where}: {key} makes {name} {value}, but it is {other} already; leave one of them out, or write "
                f'"auto" in the file'
            )
        self.values[name] = value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
