"""What attach would adapt and train, by name, and what it refuses; a refusal changes nothing."""

import json
import warnings

import bitsandbytes
import pytest
import torch
from torch import nn

import phicore
from phicore.adapters import adapter_layers
from phicore.adapters.lora import LowRankLinear
from phicore.adapters.trained import TrainedCopy
from tests.adapters.toys import CONFIG

# ===== targets, exclusions, patterns =====


def test_targets_and_exclusions(toy):
    config = phicore.LoRAConfig(target_modules=["up_proj", "head"], exclude_modules=["0.up_proj"], **CONFIG)
    assert {p for p, _ in adapter_layers(phicore.attach(toy(), config))} == {"blocks.1.up_proj", "head"}
    config = phicore.LoRAConfig(target_modules=r".*up_proj", exclude_modules=["blocks.0.up_proj"], **CONFIG)
    assert {p for p, _ in adapter_layers(phicore.attach(toy(), config))} == {"blocks.1.up_proj"}


def test_a_pattern_ends_a_name_only_after_a_dot(toy, unchanged):
    model = toy()
    with unchanged(model), pytest.raises(ValueError, match='rank_pattern key "p_proj"'):
        phicore.attach(model, phicore.LoRAConfig(rank_pattern={"p_proj": 2}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["up_prj"]}, 'no module matches target "up_prj"; did you mean up_proj'),
        ({"target_modules": ["up_proj", "xyz"]}, 'no module matches target "xyz"; there are: down_proj, embed'),
        ({"target_modules": r"blocks\.7.*"}, r'no module matches target "blocks\\.7'),
        ({"target_modules": ["norm"]}, "norm, which is a LayerNorm"),
        ({"target_modules": []}, "target_modules must name something"),
        ({"exclude_modules": ["hed"]}, 'exclude_modules entry "hed"; did you mean head'),
        ({"modules_to_save": ["hed"]}, 'modules_to_save entry "hed"; did you mean head'),
        ({"rank_pattern": {"up_prj": 2}}, 'rank_pattern key "up_prj"; did you mean up_proj'),
        ({"alpha_pattern": {"head": 2.0}}, 'alpha_pattern key "head"'),  # there, but not adapted
    ],
)
def test_what_matches_nothing_is_refused(toy, unchanged, options, message):
    model = toy()
    with unchanged(model), pytest.raises(ValueError, match=message):
        phicore.attach(model, phicore.LoRAConfig(**options))


# ===== fused projections =====

LLAMA_STYLE = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj"]
# what is named -> what of Phi-3 is adapted
FUSED = pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (LLAMA_STYLE, {"qkv_proj", "gate_up_proj", "o_proj", "down_proj"}),
        (["q_proj", "v_proj", "o_proj"], {"qkv_proj", "o_proj"}),  # only some of q, k, v
        (["self_attn.k_proj"], {"qkv_proj"}),
        (["up_proj", "qkv_proj"], {"qkv_proj", "gate_up_proj"}),
        (r".*\.(q|k|v|o)_proj", {"qkv_proj", "o_proj"}),  # as an expression, which o_proj alone would satisfy
        (r".*\.(gate|down)_proj", {"gate_up_proj", "down_proj"}),
    ],
)


@FUSED
def test_targets_of_a_llama_raise_on_phi3_and_change_nothing(tiny, unchanged, targets, adapted):
    model = tiny("phi3")
    with unchanged(model), pytest.raises(ValueError, match=r'Phi3ForCausalLM fuses .* fused_targets="map"') as told:
        phicore.attach(model, phicore.LoRAConfig(target_modules=targets, **CONFIG))
    for whole in adapted & {"qkv_proj", "gate_up_proj"} - set(targets):
        assert f'"{whole}"' in str(told.value)


@FUSED
def test_targets_of_a_llama_are_mapped_on_phi3_and_said_once(tiny, tmp_path, targets, adapted):
    config = phicore.LoRAConfig(target_modules=targets, fused_targets="map", **CONFIG)
    with pytest.warns(UserWarning, match="Phi3ForCausalLM fuses") as told:
        model = phicore.attach(tiny("phi3"), config)
    assert len(told) == 1
    assert told[0].filename == __file__
    layers = [path for path, _ in adapter_layers(model)]
    assert {path.rsplit(".", 1)[-1] for path in layers} == adapted
    assert len(layers) == 2 * len(adapted)  # in both blocks
    phicore.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(adapted)


