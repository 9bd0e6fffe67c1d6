"""TrainConfig: what the training loop needs to know."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from phicore.settings import check_types


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Settings of a Trainer. Each is explained below it in this file, and by `phicore finetune --help`, which has them
    under the same names and with the same defaults.

    Raises:
        TypeError, ValueError: a setting of a wrong type or out of range, naming it.
    """

    output: str = "runs/default"
    """Directory of the run: metrics.jsonl and checkpoints/."""

    steps: int = 100
    """Optimizer steps of the whole run."""

    batch_size: int = 8
    """Examples a step, over all micro-batches and ranks."""

    accumulation: int = 1
    """Micro-batches that each rank's share of a step is cut into; more of them need less memory and give the same
    step."""

    learning_rate: float = 2e-4
    """Peak learning rate of AdamW."""

    lora_plus_ratio: float = 1.0
    """LoRA+: the learning rate of every lora_B, as a multiple of learning_rate."""

    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly from zero."""

    min_learning_rate: float = 0.0
    """Where the cosine decay ends, at the last step."""

    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""

    beta1: float = 0.9
    """AdamW's decay of the first moment."""

    beta2: float = 0.999
    """AdamW's decay of the second moment."""

    max_norm: float = 1.0
    """Gradients are scaled down to this total norm; 0 leaves them."""

    zero_stage: Literal[1, 2] = 2
    """What several ranks split: 1 the optimizer's state, 2 the gradients too. With accumulation, stage 1 keeps a whole
    gradient and sends it once a step; stage 2 keeps a rank's share of it and sends it after each micro-batch."""

    seed: int = 0
    """Seed of the data order, of the adapters' start and of dropout."""

    group_by_length: bool = False
    """Put examples of like length into one step: less padding, and the same examples an epoch in another order."""

    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: about a third more work, far less memory."""

    eval_every: int = 0
    """Steps between evaluations during training; 0 for none."""

    eval_batch_size: int = 16
    """Examples a forward pass of evaluation."""

    save_every: int = 0
    """Steps between checkpoints; one is always written at the end, on SIGTERM and on Ctrl-C. 0 for no other."""

    async_save: bool = False
    """Write checkpoints while training goes on, from a copy in memory of what each rank saves: its share of the trained
    parameters and of their optimizer state."""

    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl; the first and the last step are always logged."""

    first_step_timeout: float = 300.0
    """Seconds that a rank waits for the others until the first step is done."""

    step_timeout: float = 100.0
    """Seconds that a rank waits for the others afterwards: for a step, an evaluation or a checkpoint of the slowest."""

    resume: bool = False
    """Go on from the newest checkpoint in output, if there is one."""

    overwrite: bool = False
    """Start anew where output holds a run already; its checkpoints and metrics are removed, and by phicore finetune
    what it made, too."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.output:
            raise ValueError("output must name a directory, got ''; the current one is '.'")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)!r}")
        for name in ("steps", "batch_size", "accumulation", "eval_batch_size", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        for name in ("warmup_steps", "min_learning_rate", "weight_decay", "max_norm", "eval_every", "save_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be below 0, got {getattr(self, name)!r}")
        for name in ("learning_rate", "lora_plus_ratio", "first_step_timeout", "step_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        for name in ("learning_rate", "lora_plus_ratio", "min_learning_rate", "weight_decay"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)!r}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate must not be above learning_rate, where the decay begins; got "
                f"{self.min_learning_rate!r} and {self.learning_rate!r}"
            )
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must fit into 64 bits, got {self.seed}")
        if self.resume and self.overwrite:
            raise ValueError(
                "resume and overwrite exclude each other: one goes on with a run, one starts it anew; set one of them "
                "to False (--no-overwrite, if a file of options says overwrite)"
            )


# What may differ between a run and its resumption: nothing here changes a weight by more than rounding.
FREE_TO_CHANGE = frozenset(
    {
        "output",
        "resume",
        "overwrite",
        "gradient_checkpointing",
        "eval_every",
        "eval_batch_size",
        "save_every",
        "async_save",
        "keep_checkpoints",
        "log_every",
        "zero_stage",
        "first_step_timeout",
        "step_timeout",
    }
)


def fixed_settings(config: TrainConfig) -> dict[str, object]:
    """The settings that must be equal for a run to be resumed."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in FREE_TO_CHANGE}
