"""attach and disabled: what they make of a model, and that a failure changes nothing."""

import copy
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import phicore
from phicore.adapters import FusedDoRALinear, LoRALinear, adapter_layers
from tests.adapters.toys import CONFIG, DORA, NF4, adapted, build, trainable, x_for

# ===== attach =====


@NF4
@DORA
def test_attach_freezes_the_base_adapts_in_place_and_changes_no_output(toy, nf4, dora):
    model = build(toy, nf4)
    x = x_for(model)
    before = model(x)
    assert phicore.attach(model, phicore.LoRAConfig(**CONFIG, dora=dora)) is model
    torch.testing.assert_close(model(x), before)
    layers = dict(adapter_layers(model))
    assert set(layers) == {"embed", *(f"blocks.{i}.{end}" for i in (0, 1) for end in ("up_proj", "down_proj"))}
    kind = phicore.DoRALinear if dora else phicore.LoRALinear
    assert all(type(layer) is kind for layer in layers.values())
    assert all((layer.rank, layer.alpha, layer.adapter_name) == (3, 7.0, "default") for layer in layers.values())
    own = ("lora_A", "lora_B", "magnitude") if dora else ("lora_A", "lora_B")
    assert trainable(model) == {f"{path}.{part}" for path in layers for part in own}
    model(x).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable(model)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_freed_does_not_stay_in_the_process():
    """Small tensors that stay come to lie in what the large ones leave; glibc kept 660 MB over this model of 100 MB."""
    script = r"""
import re, torch, phicore
from pathlib import Path
from torch import nn
from phicore.adapters.merging import merge_for_good

def own_megabytes():
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024

phicore.attach(nn.Sequential(nn.Linear(8, 8)), phicore.LoRAConfig(dora=True))
model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16) for _ in range(48)])
before = own_megabytes()
phicore.attach(model, phicore.LoRAConfig(rank=8, dora=True))
attached = own_megabytes()
merge_for_good(model)
print(attached - before, own_megabytes() - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(int(grown) < 100 for grown in run.stdout.split()), run.stdout


def test_layers_take_the_config(toy):
    options = {"dropout": 0.25, "rslora": True, "init": "gaussian", "adapter_dtype": torch.float64}
    model = phicore.attach(toy(dtype=torch.float32), phicore.LoRAConfig(rank=9, alpha=6.0, **options))
    for _, layer in adapter_layers(model):
        assert (layer.dropout, layer.rslora, layer.init) == (0.25, True, "gaussian")
        assert layer.scaling == pytest.approx(6 / 3)
        assert layer.lora_A.dtype == torch.float64


def test_patterns_give_some_layers_another_rank_and_alpha(toy):
    config = phicore.LoRAConfig(
        rank=4, alpha=8.0,
        rank_pattern={r"blocks\.1\.up_proj": 2, "up_proj": 6},
        alpha_pattern={r"blocks\.\d\.down_proj": 1.5},
    )  # fmt: skip
    layers = dict(adapter_layers(phicore.attach(toy(), config)))
    assert {path: layer.rank for path, layer in layers.items()} == {
        "embed": 4, "blocks.0.up_proj": 6, "blocks.0.down_proj": 4, "blocks.1.up_proj": 2, "blocks.1.down_proj": 4
    }  # fmt: skip
    assert {path: layer.alpha for path, layer in layers.items()} == {
        "embed": 8, "blocks.0.up_proj": 8, "blocks.0.down_proj": 1.5, "blocks.1.up_proj": 8, "blocks.1.down_proj": 1.5
    }  # fmt: skip
    assert layers["blocks.0.down_proj"].scaling == 1.5 / 4


@pytest.mark.parametrize("name", ["base", "trained"])
def test_a_layer_may_have_any_name(randomize, name):
    # adapter layers hold their frozen layer as `base`; a model's own `base` must not be taken for it
    inner = nn.ModuleDict({name: nn.Linear(4, 4), "fc": nn.Linear(4, 4)})
    model = nn.ModuleDict({name: nn.Linear(4, 4), "inner": inner})
    original = copy.deepcopy(model)
    adapted(model, randomize)
    assert [path for path, _ in adapter_layers(model)] == [name, f"inner.{name}", "inner.fc"]
    assert set(phicore.merge(model)) == {name, f"inner.{name}", "inner.fc"}
    assert model.state_dict().keys() == original.state_dict().keys()
    phicore.unmerge(model)
    adapted(model, randomize, "second")
    assert [path for path, _ in adapter_layers(model, "second")] == [name, f"inner.{name}", "inner.fc"]
    assert [path for path, _ in adapter_layers(model, "default")] == [name, f"inner.{name}", "inner.fc"]


@NF4
def test_shared_layers_share_one_adapter(toy, randomize, nf4):
    model = adapted(build(toy, nf4, shared=True), randomize)
    assert model.blocks[2] is model.blocks[0]
    twice = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": twice, "b": nn.ModuleDict({"c": twice}), "d": twice})
    x = torch.randn(2, 4)
    base = twice(x)
    adapted(model, randomize)
    assert model["a"] is model["b"]["c"] is model["d"]
    y = model["a"](x)
    assert not torch.allclose(y, base)
    errors = phicore.merge(model)
    assert set(errors) == {"a", "b.c", "d"}
    assert type(model["a"]) is nn.Linear
    assert model["a"] is model["b"]["c"] is model["d"]
    torch.testing.assert_close(model["a"](x), y)
    phicore.unmerge(model)
    assert model["a"] is model["b"]["c"] is model["d"]
    assert torch.equal(model["a"](x), y)
    assert model["a"].base is twice


def test_shared_blocks_train_and_merge(toy, randomize):
    model = adapted(toy(shared=True), randomize)
    x = x_for(model)
    y = model(x)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    phicore.merge(model)
    torch.testing.assert_close(model(x), y)
    assert torch.equal(phicore.unmerge(model)(x), y)


@DORA
def test_a_second_adapter_adapts_the_sum_and_it_alone_trains(toy, randomize, dora):
    model = adapted(toy(), randomize, "first")
    x = x_for(model)
    first = model(x)
    phicore.attach(model, phicore.LoRAConfig(rank=2, alpha=3.0, target_modules=["up_proj"], dora=dora), "second")
    torch.testing.assert_close(model(x), first)
    assert {p for p, _ in adapter_layers(model, "first")} == {
        "embed",
        *(f"blocks.{i}.{e}_proj" for i in (0, 1) for e in ("up", "down")),
    }
    assert {p for p, _ in adapter_layers(model, "second")} == {"blocks.0.up_proj", "blocks.1.up_proj"}
    own = ("lora_A", "lora_B", "magnitude") if dora else ("lora_A", "lora_B")
    assert trainable(model) == {f"blocks.{i}.up_proj.{part}" for i in (0, 1) for part in own}
    randomize(model, seed=9)
    both = model(x)
    assert not torch.allclose(both, first)
    phicore.merge(model)
    torch.testing.assert_close(model(x), both)
    assert torch.equal(phicore.unmerge(model)(x), both)


# ===== modules_to_save =====


def test_modules_to_save_trains_a_copy(toy, randomize):
    model = toy()
    original = copy.deepcopy(model)
    x = x_for(model)
    config = phicore.LoRAConfig(**CONFIG, target_modules=["up_proj"], modules_to_save=["head", "norm"])
    phicore.attach(model, config)
    torch.testing.assert_close(model(x), original(x))
    whole = {f"{name}.trained.{part}" for name in ("head", "norm") for part in ("weight", "bias")}
    assert trainable(model) == whole | {f"blocks.{i}.up_proj.lora_{p}" for i in (0, 1) for p in "AB"}
    randomize(model)
    changed = model(x)
    assert not torch.allclose(changed, original(x))
    assert torch.equal(model.head.base.weight, original.head.weight)
    assert model.head.weight is model.head.trained.weight  # who reads a head's weight finds the trained one
    with phicore.disabled(model):
        assert torch.equal(model(x), original(x))
    assert torch.equal(model(x), changed)

    phicore.merge(model)
    assert model.state_dict().keys() == original.state_dict().keys()
    torch.testing.assert_close(model(x), changed)
    assert not trainable(model)
    phicore.unmerge(model)
    assert torch.equal(model(x), changed)
    assert trainable(model) >= whole
    with phicore.disabled(model):
        assert torch.equal(model(x), original(x))


def test_a_copy_is_merged_as_it_answers_and_in_no_new_memory(toy, randomize):
    model = toy()
    base, x = copy.deepcopy(model), x_for(model)
    randomize(phicore.attach(model, phicore.LoRAConfig(**CONFIG, modules_to_save=["head"])))
    trained = model.head.trained.weight
    phicore.merge(model)
    assert model.head.weight.data_ptr() == trained.data_ptr()
    phicore.unmerge(model)
    assert model.head.trained.weight is trained
    with phicore.disabled(model):
        phicore.merge(model)
        torch.testing.assert_close(model(x), base(x))


def test_a_second_adapter_leaves_the_trained_copy_of_the_first(toy, randomize):
    model = adapted(toy(), randomize, "first", modules_to_save=["head", "blocks.1"])
    x = x_for(model)
    y = model(x)
    phicore.attach(model, phicore.LoRAConfig(**CONFIG), "second")
    torch.testing.assert_close(model(x), y)
    assert {p for p, _ in adapter_layers(model, "second")} == {"embed", "blocks.0.up_proj", "blocks.0.down_proj"}

    merged_from = model(x)
    phicore.merge(model)
    torch.testing.assert_close(model(x), merged_from)
    phicore.unmerge(model)


def test_a_shared_module_has_one_trained_copy(toy, randomize):
    model = toy(shared=True)
    twice = nn.LayerNorm(20)
    model.blocks[0].norm = model.blocks[1].norm = twice
    config = phicore.LoRAConfig(target_modules=["up_proj"], modules_to_save=["blocks.0.norm", "blocks.1.norm"])
    phicore.attach(model, config)
    assert model.blocks[0].norm is model.blocks[1].norm
    assert model.blocks[0].norm.base is twice
    phicore.merge(model)
    assert model.blocks[0].norm is model.blocks[1].norm
    phicore.unmerge(model)
    assert model.blocks[0].norm is model.blocks[1].norm


# ===== disabled =====


@NF4
@DORA
def test_disabled_is_the_base_model(toy, randomize, nf4, dora):
    model = build(toy, nf4)
    x = x_for(model)
    base = model(x)
    adapted(model, randomize, "first", dora=dora)
    adapted(model, randomize, "second", target_modules=["up_proj"])
    y = model(x)
    with phicore.disabled(model) as inside:
        assert inside is model
        assert torch.equal(model(x), base)
        with phicore.disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), y)


def test_disabled_comes_back_after_an_error(toy, randomize):
    model = adapted(toy(), randomize)
    model.embed.enabled = False
    y = model(x := x_for(model))
    with pytest.raises(RuntimeError), phicore.disabled(model):
        raise RuntimeError
    assert model.embed.enabled is False
    assert torch.equal(model(x), y)


# ===== errors =====


def broken(toy, name: str) -> nn.Module:
    model = toy()
    if name != "plain":
        phicore.attach(model, phicore.LoRAConfig(**CONFIG))
    if name == "merged":
        phicore.merge(model)
    return model


@pytest.mark.parametrize(
    ("state", "action", "message"),
    [
        ("adapted", lambda m: phicore.attach(m, phicore.LoRAConfig()), 'has an adapter named "default" already'),
        ("merged", lambda m: phicore.attach(m, phicore.LoRAConfig(), "other"), "are merged; unmerge it before"),
        ("merged", lambda m: phicore.merge(m), "the model is merged already"),
        ("plain", lambda m: phicore.merge(m), "no adapter to merge"),
        ("plain", lambda m: phicore.unmerge(m), "the model is not merged"),
        ("adapted", lambda m: phicore.unmerge(m), "the model is not merged"),
        ("plain", lambda m: phicore.disabled(m).__enter__(), "no adapter that could be disabled"),
        ("merged", lambda m: phicore.disabled(m).__enter__(), r"no adapter that could be disabled \(it is merged\)"),
    ],
)
def test_actions_out_of_turn_are_refused(toy, unchanged, state, action, message):
    model = broken(toy, state)
    with unchanged(model), pytest.raises(ValueError, match=message):
        action(model)


@pytest.mark.parametrize("name", [None, 3, ("a",)])
def test_a_name_that_is_no_text_is_refused(toy, unchanged, tmp_path, name):
    """None would be the base model for `mixed`."""
    phicore.save_adapter(phicore.attach(toy(), phicore.LoRAConfig(**CONFIG)), tmp_path)
    model = toy()
    for action in (
        lambda: phicore.attach(model, phicore.LoRAConfig(**CONFIG), name),
        lambda: phicore.load_adapter(model, tmp_path, name),
    ):
        with unchanged(model), pytest.raises(TypeError, match="the name of an adapter must be a text, got "):
            action()


def test_an_error_half_way_leaves_what_trains_as_it_was(toy, unchanged, monkeypatch):
    """Of memory, say: a layer freezes its base when it is made."""
    model = toy()
    model.norm.requires_grad_(False)
    monkeypatch.setattr(LoRALinear, "reset_parameters", mock.Mock(side_effect=[None, None, MemoryError]))
    with unchanged(model), pytest.raises(MemoryError):
        phicore.attach(model, phicore.LoRAConfig(**CONFIG))


# ===== whole models =====


@DORA
@pytest.mark.parametrize("family", ["llama", "phi3", "bert", "gpt2"])
def test_transformers_models(tiny, randomize, family, dora):
    model = tiny(family)
    linear = (nn.Linear, Conv1D)
    names = {n for n, m in model.named_modules() if isinstance(m, linear)} - {"lm_head"}
    original = copy.deepcopy(model)
    ids = torch.arange(1, 13).view(2, 6)
    base = model(ids).logits
    adapted(model, randomize, dora=dora)
    assert {p for p, _ in adapter_layers(model)} == names
    logits = model(ids).logits
    assert not torch.allclose(logits, base, rtol=1e-2)
    with phicore.disabled(model):
        assert torch.equal(model(ids).logits, base)
    phicore.merge(model)
    torch.testing.assert_close(model(ids).logits, logits)
    assert model.state_dict().keys() == original.state_dict().keys()
    phicore.unmerge(model)
    assert torch.equal(model(ids).logits, logits)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_layers_with_their_own_forward(unchanged):
    """all-linear leaves them out; by name LoRA calls them, and DoRA, which computes with the weight, refuses."""
    model = nn.Sequential(Doubled(6, 6), nn.Linear(6, 6))
    with pytest.warns(UserWarning, match=r"leaves out layers with a forward of their own \(Doubled\): 0$"):
        attached = phicore.attach(copy.deepcopy(model), phicore.LoRAConfig(rank=2))
    assert [type(layer) for layer in attached] == [Doubled, phicore.LoRALinear]
    with unchanged(model), pytest.raises(ValueError, match=r"0: a Doubled has a forward of its own; DoRA"):
        phicore.attach(model, phicore.LoRAConfig(rank=2, target_modules=["0"], dora=True))
    with unchanged(model), pytest.raises(ValueError, match=r"0 is a Doubled .* would compute otherwise as NF4Linear"):
        phicore.attach(model, phicore.LoRAConfig(rank=2, target_modules=["1", "0"], init="loftq"))
    x = torch.randn(3, 6)
    attached = phicore.attach(copy.deepcopy(model), phicore.LoRAConfig(rank=2, target_modules=["0"]))
    torch.testing.assert_close(attached(x), model(x))
    with unchanged(attached):
        with pytest.raises(ValueError, match=r"0: a Doubled has a forward of its own; DoRA"):  # over the first adapter
            phicore.attach(attached, phicore.LoRAConfig(rank=2, target_modules=["0"], dora=True), "second")
        with pytest.raises(ValueError, match=r"0: a Doubled has a forward of its own, and what"):
            phicore.merge(attached)
    with pytest.raises(ValueError, match="a Doubled has a forward of its own; DoRA"):
        FusedDoRALinear(Doubled(6, 6), {"q": 4, "k": 2}, 2)


@DORA
def test_convolutions_with_their_own_forward(unchanged, dora):
    class Standardised(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean((1, 2), keepdim=True), self.bias)

    model, config = nn.Sequential(Standardised(3, 4, 2)), phicore.LoRAConfig(rank=2, target_modules=["0"], dora=dora)
    if dora:
        with unchanged(model), pytest.raises(ValueError, match="0: a Standardised has a forward of its own; DoRA"):
            phicore.attach(model, config)
        return
    x = torch.randn(2, 3, 5)
    y = model(x)
    torch.testing.assert_close(phicore.attach(model, config)(x), y)
    with unchanged(model), pytest.raises(ValueError, match="0: a Standardised has a forward of its own, and what"):
        phicore.merge(model)


def test_a_computed_weight_takes_no_merge(unchanged):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    phicore.attach(model, phicore.LoRAConfig(rank=2))
    with pytest.raises(ValueError, match=r"computes its weight .*remove_parametrizations"):
        phicore.merge(model)
    assert type(model[0]) is phicore.LoRALinear