def test_mapping_leaves_a_llama_alone(tiny, recwarn):
    config = phicore.LoRAConfig(target_modules=LLAMA_STYLE, fused_targets="map", **CONFIG)
    layers = adapter_layers(phicore.attach(tiny("llama"), config))
    assert {path.rsplit(".", 1)[-1] for path, _ in layers} == set(LLAMA_STYLE)
    assert not [w for w in recwarn if "fuses" in str(w.message)]


@pytest.mark.filterwarnings("ignore:Phi3ForCausalLM fuses")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["layers.7.q_proj"]}, 'use "qkv_proj"'),
        ({"rank_pattern": {"q_proj": 2}}, 'rank_pattern key "q_proj".*; .*qkv_proj'),
        ({"exclude_modules": ["v_proj"]}, 'exclude_modules entry "v_proj"; this model fuses it: use "qkv_proj"'),
        ({"modules_to_save": ["v_proj"]}, 'modules_to_save entry "v_proj"; this model fuses it: use "qkv_proj"'),
    ],
)
def test_only_targets_are_mapped(tiny, unchanged, options, message):
    model = tiny("phi3")
    config = phicore.LoRAConfig(fused_targets="map", **({"target_modules": ["q_proj"]} | options))
    with unchanged(model), pytest.raises(ValueError, match=message):
        phicore.attach(model, config)


# ===== modules_to_save =====


def test_what_is_saved_whole_is_not_adapted_inside(toy):
    config = phicore.LoRAConfig(**CONFIG, modules_to_save=["blocks.0"])
    model = phicore.attach(toy(), config)
    assert {p for p, layer in adapter_layers(model) if isinstance(layer, LowRankLinear)} == {
        "embed", "blocks.1.up_proj", "blocks.1.down_proj"
    }  # fmt: skip
    assert model.blocks[0].base.up_proj.weight.requires_grad is False
    assert model.blocks[0].trained.up_proj.weight.requires_grad


@pytest.mark.parametrize("entries", [["blocks.0", "0.up_proj"], ["0.up_proj", "blocks.0"]])
def test_what_stands_in_a_module_that_is_saved_whole_is_saved_with_it(toy, tmp_path, entries):
    config = phicore.LoRAConfig(**CONFIG, target_modules=["1.up_proj"], modules_to_save=entries)
    model = phicore.attach(toy(), config)
    assert [path for path, layer in adapter_layers(model) if isinstance(layer, TrainedCopy)] == ["blocks.0"]
    model(torch.randn(2, 10, dtype=model.norm.weight.dtype)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    phicore.save_adapter(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["blocks.0"]


def test_only_saved_whole_leaves_nothing_to_adapt(toy, unchanged):
    model = toy()
    with unchanged(model), pytest.raises(ValueError, match="modules_to_save"):
        phicore.attach(model, phicore.LoRAConfig(target_modules=["head"], modules_to_save=["head"]))


@pytest.mark.parametrize("entry", ["head", "blocks.1", "embed", "blocks"])
def test_what_has_an_adapter_in_it_is_not_saved_whole(toy, unchanged, entry):
    model = phicore.attach(toy(), phicore.LoRAConfig(modules_to_save=["head"]), "first")
    config = phicore.LoRAConfig(target_modules=["0.up_proj"], modules_to_save=[entry])
    with unchanged(model), pytest.raises(ValueError, match=f'modules_to_save entry "{entry}" matches .* adapter in it'):
        phicore.attach(model, config, "second")


@pytest.mark.parametrize(
    ("first", "entry"),
    [({}, "base"), ({"modules_to_save": ["blocks.1"]}, "trained"), ({"modules_to_save": ["blocks.1"]}, "down_proj")],
)
def test_what_stands_in_an_adapted_layer_is_not_saved_whole(toy, unchanged, first, entry):
    model = phicore.attach(toy(), phicore.LoRAConfig(**CONFIG, target_modules=["0.up_proj"], **first), "first")
    config = phicore.LoRAConfig(target_modules=["head"], modules_to_save=[entry])
    with unchanged(model), pytest.raises(ValueError, match=rf"matches .*{entry}, which stands in .*, where an adapter"):
        phicore.attach(model, config, "second")


def test_a_trained_copy_is_no_target(toy, unchanged):
    model = phicore.attach(toy(), phicore.LoRAConfig(modules_to_save=["head", "blocks.1"]), "first")
    for target, message in (("head", "matches head, which is a TrainedCopy"), ("1.up_proj", "no module matches")):
        with unchanged(model), pytest.raises(ValueError, match=message):
            phicore.attach(model, phicore.LoRAConfig(target_modules=[target]), "second")


def test_what_cannot_train_is_not_saved_whole(unchanged):
    model = nn.ModuleDict(
        {"fc": nn.Linear(64, 4), "head": nn.Sequential(nn.Linear(64, 4, bias=False)), "relu": nn.ReLU()}
    )
    with unchanged(model), pytest.raises(ValueError, match='"relu" matches relu, a ReLU without parameters'):
        phicore.attach(model, phicore.LoRAConfig(rank=2, target_modules=["fc"], modules_to_save=["relu"]))
    phicore.quantize_(model)
    config = phicore.LoRAConfig(rank=2, target_modules=["fc"], modules_to_save=["head"])
    with unchanged(model), pytest.raises(ValueError, match=r"and head\.0 is a NF4Linear .* leave it out"):
        phicore.attach(model, config)
    model.head = nn.Module()
    model.head.weight = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    with unchanged(model), pytest.raises(ValueError, match="and head is a Module whose weight is coded"):
        phicore.attach(model, config)


# ===== weights that cannot be adapted =====


def test_weights_of_8_bits_need_an_adapter_dtype(unchanged):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[1].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with unchanged(model), pytest.raises(TypeError, match=r"1 has torch\.float8_e4m3fn weights, .* set adapter_dtype"):
        phicore.attach(model, phicore.LoRAConfig(rank=2))
    attached = phicore.attach(model, phicore.LoRAConfig(rank=2, adapter_dtype=torch.bfloat16))
    assert attached[1].lora_A.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"target_modules": ["1"]}, {"target_modules": ["0"], "modules_to_save": ["1"]}])
