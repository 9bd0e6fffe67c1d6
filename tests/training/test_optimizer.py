"""The optimizer of a Trainer over a model that another Trainer has trained."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from phicore.training import TrainConfig, Trainer
from tests.training.small_run import SETTINGS, assert_same_run, examples, small_model


@pytest.mark.parametrize("compiled", [False, True])
def test_a_newer_trainer_takes_the_model_over(tmp_path: Path, compiled: bool) -> None:
    """As when a cell of a notebook runs again, while the older one is still there; or the next cell compiles it."""
    model = small_model()
    older = Trainer(model, TrainConfig(output=str(tmp_path / "a"), **SETTINGS), examples())
    older.fit()
    after = copy.deepcopy(model)
    given: nn.Module = torch.compile(model, backend="eager") if compiled else model
    newer = Trainer(given, TrainConfig(output=str(tmp_path / "b"), **SETTINGS), examples())
    newer.fit()
    Trainer(after, TrainConfig(output=str(tmp_path / "c"), **SETTINGS), examples()).fit()
    assert_same_run(tmp_path / "b", tmp_path / "c")
    older.config.steps = 9
    with pytest.raises(RuntimeError, match="has other memory than when this optimizer was made"):
        older.fit()
