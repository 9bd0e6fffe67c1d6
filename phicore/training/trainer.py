"""The Trainer: one plain loop over steps."""

import functools
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from phicore.adapters.switch import check_not_mixed
from phicore.modules import unwrapped
from phicore.training import checkpoint, distributed
from phicore.training.background import BackgroundWriter
from phicore.training.batches import (
    Batch,
    Indexed,
    check_indexed,
    chunks,
    count_tokens,
    cut,
    length_of,
    make_batch,
    to_device,
)
from phicore.training.buffers import TrainedBuffers
from phicore.training.config import TrainConfig, fixed_settings
from phicore.training.data import step_indices
from phicore.training.distributed import gather_rows, on_first_rank, rank, sum_over_ranks, world_size
from phicore.training.frozen import check_same_base, check_same_frozen, described_base, frozen_tensors
from phicore.training.given import check_given, check_parameters, describe_given
from phicore.training.loss import causal_lm_loss, masked_mean, sum_and_count
from phicore.training.metrics import MetricsLog, Progress, peak_memory_bytes, told
from phicore.training.modes import mode, stop_signals
from phicore.training.optimizer import make_optimizer
from phicore.training.output import after_restart, hold_output, prepare_output
from phicore.training.randomness import kept_random, random_json, seed_everything
from phicore.training.recompute import checkpointed_blocks
from phicore.training.resume import check_settings, describe, load_checkpoint
from phicore.training.schedule import learning_rate
from phicore.training.shards import Part, random_parts, to_memory, trained_parts
from phicore.training.watch import Watch
from phicore.zero.agreement import check_same

LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, Tensor | float]]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What `fit` reports.

    Attributes:
        steps: optimizer steps done, those before a resumption included.
        loss: of the last step, per token; one before a resumption too.
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

    The same script runs alone and as several processes (torchrun, or RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in
    the environment): the Trainer joins the others when it is made. Each rank has the whole model and data, works on its
    share of each step's examples, and keeps its share of the optimizer's state and gradients (`ZeroOptimizer`). What
    follows holds for any number of ranks; all of them must call the same methods.

    The loss of a step is the sum over all its examples divided by the number of tokens (or items) that carry loss in
    all of them: cutting a step into more micro-batches, or over more ranks, does not change it. The data order is a
    function of the seed and the step. A run that was stopped and resumed computes what one that was not computes, on a
    CPU bit for bit; resumed on another number of ranks, up to rounding and the random numbers of dropout.

    On SIGTERM or SIGUSR1, to any rank, the step is finished, a checkpoint is written and all processes exit with
    status 0; on the first Ctrl-C (SIGINT) likewise, with status 130. A second Ctrl-C ends at once (under
    torchrun it does not: torchrun sends SIGTERM then). An evaluation ends after its batch, and is made anew by the run
    that goes on.

    Args:
        model: any module; what does not require gradients is not trained, and saved only where something else writes to
            it in training (running means, a teacher that follows). What does gets other memory (see `ZeroOptimizer`),
            and its gradients are consumed.
        config: see TrainConfig.
        train_data: examples by index. Dicts of input_ids and labels (1-D, of different lengths) are padded; others go
            through torch's default_collate.
        eval_data: examples for `evaluate`, and for every config.eval_every steps.
        loss_fn: maps (model, batch) to the summed loss and the number of items it sums over; default
            `causal_lm_loss`.
        collate_fn: maps a list of examples to a batch, in place of the above.
        identity: what else must be equal for a run to be resumed (model, data, adapter settings, ...); plain values. Of
            the data only its number of examples is compared without it.

    Raises:
        TypeError: data that does not give its examples by index (an IterableDataset, a generator); on several ranks, a
            model in DistributedDataParallel.
        ValueError: no parameter requires a gradient, or there is no data (for eval_every, no eval_data), or
            group_by_length is set and the examples have no input_ids; identity has a setting's name; the environment's
            variables are incomplete; ranks were given different settings, models or frozen weights.
        LostRankError: another rank was lost meanwhile, naming it.

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
        train_data: Indexed,
        eval_data: Indexed | None = None,
        loss_fn: LossFunction | None = None,
        *,
        collate_fn: Callable[[list[Any]], Batch] | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(config, TrainConfig):
            raise TypeError(f"the Trainer takes a TrainConfig, got a {type(config).__name__}")
        distributed.join(config.first_step_timeout)
        self.model = model
        self.config = config
        self.train_data, self.eval_data = train_data, eval_data
        self.loss_fn = loss_fn or causal_lm_loss
        self.collate_fn = collate_fn or make_batch
        self.output = Path(config.output).absolute()  # wherever the process goes
        self.checkpoints = self.output / "checkpoints"
        self.step = 0  # optimizer steps done
        self.tokens = 0
        self.loss = math.nan  # of the last step
        self._has_begun = False  # a run in the output, or gone on with the one there
        self.stop_requested = False  # of this process
        self._exit_status = 0  # that it was requested with
        self._stop_agreed = False  # of any, as all know
        self._watch = Watch(self.output)
        self._writer = BackgroundWriter()
        with self._watch.during("the construction of the Trainer"):
            self._construct(identity)

    def _construct(self, identity: Mapping[str, Any] | None) -> None:
        """What ranks agree on before they train; what one of them cannot do, all of them refuse."""
        self.config = config = after_restart(self.config)
        self.identity, self.parameters, self._lengths = distributed.everywhere(
            lambda: check_given(self.model, config, self.train_data, self.eval_data, identity)
        )
        distributed.to_own_gpu(self.model)
        self.device = next(iter(self.parameters.values())).device
        self.buffers = TrainedBuffers(self.model)
        if world_size() > 1:
            distributed.together(lambda: check_same(self._describe(), None, None))
        self._base = described_base(self.model, check_same_frozen(self.model, self.buffers.find))
        self.buffers.share()
        self.optimizer = make_optimizer(self.model, self.parameters, config)
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        # The thread that writes agrees with the other ranks' beside the collectives of the steps.
        self._writers = distributed.new_group(config.first_step_timeout) if config.async_save else None

    def _describe(self) -> list[str]:
        settings = {**asdict(self.config), **self._settings()}
        settings["examples to evaluate on"] = None if self.eval_data is None else len(self.eval_data)
        return describe_given(self.model, settings)

    def fit(self) -> TrainResult:
        """Trains up to config.steps.

        Raises:
            FileExistsError: the output holds a run, and neither resume nor overwrite is set; or a run is at work there.
            OSError: the output cannot be written.
            TypeError: the loss function returns no sum and count, or the model no logits, see `causal_lm_loss`.
            ValueError: resuming with other settings (each change is listed) or over another base; a step without a
                labelled token; examples that cannot be made a batch, or have no labels; a parameter that requires a
                gradient only since the Trainer was made; a loss from which no gradient comes, or a count that is none;
                a call within `phicore.adapters.mixed`.
            FloatingPointError: a loss or gradient norm that is not finite, naming the step and the rank where it arose;
                the step is not taken, on any rank.
            LostRankError: another rank ended, failed or did not answer within the time-out, naming it and its step.
            SystemExit: after the checkpoint of a SIGTERM or SIGUSR1, with status 0, or of a Ctrl-C, with status 130.
            KeyboardInterrupt: in place of the latter in an interactive session.
        """
        config = self.config
        with self._watch.during("the start"):
            distributed.everywhere(lambda: check_parameters(self.model, self.parameters.values()))
            release = hold_output(self.output)
            try:
                self._start()
                log = distributed.everywhere(self._open_log)
            except BaseException:
                release()
                raise
        progress = Progress(config.steps, self.step, shown=rank() == 0)
        recomputed = checkpointed_blocks(self.model) if config.gradient_checkpointing else nullcontext()
        seconds, first_tokens, saved_step = 0.0, self.tokens, self.step
        try:
            with stop_signals(self.request_stop), recomputed, mode(self.model, training=True):
                self._evaluate_when_due(log)  # what a stop left out
                while self.step < config.steps and not self._is_stopping():
                    start = time.perf_counter()
                    with self._watch.during(f"step {self.step + 1}"):
                        facts = self._train_step()
                    if not seconds:
                        distributed.set_timeout(config.step_timeout, self._writers)
                    seconds += time.perf_counter() - start
                    self.loss = facts["loss"]
                    speed = (self.tokens - first_tokens) / seconds
                    say = self.step == 1 or self.step % config.log_every == 0 or self.step == config.steps
                    text = f"loss {self.loss:.4f}  {speed:.0f} tokens/s"
                    progress.step(self.step, text, say=say)
                    if say and log is not None:
                        with self._watch.during(f"the metrics of step {self.step}"):
                            log.write(step=self.step, **facts, tokens_per_second=speed)
                    self._evaluate_when_due(log)
                    if config.save_every and self.step % config.save_every == 0 and self.step != saved_step:
                        self.save()
                        saved_step = self.step
                if self.step != saved_step:
                    self.save()
                with self._watch.during("the end of the run"):
                    self._writer.wait()
                    requests = gather_rows([self.stop_requested, self._exit_status], self.device)
        finally:
            progress.close()
            self._writer.join()  # the output is this run's until nothing is written there any more
            release()
            distributed.set_timeout(config.first_step_timeout)  # what follows is no step
        self.stop_requested, self._exit_status, self._stop_agreed = False, 0, False  # answered; another fit goes on
        stopped, status = map(max, zip(*requests, strict=True))
        if stopped:
            self._exit_as_asked(int(status))
        done = self.tokens - first_tokens
        speed = done / seconds if seconds else 0.0
        return TrainResult(self.step, self.loss, self.tokens, seconds, speed, peak_memory_bytes(self.device))

    def _exit_as_asked(self, status: int) -> NoReturn:
        if rank() == 0:
            newest = self.checkpoints / checkpoint.directory_name(self.step)
            print(f"stopped as asked; resume goes on from {newest}", file=sys.stderr, flush=True)
        if status and hasattr(sys, "ps1"):  # an interactive session, or a notebook: it goes on
            raise KeyboardInterrupt
        raise SystemExit(status)

    def _open_log(self) -> MetricsLog | None:
        return MetricsLog(self.output / "metrics.jsonl", self.step) if rank() == 0 else None

    def _train_step(self) -> dict[str, float]:
        config = self.config
        # ===== Phase 1: forward and backward of each micro-batch; gradients add up as sums, over ranks too =====
        indices = step_indices(len(self.train_data), config.seed, self.step, config.batch_size, self._lengths)
        parts = cut(indices[rank() :: world_size()], config.accumulation)  # none, where there are fewer than ranks
        # A reduction needs all ranks: each micro-batch can have its own only if all have as many micro-batches.
        reduce_each = config.zero_stage == 2 and len(indices) >= config.accumulation * world_size()
        loss_sum, count, tokens, waited = 0.0, 0.0, 0, 0.0
        self.optimizer.zero_grad()  # of a backward pass outside, or of a step that raised
        started = time.perf_counter()
        for number, part in enumerate(parts, 1):
            wait = time.perf_counter()
            batch = to_device(self.collate_fn([self.train_data[i] for i in part]), self.device)
            waited += time.perf_counter() - wait
            with nullcontext() if reduce_each or number == len(parts) else self.optimizer.no_sync():
                loss, n = sum_and_count(self.loss_fn(self.model, batch))
                loss.backward()
            loss_sum, count = loss_sum + float(loss.detach()), count + n
            tokens += count_tokens(batch, n)
        self.optimizer.finish_reduction()
        if not self.step and not self.optimizer.has_gradients():  # later a step may pass over all that trains
            raise ValueError(
                "step 1: no parameter that trains got a gradient; compute the loss from what the model returns, "
                "with no detach(), item() or new tensor in between"
            )
        # ===== Phase 2: from sums to the mean over all tokens of the step =====
        memory = peak_memory_bytes(self.device)
        own = [loss_sum, count, tokens, waited, self.stop_requested, memory, self._writer.failed]
        losses, counts, all_tokens, waits, stops, memories, failures = zip(*gather_rows(own, self.device), strict=True)
        if any(failures):
            self._writer.wait()  # raises the same on all ranks
        mean = masked_mean(sum(losses), sum(counts), f"step {self.step + 1}")
        norm = float(self.optimizer.clip_grad_norm_(math.inf)) / sum(counts)  # before clipping
        if not (math.isfinite(mean) and math.isfinite(norm)):
            finite = math.isfinite(loss_sum) and self.optimizer.own_gradients_were_finite()
            self.optimizer.zero_grad()
            raise FloatingPointError(self._not_finite(mean, norm, indices, finite))
        clip = min(1.0, config.max_norm / (norm + 1e-6)) if config.max_norm else 1.0
        self.optimizer.scale_gradients_(clip / sum(counts))
        # ===== Phase 3: the update =====
        rate = learning_rate(self.step, config)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = rate * (peak / config.learning_rate)
        self.optimizer.step()
        self.step += 1
        self.tokens += int(sum(all_tokens))
        self._stop_agreed = any(stops)
        elapsed = time.perf_counter() - started
        return {
            "loss": mean,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens": self.tokens,
            "data_wait_percent": 100 * sum(waits) / (world_size() * elapsed),
            "peak_memory_bytes": int(max(memories)),  # of the rank that holds the most
        }

    def _not_finite(self, mean: float, norm: float, indices: list[int], finite: bool) -> str:
        """What to tell of a step that is not taken; `finite` is whether this rank's own loss and gradients were."""
        ranks = [r for r, (bad,) in enumerate(gather_rows([not finite], self.device)) if bad]
        if world_size() == 1:
            ranks = [0]
        where = f"rank {', '.join(map(str, ranks))}" if ranks else "the sum over ranks, each finite"
        examples = [i for r in ranks or range(world_size()) for i in indices[r :: world_size()]]
        return (
            f"step {self.step + 1}, {where}: loss is {mean}, gradient norm is {norm}; the step was not taken. Examples "
            f"of the step there: {examples}. Lower the learning rate, or look at these examples"
        )

    def _is_stopping(self) -> bool:
        return self._stop_agreed or (self.stop_requested and world_size() == 1)

    def evaluate(self, data: Indexed | None = None) -> float:
        """Mean loss per labelled token over data (default: eval_data), with dropout off.

        The model's modes and the random states of torch, Python and NumPy are afterwards what they were.

        Raises:
            TypeError: the data does not give its examples by index.
            ValueError: there is no data, or none of it carries loss; a call within `phicore.adapters.mixed`.
        """
        check_not_mixed(self.model, "evaluate")
        data = self.eval_data if data is None else data
        if data is not None:
            check_indexed("the data to evaluate on", data)
        if data is None or not len(data):
            raise ValueError("there is nothing to evaluate on: give the Trainer eval_data")
        with self._watch.during(f"the evaluation after step {self.step}"):
            loss = self._evaluate(data, lambda: False)
        assert loss is not None
        return loss

    def _evaluate_when_due(self, log: MetricsLog | None) -> None:
        """Evaluates if this step has an evaluation that is not in the log. A stop, which has seconds until SIGKILL
        where an evaluation may take minutes, comes first; the run that goes on evaluates."""
        every, data = self.config.eval_every, self.eval_data
        if not every or data is None or self.step == 0 or self.step % every or self._is_stopping():
            return
        with self._watch.during(f"the evaluation after step {self.step}"):
            if on_first_rank(lambda: log is not None and log.evaluated == self.step):
                return
            eval_loss = self._evaluate(data, self._agree_to_stop)
        if log is not None and eval_loss is not None:
            with self._watch.during(f"the metrics of step {self.step}"):
                log.write(step=self.step, eval_loss=eval_loss)

    def _agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop, the same on all."""
        self._stop_agreed = any(stop for (stop,) in gather_rows([self.stop_requested], self.device))
        return self._stop_agreed

    @torch.no_grad()
    def _evaluate(self, data: Indexed, stops: Callable[[], bool]) -> float | None:
        """See `evaluate`; None once `stops`, which all ranks ask before each of their batches, says so on all."""
        loss_sum, count = 0.0, 0.0
        self.buffers.share()
        with mode(self.model, training=False), kept_random():
            # Examples of like length share a batch, which pads least; dealt out like cards, ranks have like work.
            by_length = sorted(range(len(data)), key=lambda i: length_of(data[i]))
            for dealt in chunks(by_length, self.config.eval_batch_size * world_size()):
                if stops():
                    return None
                part = dealt[rank() :: world_size()]
                if not part:
                    continue
                batch = to_device(self.collate_fn([data[i] for i in part]), self.device)
                loss, n = sum_and_count(self.loss_fn(self.model, batch))
                loss_sum, count = loss_sum + float(loss), count + n
        loss_sum, count = sum_over_ranks([loss_sum, count], self.device)
        return masked_mean(loss_sum, count, "evaluation")

    def save(self) -> Path:
        """Writes a checkpoint of this moment; see `phicore.training.checkpoint`.

        Before the first `fit` it takes the output as `fit` would: with config.resume it loads what is there first.

        With config.async_save it is written in the background, once the one before is. What goes wrong there is raised
        on all ranks by the next step or save, or by the end of `fit`, which waits for the last.

        Returns:
            Where it stands, or will.

        Raises:
            FileExistsError, ValueError: before the first `fit`, what `fit` would refuse.
            OSError: a rank could not write its part, naming it, on every rank; `latest` names what it named before.
        """
        with self._watch.during(f"the checkpoint of step {self.step}"):
            if not self._has_begun:
                release = hold_output(self.output)
                try:
                    self._start()
                finally:
                    release()
            return self._save()

    def _save(self) -> Path:
        self.buffers.share()
        shard, buffers = self.optimizer.state_dict(), self.buffers.find()
        parts = {**trained_parts(shard, self.parameters), **random_parts(rank())}
        if rank() == 0:
            # Copies: a file holds no two views of one memory.
            parts |= {f"buffer/{name}": Part(buffer.clone()) for name, buffer in buffers.items()}
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": None if math.isnan(self.loss) else self.loss,
            "settings": self._settings(),
            "tensors": describe({**self.parameters, **buffers}),
            "base": {name: words for name, words in self._base.items() if name not in buffers},
            "param_groups": shard["param_groups"],
        }
        save = functools.partial(checkpoint.save_checkpoint, self.checkpoints, state, keep=self.config.keep_checkpoints)
        new = self.checkpoints / checkpoint.directory_name(self.step)
        if not self.config.async_save:
            with told(f"writing {new}", sum(part.tensor.nbytes for part in parts.values())):
                return save(parts)
        self._writer.wait()  # before there is a second copy in memory
        self._writer.start(functools.partial(save, to_memory(parts), random=random_json(), group=self._writers))
        return new

    def request_stop(self, status: int = 0) -> None:
        """Makes `fit` finish its step on all ranks, write a checkpoint and exit with a status, as SIGTERM does."""
        self.stop_requested, self._exit_status = True, max(self._exit_status, status)

    def _settings(self) -> dict[str, Any]:
        return {**fixed_settings(self.config), "examples": len(self.train_data), **self.identity}

    def _start(self) -> None:
        """Resumes, or makes room for a new run."""
        if self.step:
            return
        newest, state = (None, None) if self._has_begun else on_first_rank(self._find)
        if newest is None or state is None:
            seed_everything(self.config.seed, rank=rank())
        else:
            with unwrapped(self.model) as bare:
                frozen = frozen_tensors(bare)
            stored = sum(path.stat().st_size for path in newest.glob("rank-*"))
            with told(f"reading {newest}", stored // world_size()):
                load_checkpoint(newest, state, self.optimizer, self.parameters, frozen, self.config.seed)
            self.step, self.tokens = state["step"], state["tokens"]
            self.loss = math.nan if (loss := state.get("loss")) is None else loss  # another trainer's has none
        self._has_begun = True

    def check_base(self, newest: Path) -> None:
        """Raises ValueError where a checkpoint was written over another base than the model's; `fit` does so first of
        all, and whoever evaluates before it may want to know. A checkpoint of another trainer does not say."""
        check_same_base(newest, checkpoint.read_state(newest).get("base", {}), self._base)

    def _find(self) -> tuple[Path | None, dict[str, Any] | None]:
        """The checkpoint to go on from and its state, or room for a new run."""
        newest = prepare_output(replace(self.config, output=str(self.output)))
        if newest is None:
            return None, None
        state = checkpoint.read_state(newest)
        if state["settings"] is None:
            print(
                f"{newest} is of {state['origin']}: its weights and optimizer state go on from step {state['step']}, "
                f"with the settings and data given here",
                file=sys.stderr,
                flush=True,
            )
        else:
            check_settings(newest, state["settings"], self._settings())
        self.check_base(newest)
        return newest, state
