"""save_pretrained of a quantized model: from_pretrained reads what it writes."""

import copy
import json
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import phicore
from phicore.formats.huggingface import load_model
from tests.chat_tokenizers import chat_tokenizer

IDS = torch.arange(18).view(2, 9)


@pytest.fixture
def model(tiny: Callable[..., nn.Module]) -> Any:
    model = tiny("llama", dtype=torch.float32, tied=True, vocab_size=300, hidden_size=64, intermediate_size=128)
    return phicore.quantize_(model)


def loads_alike(directory: Path, model: Any) -> bool:
    """Whether transformers and phicore load a model with equal logits, missing nothing."""
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert isinstance(theirs.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    torch.testing.assert_close(theirs.train()(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    chat_tokenizer("smollm2").save_pretrained(directory)
    ours, _ = load_model(str(directory), torch.float32)
    return torch.equal(ours(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "100kB"}])
def test_transformers_loads_what_save_pretrained_writes(model: Any, tmp_path: Path, options: Any) -> None:
    model.save_pretrained(tmp_path / "first", **options)
    assert (tmp_path / "first" / "model.safetensors.index.json").exists() == bool(options)
    assert loads_alike(tmp_path / "first", model)
    assert not hasattr(model.config, "quantization_config")  # the model in memory is as it was
    loaded, _ = load_model(str(tmp_path / "first"), torch.float32)
    loaded.save_pretrained(tmp_path / "again", **options)
    assert loads_alike(tmp_path / "again", model)


def test_a_coded_head_of_a_tied_model_is_written(tiny: Callable[..., nn.Module], tmp_path: Path) -> None:
    model: Any = tiny("llama", dtype=torch.float32, tied=True, vocab_size=320, hidden_size=64, intermediate_size=128)
    phicore.quantize_(model, r".*(proj|lm_head)")
    model.save_pretrained(tmp_path)
    assert not json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    assert loads_alike(tmp_path, model)


def test_a_head_that_is_tied_to_the_decoder_s_embedding_stays_so(tmp_path: Path) -> None:
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    bert = transformers.BertConfig(**sizes, num_attention_heads=4)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert, copy.deepcopy(bert))
    model: Any = phicore.quantize_(transformers.EncoderDecoderModel(config=config).eval())
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded, info = transformers.EncoderDecoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)


def test_a_model_of_images_without_an_embedding_of_the_input(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(vision_config={**sizes, "image_size": 32, "patch_size": 8}, text_config=sizes)
    model: Any = phicore.quantize_(transformers.CLIPForImageClassification(config).eval())
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    model.save_pretrained(tmp_path)
    loaded, info = transformers.CLIPForImageClassification.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.train()(images).logits, model(images).logits, atol=1e-5, rtol=1e-5)


