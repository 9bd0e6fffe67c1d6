"""PEFT's format for models of which transformers or PEFT knows something: embeddings, tasks, ties, names of old."""

import copy
import json
import sys
import warnings

import peft
import pytest
import torch
import transformers
from peft.utils import transformers_weight_conversion as weight_conversion
from safetensors.torch import save_file

import phicore
from phicore.formats.peft import CONFIG, PREFIX, WEIGHTS
from phicore.formats.peft_conversion import CONVERTED
from phicore.formats.portable import check, export
from tests.formats.peft_files import edit, edit_tensors, load_in_peft, logits

SIZES = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 48, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

LAYERS = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
SIDES = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in LAYERS.items()}


SOUND = {
    **{"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
}


def wav2vec2() -> torch.nn.Module:
    """A model without an embedding of its input, of which get_input_embeddings raises."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(vocab_size=20, **SIZES, **SOUND)
    return transformers.Wav2Vec2ForCTC(config).eval()


def test_a_model_without_an_embedding_of_its_input(tmp_path, randomize):
    model = randomize(phicore.attach(wav2vec2(), phicore.LoRAConfig(rank=4, target_modules=["q_proj", "v_proj"])))
    phicore.save_adapter(model, tmp_path)
    sound = torch.linspace(-1, 1, 400).unsqueeze(0)
    expected = model(sound).logits
    assert not torch.allclose(expected, wav2vec2()(sound).logits)
    torch.testing.assert_close(phicore.load_adapter(wav2vec2(), tmp_path)(sound).logits, expected)
    torch.testing.assert_close(load_in_peft(wav2vec2(), tmp_path)(sound).logits, expected)
    with pytest.raises(ValueError, match=r"does not say which embedding is its input's.*no embeddings"):
        phicore.attach(wav2vec2(), phicore.LoRAConfig(trainable_token_indices=[3]))


def written_task(directory) -> str | None:
    return json.loads((directory / CONFIG).read_text())["task_type"]


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    ("kind", "head", "task"),
    [
        ("BertForSequenceClassification", "classifier", "SEQ_CLS"),
        ("BertForTokenClassification", "classifier", "TOKEN_CLS"),
        ("BertForQuestionAnswering", "qa_outputs", "QUESTION_ANS"),
        ("LlamaForSequenceClassification", "score", "SEQ_CLS"),
    ],
)
def test_a_task_is_written_only_with_the_heads_that_peft_adds_for_it(tmp_path, randomize, kind, head, task, saved):
    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        config = transformers.BertConfig if kind.startswith("Bert") else transformers.LlamaConfig
        return getattr(transformers, kind)(config(**SIZES, **TEXT)).eval()

    targets = ["query"] if kind.startswith("Bert") else ["q_proj"]
    config = phicore.LoRAConfig(rank=4, target_modules=targets, modules_to_save=[head] if saved else [])
    model = randomize(phicore.attach(base(), config))
    phicore.save_adapter(model, tmp_path)
    assert written_task(tmp_path) == (task if saved else None)
    ids = torch.arange(1, 13).view(2, 6)
    torch.testing.assert_close(load_in_peft(base(), tmp_path)(input_ids=ids)[0], model(input_ids=ids)[0])


def bart():
    return transformers.BartForConditionalGeneration(transformers.BartConfig(d_model=32, **SIDES, **TEXT))


def whisper():
    lengths = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
    config = transformers.WhisperConfig(d_model=32, **SIDES, **lengths, decoder_start_token_id=1, **TEXT)
    return transformers.WhisperForConditionalGeneration(config)


def llava():
    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **SIZES}
    text = {"model_type": "llama", **SIZES, **TEXT}
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=47, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


DECODED = torch.arange(1, 9).view(2, 4)
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)


@pytest.mark.parametrize(
    ("build", "inputs", "task"),
    [
        (bart, {"input_ids": DECODED, "decoder_input_ids": DECODED}, "SEQ_2_SEQ_LM"),
        (whisper, {"input_features": torch.linspace(-1, 1, 512).view(2, 8, 32), "decoder_input_ids": DECODED}, None),
        (llava, {"input_ids": torch.tensor([[5, 47, 47, 47, 47, 9]] * 2), "pixel_values": IMAGES}, "CAUSAL_LM"),
    ],
)
def test_the_task_is_that_whose_class_of_peft_calls_the_model(tmp_path, randomize, build, inputs, task):
    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        return build().eval()

    model = randomize(phicore.attach(base(), phicore.LoRAConfig(rank=4, target_modules=["q_proj", "v_proj"])))
    phicore.save_adapter(model, tmp_path)
    assert written_task(tmp_path) == task
    torch.testing.assert_close(load_in_peft(base(), tmp_path)(**inputs).logits, model(**inputs).logits)


# ===== tables that several layers read =====


def test_different_pairs_for_the_places_of_one_table_are_named(tmp_path, unchanged):
    """PEFT keeps a pair for each of the three embeddings of an encoder-decoder, which its training moves apart."""
    torch.manual_seed(0)
    targets = ["q_proj", "lm_head"]
    config = peft.LoraConfig(r=4, target_modules=targets, ensure_weight_tying=True, init_lora_weights=False)
    other = peft.get_peft_model(bart().eval(), config)
    other.save_pretrained(tmp_path, save_embedding_layers=False)
    fresh, attached = bart().eval(), bart().eval()
    options = {"rank": 4, "alpha": 8, "ensure_weight_tying": True}
    phicore.attach(attached, phicore.LoRAConfig(target_modules=["model.shared", "q_proj"], **options))
    for model in (fresh, attached):
        with unchanged(model), pytest.raises(ValueError, match=r"one pair for model\.shared and model\.encoder\.embed"):
            phicore.load_adapter(model, tmp_path)
    first = f"{PREFIX}model.shared.lora_embedding_"
    edit_tensors(tmp_path, lambda file: {k: file[first + k[-1]].clone() if "embed_" in k else file[k] for k in file})
    for model in (fresh, attached):
        phicore.load_adapter(model, tmp_path)
        assert model.lm_head.embedding_A is model.model.shared.lora_A is model.model.encoder.embed_tokens.lora_A


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_a_copy_trained_for_tied_layers_together(tmp_path, tiny, randomize, unchanged, saved):
    """PEFT writes the one weight under both names."""
    config = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=["q_proj"], modules_to_save=[saved], ensure_weight_tying=True
    )
    other = randomize(peft.get_peft_model(tiny("tied llama"), config, autocast_adapter_dtype=False)).eval()
    other.save_pretrained(tmp_path / "theirs")
    untied = tiny("llama")
    with unchanged(untied), pytest.raises(ValueError, match=r"add lm_head to modules_to_save and set ensure_weight_ty"):
        phicore.load_adapter(untied, tmp_path / "theirs")
    model = phicore.load_adapter(tiny("tied llama"), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(other))
    assert model.lm_head.trained.weight is model.model.embed_tokens.trained.weight
    assert model.lm_head.trained.weight.requires_grad
    phicore.save_adapter(randomize(model), tmp_path / "ours")
    again = phicore.load_adapter(tiny("tied llama"), tmp_path / "ours")
    assert again.lm_head.trained.weight is again.model.embed_tokens.trained.weight
    torch.testing.assert_close(logits(again), logits(model))
    torch.testing.assert_close(logits(load_in_peft(tiny("tied llama"), tmp_path / "ours")), logits(model))
    phicore.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), logits(again))


def test_copies_of_tied_layers_that_differ_are_named(tmp_path, tiny, unchanged):
    options = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True}
    peft.get_peft_model(tiny("tied llama"), peft.LoraConfig(**options)).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda file: file | {f"{PREFIX}lm_head.weight": file[f"{PREFIX}lm_head.weight"] + 1})
    model = tiny("tied llama")
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"one weight for model\.embed_tokens, lm_head, and the file"),
    ):
        phicore.load_adapter(model, tmp_path)
    edit(tmp_path, modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=False)
    phicore.load_adapter(model, tmp_path)
    assert torch.equal(model.lm_head.trained.weight, model.model.embed_tokens.trained.weight + 1)


# ===== names that transformers or PEFT has changed =====


@pytest.mark.parametrize("beside", [[], ["q_proj"]])
def test_experts_by_number_are_to_be_saved_again_by_peft(tmp_path, tiny, unchanged, beside):
    """A file from before transformers 5, which stacks the experts of Mixtral; PEFT translates it when it loads."""
    generator, file = torch.Generator().manual_seed(0), {}
    shapes = {f"block_sparse_moe.experts.{e}.{w}": s for e in range(4) for w, s in MIXTRAL.items()}
    shapes |= {f"self_attn.{name}": (32, 32) for name in beside}
    for path, (out, width) in {f"model.layers.{n}.{k}": s for n in (0, 1) for k, s in shapes.items()}.items():
        for part, shape in (("A", (4, width)), ("B", (out, 4))):
            file[f"{PREFIX}{path}.lora_{part}.weight"] = torch.randn(shape, generator=generator).double()
    save_file(file, tmp_path / WEIGHTS)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 7, "target_modules": [*MIXTRAL, *beside]}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    model = tiny("mixtral")
    with unchanged(model), pytest.raises(ValueError, match=r"the file has an adapter for each expert.*save it again"):
        phicore.load_adapter(model, tmp_path)
    other = peft.PeftModel.from_pretrained(tiny("mixtral"), tmp_path, autocast_adapter_dtype=False).eval()
    other.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(phicore.load_adapter(model, tmp_path / "again")), logits(other))


MIXTRAL = {"w1": (44, 32), "w2": (32, 44), "w3": (44, 32)}


class Attending(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x)[0])


def test_pairs_within_an_attention_that_it_reads_past(tmp_path, unchanged):
    """all-linear of PEFT adapts out_proj of an nn.MultiheadAttention (SigLIP's head), to no effect."""
    base = Attending().eval()
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    other = peft.get_peft_model(copy.deepcopy(base), config).eval()
    other.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    with unchanged(model), pytest.raises(ValueError, match=r"attention\.out_proj stands in an .* delete its keys"):
        phicore.load_adapter(model, tmp_path)
    edit_tensors(tmp_path, lambda file: {key: tensor for key, tensor in file.items() if "out_proj" not in key})
    x = torch.linspace(-1, 1, 48).view(2, 3, 8)
    torch.testing.assert_close(phicore.load_adapter(model, tmp_path)(x), other(x))


@pytest.mark.parametrize("dora", [False, True])
def test_pairs_within_an_attention_that_did_not_train_are_passed_over(tmp_path, dora):
    """As a PEFT adapter of Gemma 3 has them: no gradient has reached B."""
    base, x = Attending().eval(), torch.linspace(-1, 1, 48).view(2, 3, 8)
    other = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, target_modules="all-linear", use_dora=dora)
    ).eval()
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    for _ in range(2):
        other(x).square().mean().backward()
        optimizer.step()
    other.save_pretrained(tmp_path)
    torch.testing.assert_close(phicore.load_adapter(base, tmp_path)(x), other(x))


