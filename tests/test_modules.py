"""Naming modules: what a target means, and what an error says instead."""

import re
import warnings
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import phicore
from phicore.modules import ALL_LINEAR, leaves, matches, no_match, output_heads, replace, select

LINEAR = (nn.Linear,)
NAMES = st.lists(st.sampled_from(("a", "b", "q_proj", "layers", "0", "1")), min_size=1, max_size=4).map(".".join)


@given(name=NAMES, targets=st.lists(NAMES, max_size=3))
def test_a_list_matches_whole_names_and_their_ends_after_a_dot(name, targets):
    parts = name.split(".")
    ends = {".".join(parts[i:]) for i in range(len(parts))}
    assert matches(name, targets) == bool(ends & set(targets))


def test_an_end_within_a_name_does_not_match():
    assert not matches("layers.0.q_proj", ["proj", "_proj", "0.q", "ayers.0.q_proj"])


@given(name=NAMES)
def test_a_string_is_a_regular_expression_of_the_whole_name(name):
    assert matches(name, re.escape(name))
    assert matches(name, ".*")
    assert not matches(name + ".more", re.escape(name))
    assert not matches("more." + name, re.escape(name))


def test_a_string_agrees_with_peft(tiny):
    import peft
    from peft.tuners import tuners_utils as tuners

    names = [name for name, _ in tiny("llama").named_modules()]
    for targets in ("q_proj", r".*\.q_proj", r"model\.layers\.0.*", ["q_proj"], ["self_attn.q_proj", "0.mlp.up_proj"]):
        config = peft.LoraConfig(target_modules=targets)
        for name in names:
            assert matches(name, targets) == bool(tuners.check_target_module_exists(config, name)), (name, targets)


def test_leaves_of_a_shared_layer_come_once_for_each_place():
    twice = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": twice, "b": twice, "inner": nn.ModuleDict({"c": twice, "d": nn.Linear(2, 2)})})
    assert [name for name, _ in leaves(model, LINEAR)] == ["a", "b", "inner.c", "inner.d"]
    assert {name for name, module in leaves(model, LINEAR) if module is twice} == {"a", "b", "inner.c"}


def test_leaves_does_not_enter_what_it_yields_nor_attention():
    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(4, 2), "block": nn.Sequential(nn.Linear(2, 2), nn.ReLU())}
    )
    model.nothing = None
    assert [name for name, _ in leaves(model, LINEAR)] == ["block.0"]
    assert [name for name, _ in leaves(model, (nn.Sequential, nn.Linear))] == ["block"]
    assert not list(leaves(model, LINEAR, closed=(nn.Sequential,)))


def test_all_linear_leaves_heads_out(toy):
    model = toy()
    expected = ["embed", *(f"blocks.{i}.{end}" for i in (0, 1) for end in ("up_proj", "down_proj"))]
    assert list(select(model, "all-linear", [], LINEAR)) == expected
    assert list(select(model, "all-linear", ["embed", "up_proj"], LINEAR)) == [
        "blocks.0.down_proj",
        "blocks.1.down_proj",
    ]


def test_output_heads_are_the_named_and_the_tied(toy):
    model = toy()
    assert output_heads(model) == {model.head}
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "fc": nn.Linear(4, 4), "out": nn.Linear(4, 5, bias=False)})
    assert output_heads(model) == set()
    model["out"].weight = model["embed"].weight
    assert output_heads(model) == {model["embed"], model["out"]}


def test_all_linear_warns_of_attention_that_it_leaves_out():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4)})
    with pytest.warns(UserWarning, match="leaves out nn.MultiheadAttention.*: attention"):
        assert list(select(model, "all-linear", [], LINEAR)) == ["fc"]


def test_a_list_selects_in_the_models_order(toy):
    model = toy()
    chosen = select(model, ["head", "blocks.1.up_proj", "embed"], [], LINEAR)
    assert list(chosen) == ["embed", "blocks.1.up_proj", "head"]
    assert chosen["head"] is model.head
    assert list(select(model, ("up_proj",), ["blocks.0.up_proj"], LINEAR)) == ["blocks.1.up_proj"]
    assert list(select(model, r"blocks\.\d\.up_proj|head", [], LINEAR)) == [
        "blocks.0.up_proj",
        "blocks.1.up_proj",
        "head",
    ]


