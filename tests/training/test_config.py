"""TrainConfig: what it refuses, and which settings a resumed run may change."""

from dataclasses import fields
from typing import Any

import pytest

from phicore.training.config import FREE_TO_CHANGE, TrainConfig, fixed_settings

NAN = float("nan")


def test_the_defaults_are_accepted() -> None:
    assert TrainConfig() == TrainConfig()


@pytest.mark.parametrize(
    "name", ["steps", "batch_size", "accumulation", "eval_batch_size", "keep_checkpoints", "log_every"]
)
def test_counts_start_at_one(name: str) -> None:
    setting: dict[str, Any] = {name: 1}
    assert getattr(TrainConfig(**setting), name) == 1
    for wrong in (0, -1):
        setting = {name: wrong}
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got {wrong}"):
            TrainConfig(**setting)


@pytest.mark.parametrize(
    "name", ["warmup_steps", "min_learning_rate", "weight_decay", "max_norm", "eval_every", "save_every"]
)
def test_what_may_be_zero_may_not_be_below(name: str) -> None:
    setting: dict[str, Any] = {name: 0}
    assert getattr(TrainConfig(**setting), name) == 0
    for wrong in (-1, NAN):
        setting = {name: wrong}
        with pytest.raises(
            (ValueError, TypeError), match=f"{name} must (not be below 0|be a whole number), got {wrong}"
        ):
            TrainConfig(**setting)


@pytest.mark.parametrize("wrong", [0.0, -1e-3, NAN])
def test_the_learning_rate_is_above_zero(wrong: float) -> None:
    with pytest.raises(ValueError, match=f"learning_rate must be above 0, got {wrong}"):
        TrainConfig(learning_rate=wrong)


def test_the_decay_does_not_end_above_where_it_begins() -> None:
    TrainConfig(learning_rate=1e-4, min_learning_rate=1e-4)
    with pytest.raises(ValueError, match=r"min_learning_rate must not be above learning_rate.* got 0\.001 and 0\.0001"):
        TrainConfig(learning_rate=1e-4, min_learning_rate=1e-3)


def test_resume_and_overwrite_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"resume and overwrite exclude each other.* \(--no-overwrite, if"):
        TrainConfig(resume=True, overwrite=True)


def test_settings_are_given_by_name_and_misspelt_ones_refused() -> None:
    wrong: Any = TrainConfig
    with pytest.raises(TypeError):
        wrong("runs/a")
    with pytest.raises(TypeError, match="learning_rates"):
        wrong(learning_rates=1.0)
    with pytest.raises(AttributeError):
        wrong().learning_rates = 1.0


def test_every_setting_is_either_fixed_or_free() -> None:
    names = {f.name for f in fields(TrainConfig)}
    assert names >= FREE_TO_CHANGE
    assert fixed_settings(TrainConfig()).keys() == names - FREE_TO_CHANGE
    assert fixed_settings(TrainConfig(seed=7))["seed"] == 7
    assert fixed_settings(TrainConfig()) == fixed_settings(TrainConfig(output="x", resume=True, save_every=3))