def test_what_is_offloaded_is_refused(unchanged, options):
    """Its adapter would have no values either."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with unchanged(model[0]), pytest.raises(ValueError, match="1 has its weights on meta: it is offloaded"):
        phicore.attach(model, phicore.LoRAConfig(rank=2, **options))
    assert type(model[1]) is nn.Linear
    whole = nn.Sequential(nn.Linear(4, 4, device="meta"))
    whole[0].forward = whole[0].forward  # as accelerate's cpu_offload leaves it
    with pytest.raises(ValueError, match="0 has its weights on meta: it is offloaded"):
        phicore.attach(whole, phicore.LoRAConfig(rank=2))


def test_integer_weights_are_refused(toy, unchanged):
    model = toy()
    model.blocks[1].down_proj.weight = nn.Parameter(torch.zeros(20, 33, dtype=torch.int8), requires_grad=False)
    told = (
        r"need a floating-point or NF4 layer, and blocks\.1\.down_proj is a Linear with torch\.int8 weights, coded by"
    )
    with unchanged(model), pytest.raises(TypeError, match=told):
        phicore.attach(model, phicore.LoRAConfig())


def test_layers_of_bitsandbytes_are_told_what_to_do_about(unchanged):
    """Whichever way one comes to them: those who know peft load a model in 4 bits first."""
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4"), nn.ReLU()).to("cpu")  # which codes it
    coded = (
        r"0 is a Linear4bit with torch\.uint8 weights, coded by another library: load .* phicore\.quantize_, or read"
    )
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=f"all-linear finds no layer of Sequential to replace: {coded}"):
            phicore.attach(model, phicore.LoRAConfig(rank=2))
        with pytest.raises(ValueError, match=f"all-linear finds no layer of Sequential to replace: {coded}"):
            phicore.quantize_(model)
        with pytest.raises(TypeError, match=f"need a floating-point or NF4 layer, and {coded}"):
            phicore.attach(model, phicore.LoRAConfig(rank=2, target_modules=["0"]))
        for kind in (phicore.LoRALinear, phicore.DoRALinear):
            with pytest.raises(
                TypeError, match=f"{kind.__name__} adapts .*, got a Linear4bit with torch.uint8 weights"
            ):
                kind(model[0])


def test_warnings_of_what_is_left_out_are_of_the_line_that_asked():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for act in (phicore.quantize_, lambda model: phicore.attach(model, phicore.LoRAConfig(rank=2))):
        with pytest.warns(UserWarning, match="all-linear leaves out") as caught:
            act(nn.Sequential(nn.Linear(4, 4), Doubled(4, 4), nn.MultiheadAttention(4, 1)))
        assert len(caught) == 2
        assert {warning.filename for warning in caught} == {__file__}
