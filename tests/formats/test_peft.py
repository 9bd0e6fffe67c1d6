"""PEFT's adapter format, in both directions, against PEFT itself; and what happens to files that are not right."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import phicore
from phicore.adapters import adapter_layers
from phicore.adapters.attach import TrainedCopy
from phicore.formats.bitsandbytes import save_quantized
from phicore.formats.peft import CONFIG, PREFIX, WEIGHTS
from phicore.formats.peft_parts import with_metadata

IDS = torch.arange(1, 13).view(2, 6)
LLAMA = ["q_proj", "v_proj", "down_proj"]

# name: model family, ours, theirs
SETTINGS = {
    "lora": ("llama", {"target_modules": LLAMA}, {"target_modules": LLAMA}),
    "all-linear": ("llama", {"target_modules": "all-linear"}, {"target_modules": "all-linear"}),
    "regex": ("llama", {"target_modules": r".*\.1\..*_proj"}, {"target_modules": r".*\.1\..*_proj"}),
    "excluded": (
        "llama",
        {"target_modules": LLAMA, "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": LLAMA, "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "dora": ("llama", {"target_modules": LLAMA, "dora": True}, {"target_modules": LLAMA, "use_dora": True}),
    "rslora": ("llama", {"target_modules": LLAMA, "rslora": True}, {"target_modules": LLAMA, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": LLAMA,
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 6},
            "alpha_pattern": {r"layers\.0\.self_attn\.v_proj": 3, "q_proj": 16},
        },
        {
            "target_modules": LLAMA,
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 6},
            "alpha_pattern": {r"layers\.0\.self_attn\.v_proj": 3, "q_proj": 16},
        },
    ),
    "dora with patterns": (
        "llama",
        {"target_modules": LLAMA, "dora": True, "rslora": True, "rank_pattern": {"1.self_attn.q_proj": 2}},
        {"target_modules": LLAMA, "use_dora": True, "use_rslora": True, "rank_pattern": {"1.self_attn.q_proj": 2}},
    ),
    "whole head": (
        "llama",
        {"target_modules": LLAMA, "modules_to_save": ["lm_head"]},
        {"target_modules": LLAMA, "modules_to_save": ["lm_head"]},
    ),
    "layers": (
        "llama",
        {"target_modules": LLAMA, "layers_to_transform": 1},
        {"target_modules": LLAMA, "layers_to_transform": 1},
    ),
    "biases of layers": (
        "gpt2",
        {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only"},
        {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only", "fan_in_fan_out": True},
    ),
    "biases dora": (
        "gpt2",
        {"target_modules": ["c_attn"], "bias": "lora_only", "dora": True},
        {"target_modules": ["c_attn"], "bias": "lora_only", "use_dora": True, "fan_in_fan_out": True},
    ),
    "all biases": (
        "gpt2",
        {"target_modules": ["c_attn"], "bias": "all"},
        {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True},
    ),
    "convolution biases": (
        "conv",
        {"target_modules": ["conv1", "conv2"], "bias": "all"},
        {"target_modules": ["conv1", "conv2"], "bias": "all"},
    ),
    "tokens": (
        "llama",
        {"target_modules": LLAMA, "trainable_token_indices": [7, 3, 12]},
        {"target_modules": LLAMA, "trainable_token_indices": [7, 3, 12]},
    ),
    "tokens of both ends": (
        "llama",
        {"target_modules": LLAMA, "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [9, 1]}},
        {"target_modules": LLAMA, "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [9, 1]}},
    ),
    "tied tokens": (
        "tied llama",
        {"target_modules": LLAMA, "trainable_token_indices": [7, 3, 12]},
        {"target_modules": LLAMA, "trainable_token_indices": [7, 3, 12]},
    ),
    "tied": (
        "tied llama",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "phi3": (
        "phi3",
        {"target_modules": "all-linear", "dora": True},
        {"target_modules": "all-linear", "use_dora": True},
    ),
    "bert": (
        "bert",
        {"target_modules": ["query", "value", "intermediate.dense"], "modules_to_save": ["classifier"]},
        {"target_modules": ["query", "value", "intermediate.dense"], "modules_to_save": ["classifier"]},
    ),
    "gpt2": ("gpt2", {"target_modules": "all-linear"}, {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "gpt2 dora": (
        "gpt2",
        {"target_modules": ["c_attn", "c_fc"], "dora": True},
        {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True},
    ),
    "embedding": (
        "llama",
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"target_modules": ["embed_tokens", "v_proj"]},
    ),
    "embedding dora": (
        "bert",
        {
            "target_modules": ["word_embeddings", "key"],
            "dora": True,
            "rslora": True,
            "modules_to_save": ["classifier"],
        },
        {
            "target_modules": ["word_embeddings", "key"],
            "use_dora": True,
            "use_rslora": True,
            "modules_to_save": ["classifier"],
        },
    ),
    "convolutions": (
        "conv",
        {"target_modules": ["conv1", "conv2", "head"], "rank_pattern": {"conv2": 2}},
        {"target_modules": ["conv1", "conv2", "head"], "rank_pattern": {"conv2": 2}},
    ),
    "convolutions dora": (
        "conv",
        {"target_modules": ["embed", "conv1", "conv2"], "dora": True},
        {"target_modules": ["embed", "conv1", "conv2"], "use_dora": True},
    ),
}
EACH = pytest.mark.parametrize("setting", SETTINGS)


def ours(tiny, randomize, setting: str, **more) -> nn.Module:
    """A model with a phicore adapter whose every tensor is off its start."""
    family, options, _ = SETTINGS[setting]
    config = phicore.LoRAConfig(**{"rank": 4, "alpha": 7, **options, **more})
    return randomize(phicore.attach(tiny(family), config))


def theirs(tiny, randomize, setting: str):
    """A model with a PEFT adapter whose every tensor is off its start."""
    family, _, options = SETTINGS[setting]
    task = {"bert": "SEQ_CLS", "conv": None}.get(family, "CAUSAL_LM")
    config = peft.LoraConfig(r=4, lora_alpha=7, task_type=task, **options)
    model = peft.get_peft_model(tiny(family), config, autocast_adapter_dtype=False)
    return randomize(model).eval()


def load_in_peft(model: nn.Module, directory: Path):
    """PeftModel.from_pretrained, in which a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(model, directory, autocast_adapter_dtype=False).eval()