def test_a_list_of_heads_has_no_weight_to_be_tied(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MusicgenDecoderConfig(**sizes, num_codebooks=2, pad_token_id=0, dropout=0.0)
    model: Any = phicore.quantize_(transformers.MusicgenForCausalLM(config).eval(), exclude_modules=["lm_heads"])
    assert isinstance(model.get_output_embeddings(), nn.ModuleList)
    model.save_pretrained(tmp_path)
    loaded, info = transformers.MusicgenForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    ids = torch.arange(8).view(2, 4)
    torch.testing.assert_close(loaded.train()(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_dense_layers_of_conv1d_beside_coded_ones_stay_dense(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "num_labels": 3}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model: Any = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes, **still)).eval()
    phicore.quantize_(model, ["score"])
    model.save_pretrained(tmp_path)
    loaded: Any = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded.transformer.h[0].attn.c_attn) is type(model.transformer.h[0].attn.c_attn)
    torch.testing.assert_close(loaded.train()(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself(model: Any, tmp_path: Path, clone: Callable[[Any], Any]) -> None:
    other = clone(model)
    other.model.norm.weight.data.mul_(2)
    other.save_pretrained(tmp_path)
    assert loads_alike(tmp_path, other)


def test_a_model_is_freed_without_the_garbage_collector(tiny: Callable[..., nn.Module]) -> None:
    model = tiny("llama", dtype=torch.float32)
    gone = weakref.ref(phicore.quantize_(model).lm_head)
    del model
    assert gone() is None


def test_what_from_pretrained_cannot_read_is_warned_of(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    phicore.attach(model, phicore.LoRAConfig(rank=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapted")
    with safe_open(tmp_path / "adapted" / "model.safetensors", "pt") as file:  # what transformers' Trainer reads back
        assert set(file.keys()) == model.state_dict().keys() - {"lm_head.weight"}
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("phicore")]
    for name, message in zip(("given", "adapted"), messages, strict=True):
        assert message.startswith(
            f"{tmp_path / name}: written with phicore's own names, which from_pretrained does not"
        )
        assert "phicore.save_adapter" in message


def test_layers_that_transformers_leaves_dense_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"vocab_size": 320, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
    model: Any = transformers.T5ForConditionalGeneration(config).eval()
    other = phicore.quantize_(copy.deepcopy(model), exclude_modules=["wo"])
    phicore.quantize_(model).save_pretrained(tmp_path / "all")
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("phicore")]
    assert message.startswith("transformers leaves encoder.block.0.layer.1.DenseReluDense.wo, ")
    assert message.endswith("quantize with exclude_modules=['wo']")
    given = {"input_ids": IDS, "decoder_input_ids": IDS}
    # As long as it is so; transformers 5.20, which Python 3.10 gets, finds out in the forward pass.
    with pytest.raises(RuntimeError, match=r"ignore_mismatched_sizes|shapes cannot be multiplied"):
        transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "all").train()(**given)
    caplog.clear()
    other.save_pretrained(tmp_path / "other")
    assert not [record for record in caplog.records if record.name.startswith("phicore")]
    loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "other").train()  # as in loads_alike
    torch.testing.assert_close(loaded(**given).logits, other.train()(**given).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["Falcon", "Llama4"])
def test_a_model_that_transformers_does_not_read_in_codes_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "Falcon":
        kind, config = transformers.FalconForCausalLM, transformers.FalconConfig(**sizes)
    else:
        more = {"intermediate_size": 128, "intermediate_size_mlp": 128, "num_key_value_heads": 4, "head_dim": 16}
        ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
        config = transformers.Llama4TextConfig(**sizes, **more, **ids, num_local_experts=4)
        kind = transformers.Llama4ForCausalLM
    model: Any = phicore.quantize_(kind(config).eval())
    model.save_pretrained(tmp_path)
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("phicore")]
    assert message.startswith(f"from_pretrained of transformers will not read {family}ForCausalLM in NF4")
    with pytest.raises((RuntimeError, NotImplementedError)):
        kind.from_pretrained(tmp_path, dtype=torch.float32)


