"""A run on a small regression in float64, with tuples for data: (x [3], y [2], mask [2])."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phicore.training import TrainConfig, Trainer, checkpoint
from phicore.training.consolidate import consolidate
from phicore.training.data import order
from tests.training.small_run import SETTINGS

Batch = list[Tensor]


def regression_data(n: int = 13) -> list[tuple[Tensor, ...]]:
    """Examples of which 0, 1 or 2 outputs count."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return [(row[:3], row[3:], torch.tensor([i % 3 > 0, i % 2 > 0])) for i, row in enumerate(rows)]


def squares(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    x, y, mask = batch
    return ((model(x) - y)[mask] ** 2).sum(), mask.sum()


def regression(
    output: Path, model: nn.Module | None = None, data: Any = None, eval_data: Any = None, **settings: Any
) -> Trainer:
    if model is None:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    config = TrainConfig(output=str(output), **{**SETTINGS, **settings})
    return Trainer(model, config, data or regression_data(), eval_data, loss_fn=squares)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.parameters.items()}


def visits(n: int, seed: int, steps: int, batch_size: int) -> list[list[int]]:
    """The examples of each step: the epochs' orders, one after the other, cut in batches."""
    row = [i for epoch in range(steps * batch_size // n + 1) for i in order(n, seed, epoch)]
    return [row[k * batch_size : (k + 1) * batch_size] for k in range(steps)]


def weights_of(output: Path) -> dict[str, Tensor]:
    newest = checkpoint.latest_checkpoint(output / "checkpoints")
    assert newest is not None
    return consolidate(newest)[0]