def deepseek() -> torch.nn.Module:
    """A dense block and one of experts, two of each layer's weights under names that PEFT takes for experts'."""
    torch.manual_seed(0)
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
    groups = {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
    config = transformers.DeepseekV3Config(**SIZES, **TEXT, **heads, **experts, **groups)
    config._experts_implementation = "eager"
    return transformers.DeepseekV3ForCausalLM(config).eval()


def test_layers_that_peft_takes_for_experts_are_named(tmp_path, randomize):
    targets = ["q_a_proj", "gate_proj", "up_proj", "down_proj"]
    model = randomize(phicore.attach(deepseek(), phicore.LoRAConfig(rank=4, target_modules=targets)))
    with pytest.warns(UserWarning, match=r"deepseek_v3 .*layers\.0\.mlp\.gate_proj.*, model\.layers\.1\.mlp\.shared_"):
        phicore.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(phicore.load_adapter(deepseek(), tmp_path / "adapter")), logits(model))
    for target in ("transformers", "kaito"):
        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj.* and 3 more: on deepseek_v3 models peft"):
            export(tmp_path / "adapter", tmp_path / "exported", target)
    assert check(tmp_path / "adapter", "vllm") == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.PeftModel.from_pretrained(deepseek(), tmp_path / "adapter").eval()
    assert not torch.allclose(logits(other), logits(model), rtol=1e-2)  # as long as it is so

    model = randomize(phicore.attach(deepseek(), phicore.LoRAConfig(rank=4, target_modules=["q_a_proj", "o_proj"])))
    phicore.save_adapter(model, tmp_path / "other")
    assert check(tmp_path / "other", "transformers") == []
    torch.testing.assert_close(logits(load_in_peft(deepseek(), tmp_path / "other")), logits(model))