def kinds(model: nn.Module) -> list[tuple[str, type]]:
    return [(path, type(layer)) for path, layer in adapter_layers(model)]


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


# ===== both directions =====


@EACH
def test_peft_reads_what_we_write(tmp_path, tiny, randomize, setting):
    model = ours(tiny, randomize, setting)
    phicore.save_adapter(model, tmp_path)
    other = load_in_peft(tiny(SETTINGS[setting][0]), tmp_path)
    assert not torch.allclose(logits(model), logits(tiny(SETTINGS[setting][0])), rtol=1e-2)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-6, atol=1e-6)


@EACH
def test_we_read_what_peft_writes(tmp_path, tiny, randomize, setting):
    other = theirs(tiny, randomize, setting)
    other.save_pretrained(tmp_path, save_embedding_layers=False)
    model = phicore.load_adapter(tiny(SETTINGS[setting][0]), tmp_path)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-6, atol=1e-6)
    # PEFT makes two parameters of a tied pair, over one storage
    trained, exact = ({p.data_ptr(): p.numel() for p in m.parameters() if p.requires_grad} for m in (model, other))
    assert sum(trained.values()) == sum(exact.values())

    # and into a model that has this adapter already, whatever its values
    model = ours(tiny, randomize, setting)
    assert not torch.allclose(logits(model), logits(other), rtol=1e-2)
    phicore.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-6, atol=1e-6)


