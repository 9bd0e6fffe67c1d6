"""The Trainer on several ranks, as real processes: the run of one process, whatever each rank got to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phicore.training import TrainConfig, Trainer
from tests.training.small_run import SETTINGS, examples, history, small_model
from tests.zero.ranks import Ranks

Group = Callable[[int], Ranks]


def trainer(output: Path, dropout: float = 0.0, model: nn.Module | None = None, **settings: Any) -> Trainer:
    config = TrainConfig(output=str(output), **{**SETTINGS, **settings})
    return Trainer(model or small_model(dropout), config, examples(), examples(7))


def fit(output: Path, settings: dict[str, Any]) -> dict[str, Tensor]:
    run = trainer(output, **settings)
    run.fit()
    return {name: p.detach().clone() for name, p in run.parameters.items()}


def assert_close_runs(a: Path, b: Path) -> None:
    for mine, theirs in zip(history(a), history(b), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_train_as_one_process(tmp_path: Path, ranks: Group, world: int) -> None:
    """Unequal token counts, micro-batches that differ in number, and batches smaller than the world."""
    for i, settings in enumerate(
        (
            {"zero_stage": 2, "batch_size": 7, "accumulation": 2, "eval_every": 4},
            {"zero_stage": 1, "batch_size": 7, "accumulation": 3, "lora_plus_ratio": 4.0},
            {"zero_stage": 2, "batch_size": 4, "accumulation": 4, "max_norm": 0.0},
            {"zero_stage": 1, "batch_size": 1, "accumulation": 1, "max_norm": 0.01},
            {"zero_stage": 2, "batch_size": 2, "accumulation": 5, "group_by_length": True},
        )
    ):
        alone, several = tmp_path / f"{i}-alone", tmp_path / f"{i}-ranks"
        expected = fit(alone, settings)
        found = ranks(world)(fit, several, settings)
        assert_close_runs(several, alone)
        for weights in found:
            for name, p in expected.items():
                assert torch.equal(weights[name], found[0][name])
                torch.testing.assert_close(weights[name], p, rtol=1e-5, atol=1e-6, msg=name)
