"""PEFT's adapter format, in both directions, against PEFT itself."""

import contextlib
import copy
import json
import warnings

import bitsandbytes
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import phicore
from phicore.adapters import adapter_layers
from phicore.adapters.trained import TrainedCopy
from phicore.formats import portable
from phicore.formats.bitsandbytes import save_quantized
from phicore.formats.peft import CONFIG, PREFIX, WEIGHTS
from tests.formats.peft_files import assert_same_files, edit, edit_tensors, kinds, load_in_peft, logits

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
    "tokens of a plain model": (
        "conv",
        {"target_modules": ["conv1"], "trainable_token_indices": [7, 3]},
        {"target_modules": ["conv1"], "trainable_token_indices": {"embed": [7, 3]}},
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
    assert_same_files(tmp_path / "again", tmp_path)


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


def test_an_adapter_beside_a_model_is_told_of(tmp_path, tiny, randomize):
    """From then on the model's directory gives the adapted model to whoever loads the base."""
    base = tiny("llama", dtype=torch.float32)
    base.save_pretrained(tmp_path)
    model = randomize(phicore.attach(copy.deepcopy(base), phicore.LoRAConfig(rank=2, target_modules=LLAMA)))
    with pytest.warns(UserWarning, match="holds a model, too, which transformers will load with this adapter"):
        phicore.save_adapter(model, tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(read), logits(model))
    assert not torch.allclose(logits(read), logits(base), atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        phicore.save_adapter(model, tmp_path / "alone")


# ===== adapters by name, shared and odd modules =====


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, lambda m: nn.DataParallel(torch.compile(m))])
def test_what_torch_wraps_a_model_in_stands_in_no_name(tmp_path, toy, randomize, wrap):
    model = randomize(phicore.attach(toy(), phicore.LoRAConfig(rank=3, alpha=7)))
    x = torch.randn(4, 10, dtype=torch.float64)
    expected = model(x)
    phicore.save_adapter(wrap(model), tmp_path)
    torch.testing.assert_close(phicore.load_adapter(toy(), tmp_path)(x), expected)
    wrapped = wrap(toy())
    assert phicore.attach(wrapped, phicore.LoRAConfig(rank=3, alpha=7)) is wrapped
    phicore.load_adapter(wrapped, tmp_path)
    phicore.save_adapter(wrapped, tmp_path / "again")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


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


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "gate_up_proj"},
        {"target_modules": r"(.*\.)?gate_up_proj", "rank_pattern": {"inner.gate_up_proj": 3, "more.gate_up_proj": 3}},
        {"target_modules": r"(.*\.)?gate_up_proj", "alpha_pattern": {"inner.gate_up_proj": 3, "more.gate_up_proj": 3}},
        {
            "target_modules": r"(.*\.)?gate_proj",
            "fused_targets": "split",
            "rank_pattern": {"inner.gate_proj": 3, "more.gate_proj": 3},
            "alpha_pattern": {"inner.gate_proj": 3, "more.gate_proj": 3},
        },
    ],
)
def test_a_layer_whose_name_is_the_end_of_another_s(tmp_path, randomize, options):
    def build() -> nn.Module:
        torch.manual_seed(0)
        parts = {name: nn.ModuleDict({"gate_up_proj": nn.Linear(4, 4)}) for name in ("inner", "more")}
        return nn.ModuleDict({"gate_up_proj": nn.Linear(4, 4), **parts})

    def products(model) -> dict[str, Tensor]:
        return {path: layer.product().detach() for path, layer in adapter_layers(model)}

    model = randomize(phicore.attach(build(), phicore.LoRAConfig(rank=2, alpha=5, **options)))
    phicore.save_adapter(model, tmp_path)
    other = phicore.load_adapter(build(), tmp_path)
    assert products(other).keys() == products(model).keys()
    assert all(torch.equal(products(other)[path], product) for path, product in products(model).items())
    phicore.save_adapter(other, tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path)
    for path, layer in load_in_peft(build(), tmp_path).base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            torch.testing.assert_close(layer.get_delta_weight("default"), products(model)[path], rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize(
    ("A", "B", "held"),
    [
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float32),
        (torch.float8_e5m2, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_a_pair_of_two_dtypes_or_of_8_bits_is_not_rounded(tmp_path, toy, randomize, A, B, held):
    phicore.save_adapter(randomize(phicore.attach(toy(), phicore.LoRAConfig(rank=2))), tmp_path)
    edit_tensors(tmp_path, lambda tensors: {key: t.to(A if ".lora_A" in key else B) for key, t in tensors.items()})
    stored = load_file(tmp_path / WEIGHTS)
    for path, layer in adapter_layers(phicore.load_adapter(toy(), tmp_path)):
        assert torch.equal(layer.lora_A, stored[f"{PREFIX}{path}.lora_A.weight"].to(held))
        assert torch.equal(layer.lora_B, stored[f"{PREFIX}{path}.lora_B.weight"].to(held))


def test_a_target_that_is_saved_whole_may_have_patterns(tmp_path, tiny, randomize):
    """PEFT trains it whole, and passes over what a pattern says of it."""
    patterns = {"rank_pattern": {"lm_head": 6}, "alpha_pattern": {"lm_head": 5}}
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"], **patterns)
    other = randomize(peft.get_peft_model(tiny("llama"), config, autocast_adapter_dtype=False)).eval()
    other.save_pretrained(tmp_path, save_embedding_layers=False)
    model = phicore.load_adapter(tiny("llama"), tmp_path)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-6, atol=1e-6)


def test_patterns_whose_order_peft_loses(tmp_path, tiny, randomize):
    """PEFT trains q_proj of layer 1 by the first key, and sorts them in the file: it reads back another adapter."""
    for pattern in ("rank_pattern", "alpha_pattern"):
        directory, order = tmp_path / pattern, {"q_proj": 2, r"1\..*": 3}
        config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=LLAMA, **{pattern: order})
        other = randomize(peft.get_peft_model(tiny("llama"), config)).eval()
        other.save_pretrained(directory)
        model = tiny("llama")
        wrong = pytest.raises(ValueError, match="do not fit") if pattern == "rank_pattern" else contextlib.nullcontext()
        said = f"several keys of {pattern} mean model.layers.1.self_attn.q_proj .*PEFT sorts them"
        with wrong, pytest.warns(UserWarning, match=said):
            phicore.load_adapter(model, directory)
        if pattern == "alpha_pattern":
            with pytest.warns(UserWarning, match=said):
                portable.check(directory, "vllm")
        edit(directory, **{pattern: order})
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = phicore.load_adapter(tiny("llama"), directory)
        torch.testing.assert_close(logits(model), logits(other), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("start", ["mica", "MiCA", "Gaussian"])
def test_starts_of_peft_that_leave_the_base(tmp_path, tiny, randomize, start):
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj"], init_lora_weights=start)
    other = peft.get_peft_model(tiny("llama", dtype=torch.float32), config, autocast_adapter_dtype=False).eval()
    randomize(other).save_pretrained(tmp_path)
    model = phicore.load_adapter(tiny("llama", dtype=torch.float32), tmp_path)
    torch.testing.assert_close(logits(model), logits(other))


def test_modules_to_save_that_end_in_an_entry_as_peft_takes_it(tmp_path, randomize, tiny):
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj"], modules_to_save=["norm"])
    other = randomize(peft.get_peft_model(tiny("llama").double(), config, autocast_adapter_dtype=False).eval())
    other.save_pretrained(tmp_path / "theirs")
    model = phicore.load_adapter(tiny("llama").double(), tmp_path / "theirs")
    assert isinstance(model.model.layers[1].input_layernorm, TrainedCopy)
    torch.testing.assert_close(logits(model), logits(other))
    phicore.save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(logits(load_in_peft(tiny("llama").double(), tmp_path / "ours")), logits(other))