@EACH
def test_the_files_are_those_of_peft(tmp_path, tiny, randomize, setting):
    """The same keys, shapes and metadata, and no field of the configuration that PEFT has not."""
    theirs(tiny, randomize, setting).save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    phicore.save_adapter(ours(tiny, randomize, setting), tmp_path / "ours")
    tensors = {who: load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs")}
    assert {k: v.shape for k, v in tensors["ours"].items()} == {k: v.shape for k, v in tensors["theirs"].items()}
    config = {who: json.loads((tmp_path / who / CONFIG).read_text()) for who in ("ours", "theirs")}
    assert config["ours"].keys() <= config["theirs"].keys()
    for field in ("peft_type", "task_type", "bias", "lora_dropout", "use_dora", "use_rslora"):
        assert config["ours"][field] == config["theirs"][field]
    targets = config["ours"]["target_modules"]
    assert targets == sorted(targets)
    header = (tmp_path / "ours" / WEIGHTS).read_bytes()
    assert b'"__metadata__":{"format":"pt"}' in header[: 8 + int.from_bytes(header[:8], "little")]


@EACH
def test_round_trip(tmp_path, tiny, randomize, setting):
    model = ours(tiny, randomize, setting, dropout=0.1)
    phicore.save_adapter(model, tmp_path)
    fresh = phicore.load_adapter(tiny(SETTINGS[setting][0]), tmp_path)
    assert torch.equal(logits(fresh.eval()), logits(model.eval()))
    assert kinds(fresh) == kinds(model)
    for (_, a), (_, b) in zip(adapter_layers(fresh), adapter_layers(model), strict=True):
        if hasattr(a, "rank"):
            assert (a.rank, a.alpha, a.scaling, a.dropout) == (b.rank, b.alpha, b.scaling, b.dropout)
    phicore.save_adapter(fresh, tmp_path / "again")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("dora", [False, True])
def test_over_nf4(tmp_path, tiny, randomize, dora):
    def base() -> nn.Module:
        return phicore.quantize_(tiny("llama", dtype=torch.float32)).double()

    model = randomize(phicore.attach(base(), phicore.LoRAConfig(rank=4, alpha=7, dora=dora)))
    phicore.save_adapter(model, tmp_path)
    fresh = phicore.load_adapter(base(), tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    # in PEFT, over the dense model with the decoded weights
    dense = tiny("llama")
    with torch.no_grad():
        for path, layer in adapter_layers(model):
            dense.get_submodule(path).weight.copy_(layer.base.nf4.dequantize())
    torch.testing.assert_close(logits(load_in_peft(dense, tmp_path)), logits(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_over_nf4_in_peft_and_bitsandbytes(tmp_path, tiny, randomize, dora):
    """The same NF4 base as bitsandbytes' Linear4bit under PEFT, the adapter going both ways.

    Layer widths are multiples of 64, and PEFT's layers are in train mode: beyond that bitsandbytes' CPU code is not
    exact.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    base = phicore.quantize_(tiny("llama", dtype=torch.float32, **sizes))
    (tmp_path / "base").mkdir()
    save_quantized(base, tmp_path / "base")

    def bitsandbytes_base() -> nn.Module:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        assert isinstance(model.model.layers[0].self_attn.q_proj, bitsandbytes.nn.Linear4bit)
        return model.train()

    close = {"rtol": 1e-4, "atol": 1e-4}
    model = randomize(phicore.attach(base, phicore.LoRAConfig(rank=4, alpha=7, dora=dora)))
    phicore.save_adapter(model, tmp_path / "ours")
    other = load_in_peft(bitsandbytes_base(), tmp_path / "ours").train()
    torch.testing.assert_close(logits(other), logits(model), **close)

    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    other = randomize(peft.get_peft_model(bitsandbytes_base(), config, autocast_adapter_dtype=False), seed=4)
    other.save_pretrained(tmp_path / "theirs")
    assert not torch.allclose(logits(model), logits(other), rtol=1e-2)
    phicore.load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(other), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("explicit", [False, True])
def test_dtype_on_disk_is_that_in_memory(tmp_path, toy, randomize, dtype, explicit):
    model = toy(dtype=torch.float32 if explicit else dtype)
    config = phicore.LoRAConfig(rank=2, dora=True, adapter_dtype=dtype if explicit else None)
    randomize(phicore.attach(model, config))
    phicore.save_adapter(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert {t.dtype for t in stored.values()} == {dtype}
    # loading keeps it, whatever the base's dtype
    other = phicore.load_adapter(toy(dtype=torch.float32), tmp_path)
    assert {p.dtype for p in other.parameters() if p.requires_grad} == {dtype}
    for path, layer in adapter_layers(other):
        assert torch.equal(layer.lora_B, stored[f"{PREFIX}{path}.lora_B.weight"])


def test_two_processes_write_the_same_bytes(tmp_path):
    code = """
import sys, torch, phicore
from torch import nn
torch.manual_seed(0)
names = ["query", "key", "value", "dense", "up", "down"]
model = nn.ModuleDict({str(i): nn.ModuleDict({n: nn.Linear(4, 4) for n in names}) for i in range(2)})
config = phicore.LoRAConfig(rank=2, target_modules=names[:5], dora=True, rank_pattern={"query": 1, "key": 3},
                            alpha_pattern={"up": 3, "0.dense": 2.5}, modules_to_save=["1.down", "0.down"])
phicore.save_adapter(phicore.attach(model, config), sys.argv[1])
"""
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], env=env, check=True)
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == [CONFIG, WEIGHTS]


def test_saving_again_replaces_both_files_and_leaves_others(tmp_path, toy, randomize):
    model = phicore.attach(toy(), phicore.LoRAConfig(rank=2))
    phicore.save_adapter(model, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    first = (tmp_path / WEIGHTS).read_bytes()
    phicore.save_adapter(randomize(model), tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]


# ===== adapters by name, shared and odd modules =====


@pytest.mark.parametrize("dora", [False, True])
def test_each_of_two_adapters_is_saved_and_loaded_alone(tmp_path, toy, randomize, dora):
    def stacked(seed: int) -> nn.Module:
        model = randomize(phicore.attach(toy(), phicore.LoRAConfig(rank=3, alpha=7), "first"), seed=seed)
        config = phicore.LoRAConfig(rank=2, alpha=5, target_modules=["up_proj"], dora=dora)
        return randomize(phicore.attach(model, config, "second"), seed=seed + 1)

    model, x = stacked(1), torch.randn(4, 10, dtype=torch.float64)
    for name in ("first", "second"):
        phicore.save_adapter(model, tmp_path / name, name)
    with pytest.raises(ValueError, match=r"no adapter named \"third\" .* has the adapters \['first', 'second'\]"):
        phicore.save_adapter(model, tmp_path / "third", "third")

    other = phicore.load_adapter(toy(), tmp_path / "first", "first")
    phicore.load_adapter(other, tmp_path / "second", "second")
    torch.testing.assert_close(other(x), model(x))

    # in place, the inner one last: a DoRA layer over it must see that its base changed
    other = stacked(11)
    phicore.load_adapter(other, tmp_path / "second", "second")
    phicore.load_adapter(other, tmp_path / "first", "first")
    torch.testing.assert_close(other(x), model(x))


def test_shared_layers_round_trip(tmp_path, toy, randomize):
    def build() -> nn.Module:
        model = toy(shared=True)
        model.again = nn.ModuleDict({"up_proj": model.blocks[0].up_proj})
        return model

    x = torch.randn(4, 10, dtype=torch.float64)
    for targets in ("all-linear", ["up_proj", "head"]):
        config = phicore.LoRAConfig(rank=2, target_modules=targets, modules_to_save=["norm"])
        model = randomize(phicore.attach(build(), config))
        phicore.save_adapter(model, tmp_path)
        other = phicore.load_adapter(build(), tmp_path)
        assert torch.equal(other(x), model(x))
        assert other.again["up_proj"] is other.blocks[0].up_proj


def test_a_module_saved_whole_may_hold_integers(tmp_path, toy, randomize):
    def build() -> nn.Module:
        model = toy()
        model.norm = nn.BatchNorm1d(20, dtype=torch.float64)
        return model

    x = torch.randn(4, 10, dtype=torch.float64)
    model = randomize(phicore.attach(build(), phicore.LoRAConfig(rank=2, modules_to_save=["norm"])))
    model(x)
    phicore.save_adapter(model, tmp_path)
    other = phicore.load_adapter(build(), tmp_path)
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert other.norm.trained.num_batches_tracked == 1


def test_names_with_regex_signs(tmp_path, randomize):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict(
            {"a+b": nn.Linear(3, 3), "a": nn.ModuleDict({"c(d": nn.Linear(3, 3), "e": nn.Linear(3, 3)})}
        )

    config = phicore.LoRAConfig(rank=2, rank_pattern={r"a\+b": 1}, alpha_pattern={r"c\(d": 3})
    model = randomize(phicore.attach(build(), config))
    phicore.save_adapter(model, tmp_path)
    other = phicore.load_adapter(build(), tmp_path)
    assert {p: (layer.rank, layer.alpha) for p, layer in adapter_layers(other)} == {
        "a+b": (1, 32), "a.c(d": (2, 3), "a.e": (2, 32)
    }  # fmt: skip


def test_all_biases_beside_a_head_trained_whole(tmp_path, tiny, randomize):
    """PEFT's file holds the head's bias three times over, of which one is the base's."""
    options = {"target_modules": ["query", "output.dense"], "bias": "all", "modules_to_save": ["classifier"]}
    config = peft.LoraConfig(r=4, lora_alpha=7, task_type="SEQ_CLS", **options)
    other = randomize(peft.get_peft_model(tiny("bert"), config, autocast_adapter_dtype=False)).eval()
    other.save_pretrained(tmp_path / "theirs")
    assert len([k for k in load_file(tmp_path / "theirs" / WEIGHTS) if "classifier" in k]) == 4
    model = phicore.load_adapter(tiny("bert"), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-6, atol=1e-6)

    randomize(model, seed=5)
    phicore.save_adapter(model, tmp_path / "ours")
    assert {k for k in load_file(tmp_path / "ours" / WEIGHTS) if "classifier" in k} == {
        f"{PREFIX}classifier.weight",
        f"{PREFIX}classifier.bias",
    }
    other = load_in_peft(tiny("bert"), tmp_path / "ours")
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-6, atol=1e-6)
    with phicore.disabled(model):
        assert torch.equal(logits(model), logits(tiny("bert")))


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ([3, 7], r"trainable_token_indices: \{'model.embed_tokens': \[3, 7\]\} in the file, .* \[7, 3\]\} here"),
        ({"lm_head": [7, 3]}, r"trainable_token_indices: \{'lm_head': \[7, 3\]\} in the file"),
        (None, r"trainable_token_indices: \{\} in the file, .* \[7, 3\]\} here"),
    ],
)
def test_other_tokens_are_not_loaded_into_an_adapter(tmp_path, tiny, randomize, unchanged, there, message):
    config = phicore.LoRAConfig(rank=4, target_modules=LLAMA, trainable_token_indices=[7, 3])
    model = randomize(phicore.attach(tiny("llama"), config))
    phicore.save_adapter(model, tmp_path)
    edit(tmp_path, trainable_token_indices=there)
    with unchanged(model), pytest.raises(ValueError, match=message):
        phicore.load_adapter(model, tmp_path)


def test_dtypes_of_a_file_whose_biases_are_in_the_base_s(tmp_path, tiny, randomize):
    """PEFT trains A and B in float32 over a bfloat16 base, and biases in bfloat16."""
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True)
    other = randomize(peft.get_peft_model(tiny("gpt2", dtype=torch.bfloat16), config))
    other.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert {t.dtype for t in stored.values()} == {torch.float32, torch.bfloat16}
    model = phicore.load_adapter(tiny("gpt2", dtype=torch.bfloat16), tmp_path)
    for path, layer in adapter_layers(model):
        assert torch.equal(layer.lora_B, stored[f"{PREFIX}{path}.lora_B.weight"])
        assert torch.equal(layer.bias, stored[f"{PREFIX}{path}.base_layer.bias"])
        assert layer.lora_A.dtype == torch.float32