@pytest.mark.parametrize(("targets", "dora"), [(["0", "1"], True), (["1"], True), (["0", "1"], False)])
def test_dora_of_convolutions_with_groups_is_named(tmp_path, randomize, targets, dora):
    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv1d(4, 6, 3, groups=2), torch.nn.Conv1d(6, 4, 3))

    x = torch.linspace(-1, 1, 64).view(2, 4, 8)
    model = randomize(phicore.attach(build(), phicore.LoRAConfig(rank=2, target_modules=targets, dora=dora)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        phicore.save_adapter(model, tmp_path)
        phicore.load_adapter(build(), tmp_path)
    otherwise = dora and "0" in targets
    assert [("groups (0) PEFT divides" in str(one.message), one.filename) for one in said] == [(True, __file__)] * (
        2 * otherwise
    )
    other = peft.PeftModel.from_pretrained(build(), tmp_path)
    assert torch.allclose(other(x), model(x), rtol=1e-3, atol=1e-5) != otherwise  # as long as it is so


@pytest.mark.parametrize(
    ("options", "otherwise"),
    [
        ({"padding_mode": "circular", "padding": 1}, True),
        ({"padding_mode": "circular"}, False),
        ({"padding": "same", "dilation": 2}, True),
        ({"padding": "same"}, False),
        ({"padding": 1, "stride": 2}, False),
    ],
)
def test_convolutions_that_peft_pads_otherwise_are_named(tmp_path, randomize, options, otherwise):
    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv1d(4, 6, 3, **options), torch.nn.Conv1d(6, 4, 1, padding="same"))

    x = torch.linspace(-1, 1, 64).view(2, 4, 8)
    model = randomize(phicore.attach(build(), phicore.LoRAConfig(rank=2, target_modules=["0", "1"])))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        phicore.save_adapter(model, tmp_path)
        phicore.load_adapter(build(), tmp_path)
        phicore.load_adapter(copy.deepcopy(model), tmp_path)
    assert [("convolutions (0) out of A's" in str(one.message), one.filename) for one in said] == [(True, __file__)] * (
        3 * otherwise
    )
    other = peft.PeftModel.from_pretrained(build(), tmp_path)
    assert torch.allclose(other(x), model(x), rtol=1e-3, atol=1e-5) != otherwise  # as long as it is so


@pytest.mark.parametrize(
    ("family", "target", "otherwise"),
    [
        ("wavlm", "v_proj", True),
        ("wavlm", "intermediate_dense", False),
        ("mamba", "dt_proj", True),
        ("mamba", "x_proj", False),
        ("jamba", "dt_proj", True),
    ],
)
def test_layers_whose_weight_is_read_past_peft_s_pairs_are_named(tmp_path, randomize, family, target, otherwise):
    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        if family == "wavlm":
            return transformers.WavLMForCTC(transformers.WavLMConfig(vocab_size=20, **SIZES, **SOUND)).eval()
        if family == "mamba":
            more = {"state_size": 4, "hidden_size": 32, "num_hidden_layers": 2}
            return transformers.MambaForCausalLM(transformers.MambaConfig(**TEXT, **more)).eval()
        more = {"num_key_value_heads": 2, "num_experts": 2, "use_cache": False, "mamba_d_state": 4}
        return transformers.JambaForCausalLM(transformers.JambaConfig(**TEXT, **SIZES, **more)).eval()

    x = torch.linspace(-1, 1, 400).view(2, 200) if family == "wavlm" else torch.arange(1, 13).view(2, 6)
    config = phicore.LoRAConfig(rank=4, target_modules=[target])
    model = phicore.attach(build(), config)
    for trained in (False, True):
        model = randomize(model) if trained else model
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            phicore.save_adapter(model, tmp_path)
            loaded = phicore.load_adapter(build(), tmp_path)
        told = [(f"{target} have no effect" in str(one.message), one.filename) for one in said]
        assert told == [(True, __file__)] * (2 * (otherwise and trained))
        assert bool(check(tmp_path, "transformers")) == (otherwise and trained)
        with torch.no_grad():
            assert torch.equal(loaded(x).logits, model(x).logits)
            other = peft.PeftModel.from_pretrained(build(), tmp_path).eval().base_model.model(x).logits
            assert torch.allclose(other, model(x).logits, rtol=1e-3, atol=1e-5) != (otherwise and trained)


def test_the_models_that_peft_converts_are_those_of_peft_and_transformers():
    families = weight_conversion._MODEL_TO_CONVERSION_PATTERN  # with those of transformers
    names = weight_conversion._MOE_TARGET_MODULE_MAPPING
    there = {kind: set(names[family]) for kind, family in families.items() if family in names and kind.islower()}
    newest = sys.version_info >= (3, 11)  # the last transformers for Python 3.10, 5.20, converts fewer
    assert {kind: set(names) for kind, names in CONVERTED.items() if newest or kind in families} == there