@pytest.mark.parametrize(
    ("targets", "excluded", "message"),
    [
        (["up_prj"], [], r'no module matches target "up_prj"; did you mean up_proj'),
        (["embed", "xyz"], [], r'no module matches target "xyz"; there are: down_proj, embed, head, up_proj'),
        ("blocks.7.up_proj", [], r'no module matches target "blocks.7.up_proj"; did you mean up_proj'),
        (["q_proj"], [], r'no module matches target "q_proj"'),
        (["gate_up_proj"], [], r'no module matches target "gate_up_proj"; did you mean'),
        (["all-linear", "head"], [], r'"all-linear" is taken by itself only, as a string'),
        (["norm"], [], r'target "norm" matches norm, which is a LayerNorm and cannot be .*; layers that can: Linear,'),
        (["up_proj"], ["hed"], r'no module matches exclude_modules entry "hed"; did you mean head'),
        (["up_proj"], ["up_proj"], r"target_modules=\['up_proj'\] with exclude_modules=\['up_proj'\] leaves no module"),
        ([], [], r"target_modules must name something"),
        ("", [], r"target_modules must name something"),
        ("up_proj(", [], r"'up_proj\(' is no regular expression"),
        (
            ["up_proj"],
            ["norm"],
            r'exclude_modules entry "norm" matches norm, a LayerNorm which .* leave nothing',
        ),
        (None, [], r"target_modules must name something, got None"),
        ([""], [], r"target_modules must be a string or a list of names, got \[''\]; none may be empty"),
        ([["up_proj"]], [], r"target_modules must be a string or a list of names, got \[\['up_proj'\]\]"),
        (iter(["up_proj"]), [], r"target_modules must be a string or a list of names, got <list_iterator"),
        (["up_proj"], None, r"exclude_modules must be a list of names, got None"),
        ("a{99999999999}", [], r"is no regular expression: the repetition number is too large"),
        (["up_proj"], "head", "exclude_modules must be a list of names, got 'head'"),
    ],
)
def test_what_matches_nothing_is_named(toy, targets, excluded, message):
    with pytest.raises(ValueError, match=message):
        select(toy(), targets, excluded, LINEAR)


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.MultiheadAttention(4, 1)], ids=["linear", "attention"])
def test_a_model_that_is_one_layer_has_no_place_for_another(model):
    """Of an attention nothing else would look at the layer put into it."""
    with pytest.raises(ValueError, match=f"the model itself is of type {type(model).__name__}.*another module"):
        select(model, ALL_LINEAR if isinstance(model, nn.Linear) else ["out_proj"], [], (nn.Linear,))


def test_a_target_inside_attention_is_explained():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"attention\.out_proj, which is a .*outside nn\.MultiheadAttention"):
        select(model, ["out_proj"], [], LINEAR)


@pytest.mark.parametrize(
    ("name", "there", "expected"),
    [
        ("q_proj", ["a.qkv_proj", "a.o_proj"], 'this model fuses it: use "qkv_proj"'),
        ("self_attn.v_proj", ["a.qkv_proj"], 'this model fuses it: use "qkv_proj"'),
        ("up_proj", ["a.gate_up_proj"], 'this model fuses it: use "gate_up_proj"'),
        ("qkv_proj", ["a.q_proj", "a.k_proj", "a.v_proj"], "this model splits it: use q_proj, k_proj and v_proj"),
        ("gate_up_proj", ["a.gate_proj", "a.up_proj"], "this model splits it: use gate_proj and up_proj"),
        ("qkv_proj", ["a.q_proj"], "did you mean q_proj?"),
        ("dense", ["a.q_proj"], "there are: q_proj"),
    ],
)
def test_fused_projections_are_named(name, there, expected):
    assert expected in no_match(f'target "{name}"', name, there)