def test_a_table_that_peft_saved_beside_its_adapter(tmp_path, tiny, randomize, unchanged):
    """PEFT adds an adapted embedding's own table to the file: it is passed over if it is the model's, or named."""
    other = theirs(tiny, randomize, "embedding")
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        other.save_pretrained(tmp_path)
    key = f"{PREFIX}model.embed_tokens.base_layer.weight"
    assert key in load_file(tmp_path / WEIGHTS)
    model = phicore.load_adapter(tiny("llama"), tmp_path)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-6, atol=1e-6)

    phicore.load_adapter(model, tmp_path)  # into the attached adapter, too
    edit_tensors(tmp_path, lambda tensors: {**tensors, key: tensors[key] + 1})
    for spared in (tiny("llama"), model):
        with unchanged(spared), pytest.raises(ValueError, match=r"embed_tokens\.base_layer\.weight .*another table"):
            phicore.load_adapter(spared, tmp_path)


def test_a_tied_pair_of_peft_with_its_tables(tmp_path, tiny, randomize, unchanged):
    other = theirs(tiny, randomize, "tied")
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        other.save_pretrained(tmp_path)
    assert f"{PREFIX}lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    model = phicore.load_adapter(tiny("tied llama"), tmp_path)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-6, atol=1e-6)
    assert model.lm_head.embedding_A is model.model.embed_tokens.lora_A

    edit_tensors(tmp_path, lambda tensors: {k: t + (k.endswith("lm_head.lora_B.weight")) for k, t in tensors.items()})
    for spared in (tiny("tied llama"), model):
        with (
            unchanged(spared),
            pytest.raises(ValueError, match=r"one pair for model\.embed_tokens and lm_head,"),
        ):
            phicore.load_adapter(spared, tmp_path)
    edit(tmp_path, ensure_weight_tying=False, target_modules=["embed_tokens", "lm_head", "q_proj"])
    assert type(phicore.load_adapter(tiny("tied llama"), tmp_path).lm_head) is phicore.LoRALinear


# ===== files that are not right =====


@pytest.fixture(scope="module")
def saved(tmp_path_factory, toy, randomize) -> Path:
    """A DoRA adapter of a Toy with a head trained whole."""
    directory = tmp_path_factory.mktemp("saved")
    config = phicore.LoRAConfig(rank=3, alpha=7, dora=True, modules_to_save=["head"])
    phicore.save_adapter(randomize(phicore.attach(toy(), config)), directory)
    return directory


