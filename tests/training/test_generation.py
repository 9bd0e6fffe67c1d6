"""Answers: the same in a batch as alone, ended where the model ends them, and nothing of the model left changed."""

import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import phicore
from phicore.formats.huggingface import load_model, save_model
from phicore.training.generation import generate, stop_ids
from tests.chat_tokenizers import chat_tokenizer
from tests.tied_llama import PROMPTS, VOCABULARY, WIDE, tied_llama


@pytest.fixture
def model(tiny: Callable[..., nn.Module]) -> Any:
    return tied_llama(tiny)


@pytest.fixture
def tokenizer() -> Any:
    return chat_tokenizer("smollm2")


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_a_batch_answers_as_one_by_one(
    tiny: Callable[..., nn.Module], tokenizer: Any, family: str, quantized: bool, batch_size: int
) -> None:
    model: Any = wide(tiny, family)
    if quantized:
        phicore.quantize_(model) if family != "gpt2" else None  # GPT-2 has no nn.Linear
        phicore.attach(model, phicore.LoRAConfig(rank=2, alpha=3, target_modules=["lm_head"]))
    alone = [generate(model, tokenizer, [prompt], 12, 1)[0] for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, 12, batch_size) == alone
    assert len(set(alone)) > 2  # the model's answers do depend on the prompt
    for prompt, answer in zip(PROMPTS, alone, strict=True):
        assert answer == by_hand(model, tokenizer, prompt, 12)


def test_a_model_that_counts_positions_by_itself_gets_no_padding(tokenizer: Any) -> None:
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 44}
    config = transformers.BartConfig(vocab_size=VOCABULARY, d_model=32, **sizes, init_std=0.6)
    model: Any = transformers.BartForCausalLM(config).eval()
    prompts = [*PROMPTS, *(prompt[::-1] for prompt in PROMPTS)]
    seen = inputs_of(model)
    answers = generate(model, tokenizer, prompts, 6, len(prompts))
    assert len(seen[0]) > 1  # of equal length, they do share a batch
    assert answers == [by_hand(model, tokenizer, prompt, 6) for prompt in prompts]
    assert len(set(answers)) > 2


def test_a_compiled_model_answers_as_it_did(model: Any, tokenizer: Any) -> None:
    torch._dynamo.reset()
    alone = generate(model, tokenizer, PROMPTS[:3], 4, 3)
    assert generate(torch.compile(model, backend="eager"), tokenizer, PROMPTS[:3], 4, 3) == alone


def wide(tiny: Callable[..., nn.Module], family: str) -> Any:
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, **WIDE}
    if family in ("lfm2", "falcon_h1"):
        return linear_attention(family)
    if family != "gpt2":
        return tiny(family, dtype=torch.float32, **sizes)
    config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=256, **WIDE)
    return transformers.GPT2LMHeadModel(config).eval()


def linear_attention(family: str) -> Any:
    """Layers of it beside those of attention (LFM2), or within each (Falcon H1)."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, **WIDE}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    if family == "lfm2":
        kinds = ["conv", "full_attention"]
        return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**sizes, **heads, layer_types=kinds)).eval()
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
    return transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**sizes, **heads, **mamba)).eval()


@torch.no_grad()
def by_hand(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """Greedy decoding without a cache, a batch or padding."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    while len(new) < max_new_tokens:
        token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in stop_ids(model, tokenizer):
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True)


def test_answers_end_at_eos(model: Any, tokenizer: Any) -> None:
    """Whatever token comes third is made the model's eos: what came before it stays, whatever the batch."""
    whole = generate(model, tokenizer, PROMPTS, 10, 3)
    ids = model.generate(**tokenizer(PROMPTS[1], return_tensors="pt"), max_new_tokens=10, do_sample=False)[0]
    new = ids[len(tokenizer(PROMPTS[1])["input_ids"]) :].tolist()
    at = next(n for n in range(1, 10) if new[n] not in new[:n])
    model.generation_config.eos_token_id = [new[at], 299]
    stopped = generate(model, tokenizer, PROMPTS, 10, 3)
    assert stopped[1] == tokenizer.decode(new[:at], skip_special_tokens=True)
    for before, after in zip(whole, stopped, strict=True):
        assert before.startswith(after)


@pytest.mark.parametrize(("style", "end"), [("smollm2", "<|im_end|>"), ("phi3", "<|end|>")])
def test_the_chat_templates_end_of_turn_stops(model: Any, style: Any, end: str) -> None:
    tokenizer: Any = chat_tokenizer(style)
    ends = {*tokenizer.convert_tokens_to_ids([end, tokenizer.eos_token])}
    assert ends <= set(stop_ids(model, tokenizer))
    template = str(tokenizer.chat_template)
    tokenizer.chat_template = template.replace("['content'] +", "['content'] + '\\n' +")  # Nemotron's ends so
    assert tokenizer.chat_template != template
    assert ends <= set(stop_ids(model, tokenizer))
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert tokenizer.eos_token_id in stop_ids(model, tokenizer)


def inputs_of(model: Any) -> list[Tensor]:
    """The input_ids of each forward pass from now on."""
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["input_ids"]), with_kwargs=True)
    return seen


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "lfm2", "falcon_h1"])
def test_rows_that_have_ended_leave_the_batch(tiny: Callable[..., nn.Module], tokenizer: Any, family: str) -> None:
    model = wide(tiny, family)
    prompts = [f"{chr(97 + i)}{prompt}" for i in range(4) for prompt in PROMPTS]
    free = [tokenizer(text)["input_ids"] for text in generate(model, tokenizer, prompts, 16, 20)]
    model.generation_config.eos_token_id = sorted({row[3] for row in free[:10] if len(row) > 3})
    alone = [generate(model, tokenizer, [prompt], 16, 1)[0] for prompt in prompts]
    assert len({len(tokenizer(text)["input_ids"]) for text in alone}) > 3
    seen = inputs_of(model)
    assert generate(model, tokenizer, prompts, 16, 20) == alone
    sizes = [len(ids) for ids in seen]
    assert sizes[0] == 20
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2


