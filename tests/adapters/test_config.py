"""LoRAConfig: what it refuses, and the two scalings."""

import dataclasses
import re

import numpy
import pytest
import torch

import phicore
from phicore.adapters.config import pattern_value, scaling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number above 0, got 0"),
        ({"rank": True}, "rank must be a whole number above 0, got True"),
        ({"rank": 1.5}, "rank must be a whole number above 0, got 1.5"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be a whole number above 0, got 0"),
        ({"alpha": -1}, "alpha must be a number above 0, got -1"),
        ({"alpha": float("nan")}, "alpha must be a number above 0, got nan"),
        ({"alpha": 10**400}, "alpha must be a number above 0, got 1000"),
        ({"alpha_pattern": {"q": True}}, r"alpha_pattern\['q'\] must be a number above 0, got True"),
        ({"alpha_pattern": {"q": 0.0}}, r"alpha_pattern\['q'\] must be a number above 0, got 0.0"),
        ({"dropout": 1}, "dropout must be at least 0 and below 1, got 1"),
        ({"dropout": float("nan")}, "dropout must be at least 0 and below 1, got nan"),
        ({"init": "eva"}, "init must be one of kaiming, gaussian, pissa, olora, loftq, got 'eva'"),
        ({"fused_targets": "halve"}, "fused_targets must be one of raise, map, split, got 'halve'"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        phicore.LoRAConfig(**options)


def test_a_misspelt_field_is_refused():
    with pytest.raises(TypeError, match="lora_alpha"):
        phicore.LoRAConfig(lora_alpha=16)
    with pytest.raises(AttributeError):
        phicore.LoRAConfig().lora_alpha = 16


def test_instances_do_not_share_their_containers():
    first, second = phicore.LoRAConfig(), phicore.LoRAConfig()
    first.rank_pattern["q"] = 4
    assert second == phicore.LoRAConfig()
    assert dataclasses.replace(second, rank=4).rank == 4


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (4, 8), (16, 5.0), (7, 3)])
def test_scaling(rank, alpha):
    assert scaling(rank, alpha, rslora=False) == alpha / rank
    assert scaling(rank, alpha, rslora=True) == pytest.approx(alpha / rank**0.5)


def test_many_patterns_are_compiled_once_each_however_many_names_there_are(monkeypatch):
    compiled = []
    compile_ = re.compile
    monkeypatch.setattr(re, "compile", lambda pattern: compiled.append(pattern) or compile_(pattern))
    pattern = {rf"layers\.{i}\.once": i for i in range(600)}  # re itself keeps 512
    assert [pattern_value(pattern, f"layers.{i}.once", -1) for i in (0, 599, 600)] == [0, 599, -1]
    assert len(compiled) == 600


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_no_regular_expression_is_named(field):
    with pytest.raises(ValueError, match=rf"{field}: 'q_proj\(' is no regular expression"):
        phicore.LoRAConfig(**{field: {"q_proj(": 3}})


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_cannot_stand_behind_a_prefix_is_named(field):
    with pytest.raises(ValueError, match=rf"{field}, which is put behind a prefix: .*[Ff]lags not at the start"):
        phicore.LoRAConfig(**{field: {"(?i)Q_PROJ": 3}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_dtype": torch.int8}, r"adapter_dtype must be a floating-point torch.dtype .*, got torch\.int8"),
        ({"adapter_dtype": torch.float8_e5m2}, "adapter_dtype must be .* of 16 bits or more"),
        ({"adapter_dtype": "bfloat16"}, "adapter_dtype must be .*, got 'bfloat16'"),
        ({"target_modules": [1]}, r"target_modules must be a string or a list of names, got \[1\]"),
        ({"target_modules": iter(["q"])}, "target_modules must be a string or a list of names, got <list_iterator"),
        ({"target_modules": {"q": 8}}, "target_modules must be a string or a list of names, got {'q': 8}"),
        ({"target_modules": ["q", ""]}, r"target_modules must be .*, got \['q', ''\]; none may be empty"),
        ({"modules_to_save": [""]}, r"modules_to_save must be a list of names, got \[''\]; none may be empty"),
        ({"modules_to_save": None}, "modules_to_save must be a list of names, got None"),
        ({"exclude_modules": None}, "exclude_modules must be a list of names, got None"),
        ({"target_parameters": 3}, "target_parameters must be a list of names, got 3"),
        ({"rank_pattern": None}, "rank_pattern must be a dict of regular expressions, got None"),
        ({"alpha_pattern": [3]}, r"alpha_pattern must be a dict of regular expressions, got \[3\]"),
        ({"rank_pattern": {3: 2}}, "rank_pattern must hold regular expressions, got 3"),
        ({"layers_to_transform": 0, "layers_pattern": [3]}, "layers_pattern must hold regular expressions, got 3"),
        ({"trainable_token_indices": {3: [1]}}, r"what trainable_token_indices are given for must be .*, got \[3\]"),
        ({"trainable_token_indices": numpy.array([1, 2])}, "trainable_token_indices must be .* is none; got array"),
        ({"trainable_token_indices": 1.5}, "trainable_token_indices must be whole numbers from 0, got 1.5"),
        ({"trainable_token_indices": {}}, "trainable_token_indices must be a list of whole numbers, got {}"),
        ({"layers_to_transform": iter([1])}, "layers_to_transform must be whole numbers from 0, got <list_iterator"),
        ({"bias": "some"}, "bias must be one of none, all, lora_only, got 'some'"),
        ({"trainable_token_indices": [3, 3]}, "trainable_token_indices must be .* one comes twice"),
        ({"trainable_token_indices": {"embed": [1.0]}}, r"trainable_token_indices\['embed'\] must be .* 1.0 is none"),
        ({"trainable_token_indices": []}, "trainable_token_indices must be .* there is none"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        phicore.LoRAConfig(**options)