def fused_model() -> nn.Module:
    """One block that fuses its projections, one that does not, and one that has a part beside the whole."""
    names = (["qkv_proj", "o_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], ["qkv_proj", "q_proj", "o_proj"])
    return nn.ModuleList(nn.ModuleDict({name: nn.Linear(4, 4) for name in block}) for block in names)


@pytest.mark.parametrize(
    ("target", "fused"),
    [
        (["q_proj"], ["0.qkv_proj"]),
        (["k_proj"], ["0.qkv_proj", "2.qkv_proj"]),
        (["0.v_proj"], ["0.qkv_proj"]),
        (["0.k_proj", "o_proj"], ["0.qkv_proj"]),
        (r"\d\.(q|o)_proj", ["0.qkv_proj"]),
        (r".*\.[qkvo]_proj", ["0.qkv_proj", "2.qkv_proj"]),
    ],
)
def test_targets_that_mean_a_part_of_a_fused_layer_raise_or_are_mapped(target, fused):
    model = fused_model()
    for choice, hint in ((None, "name those$"), ("raise", 'name those or set fused_targets="map"')):
        with pytest.raises(ValueError, match=f'ModuleList fuses what .* into "qkv_proj"; {hint}'):
            select(model, target, [], LINEAR, fused_targets=choice)
    with pytest.warns(UserWarning, match='fuses what .* into "qkv_proj", which are taken whole') as told:
        chosen = select(model, target, [], LINEAR, fused_targets="map")
    assert len(told) == 1
    assert list(chosen) == [n for n, _ in leaves(model, LINEAR) if n in fused or matches(n, target)]


@pytest.mark.parametrize("target", [["o_proj"], ["qkv_proj"], "all-linear", r".*_proj", r"1\..*", ["1.q_proj"]])
def test_targets_that_miss_no_part_are_taken_as_they_are(target, recwarn):
    chosen = {choice: select(fused_model(), target, [], LINEAR, fused_targets=choice) for choice in ("raise", "map")}
    assert list(chosen["raise"]) == list(chosen["map"])
    assert not recwarn


def test_replace_puts_a_module_at_any_depth(toy):
    model = toy()
    new = nn.Identity()
    for name in ("head", "blocks.1", "blocks.0.up_proj"):
        replace(model, name, new)
        assert model.get_submodule(name) is new
    assert isinstance(model.blocks, nn.ModuleList)
    assert torch.equal(model.embed.weight, toy().embed.weight)


@pytest.mark.parametrize("targets", [["out_proj"], r"(.*\.)?out_proj"])
def test_a_target_that_means_more_than_can_be_chosen_says_what_it_passes_over(targets, recwarn):
    model = nn.ModuleDict({name: nn.ModuleDict() for name in ("plain", "pooled", "rows", "adapted")})
    model.plain.out_proj, model.rows.out_proj = nn.Linear(4, 4), nn.ConvTranspose1d(4, 4, 2)
    model.pooled["0"] = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    model.adapted.out_proj = phicore.LoRALinear(nn.Linear(4, 4), rank=2)
    kinds = (nn.Linear, phicore.LoRALinear)
    with pytest.warns(UserWarning, match="means layers that cannot be adapted or quantized, too") as told:
        chosen = select(model, targets, [], kinds)
    assert list(chosen) == ["plain.out_proj", "adapted.out_proj"]
    assert len(told) == 1
    assert str(told[0].message).endswith(
        "they stay as they are: pooled.0.attention.out_proj (NonDynamicallyQuantizableLinear), "
        "rows.out_proj (ConvTranspose1d)"
    )
    select(model, ["out_proj"], ["pooled", "rows.out_proj"], kinds)
    select(model, ["out_proj"], ["rows"], kinds, closed=(nn.MultiheadAttention,))
    select(model, r"(plain|adapted)\.out_proj.*", [], kinds)  # the layer under an adapter too
    assert len(recwarn) == 0


def test_an_excluded_container_leaves_out_what_is_in_it(toy):
    whole = select(toy(), "all-linear", [], LINEAR)
    rest = select(toy(), "all-linear", ["blocks.0"], LINEAR)
    assert rest.keys() == {name for name in whole if not name.startswith("blocks.0.")}
    assert rest.keys() < whole.keys()


def test_blocks_that_share_weights_are_left_out_with_a_word():
    """As Zamba2's; a head that is tied to an embedding is left out without one."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4), "head": nn.Linear(4, 9)})
    model["b"].weight = model["a"].weight
    model["embed"] = nn.Embedding(9, 4)
    model["head"].weight = model["embed"].weight
    with pytest.warns(UserWarning, match="leaves out layers that share a weight with each other: a, b$"):
        assert list(select(model, ALL_LINEAR, [], (nn.Linear,))) == ["c"]
    model["b"].weight = nn.Parameter(torch.zeros(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select(model, ALL_LINEAR, [], (nn.Linear, nn.Embedding), all_linear=(nn.Linear,))


def test_a_string_that_would_match_as_a_list_says_so():
    model = nn.Sequential(nn.ModuleDict({"body": nn.Linear(2, 2)}))
    with pytest.raises(ValueError, match=r'is a regular expression for whole names.*give a list: \["body"\]'):
        select(model, "body", [], (nn.Linear,))
    assert list(select(model, ["body"], [], (nn.Linear,))) == ["0.body"]


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (ALL_LINEAR, "first.base_layer"),
        (["first"], "base_model.model.first"),  # a layer of peft's, called Linear too
        (["default"], "first.lora_A.default"),
        (["second"], "second"),
    ],
)
def test_what_is_pefts_is_named_and_left_alone(targets, named):
    import peft

    model = nn.Sequential(OrderedDict(first=nn.Linear(8, 8), second=nn.Linear(8, 8), third=nn.Linear(8, 8)))
    config = peft.LoraConfig(r=2, target_modules=["first"], modules_to_save=["second"])
    theirs = peft.get_peft_model(model, config)
    for change in (phicore.quantize_, lambda m, t: phicore.attach(m, phicore.LoRAConfig(rank=2, target_modules=t))):
        trained = [name for name, p in theirs.named_parameters() if p.requires_grad]
        with pytest.raises(ValueError, match=rf"{named} belongs to an adapter of peft.*merge_and_unload"):
            change(theirs, targets)
        assert [name for name, p in theirs.named_parameters() if p.requires_grad] == trained
    assert phicore.quantize_(theirs, ["third"]) is theirs
    whole = phicore.LoRAConfig(rank=2, target_modules=["third"], modules_to_save=["second"])
    with pytest.raises(ValueError, match=r"second belongs to an adapter of peft"):
        phicore.attach(theirs, whole)