@pytest.fixture
def spoiled(saved, tmp_path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def edit(directory: Path, **fields) -> None:
    config = json.loads((directory / CONFIG).read_text()) | fields
    (directory / CONFIG).write_text(json.dumps(config))


def edit_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / WEIGHTS)
    save_file(change(tensors) or tensors, directory / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture(params=["fresh", "attached"])
def refused(request, toy, unchanged):
    """Loads into a model, with or without the adapter, and expects an error that leaves it unchanged."""

    def check(directory: Path, message: str, error: type[Exception] = ValueError) -> None:
        model = toy(seed=4)
        if request.param == "attached":
            phicore.attach(model, phicore.LoRAConfig(rank=3, alpha=7, dora=True, modules_to_save=["head"]))
        with unchanged(model), pytest.raises(error, match=message):
            phicore.load_adapter(model, directory)

    return check


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file(spoiled, refused, name):
    (spoiled / name).unlink()
    refused(spoiled, f"holds no {name}", FileNotFoundError)
    refused(spoiled / "nowhere", f"holds no {CONFIG}", FileNotFoundError)


def test_a_truncated_file(spoiled, refused):
    data = (spoiled / WEIGHTS).read_bytes()
    (spoiled / WEIGHTS).write_bytes(data[:-1])
    refused(spoiled, "is not a whole safetensors file")


def test_a_pickled_adapter_is_not_read_and_it_is_said_what_to_do(spoiled, refused):
    (spoiled / WEIGHTS).rename(spoiled / "adapter_model.bin")
    refused(spoiled, f"holds no {WEIGHTS}; weights saved by pickle.*save_pretrained writes safe", FileNotFoundError)


def test_a_spoilt_tensor_is_named(spoiled, refused):
    data = (spoiled / WEIGHTS).read_bytes()
    (spoiled / WEIGHTS).write_bytes(data.replace(b'"shape":[3,10]', b'"shape":[3,11]', 1))
    refused(spoiled, rf"{WEIGHTS} is not a whole .*: tensor {PREFIX}embed\.lora_A\.weight has 240 bytes, but F64")


@pytest.mark.parametrize("text", ['{"peft_type": "LORA", "peft_type": "LORA"}', "[" * 100_000, '{"r": 1' + "0" * 5000])
def test_a_configuration_that_misuses_json(spoiled, refused, text):
    (spoiled / CONFIG).write_text(text)
    refused(spoiled, f"{CONFIG}: .*(twice|too deep|integer string)")


@pytest.mark.parametrize("rank", [0, -1, 10**9, 2**70])
@pytest.mark.parametrize("field", ["r", "rank_pattern"])
def test_a_rank_that_the_tensors_do_not_have_takes_no_memory(spoiled, refused, field, rank):
    edit(spoiled, **{field: rank if field == "r" else {"embed": rank}})
    refused(spoiled, "rank|lora_A.weight: |r of embed: ")


@given(data=st.data())
def test_cut_or_corrupt_bytes_give_an_error_or_the_tensors(saved, tmp_path_factory, toy, unchanged, data):
    whole = (saved / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    where = st.one_of(st.integers(0, header - 1), st.integers(0, len(whole) - 1))  # half of them in the header
    if data.draw(st.booleans()):
        spoilt = whole[: data.draw(where)]
    else:
        at, patch = data.draw(where), data.draw(st.binary(min_size=1, max_size=4))
        spoilt = (whole[:at] + patch + whole[at + len(patch) :])[: len(whole)]
    directory = tmp_path_factory.mktemp("spoilt")
    shutil.copy(saved / CONFIG, directory)
    (directory / WEIGHTS).write_bytes(spoilt)
    model = toy(seed=4)
    try:
        with unchanged(model):
            try:
                phicore.load_adapter(model, directory)
            except ValueError:
                return
            raise StopIteration
    except StopIteration:  # it was loaded: then by the right keys and shapes
        stored = load_file(directory / WEIGHTS)
        assert stored.keys() == load_file(saved / WEIGHTS).keys()
        for path, layer in adapter_layers(model):
            if hasattr(layer, "lora_A"):
                expected = stored[f"{PREFIX}{path}.lora_A.weight"]
                assert torch.equal(layer.lora_A.to(expected.dtype), expected) or expected.isnan().any()


@given(data=st.data())
def test_a_spoilt_configuration_gives_an_error_or_an_adapter(saved, tmp_path_factory, toy, unchanged, data):
    """A value of a wrong type, or bytes that are not JSON: a ValueError, never another exception."""
    directory = tmp_path_factory.mktemp("spoilt")
    shutil.copy(saved / WEIGHTS, directory)
    config = json.loads((saved / CONFIG).read_text())
    if data.draw(st.integers(0, 3)):
        scalars = st.one_of(
            st.none(), st.booleans(), st.integers(-3, 20), st.floats(allow_nan=True), st.text(max_size=4)
        )
        values = st.one_of(
            scalars, st.lists(scalars, max_size=2), st.dictionaries(st.text(max_size=3), scalars, max_size=2)
        )
        config[data.draw(st.sampled_from(sorted({*config, "exclude_modules"})))] = data.draw(values)
        text = json.dumps(config).encode()
    else:
        text = json.dumps(config).encode()
        at = data.draw(st.integers(0, len(text) - 1))
        text = text[:at] + data.draw(st.binary(max_size=2)) + text[at + 1 :]
    (directory / CONFIG).write_bytes(text)
    model = toy(seed=4)
    try:
        with unchanged(model):
            try:
                phicore.load_adapter(model, directory)
            except ValueError:
                return
            raise StopIteration
    except StopIteration:
        assert list(adapter_layers(model))


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", '"LORA"', "{}", '{"peft_type": "LOHA"}', '{"peft_type": null}']
)
def test_not_a_lora_configuration(spoiled, refused, text):
    (spoiled / CONFIG).write_text(text)
    refused(spoiled, 'is not (a )?JSON|peft_type must be "LORA"')


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_bias": True}, "does not support: lora_bias=True"),
        ({"layer_replication": [[0, 1]]}, "does not support: layer_replication"),
        ({"use_qalora": True, "lora_bias": True}, "does not support: lora_bias=True, use_qalora=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base's weights too"),
        ({"init_lora_weights": "olora_niter"}, "init_lora_weights='olora_niter' changed the base's weights too"),
        ({"a_setting_of_tomorrow": "x"}, "does not support: a_setting_of_tomorrow='x'"),
    ],
)
def test_settings_that_are_not_supported_are_named(spoiled, refused, fields, message):
    edit(spoiled, **fields)
    refused(spoiled, message)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", "3"),
        ("r", 3.0),
        ("r", True),
        ("lora_alpha", "7"),
        ("lora_alpha", [7]),
        ("lora_alpha", 10**400),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("r", 2**70),
        ("rank_pattern", {"embed": 2**70}),
        ("lora_dropout", "0"),
        ("target_modules", 5),
        ("target_modules", [1]),
        ("target_modules", "*proj"),  # no regular expression
        ("exclude_modules", True),
        ("exclude_modules", {"embed": 1}),
        ("modules_to_save", "head"),
        ("bias", "some"),
        ("bias", ["all"]),
        ("trainable_token_indices", [1.5]),
        ("trainable_token_indices", {"embed": 3}),
        ("rank_pattern", True),
        ("rank_pattern", ["embed"]),
        ("rank_pattern", {"embed": "3"}),
        ("rank_pattern", {"*": 3}),
        ("rank_pattern", {"(?i)embed": 3}),  # none behind a prefix
        ("layers_to_transform", "1"),
        ("layers_to_transform", [0.5]),
        ("layers_pattern", ["*"]),
        ("alpha_pattern", {"embed": None}),
    ],
)
def test_values_of_a_wrong_type_are_named(spoiled, refused, field, value):
    edit(spoiled, **{field: value})
    refused(spoiled, f"values of a wrong type or size: {field}=")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", "(a+)+b"),
        ("exclude_modules", ".*.*.*.*.*.*x"),
        ("rank_pattern", {"(.|.)*x": 3}),
        ("alpha_pattern", {"x": 3, "(a|a)*x": 3}),
        ("layers_pattern", ["blocks", "(a*)*"]),
    ],
)
def test_patterns_that_could_take_for_ever_are_named(spoiled, refused, field, value):
    edit(spoiled, **{field: value})
    refused(spoiled, rf"{CONFIG}: {field}: the pattern .* might take very long to match")


def test_many_patterns_that_take_long_together_are_refused(spoiled, refused):
    edit(spoiled, alpha_pattern={f".*.*.*x{i}": 3 for i in range(100)})
    refused(spoiled, "its 100 patterns might take very long to match")


def test_a_pattern_of_layers_that_the_model_has_not_is_passed_over(spoiled, toy):
    """PEFT writes patterns as they were given, of whatever layers."""
    edit(spoiled, rank_pattern={"q_proj": 5, "em?bed": 3}, alpha_pattern={"vision.*": 2, "embed": 9})
    layers = dict(adapter_layers(phicore.load_adapter(toy(), spoiled)))
    assert {path: layer.alpha for path, layer in layers.items() if hasattr(layer, "alpha")}["embed"] == 9


