"""What a Trainer does not take: models, data and settings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from phicore.training import TrainConfig, Trainer
from tests.training.regression import regression
from tests.training.small_run import SETTINGS, examples, small_model, small_trainer

SIZED = examples(5)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(output=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="no parameter of SmallLM requires a gradient; attach an adapter first"):
        Trainer(small_model().requires_grad_(False), config, examples())
    with pytest.raises(ValueError, match="train_data is empty"):
        Trainer(small_model(), config, [])
    blocky = TrainConfig(output=str(tmp_path / "run"), gradient_checkpointing=True)
    with pytest.raises(ValueError, match=r"needs repeated blocks in an nn\.ModuleList; SmallLM has none"):
        Trainer(small_model(), blocky, examples()).fit()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(examples())

    def __len__(self) -> int:
        return len(examples())


@pytest.mark.parametrize(
    "data",
    [Stream(), DataLoader(SIZED), iter(SIZED), {"train": SIZED}, "train.jsonl"],
    ids=lambda data: type(data).__name__,
)
def test_data_that_takes_no_index_is_refused(tmp_path: Path, data: Any) -> None:
    config, told = TrainConfig(output=str(tmp_path)), f"is of type {type(data).__name__};.*give a list"
    with pytest.raises(TypeError, match=f"train_data {told}"):
        Trainer(small_model(), config, data)
    with pytest.raises(TypeError, match=f"eval_data {told}"):
        Trainer(small_model(), config, examples(), data)
    with pytest.raises(TypeError, match=f"the data to evaluate on {told}"):
        small_trainer(tmp_path).evaluate(data)


def test_an_identity_does_not_hide_a_setting(tmp_path: Path) -> None:
    config = TrainConfig(output=str(tmp_path), **SETTINGS)
    with pytest.raises(ValueError, match=r"identity has learning_rate=7, which is also the name of a setting.*0\.05"):
        Trainer(small_model(), config, examples(), identity={"learning_rate": 7})
    Trainer(small_model(), config, examples(), identity={"learning_rate": 0.05})  # as all arguments of a script


def test_evaluations_without_data_are_refused(tmp_path: Path) -> None:
    for data in (None, []):
        with pytest.raises(ValueError, match="eval_every is 2, but there is no eval_data"):
            Trainer(small_model(), TrainConfig(output=str(tmp_path), eval_every=2), examples(), data)


def test_group_by_length_refuses_examples_without_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="group_by_length needs examples with input_ids, got tuple"):
        regression(tmp_path, group_by_length=True)


def test_what_trains_only_since_the_trainer_was_made_is_told(tmp_path: Path) -> None:
    model = small_model()
    model.head.requires_grad_(False)
    trainer = Trainer(model, TrainConfig(output=str(tmp_path), **SETTINGS), examples())
    model.head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"head\.weight \(of 2\) requires a gradient and did not when .* not train"):
        trainer.fit()
    model.head.requires_grad_(False)
    trainer.fit()
    model.head = nn.Linear(6, 12)
    with pytest.raises(ValueError, match=r"head\.weight \(of 2\) .* or was not there"):
        trainer.fit()
