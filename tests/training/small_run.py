"""A small run that a test starts in its own process or in another, and what of a run must be equal to another's.

As a program: `python -m tests.training.small_run OUTPUT PAUSE '{"steps": 9, ...}' [STEP]`, PAUSE in seconds a step; at
STEP the last rank kills itself, unless it has been restarted. It says nothing of ranks: torchrun starts it as it is.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phicore.training import TrainConfig, Trainer, distributed
from phicore.training.checkpoint import latest_checkpoint
from phicore.training.consolidate import consolidate
from phicore.training.shards import open_shard

SETTINGS: dict[str, Any] = {
    "steps": 8,
    "batch_size": 4,
    "accumulation": 2,
    "learning_rate": 0.05,
    "warmup_steps": 3,
    "log_every": 1,
}


class SmallLM(nn.Module):
    """Predicts a token from the one before, with dropout, so that a run depends on the random state."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6, 12)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.dropout(self.embed(input_ids)))


def small_model(dropout: float = 0.2, dtype: torch.dtype = torch.float32) -> SmallLM:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return SmallLM(dropout).to(dtype)


def examples(n: int = 11, vocabulary: int = 12) -> list[dict[str, Tensor]]:
    """Of 2 to 8 tokens, the last one to seven labelled."""
    generator = torch.Generator().manual_seed(6)
    made = []
    for i in range(n):
        length = 2 + i * 5 % 7
        ids = torch.randint(vocabulary, (length,), generator=generator)
        labels = ids.clone()
        labels[: i % length] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


class Slow(Sequence[dict[str, Tensor]]):
    """The examples, each after a pause."""

    def __init__(self, pause: float) -> None:
        self.pause, self.items = pause, examples()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: Any) -> Any:
        time.sleep(self.pause)
        return self.items[i]


def small_trainer(output: Path | str, pause: float = 0.0, **settings: Any) -> Trainer:
    config = TrainConfig(output=str(output), **{**SETTINGS, **settings})
    return Trainer(small_model(), config, Slow(pause / config.batch_size) if pause else examples())


def stop_after(trainer: Trainer, step: int) -> Trainer:
    """The trainer, which will ask itself to stop within that step."""
    loss_fn = trainer.loss_fn

    def asking(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | int]:
        if trainer.step == step - 1:
            trainer.request_stop()
        return loss_fn(model, batch)

    trainer.loss_fn = asking
    return trainer


def killing(trainer: Trainer, step: int) -> Callable[..., Any]:
    """The trainer's loss, which kills the last rank within a step, once."""
    inner = trainer.loss_fn

    def loss_fn(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | int]:
        last = distributed.rank() == distributed.world_size() - 1
        if trainer.step == step - 1 and last and not distributed.is_restarted():
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(model, batch)

    return loss_fn


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def history(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock and the machine."""
    clock = {"tokens_per_second", "peak_memory_bytes", "data_wait_percent"}
    return [{key: value for key, value in line.items() if key not in clock} for line in metrics(output)]


def saved(output: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint: weights, optimizer state and torch's random state."""
    newest = latest_checkpoint(output / "checkpoints")
    assert newest is not None
    tensors, optimizer = consolidate(newest)
    names = [name for group in optimizer["param_groups"] for name in group["param_names"]]
    states = {f"{key}/{names[i]}": t for i, values in optimizer["state"].items() for key, t in values.items()}
    with open_shard(newest, 0) as shard:
        return tensors | states | {name: shard.read(f"rng/{name}") for name in shard.names["rng"]}


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_same_run(a: Path, b: Path) -> None:
    """Two outputs hold the same losses, step by step, and end in the same state, bit for bit."""
    assert history(a) == history(b)
    assert_same_tensors(saved(a), saved(b))


def process(target: Callable[..., None], *args: Any) -> Any:
    """A process that will call target: forked from a server that has imported torch, so that it starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "phicore"])  # the first step of any torch optimizer imports it
    return context.Process(target=_on_one_thread, args=(target, *args), daemon=True)


def _on_one_thread(target: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    target(*args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = small_trainer(sys.argv[1], float(sys.argv[2]), **json.loads(sys.argv[3]))
    if len(sys.argv) > 4:
        run.loss_fn = killing(run, int(sys.argv[4]))
    run.fit()
