"""Settings of a wrong type are named, with what is accepted."""

import json
import math
from dataclasses import asdict

import numpy
import pytest
import torch

import phicore
from phicore import LoRAConfig, TrainConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 3.5}, "steps must be a whole number, got 3.5"),
        ({"steps": "3"}, "steps must be a whole number, got '3'"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"seed": "a"}, "seed must be a whole number, got 'a'"),
        ({"resume": "no"}, "resume must be True or False, got 'no'"),
        ({"learning_rate": "1e-4"}, "learning_rate must be a number, got '1e-4'"),
        ({"zero_stage": 3}, "zero_stage must be one of 1, 2, got 3"),
        ({"zero_stage": True}, "zero_stage must be one of 1, 2, got True"),
        ({"output": 3}, "output must be a text, got 3"),
    ],
)
def test_of_a_run(settings, message):
    with pytest.raises(TypeError, match=message):
        TrainConfig(**settings)


def test_numbers_of_numpy_and_whole_ones_for_others_are_taken(tmp_path):
    config = TrainConfig(steps=numpy.int64(3), learning_rate=1, max_norm=numpy.float32(0.5), output=tmp_path)
    assert json.loads(json.dumps(asdict(config))) == asdict(config)  # as a checkpoint holds it
    assert (config.steps, config.max_norm, config.output) == (3, 0.5, str(tmp_path))
    assert json.dumps(LoRAConfig(dropout=numpy.float32(0.5)).dropout) == "0.5"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": math.inf}, "learning_rate must be finite, got inf"),
        ({"seed": 2**64}, "seed must fit into 64 bits"),
        ({"output": ""}, "output must name a directory, got ''; the current one is '.'"),
    ],
)
def test_of_a_run_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize("beta", [1.0, -0.1, math.nan])
def test_betas(beta):
    with pytest.raises(ValueError, match="beta1 must be at least 0 and below 1"):
        TrainConfig(beta1=beta)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": "16"}, "alpha must be a number above 0, got '16'"),
        ({"alpha": math.inf}, "alpha must be a number above 0, got inf"),
        ({"trainable_token_indices": 3}, "trainable_token_indices must be a list of whole numbers, got 3"),
        ({"dropout": "0.1"}, "dropout must be a number, got '0.1'"),
        ({"dora": "yes"}, "dora must be True or False, got 'yes'"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list of names, got 'head'"),
        ({"exclude_modules": "head"}, "exclude_modules must be a list of names, got 'head'"),
    ],
)
def test_of_an_adapter(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LoRAConfig(**settings)


def test_what_is_no_configuration_is_named():
    with pytest.raises(TypeError, match="the Trainer takes a TrainConfig, got a dict"):
        phicore.Trainer(torch.nn.Linear(4, 4), {"steps": 1}, [1])
    with pytest.raises(TypeError, match="attach takes a LoRAConfig, got a dict"):
        phicore.attach(torch.nn.Sequential(torch.nn.Linear(2, 2)), {"rank": 4})
