"""The Trainer: one plain loop over steps."""

import json
import math
import os
import random
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import default_collate

from phicore.adapters.lora import LowRankLinear
from phicore.adapters.lora_plus import lora_plus_groups
from phicore.training import checkpoint
from phicore.training.config import TrainConfig, fixed_settings
from phicore.training.data import collate, step_indices
from phicore.training.distributed import rank, sum_over_ranks, world_size
from phicore.training.loss import causal_lm_loss, masked_mean
from phicore.training.metrics import MetricsLog, Progress, peak_memory_bytes
from phicore.training.recompute import checkpointed_blocks
from phicore.training.schedule import learning_rate

Batch = Any
LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, Tensor | int]]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What `fit` reports.

    Attributes:
        steps: optimizer steps done, those before a resumption included.
        loss: of the last step, per token.
        tokens: trained on, those before a resumption included.
        seconds: spent in this process's steps, evaluation and saving left out.
        tokens_per_second: over this process's steps.
        peak_memory_bytes: see `phicore.training.metrics.peak_memory_bytes`.
    """

    steps: int
    loss: float
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int


class Trainer:
    """Trains the parameters of a model that require gradients, with AdamW, for a number of steps.

    The loss of a step is the sum over all its examples divided by the number of tokens (or items) that carry loss in
    all of them: cutting a step into more micro-batches, or over more ranks, does not change it. The data order is a
    function of the seed and the step. A run that was stopped and resumed computes what one that was not computes, on a
    CPU bit for bit.

    On SIGTERM or SIGUSR1 the step is finished, a checkpoint is written and the process exits with status 0.

    Args:
        model: any module; what does not require gradients is neither trained nor saved.
        config: see TrainConfig.
        train_data: examples by index. Dicts of input_ids and labels (1-D, of different lengths) are padded; others go
            through torch's default_collate.
        eval_data: examples for `evaluate`, and for every config.eval_every steps.
        loss_fn: maps (model, batch) to the summed loss and the number of items it sums over; default
            `causal_lm_loss`.
        collate_fn: maps a list of examples to a batch, in place of the above.
        identity: what else must be equal for a run to be resumed (model, data, adapter settings, ...); plain values.

    Raises:
        ValueError: no parameter requires a gradient, or there is no data (for eval_every, no eval_data), or
            group_by_length is set and the examples have no input_ids.

    Example:
        >>> data = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])}]
        >>> model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
        >>> trainer = Trainer(model, TrainConfig(output=directory, steps=3, batch_size=1), data)
        >>> trainer.fit().steps
        3
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        train_data: Sequence[Any],
        eval_data: Sequence[Any] | None = None,
        loss_fn: LossFunction | None = None,
        *,
        collate_fn: Callable[[list[Any]], Batch] | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        if world_size() > 1:
            raise NotImplementedError("training on several ranks is not there yet; start one process")
        self.model, self.config = model, config
        self.train_data, self.eval_data = train_data, eval_data
        self.loss_fn = loss_fn or causal_lm_loss
        self.collate_fn = collate_fn or _collate
        self.identity = json.loads(json.dumps(dict(identity or {})))  # as a checkpoint will give it back
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError(f"no parameter of {type(model).__name__} requires a gradient; attach an adapter first")
        if not len(train_data):
            raise ValueError("train_data is empty")
        if config.eval_every and eval_data is None:
            raise ValueError(f"eval_every is {config.eval_every}, but there is no eval_data to evaluate on")
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = torch.optim.AdamW(
            lora_plus_groups(self.parameters.items(), config.learning_rate, config.lora_plus_ratio),
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self._lengths = _lengths(train_data) if config.group_by_length else None
        self.output = Path(config.output)
        self.checkpoints = self.output / "checkpoints"
        self.step = 0  # optimizer steps done
        self.tokens = 0
        self.stop_requested = False
        # Buffers that training writes (running means, say) are part of a checkpoint; the frozen base's are not. The
        # kernel of batch norm writes past the version counter. The start of a PiSSA or OLoRA layer is saved too: it
        # belongs to the A and B that were trained, and another machine's decomposition could differ.
        kinds = (_NormBase, LowRankLinear)
        kept = {
            buffer
            for module in model.modules()
            if isinstance(module, kinds)
            for name, buffer in module.named_buffers(recurse=False)
            if name != "base_norm_squared"
        }
        self._buffers_at_start = {
            name: (weakref.ref(buffer), buffer._version) for name, buffer in model.named_buffers() if buffer not in kept
        }

    def fit(self) -> TrainResult:
        """Trains up to config.steps.

        Raises:
            FileExistsError: the output holds a run, and neither resume nor overwrite is set.
            ValueError: resuming with other settings (each change is listed), or a step without a labelled token.
            FloatingPointError: a loss or gradient norm that is not finite, naming the step; the step is not taken.
            SystemExit: with status 0, after a SIGTERM or SIGUSR1 and its checkpoint.
        """
        config = self.config
        self._start()
        log = MetricsLog(self.output / "metrics.jsonl", self.step) if rank() == 0 else None
        progress = Progress(config.steps, self.step, shown=rank() == 0)
        recomputed = checkpointed_blocks(self.model) if config.gradient_checkpointing else nullcontext()
        loss, seconds, first_tokens, saved_step = math.nan, 0.0, self.tokens, self.step
        try:
            with self._signals(), recomputed, _mode(self.model, training=True):
                while self.step < config.steps and not self.stop_requested:
                    start = time.perf_counter()
                    facts = self._train_step()
                    seconds += time.perf_counter() - start
                    loss = facts["loss"]
                    speed = (self.tokens - first_tokens) / seconds
                    say = self.step == 1 or self.step % config.log_every == 0 or self.step == config.steps
                    text = f"loss {loss:.4f}  {speed:.0f} tokens/s"
                    progress.step(self.step, text, say=say)
                    if say and log is not None:
                        facts |= {"tokens_per_second": speed, "peak_memory_bytes": peak_memory_bytes(self.device)}
                        log.write(step=self.step, **facts)
                    if config.eval_every and self.step % config.eval_every == 0:
                        eval_loss = self.evaluate()
                        if log is not None:
                            log.write(step=self.step, eval_loss=eval_loss)
                    if config.save_every and self.step % config.save_every == 0:
                        self.save()
                        saved_step = self.step
                if self.step != saved_step:
                    self.save()
        finally:
            progress.close()
        if self.stop_requested:
            self.stop_requested = False  # it is answered; another fit goes on
            raise SystemExit(0)
        done = self.tokens - first_tokens
        return TrainResult(
            self.step, loss, self.tokens, seconds, done / seconds if seconds else 0.0, peak_memory_bytes(self.device)
        )

    def _train_step(self) -> dict[str, float]:
        config = self.config
        # ===== Phase 1: forward and backward of each micro-batch; gradients add up as sums =====
        indices = step_indices(len(self.train_data), config.seed, self.step, config.batch_size, self._lengths)
        mine = indices[rank() :: world_size()]
        loss_sum, count, tokens, waited = 0.0, 0.0, 0, 0.0
        self.optimizer.zero_grad()  # of a backward pass outside, or of a step that raised
        started = time.perf_counter()
        for part in _cut(mine, config.accumulation):
            wait = time.perf_counter()
            batch = _to(self.collate_fn([self.train_data[i] for i in part]), self.device)
            waited += time.perf_counter() - wait
            loss, n = self.loss_fn(self.model, batch)
            loss.backward()
            loss_sum, count = loss_sum + float(loss.detach()), count + float(n)
            tokens += _tokens(batch, float(n))
        # ===== Phase 2: from sums to the mean over all tokens of the step =====
        loss_sum, count, tokens_all = sum_over_ranks([loss_sum, count, tokens], self.device)
        mean = masked_mean(loss_sum, count, f"step {self.step + 1}")
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / count
        if not (math.isfinite(mean) and math.isfinite(norm)):
            self.optimizer.zero_grad()
            raise FloatingPointError(
                f"step {self.step + 1}, rank {rank()}: loss is {mean}, gradient norm is {norm}; the step was not "
                f"taken. Examples of the step: {indices}. Lower the learning rate, or look at these examples"
            )
        clip = min(1.0, config.max_norm / (norm + 1e-6)) if config.max_norm else 1.0
        for gradient in gradients:
            gradient.mul_(clip / count)
        # ===== Phase 3: the update =====
        rate = learning_rate(self.step, config)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = rate * (peak / config.learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens += int(tokens_all)
        elapsed = time.perf_counter() - started
        return {
            "loss": mean,
            "grad_norm": norm,  # before clipping
            "learning_rate": rate,
            "tokens": self.tokens,
            "data_wait_percent": 100 * waited / elapsed,
        }

    @torch.no_grad()
    def evaluate(self, data: Sequence[Any] | None = None) -> float:
        """Mean loss per labelled token over data (default: eval_data), with dropout off.

        The model's modes and torch's random state are afterwards what they were.

        Raises:
            ValueError: there is no data, or none of it carries loss.
        """
        data = self.eval_data if data is None else data
        if data is None or not len(data):
            raise ValueError("there is nothing to evaluate on: give the Trainer eval_data")
        loss_sum, count = 0.0, 0.0
        generators = [self.device] if self.device.type == "cuda" else []
        with _mode(self.model, training=False), torch.random.fork_rng(generators):
            # Examples of like length share a batch, which pads least.
            by_length = sorted(range(len(data)), key=lambda i: _length(data[i]))[rank() :: world_size()]
            for part in _chunks(by_length, self.config.eval_batch_size):
                loss, n = self.loss_fn(self.model, _to(self.collate_fn([data[i] for i in part]), self.device))
                loss_sum, count = loss_sum + float(loss), count + float(n)
        loss_sum, count = sum_over_ranks([loss_sum, count], self.device)
        return masked_mean(loss_sum, count, "evaluation")

    def save(self) -> Path:
        """Writes a checkpoint of this moment; see `phicore.training.checkpoint`."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.parameters.items()}
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "world_size": world_size(),
            "settings": self._settings(),
        }
        return checkpoint.save_checkpoint(
            self.checkpoints,
            state,
            self._trained_tensors(),
            checkpoint.optimizer_tensors(self.optimizer, names),
            self.config.keep_checkpoints,
            rank(),
        )

    def request_stop(self) -> None:
        """Makes `fit` finish its step, write a checkpoint and exit, as SIGTERM does."""
        self.stop_requested = True

    def _trained_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = dict(self.parameters)
        for name, buffer in self.model.named_buffers():
            at_start, version = self._buffers_at_start.get(name, (None, None))
            if at_start is None or at_start() is not buffer or buffer._version != version:
                tensors[name] = buffer
        return tensors

    def _settings(self) -> dict[str, Any]:
        return {**fixed_settings(self.config), "examples": len(self.train_data), **self.identity}

    def _start(self) -> None:
        """Resumes, or makes room for a new run."""
        if self.config.overwrite and self.step == 0 and self.checkpoints.exists():
            # First the name: a kill in between must not leave it without its checkpoint.
            (self.checkpoints / checkpoint.LATEST).unlink(missing_ok=True)
            shutil.rmtree(self.checkpoints)
        newest = checkpoint.latest_checkpoint(self.checkpoints)
        if newest is not None and self.config.resume and self.step == 0:
            self._resume(newest)
        elif newest is not None and self.step == 0:
            raise FileExistsError(
                f"{self.output} holds a run ({newest.name}); set resume, overwrite, or another output"
            )
        log = self.output / "metrics.jsonl"
        if self.step == 0 and not (self.config.resume or self.config.overwrite) and log.exists() and log.stat().st_size:
            raise FileExistsError(f"{log} is of a run that has no checkpoint; set overwrite, or another output")
        if self.step == 0:
            torch.manual_seed(self.config.seed)
            random.seed(self.config.seed)
            numpy.random.seed(self.config.seed % 2**32)

    def _resume(self, path: Path) -> None:
        state = checkpoint.read_state(path)
        saved, now = state["settings"], self._settings()
        changed = [
            f"{key}: {saved.get(key)!r} then, {now.get(key)!r} now"
            for key in sorted(saved.keys() | now.keys())
            if saved.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(f"{path} was written with other settings; {'; '.join(changed)}")
        tensors = checkpoint.read_tensors(path / "model.safetensors")
        optimizer = checkpoint.read_tensors(path / f"rank-{rank()}.safetensors")
        random_states = checkpoint.read_rng(path, rank())
        places = {**dict(self.model.named_buffers()), **self.parameters}
        wrong = [
            name
            for name in sorted(tensors.keys() | self.parameters.keys())
            if name not in places
            or name not in tensors
            or (places[name].shape, places[name].dtype) != (tensors[name].shape, tensors[name].dtype)
        ]
        if wrong:
            raise ValueError(f"{path} does not fit the model: {', '.join(wrong[:10])} (of {len(wrong)} names)")
        checkpoint.load_optimizer_tensors(self.optimizer, optimizer, self.parameters)
        with torch.no_grad():
            for name, tensor in tensors.items():
                places[name].copy_(tensor)
        checkpoint.restore_rng(optimizer, random_states)
        self.step, self.tokens = state["step"], state["tokens"]

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGUSR1 ask for a stop at the end of the step. Outside the main thread they are left alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        caught = [signal.SIGTERM, *([signal.SIGUSR1] if os.name == "posix" else [])]
        before = {number: signal.signal(number, lambda *_: self.request_stop()) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Within it, the model is in training or evaluation mode; afterwards each module is in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def _collate(examples: list[Any]) -> Batch:
    first = examples[0]
    if isinstance(first, Mapping) and first.keys() == {"input_ids", "labels"}:
        return collate(examples, pad_id=0)  # attention_mask and labels hide the padding
    return default_collate(examples)


def _to(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        moved = [_to(value, device) for value in batch]
        return (
            type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
        )  # a namedtuple takes them singly
    return batch


def _tokens(batch: Batch, items: float) -> int:
    """Tokens of a batch, padding left out; for other data, the items that the loss counted."""
    if isinstance(batch, Mapping) and isinstance(batch.get("attention_mask"), Tensor):
        return int(batch["attention_mask"].sum())
    return int(items)


def _length(example: Any) -> int:
    return len(example["input_ids"]) if isinstance(example, Mapping) and "input_ids" in example else 0


def _lengths(data: Sequence[Any]) -> list[int]:
    lengths = [_length(data[i]) for i in range(len(data))]
    if not any(lengths):
        raise ValueError(f"group_by_length needs examples with input_ids, got {type(data[0]).__name__}")
    return lengths


def _cut(indices: list[int], parts: int) -> list[list[int]]:
    """Cuts a list into at most `parts` runs of nearly equal length, none empty."""
    bounds = [len(indices) * i // parts for i in range(parts + 1)]
    return [indices[a:b] for a, b in pairwise(bounds) if a < b]


def _chunks(indices: list[int], size: int) -> list[list[int]]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]