def test_settings_that_say_nothing_are_passed_over(spoiled, toy):
    edit(spoiled, peft_version="99", megatron_core="megatron.core", init_lora_weights="eva", inference_mode=False)
    edit(
        spoiled,
        lora_bias=False,
        ensure_weight_tying=True,
        trainable_token_indices=None,
        layers_to_transform=[],
        a_setting_of_tomorrow=None,
    )
    phicore.load_adapter(toy(), spoiled)


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace(PREFIX, "model."): tensor for key, tensor in tensors.items()}


def test_a_wrong_prefix(spoiled, refused):
    edit_tensors(spoiled, renamed)
    refused(spoiled, "unexpected keys: model.blocks.0|missing keys: base_model.model.")


def test_keys_that_fit_no_layer_say_what_is_expected(spoiled, toy, unchanged):
    edit_tensors(spoiled, renamed)
    edit(spoiled, target_modules=["query"])
    model = toy()
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"no key of the adapter names a layer of Toy.*model\.blocks"),
    ):
        phicore.load_adapter(model, spoiled)


def test_missing_unexpected_and_misshapen_keys_are_all_listed(spoiled, refused):
    up, head = f"{PREFIX}blocks.0.up_proj", f"{PREFIX}head"

    def change(tensors):
        del tensors[f"{up}.lora_A.weight"], tensors[f"{head}.bias"]
        tensors[f"{up}.lora_C.weight"] = torch.zeros(3)
        tensors[f"{up}.lora_B.weight"] = torch.zeros(33, 4, dtype=torch.float64)
        tensors[f"{PREFIX}embed.lora_magnitude_vector"] = torch.zeros(20, dtype=torch.int64)

    edit_tensors(spoiled, change)
    refused(spoiled, "which is unchanged: missing keys: [^;]*blocks.0.up_proj.lora_A.weight[^;]*head.bias")
    refused(spoiled, "unexpected keys: [^;]*blocks.0.up_proj.lora_C.weight")
    refused(spoiled, r"blocks.0.up_proj.lora_B.weight: \[33, 4\] in the file, \[33, 3\] in the model")
    refused(spoiled, r"dtypes that do not fit: [^;]*embed.lora_magnitude_vector: torch.int64 in the file")


def test_many_missing_keys_are_counted(spoiled, refused):
    edit_tensors(spoiled, lambda tensors: {k: v for k, v in tensors.items() if k.startswith(f"{PREFIX}embed")})
    refused(spoiled, r"missing keys: .* and \d+ more")


def test_layers_that_the_file_names_and_does_not_hold(spoiled, refused):
    """target_modules says down_proj, and there is no tensor for one of them: not the base weights in silence."""
    edit_tensors(spoiled, lambda t: {k: v for k, v in t.items() if "blocks.1.down_proj" not in k})
    refused(spoiled, "missing keys: .*blocks.1.down_proj.lora_A.weight")


def test_a_model_of_other_sizes(saved, toy, unchanged):
    model = toy(hidden=34)
    with unchanged(model), pytest.raises(ValueError, match=r"up_proj.lora_B.weight: \[33, 3\] in the file, \[34, 3\]"):
        phicore.load_adapter(model, saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2}, "r of embed: 3 in the file, 2 here"),
        ({"alpha": 8}, "lora_alpha of embed: 7 in the file, 8 here"),
        ({"rslora": True}, "use_rslora of embed: False in the file, True here"),
        ({"dora": False}, "use_dora of embed: True in the file, False here"),
        ({"alpha_pattern": {"0.up_proj": 5}}, "differ: lora_alpha of blocks.0.up_proj: 7 in the file, 5 here$"),
        ({"rank_pattern": {"down_proj": 5}}, "differ: r of blocks.0.down_proj: 3 in the file, 5 here$"),
        ({"modules_to_save": []}, "unexpected keys: .*head.weight"),
        ({"target_modules": ["up_proj"]}, "unexpected keys: .*down_proj"),
    ],
)
def test_an_attached_adapter_that_differs_from_the_file(saved, toy, unchanged, options, message):
    config = phicore.LoRAConfig(**{"rank": 3, "alpha": 7, "dora": True, "modules_to_save": ["head"], **options})
    model = phicore.attach(toy(), config)
    with unchanged(model), pytest.raises(ValueError, match=message):
        phicore.load_adapter(model, saved)