@pytest.mark.parametrize(
    ("template", "prompt", "given", "bos"),
    [
        (True, "<s>a", None, 1),
        (True, "a", None, 0),
        (True, "a", True, 1),
        (True, "<s>a", True, 1),
        (False, "a", None, 1),
        (False, "<s>a", None, 1),
        (False, "a", False, 0),
    ],
)
def test_no_second_bos(model: Any, template: bool, prompt: str, given: bool | None, bos: int) -> None:
    tokenizer = chat_tokenizer("phi3", add_bos=True)
    if not template:
        tokenizer.chat_template = None
    seen = inputs_of(model)
    generate(model, tokenizer, [prompt], 2, 1, add_special_tokens=given)
    assert (seen[0] == tokenizer.bos_token_id).sum() == bos


def test_each_prompt_may_say_whether_the_tokenizer_begins_it(model: Any) -> None:
    tokenizer = chat_tokenizer("phi3", add_bos=True)
    seen = inputs_of(model)
    generate(model, tokenizer, ["a", "a", "a"], 2, 1, add_special_tokens=[True, False, True])
    begun = [int((ids == tokenizer.bos_token_id).sum()) for ids in seen]
    assert begun.count(1) == 2


def test_sampling_settings_are_not_used_and_everything_is_restored(model: Any, tokenizer: Any) -> None:
    plain = generate(model, tokenizer, PROMPTS, 8, 2)
    model.generation_config.update(do_sample=True, temperature=9.0, top_k=7, repetition_penalty=5.0, max_length=3)
    settings = model.generation_config
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    tokenizer.padding_side = "right"
    assert generate(model, tokenizer, PROMPTS, 8, 2) == plain
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is settings
    assert tokenizer.padding_side == "right"


def test_everything_is_restored_after_an_error(model: Any, tokenizer: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    model.train()
    settings = model.generation_config
    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, tokenizer, ["a"], 2, 1)
    assert model.training
    assert model.generation_config is settings


def test_no_warnings(model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture, capfd: Any, tmp_path: Path) -> None:
    tokenizer.model_max_length = 4
    import_module("deepspeed")  # which transformers does where it is installed, and which says what device it found
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, tokenizer, PROMPTS, 4, 2)
        save_model(model, tokenizer, tmp_path / "model")
        load_model(str(tmp_path / "model"), torch.float32)
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_progress_is_told(model: Any, tokenizer: Any) -> None:
    told: list[tuple[int, int]] = []
    generate(model, tokenizer, PROMPTS, 2, 2, lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert generate(model, tokenizer, [], 2, 2) == []


def test_what_generate_refuses(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="must be positive, got 0 and 1"):
        generate(model, tokenizer, ["a"], 0, 1)
    with pytest.raises(ValueError, match="must be positive, got 1 and 0"):
        generate(model, tokenizer, ["a"], 1, 0)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, tokenizer, ["a", ""], 1, 1)
    with pytest.raises(ValueError, match=r"prompt 1 has 250 tokens.*max_new_tokens=7 passes the model's 256 positions"):
        generate(model, tokenizer, ["a", "b" * 250], 7, 1)
    assert len(generate(model, tokenizer, ["b" * 250], 6, 1)) == 1


@pytest.mark.parametrize(
    "config",
    [
        transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1),
        # It takes past_key_values, and would answer from what its layers kept of the prompts before.
        transformers.RecurrentGemmaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8, lru_width=32
        ),
    ],
    ids=["mamba", "recurrent_gemma"],
)
def test_models_that_keep_their_states_otherwise(config: Any, tokenizer: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="keeps not all that it knows of earlier tokens in past_key_values"):
        generate(model, tokenizer, ["a", "b"], 2, 2)


def test_the_head_sees_no_strided_input(model: Any, tokenizer: Any) -> None:
    """Of a strided one and a frozen 16-bit weight torch makes a product, and a copy of the weight, for each prompt."""
    seen: list[bool] = []
    head = model.get_output_embeddings()
    forward = head.forward
    head.forward = lambda x: seen.append(x.is_contiguous()) or forward(x)
    generate(model, tokenizer, PROMPTS, 2, len(PROMPTS))
    del head.forward
    assert seen
    assert all(seen)
    assert not head._forward_pre_hooks


def test_rows_of_other_adapters_are_refused(model: Any, tokenizer: Any) -> None:
    """The longest prompt would be row 0, and answered by the adapter of prompt 0; what the message names works."""
    phicore.attach(model, phicore.LoRAConfig(rank=2, alpha=64.0, init="gaussian"), name="a")
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    ids = torch.tensor([[5, 6, 7], [5, 6, 7]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    adapted = model.generate(ids, **settings)
    with phicore.disabled(model):
        base = model.generate(ids, **settings)
    with phicore.adapters.mixed(model, ["a", None]):
        with pytest.raises(ValueError, match=r"within mixed\(\) .*generate chooses which example is which row"):
            generate(model, tokenizer, PROMPTS[:2], 4, 2)
        answers = model.generate(ids, **settings)
    assert not adapted.equal(base)
    assert answers[0].equal(adapted[0])
    assert answers[1].equal(base[1])
    assert len(generate(model, tokenizer, PROMPTS[:2], 4, 2)) == 2