def test_a_merged_model_without_coded_layers_is_written_as_ever(
    tiny: Callable[..., nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = phicore.quantize_(tiny("llama", dtype=torch.float32, vocab_size=300), ["q_proj"])
    for layer in model.model.layers:
        coded = layer.self_attn.q_proj
        layer.self_attn.q_proj = nn.Linear(coded.in_features, coded.out_features, bias=False)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not [record for record in caplog.records if record.name.startswith("phicore")]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_tying_leaves_a_coded_head_and_ties_the_others(tiny: Callable[..., nn.Module], family: str) -> None:
    options = {"tied": True, "vocab_size": 300} if family == "llama" else {}
    model: Any = phicore.quantize_(tiny(family, **options).float(), ["lm_head"])
    model.config.tie_word_embeddings = True
    head, before = model.lm_head, model.lm_head.packed.clone()
    model.tie_weights()
    assert model.lm_head is head
    assert torch.equal(head.packed, before)
    if family == "t5":
        assert model.encoder.embed_tokens.weight is model.shared.weight
    assert type(model)._tied_weights_keys.keys() - model._tied_weights_keys.keys() == {"lm_head.weight"}


TIED = [
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "dora": True},
    {"target_modules": ["lm_head"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
]


@pytest.mark.parametrize("options", TIED)
def test_tying_passes_adapters_by(
    tiny: Callable[..., nn.Module], randomize: Callable[[nn.Module], nn.Module], options: dict[str, Any]
) -> None:
    model: Any = tiny("llama", dtype=torch.float32, tied=True, vocab_size=300)
    randomize(phicore.attach(model, phicore.LoRAConfig(rank=3, alpha=7, **options)))
    if "target_modules" in options and options["target_modules"] != ["q_proj"]:
        randomize(phicore.attach(model, phicore.LoRAConfig(rank=2, alpha=3, **options), name="second"))
    y, names = model(IDS).logits, [name for name, _ in model.named_parameters()]
    with phicore.disabled(model):
        base = model(IDS).logits
    for other in (model, copy.deepcopy(model)):
        other.tie_weights()
        assert torch.equal(other(IDS).logits, y)
        assert [name for name, _ in other.named_parameters()] == names
        with phicore.disabled(other):
            assert torch.equal(other(IDS).logits, base)
    head = next(module for module in model.lm_head.modules() if isinstance(module, nn.Linear))
    embedding = next(module for module in model.model.embed_tokens.modules() if isinstance(module, nn.Embedding))
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.tie_weights()
    assert head.weight is embedding.weight


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("options", TIED)
def test_a_checkpoint_of_transformers_trainer_goes_back_into_a_tied_model(
    tiny: Callable[..., nn.Module],
    randomize: Callable[[nn.Module], nn.Module],
    tmp_path: Path,
    options: dict[str, Any],
    given: bool,
) -> None:
    def adapted() -> Any:
        model = tiny("llama", dtype=torch.float32, tied=True, vocab_size=300)
        return phicore.attach(model, phicore.LoRAConfig(rank=3, alpha=7, **options))

    model, other = randomize(adapted()), adapted()
    model.save_pretrained(tmp_path, state_dict=model.state_dict() if given else None)
    found = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not found.unexpected_keys
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_only_models_of_transformers_are_written_so_wherever_they_stand(
    tiny: Callable[..., nn.Module], tmp_path: Path
) -> None:
    class OfAnotherLibrary(nn.Module):  # as models of diffusers, peft and sentence-transformers
        config = None

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny("llama", dtype=torch.float32, vocab_size=300, hidden_size=64, intermediate_size=128)

        def save_pretrained(self, directory: Path, safe_serialization: bool = True) -> None:
            assert safe_serialization is True
            self.inner.save_pretrained(directory)

    whole: Any = phicore.quantize_(OfAnotherLibrary(), exclude_modules=["lm_head"])
    whole.save_pretrained(tmp_path)
    assert loads_alike(tmp_path, whole.inner)


@pytest.mark.parametrize("dora", [False, True])
def test_the_trainer_of_transformers_trains_an_adapter_and_goes_on(tmp_path: Path, model: Any, dora: bool) -> None:
    """Its checkpoints hold the model under phicore's names, from which the same adapted model goes on."""
    data = [{"input_ids": ids, "labels": ids} for ids in torch.arange(48).view(8, 6).tolist()]
    config = phicore.LoRAConfig(rank=2, alpha=4, dora=dora)

    def trained(output: str, **more: Any) -> Any:
        torch.manual_seed(0)
        adapted = phicore.attach(copy.deepcopy(model), config)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / output), max_steps=4, save_steps=2, learning_rate=1e-2, use_cpu=True,
            per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        transformers.Trainer(adapted, arguments, train_dataset=data).train(**more)
        return adapted.eval()

    whole = trained("whole")
    resumed = trained("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    with phicore.disabled(whole):
        base = whole(IDS).logits
    assert not torch.allclose(whole(IDS).logits, base, atol=1e-2)
    torch.testing.assert_close(resumed(IDS).logits, whole(IDS).logits)
    phicore.save_adapter(whole, tmp_path / "adapter")
    loaded = phicore.load_adapter(copy.deepcopy(model), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(IDS).logits, whole(IDS).logits)