def test_merged_models_neither_save_nor_load(tmp_path, saved, toy, unchanged):
    model = phicore.load_adapter(toy(), saved)
    phicore.merge(model)
    with unchanged(model):
        with pytest.raises(ValueError, match="are merged; unmerge it before loading"):
            phicore.load_adapter(model, saved)
        with pytest.raises(ValueError, match="is merged; unmerge it first"):
            phicore.save_adapter(model, tmp_path / "merged")
        with pytest.raises(ValueError, match='no adapter named "default"'):
            phicore.save_adapter(toy(), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# ===== adapters for parts of fused layers =====

PARTS = ["q_proj", "v_proj", "gate_proj", "o_proj"]
SPLIT = {
    "plain": {},
    "dora": {"dora": True},
    "patterns": {"rslora": True, "rank_pattern": {"1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
}


def split_adapter(tiny, randomize, **options) -> nn.Module:
    config = phicore.LoRAConfig(**{"rank": 4, "alpha": 7, "target_modules": PARTS, "fused_targets": "split", **options})
    return randomize(phicore.attach(tiny("phi3"), config))


@pytest.mark.parametrize("options", SPLIT.values(), ids=SPLIT)
def test_parts_of_fused_layers(tmp_path, tiny, randomize, options):
    """PEFT reads them as a plain adapter; we as what they are; the same bytes come out again."""
    model = split_adapter(tiny, randomize, **options)
    phicore.save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(load_in_peft(tiny("phi3"), tmp_path)), logits(model), rtol=1e-6, atol=1e-6)
    stored = load_file(tmp_path / WEIGHTS)
    assert stored[f"{PREFIX}model.layers.0.self_attn.qkv_proj.lora_A.weight"].shape == (8, 32)  # q and v, of rank 4

    fresh = phicore.load_adapter(tiny("phi3"), tmp_path)
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-12, atol=1e-12)
    assert kinds(fresh) == kinds(model)
    assert [(n, p.shape) for n, p in fresh.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    phicore.save_adapter(fresh, tmp_path / "again")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()

    other = randomize(split_adapter(tiny, randomize, **options), seed=9)
    phicore.load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-12, atol=1e-12)


def test_parts_whose_metadata_is_lost_are_a_plain_adapter(tmp_path, tiny, randomize):
    model = split_adapter(tiny, randomize, dora=True)
    phicore.save_adapter(model, tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors)  # writes the metadata {"format": "pt"} alone
    fresh = phicore.load_adapter(tiny("phi3"), tmp_path)
    torch.testing.assert_close(logits(fresh), logits(model))
    assert {type(layer) for _, layer in adapter_layers(fresh)} == {phicore.DoRALinear}
    phicore.load_adapter(split_adapter(tiny, randomize, dora=True), tmp_path)  # which is split, and the file's can be


def test_a_plain_adapter_does_not_load_into_parts(tmp_path, tiny, randomize, unchanged):
    plain = phicore.LoRAConfig(rank=8, alpha=14, target_modules=["qkv_proj"])
    phicore.save_adapter(randomize(phicore.attach(tiny("phi3"), plain)), tmp_path)
    model = split_adapter(tiny, randomize, target_modules=["q_proj", "v_proj"])
    with unchanged(model), pytest.raises(ValueError, match=r"qkv_proj: the adapter mixes the parts .*cannot be split"):
        phicore.load_adapter(model, tmp_path)


def test_parts_that_differ_from_the_files_are_named(tmp_path, tiny, randomize, unchanged):
    ranks = {"self_attn.q_proj": 2, "self_attn.v_proj": 6}
    phicore.save_adapter(split_adapter(tiny, randomize, target_modules=["q_proj", "v_proj"]), tmp_path)
    model = split_adapter(
        tiny, randomize, target_modules=["q_proj", "v_proj"], rank_pattern=ranks, alpha_pattern={"q_proj": 3.5}
    )
    with unchanged(model), pytest.raises(ValueError, match=r"parts of .*qkv_proj: .*'q_proj': \(4, 7\).* in the file"):
        phicore.load_adapter(model, tmp_path)


def test_parts_put_there_by_hand_are_saved_as_a_plain_adapter(tmp_path, randomize):
    def build() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))

    model = build()
    model[0] = phicore.adapters.FusedLoRALinear(model[0], {"a": 5, "b": 3}, rank={"a": 2, "b": 1}, alpha=3)
    randomize(model.requires_grad_(False)[0].parts.requires_grad_(True))
    phicore.save_adapter(model, tmp_path)
    x = torch.randn(4, 6)
    torch.testing.assert_close(phicore.load_adapter(build(), tmp_path)(x), model(x))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"x": 1}', '{"a.qkv_proj": {"x": [1, 2]}}', '{"a.qkv_proj": {"q_proj": 4}}']
)
def test_metadata_that_is_not_right(spoiled, refused, text):
    data = (spoiled / WEIGHTS).read_bytes()
    (spoiled / WEIGHTS).write_bytes(with_metadata(data, "phicore.parts", text))
    refused(spoiled, r"its metadata phicore\.parts")


# ===== parameters =====

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
STACKS = {
    "both": EXPERTS,
    "one": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    "rslora and patterns": {**EXPERTS, "rank_pattern": {"1.mlp.experts.down_proj": 2}, "rslora": True},
    "some blocks": {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.gate_up_proj"]},
    "one of one": {"target_modules": ["o_proj"], "target_parameters": ["experts.down_proj", "0.mlp.gate.weight"]},
}


@pytest.fixture(params=["mixtral", "gpt-oss"])
def mixture(request, tiny):
    """Builds a mixture of experts: its weights lie as [experts, out, in], or as [experts, in, out] in GPT-OSS."""
    return lambda: tiny(request.param)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # PEFT's mistake: it heeds them
@pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)
def test_parameters(tmp_path, mixture, randomize, options):
    if any("gate.weight" in name for name in options["target_parameters"]) and not hasattr(
        mixture().model.layers[0].mlp, "gate"
    ):
        options = {**options, "target_parameters": ["experts.down_proj", "0.mlp.router.weight"]}
    base = logits(mixture())
    model = randomize(phicore.attach(mixture(), phicore.LoRAConfig(rank=4, alpha=7, **options)))
    assert not torch.allclose(logits(model), base, rtol=1e-2)
    phicore.save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(logits(load_in_peft(mixture(), tmp_path / "ours")), logits(model))
    fresh = phicore.load_adapter(mixture(), tmp_path / "ours")
    assert torch.equal(logits(fresh), logits(model))
    phicore.save_adapter(fresh, tmp_path / "again")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()

    theirs = {**options, "use_rslora": options.get("rslora", False)}
    theirs.pop("rslora", None)
    config = peft.LoraConfig(r=4, lora_alpha=7, task_type="CAUSAL_LM", **theirs)
    other = randomize(peft.get_peft_model(mixture(), config, autocast_adapter_dtype=False).eval(), seed=5)
    other.save_pretrained(tmp_path / "theirs")
    stored, read = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert {key: t.shape for key, t in stored.items()} == {key: t.shape for key, t in read.items()}
    torch.testing.assert_close(logits(phicore.load_adapter(mixture(), tmp_path / "theirs")), logits(other))
    torch.testing.assert_close(logits(phicore.load_adapter(model, tmp_path / "theirs")), logits(other))


def test_parameters_that_differ_from_the_files_are_named(tmp_path, mixture, unchanged):
    def attached(**options) -> nn.Module:
        return phicore.attach(mixture(), phicore.LoRAConfig(**{"rank": 4, "alpha": 7, **EXPERTS, **options}))

    phicore.save_adapter(attached(), tmp_path)
    for options, message in (
        ({"alpha": 8}, "lora_alpha of .*: 7 in the file, 8 here"),
        ({"rank_pattern": {"experts.down_proj": 3}}, r"r of .*\.down_proj: 4 in the file, 3 here"),
        ({"target_parameters": ["experts.down_proj"]}, "unexpected keys: .*experts.base_layer.lora_A.weight"),
    ):
        model = attached(**options)
        with unchanged(model), pytest.raises(ValueError, match=message):
            phicore.load_adapter(model, tmp_path)
    edit_tensors(tmp_path, lambda t: {k: v for k, v in t.items() if "1.mlp.experts.lora_B" not in k})
    model = mixture()
    with unchanged(model), pytest.raises(ValueError, match=r"missing keys: .*1\.mlp\.experts\.lora_B\.weight"):
        phicore.load_adapter(model, tmp_path)


