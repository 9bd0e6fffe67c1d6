"""Model directories of transformers: what is written loads to the same model, and what cannot be loaded is named."""

import copy
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import phicore
from phicore.formats.huggingface import (
    convert_gguf,
    find_model,
    import_transformers,
    load_model,
    model_config,
    save_model,
)
from phicore.formats.streaming import quantize_directory
from phicore.training.generation import generate
from tests.chat_tokenizers import chat_tokenizer
from tests.tied_llama import PROMPTS, VOCABULARY, tied_llama


@pytest.fixture
def model(tiny: Callable[..., nn.Module]) -> Any:
    return tied_llama(tiny)


@pytest.fixture
def tokenizer() -> Any:
    return chat_tokenizer("smollm2")


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(2 * 9).reshape(2, 9) * 13 % VOCABULARY
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


# ===== saving and loading =====


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_loads_to_equal_logits(
    tiny: Callable[..., nn.Module], tokenizer: Any, tmp_path: Path, family: str, tied: bool, dtype: torch.dtype
) -> None:
    model: Any = tiny(family, tied=tied, dtype=torch.float32, vocab_size=VOCABULARY)
    for parameter in model.parameters():  # not model.to, which would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    save_model(model, tokenizer, tmp_path / "model")
    loaded, loaded_tokenizer = load_model(str(tmp_path / "model"), dtype)
    assert type(loaded) is type(model)
    assert loaded.dtype == dtype
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for text in PROMPTS:
        assert loaded_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded_tokenizer.chat_template == tokenizer.chat_template
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]  # no temporary directory is left
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()} == {0o644}


