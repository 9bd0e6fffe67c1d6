"""layers_to_transform and layers_pattern, by PEFT's rule, and what is said where they mean nothing."""

import json

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

import phicore
from phicore.adapters import adapter_layers
from phicore.adapters.layer_index import at_indices, described_by_indices, layer_index

PARTS = st.lists(st.sampled_from(("model", "layers", "h", "0", "1", "12", "experts", "up")), min_size=1, max_size=6)
PATTERNS = st.sampled_from((None, "layers", "h", ["h", "layers"], "h|layers", "experts"))


@given(name=PARTS.map(".".join), pattern=PATTERNS, index=st.sampled_from((0, 1, 12)))
def test_the_rule_is_that_of_peft(name, pattern, index):
    name = f"top.{name}"  # a target that is a whole name is adapted by PEFT at any index
    config = peft.LoraConfig(
        target_modules=[name.rsplit(".", 1)[-1]], layers_to_transform=index, layers_pattern=pattern
    )
    ours = layer_index(name, [pattern] if isinstance(pattern, str) else pattern or ())
    if pattern != "h|layers":  # which PEFT reads as two halves of its own expression
        assert (ours == index) == bool(check_target_module_exists(config, name))


@given(paths=st.sets(PARTS.map(".".join), max_size=6), more=st.sets(PARTS.map(".".join), max_size=6))
def test_a_description_means_what_it_describes(paths, more):
    found = described_by_indices(paths, paths | more)
    if paths and found:
        assert at_indices(paths | more, *found) == paths


def experts() -> nn.Module:
    """Blocks of experts, in a list that stands in a module."""
    blocks = [
        nn.ModuleDict({"experts": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(3, 3)}) for _ in range(2)])})
        for _ in range(3)
    ]
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(blocks)}), "head": nn.Linear(3, 3)})


def chosen(model: nn.Module, **options) -> list[str]:
    return [path for path, _ in adapter_layers(phicore.attach(model, phicore.LoRAConfig(rank=2, **options)))]


def test_blocks_are_counted_and_not_experts():
    names = ["model.layers.1.experts.0.up", "model.layers.1.experts.1.up"]
    assert chosen(experts(), layers_to_transform=1) == names
    assert chosen(experts(), layers_to_transform=[1], layers_pattern="layers") == names
    assert (
        chosen(experts(), target_modules=["0.up"], layers_to_transform=1, layers_pattern="experts|layers") == names[:1]
    )
    expected = [f"model.layers.{i}.experts.1.up" for i in range(3)]
    assert chosen(experts(), target_modules=r".*experts.*", layers_to_transform=1, layers_pattern="experts") == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers_to_transform": -1}, r"layers_to_transform must be whole numbers from 0.*: -1 is none; got -1"),
        ({"layers_to_transform": [0, True]}, r"True is none"),
        ({"layers_to_transform": []}, r"there is none; got \[\]"),
        ({"layers_to_transform": [1, 1]}, r"one comes twice"),
        ({"layers_pattern": "layers"}, r"layers_pattern='layers' needs layers_to_transform"),
        ({"layers_to_transform": 0, "layers_pattern": "("}, r"layers_pattern: '\(' is no regular expression"),
        ({"layers_to_transform": [1, 7]}, r"has the index 7; there are 0 to 2"),
        ({"layers_to_transform": 0, "layers_pattern": "h"}, r"layers_pattern='h'; there are the lists layers: name"),
        ({"layers_to_transform": 0, "target_modules": ["head"]}, r"no layer that is meant stands in a numbered list"),
    ],
)
def test_what_means_no_layer_is_named(unchanged, options, message):
    model = experts()
    with unchanged(model), pytest.raises(ValueError, match=message):
        phicore.attach(model, phicore.LoRAConfig(rank=2, **options))


def test_a_list_at_the_top_is_named_by_the_error_and_then_found(toy, tmp_path):
    with pytest.raises(ValueError, match="there are the lists blocks: name one by layers_pattern"):
        chosen(toy(), target_modules=["up_proj"], layers_to_transform=1)
    model = toy()
    assert chosen(model, target_modules=["up_proj"], layers_to_transform=1, layers_pattern=["blocks"]) == [
        "blocks.1.up_proj"
    ]
    phicore.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["target_modules"], config["layers_to_transform"], config["layers_pattern"]) == (
        ["up_proj"],
        [1],
        "blocks",
    )
    assert [p for p, _ in adapter_layers(phicore.load_adapter(toy(), tmp_path))] == ["blocks.1.up_proj"]