def test_modules_to_save_that_end_in_an_entry_as_peft_takes_it(tmp_path, randomize, tiny):
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj"], modules_to_save=["norm"])
    other = randomize(peft.get_peft_model(tiny("llama").double(), config, autocast_adapter_dtype=False).eval())
    other.save_pretrained(tmp_path / "theirs")
    model = phicore.load_adapter(tiny("llama").double(), tmp_path / "theirs")
    assert isinstance(model.model.layers[1].input_layernorm, TrainedCopy)
    torch.testing.assert_close(logits(model), logits(other))
    phicore.save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(logits(load_in_peft(tiny("llama").double(), tmp_path / "ours")), logits(other))


# ===== nn.MultiheadAttention =====


class Attending(nn.Module):
    """Token ids [B, T] -> .logits [B, T, 7]."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.head = nn.Linear(8, 7)

    def forward(self, input_ids: Tensor):
        x = self.embed(input_ids)
        widths = self.attention.kdim, self.attention.vdim
        return SimpleNamespace(logits=self.head(self.attention(x, *(x[..., :width] for width in widths))[0]))


def attending(**options) -> nn.Module:
    torch.manual_seed(3)
    return Attending(**options).double().eval()


ATTENTIONS = {
    "plain": {},
    "rslora": {"rslora": True},
    "pattern": {"rank_pattern": {"attention": 2}, "alpha_pattern": {"attention": 3}},
    "parts": {"fused_targets": "split"},
    "parts of two ranks": {"fused_targets": "split", "rslora": True, "rank_pattern": {"attention.k_proj": 3}},
    "two ranks": {"rank_pattern": {"out_proj": 2}, "alpha_pattern": {"out_proj": 3.5}},
    "larger out_proj": {"rank_pattern": {"out_proj": 6}, "alpha_pattern": {"out_proj": 10.5}},
}


@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention(tmp_path, randomize, options):
    config = phicore.LoRAConfig(rank=4, alpha=7, target_modules=["attention", "head"], **options)
    model = randomize(phicore.attach(attending(), config))
    phicore.save_adapter(model, tmp_path / "ours")
    other = load_in_peft(attending(), tmp_path / "ours")
    assert not torch.allclose(logits(model), logits(attending()), rtol=1e-2)
    torch.testing.assert_close(logits(other), logits(model))
    fresh = phicore.load_adapter(attending(), tmp_path / "ours")
    torch.testing.assert_close(logits(fresh), logits(model))
    assert kinds(fresh) == kinds(model)
    assert [(n, p.shape) for n, p in fresh.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    phicore.save_adapter(fresh, tmp_path / "again")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    again = randomize(phicore.attach(attending(), config), seed=8)
    torch.testing.assert_close(logits(phicore.load_adapter(again, tmp_path / "ours")), logits(model))


def test_attention_that_peft_wrote(tmp_path, randomize):
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["attention", "head"], rank_pattern={"attention": 2})
    other = randomize(peft.get_peft_model(attending(), config, autocast_adapter_dtype=False).eval())
    other.save_pretrained(tmp_path / "theirs")
    model = phicore.load_adapter(attending(), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(other))
    phicore.save_adapter(model, tmp_path / "ours")
    stored, read = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert stored.keys() == read.keys()
    assert all(torch.equal(tensor, read[key]) for key, tensor in stored.items())


@pytest.mark.filterwarnings('ignore:bias="lora_only" leaves attention.in_proj.bias frozen, as PEFT does')
@pytest.mark.parametrize("targets", [["attention", "head"], ["attention"]])
def test_biases_of_an_attention_and_other_layers(tmp_path, randomize, targets):
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=targets, bias="lora_only")
    other = randomize(peft.get_peft_model(attending(), config, autocast_adapter_dtype=False).eval())
    other.save_pretrained(tmp_path / "theirs")
    model = phicore.load_adapter(attending(), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(other))
    phicore.save_adapter(model, tmp_path / "ours")
    stored, read = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert stored.keys() == read.keys()
    assert all(torch.equal(tensor, read[key]) for key, tensor in stored.items())
    fresh = phicore.LoRAConfig(rank=4, alpha=7, target_modules=targets, bias="lora_only")
    again = randomize(phicore.attach(attending(), fresh), seed=8)
    assert any(name.startswith("attention.out_proj.trained_bias") for name, p in again.named_parameters())
    torch.testing.assert_close(logits(phicore.load_adapter(again, tmp_path / "ours")), logits(model))
    expected = logits(model)
    phicore.merge(model)
    torch.testing.assert_close(logits(model), expected)
    phicore.unmerge(model)
    torch.testing.assert_close(logits(model), expected)
    with phicore.disabled(model):
        torch.testing.assert_close(logits(model), logits(attending()))


@pytest.mark.parametrize(("options", "dora"), [({}, True), ({"kdim": 6, "vdim": 5}, False), ({"kdim": 6}, True)])
@pytest.mark.parametrize("fused_targets", ["raise", "split"])
def test_attention_that_peft_refuses(tmp_path, randomize, options, dora, fused_targets):
    config = phicore.LoRAConfig(rank=4, alpha=7, target_modules=["attention"], dora=dora, fused_targets=fused_targets)
    model = randomize(phicore.attach(attending(**options), config))
    phicore.save_adapter(model, tmp_path)
    fresh = phicore.load_adapter(attending(**options), tmp_path)
    torch.testing.assert_close(logits(fresh), logits(model))
    assert kinds(fresh) == kinds(model)
    with pytest.raises(ValueError, match=r"MultiheadAttention does not support DoRA|Only same embed for query"):
        peft.PeftModel.from_pretrained(attending(**options), tmp_path)


def test_attention_that_a_file_cannot_hold_is_named(tmp_path, randomize, unchanged):
    config = phicore.LoRAConfig(rank=4, alpha=7, target_modules=["attention"], alpha_pattern={"out_proj": 9})
    model = phicore.attach(attending(), config)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"one rank and one alpha for in_proj and out_proj of attent"),
    ):
        phicore.save_adapter(model, tmp_path / "never")
    larger = phicore.LoRAConfig(rank=4, alpha=7, target_modules=["attention"])
    phicore.save_adapter(randomize(phicore.attach(attending(), larger)), tmp_path)
    config.alpha_pattern, config.rank_pattern = {"out_proj": 3.5}, {"out_proj": 2}
    model = phicore.attach(attending(), config)
    with unchanged(model), pytest.raises(ValueError, match=r"attention\.out_proj has a higher rank than 2"):
        phicore.load_adapter(model, tmp_path)