def test_weights_get_the_dtype_asked_for(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    save_model(model, tokenizer, tmp_path / "model")
    loaded, _ = load_model(str(tmp_path / "model"), torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours.bfloat16(), theirs)


def test_a_merged_head_of_a_tied_model_is_not_lost(
    model: Any, tokenizer: Any, randomize: Callable[..., nn.Module], tmp_path: Path
) -> None:
    phicore.attach(model, phicore.LoRAConfig(rank=4, alpha=6, target_modules=["lm_head", "q_proj"]))
    randomize(model)
    with pytest.raises(TypeError, match=r"q_proj is a LoRALinear.*merge"):
        save_model(model, tokenizer, tmp_path / "model")
    phicore.merge(model)
    save_model(model, tokenizer, tmp_path / "model")
    assert model.config.tie_word_embeddings  # the model in memory is as it was
    loaded, _ = load_model(str(tmp_path / "model"), torch.float32)
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(logits(loaded), logits(model))


def test_nf4_layers_are_written_as_they_are(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    phicore.quantize_(model)
    save_model(model, tokenizer, tmp_path / "model")
    loaded, _ = load_model(str(tmp_path / "model"), torch.float32)
    assert [type(m).__name__ for m in loaded.modules()] == [type(m).__name__ for m in model.modules()]
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_that_no_file_holds_are_not_computed_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("smollm2")
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512}
    dense: Any = transformers.GPTJForCausalLM(transformers.GPTJConfig(vocab_size=len(tokenizer), **sizes))
    save_model(dense, tokenizer, tmp_path / "dense")
    save_model(phicore.quantize_(dense), tokenizer, tmp_path / "nf4")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    ours, _ = load_model(str(tmp_path / "nf4"), dtype)
    for name, table in theirs.named_buffers():
        assert ours.get_buffer(name).dtype == torch.float32
        assert torch.equal(ours.get_buffer(name), table), name


def test_what_was_loaded_is_not_initialised(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    tokenizer = chat_tokenizer("smollm2")
    config = transformers.YoutuConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes, **ranks)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)  # its class zeroes the padding's row at any time
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    save_model(phicore.quantize_(model), tokenizer, tmp_path / "nf4")
    before = torch.get_rng_state()
    loaded, _ = load_model(str(tmp_path / "nf4"), torch.float32)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_overwriting_needs_to_be_asked_for(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        save_model(model, tokenizer, target)
    assert [file.name for file in target.iterdir()] == ["notes.txt"]
    save_model(model, tokenizer, target, overwrite=True)
    assert not (target / "notes.txt").exists()
    assert (target / "model.safetensors").is_file()
    assert list(tmp_path.iterdir()) == [target]


def test_a_save_that_fails_leaves_the_old_directory(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(model, tokenizer, tmp_path / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(model, tokenizer, tmp_path / "model", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_settings_of_transformers_are_restored(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    logging_ = transformers.utils.logging
    logging_.set_verbosity_info()
    logging_.enable_progress_bar()
    try:
        save_model(model, tokenizer, tmp_path / "model")
        load_model(str(tmp_path / "model"), torch.float32)
        generate(model, tokenizer, ["a"], 2, 1)
        assert logging_.get_verbosity() == logging.INFO
        assert logging_.is_progress_bar_enabled()
    finally:
        logging_.set_verbosity_warning()


def test_a_missing_pad_token_becomes_eos_and_is_reported(
    model: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.pad_token = None
    save_model(model, tokenizer, tmp_path / "model")
    _, loaded = load_model(str(tmp_path / "model"), torch.float32)
    assert loaded.pad_token == loaded.eos_token == "<|im_end|>"
    assert "no pad token; its eos token '<|im_end|>' is used" in caplog.text


# ===== what cannot be loaded =====


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere-at-all", "some/deep/path", "nowhere.gguf", ""])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or directory") as caught:
        load_model(name, torch.float32)
    assert f'"{name}"' in str(caught.value)


def test_a_name_that_neither_disk_nor_hub_has() -> None:
    with pytest.raises(OSError, match=r'no such directory: "nobody/nothing-of-the-kind"; and as a name on the hub: \w'):
        load_model("nobody/nothing-of-the-kind", torch.float32)


def test_a_directory_that_lacks_something(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no model; looked for config.json or one .gguf file"):
        load_model(str(empty), torch.float32)
    whole = tmp_path / "whole"
    save_model(model, tokenizer, whole)
    for lacking, message in (("model.safetensors", "holds no weights; looked for"), ("tokenizer*", "no tokenizer")):
        broken = tmp_path / "broken"
        shutil.copytree(whole, broken)
        for file in broken.glob(lacking):
            file.unlink()
        (broken / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(FileNotFoundError, match=message):
            load_model(str(broken), torch.float32)
        shutil.rmtree(broken)
    (whole / "model.safetensors").rename(whole / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (whole / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(
        FileNotFoundError, match=r"lacks model-00002-of-00002.safetensors, which its .*index.json names"
    ):
        load_model(str(whole), torch.float32)


def test_an_adapter_where_a_model_is_expected(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """transformers puts the adapter of such a directory into the model that it loads, where peft is installed."""
    phicore.save_adapter(phicore.attach(copy.deepcopy(model), phicore.LoRAConfig(rank=2)), tmp_path / "both")
    with pytest.raises(FileNotFoundError, match=r"holds an adapter and no model; give its base as the model"):
        load_model(str(tmp_path / "both"), torch.float32)
    save_model(model, tokenizer, tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "both", dirs_exist_ok=True)
    for read in (lambda: load_model(str(tmp_path / "both"), torch.float32), lambda: find_model(str(tmp_path / "both"))):
        with pytest.raises(ValueError, match=r"holds a model and an adapter \(adapter_config.json\)"):
            read()


def test_integers_in_a_weight_s_place_are_named(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    save_model(model, tokenizer, tmp_path / "model")
    path, name = tmp_path / "model" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    save_file({k: t.to(torch.int8) if k == name else t for k, t in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} is held as torch.int8, coded by another library"):
        load_model(str(tmp_path / "model"), torch.float32)


def test_integers_under_a_name_that_the_model_has_not_are_named(
    tiny: Callable[..., nn.Module], tokenizer: Any, tmp_path: Path
) -> None:
    """transformers stacks the experts that files have one by one; and passes over masks of attention in old files."""
    model: Any = tiny("mixtral", dtype=torch.float32, vocab_size=VOCABULARY)
    save_model(model, tokenizer, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    expert = min(name for name in tensors if name.endswith("experts.3.w1.weight"))
    mask = {"model.layers.0.self_attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
    save_file(tensors | mask, path, {"format": "pt"})
    loaded, _ = load_model(str(tmp_path / "model"), torch.float32)
    assert all(torch.equal(loaded.get_parameter(name), p) for name, p in model.named_parameters())
    save_file(tensors | {expert: tensors[expert].to(torch.int8)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{expert} is held as torch.int8, coded by another library"):
        load_model(str(tmp_path / "model"), torch.float32)


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "scale_weight"])
def test_8_bit_floats_beside_a_scale_are_named(model: Any, tokenizer: Any, tmp_path: Path, scale: str) -> None:
    """Without one they are the weights, rounded; with one they are read as if it were 1 by who does not know it."""
    save_model(model, tokenizer, tmp_path / "model")
    path, layer = tmp_path / "model" / "model.safetensors", "model.layers.1.mlp.up_proj"
    tensors = load_file(path)
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, path, {"format": "pt"})
    loaded, _ = load_model(str(tmp_path / "model"), torch.float32)
    assert torch.equal(loaded.get_parameter(f"{layer}.weight"), tensors[f"{layer}.weight"].float())
    save_file(tensors | {f"{layer}.{scale}": torch.tensor([0.01])}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{layer}.weight is held as torch.float8_e4m3fn, coded by another library"):
        load_model(str(tmp_path / "model"), torch.float32)
    with pytest.raises(ValueError, match=rf"{layer}.weight \(torch.float8_e4m3fn, coded with a scale"):
        quantize_directory(tmp_path / "model", tmp_path / "nf4")


def test_a_model_of_its_author_s_code_says_what_to_do(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    save_model(model, tokenizer, tmp_path / "model")
    edit_config(tmp_path / "model", model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    with pytest.raises(ValueError, match=r"model needs code of its author, which is not run here; load it by"):
        load_model(str(tmp_path / "model"), torch.float32)


def test_what_is_written_names_no_code_that_is_not_in_it(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """As Phi-3's configuration does: transformers has the class itself, and who trusts the author's looks for it."""
    save_model(model, tokenizer, tmp_path / "model")
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit_config(tmp_path / "model", auto_map=code)
    save_model(*load_model(str(tmp_path / "model"), torch.float32), tmp_path / "again")
    quantize_directory(tmp_path / "model", tmp_path / "nf4")
    for name in ("again", "nf4"):
        config = transformers.AutoConfig.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert type(config) is type(model.config)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"missing weights: model\.layers\.2\."),
        ({"intermediate_size": 40}, r"gate_proj.weight \(\[44, 32\] in the files, \[40, 32\] in the model\)"),
        ({"model_type": "t5"}, r'type "t5", which is not a causal language model'),
        ({"quantization_config": {"quant_method": "fp8"}}, r"is quantized already \(fp8\).*; give its full-precision"),
        ({"vocab_size": 290}, r"embed_tokens.weight \(\[300, 32\] in the files, \[290, 32\] in the model\)"),
    ],
)
def test_a_configuration_that_the_weights_do_not_fit(
    model: Any, tokenizer: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    save_model(model, tokenizer, tmp_path / "model")
    edit_config(tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path / "model"), torch.float32)


def test_a_tokenizer_with_more_tokens_than_the_model(
    tiny: Callable[..., nn.Module], tokenizer: Any, tmp_path: Path
) -> None:
    save_model(tiny("llama"), tokenizer, tmp_path / "model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the tokenizer has 259 tokens, the model embeddings for 48"):
        load_model(str(tmp_path / "model"), torch.float32)


def test_truncated_weights(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    save_model(model, tokenizer, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_model(str(tmp_path / "model"), torch.float32)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", '{"version": "1.0"', None])
def test_a_tokenizer_that_is_damaged_or_missing(
    model: Any, tokenizer: Any, tmp_path: Path, name: str, content: str | None
) -> None:
    save_model(model, tokenizer, tmp_path / "model")
    file = tmp_path / "model" / name
    file.unlink() if content is None else file.write_text(content)
    told = "model: its tokenizer" if content is None else f"model/{name} is not a whole JSON file: "
    with pytest.raises(ValueError, match=told):
        load_model(str(tmp_path / "model"), torch.float32)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", "is not a whole JSON file: "),
        (b"\xff\xfe{}", "is not a whole JSON file: "),
        (b"[]", "must hold a JSON object, holds a list"),
        (b"null", "must hold a JSON object, holds a NoneType"),
    ],
)
def test_a_broken_file_of_settings_is_named(
    model: Any, tokenizer: Any, tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    save_model(model, tokenizer, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"model/{name} {told}"):
        load_model(str(tmp_path / "model"), torch.float32)
    if name == "config.json":
        with pytest.raises(ValueError, match=f"model/{name} {told}"):
            model_config(str(tmp_path / "model"))


def test_a_tokenizer_without_its_parts_is_named(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    save_model(model, tokenizer, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="model: its tokenizer's files do not load: KeyError"):
        load_model(str(tmp_path / "model"), torch.float32)


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is a file; give a .gguf file or the directory"):
        load_model(str(tmp_path / "model.bin"), torch.float32)


@pytest.mark.parametrize("missing", ["transformers", "gguf"])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    (tmp_path / "some.gguf").write_bytes(b"")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[hf\]'"):
        load_model(str(tmp_path), torch.float32)


def test_a_package_that_is_there_and_does_not_import_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "packages/transformers"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('tokenizers is too old')")
    monkeypatch.syspath_prepend(broken.parent)
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(ImportError, match=r"needs a package that does not import \(tokenizers is too old\)"):
        import_transformers()


# ===== GGUF =====


def permuted(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of the rows of q and k."""
    out, inner = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, inner).swapaxes(1, 2).reshape(out, inner)


def write_gguf(path: Path, model: Any, tokenizer: Any) -> None:
    """A float32 GGUF file of a Llama and a byte-level tokenizer, as llama.cpp would write it."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") or token.startswith("<u") else 1 for token in tokens])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    places = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    tensors = {"token_embd": model.model.embed_tokens.weight, "output_norm": model.model.norm.weight}
    for i, layer in enumerate(model.model.layers):
        tensors |= {f"blk.{i}.{theirs}": layer.get_submodule(ours).weight for ours, theirs in places.items()}
    for name, tensor in tensors.items():
        if name.endswith(("attn_q", "attn_k")):
            tensor = permuted(tensor, config.num_attention_heads if name.endswith("q") else config.num_key_value_heads)
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(tensor.detach().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_a_directory_of_the_same_model(model: Any, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("smollm2", merges=[("h", "e")])
    source = tmp_path / "source"
    source.mkdir()
    write_gguf(source / "tiny.gguf", model, tokenizer)
    from_file, _ = load_model(str(source / "tiny.gguf"), torch.float32)
    assert torch.equal(logits(from_file), logits(model))
    convert_gguf(source, tmp_path / "model", torch.float32)
    loaded, loaded_tokenizer = load_model(str(tmp_path / "model"), torch.float32)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded_tokenizer.chat_template == tokenizer.chat_template
    for text in [*PROMPTS, "<|im_start|>user\nä<|im_end|>\n"]:
        assert loaded_tokenizer(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", ["directory", "nf4", "gguf"])
def test_a_weight_beyond_float16_is_named(model: Any, tokenizer: Any, tmp_path: Path, kind: str) -> None:
    model.model.norm.weight.data[3] = -1e6
    source = str(tmp_path / "model")
    if kind == "gguf":
        source, tokenizer = str(tmp_path / "tiny.gguf"), chat_tokenizer("smollm2", merges=[("h", "e")])
        write_gguf(Path(source), model, tokenizer)
    else:
        save_model(phicore.quantize_(model) if kind == "nf4" else model, tokenizer, tmp_path / "model")
    with pytest.raises(ValueError, match=r"model.norm.weight holds .* float16 ends at 65,504; choose bfloat16 or") as e:
        load_model(source, torch.float16)
    assert ("up to 1e+06" in str(e.value)) == (kind != "gguf")
    assert source in str(e.value)
    assert load_model(source, torch.bfloat16)[0].model.norm.weight[3] < -9e5


def test_a_weight_that_was_infinite_already_loads(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model.model.norm.weight.data[3] = -torch.inf
    save_model(model, tokenizer, tmp_path / "model")
    assert load_model(str(tmp_path / "model"), torch.float16)[0].model.norm.weight[3] == -torch.inf


def test_a_directory_of_several_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert find_model(str(tmp_path)) == (str(tmp_path), "a.gguf")
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"several GGUF files; give one of them: a.gguf, b.gguf"):
        find_model(str(tmp_path))
    assert find_model(str(tmp_path / "b.gguf")) == (str(tmp_path), "b.gguf")
