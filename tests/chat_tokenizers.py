"""Small fast tokenizers, built offline, that carry a real chat template."""

from collections.abc import Sequence
from functools import cache
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

Style = Literal["smollm2", "phi3"]
Backend = Literal["byte-level", "byte-fallback"]

# HuggingFaceTB/SmolLM2-135M-Instruct
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# microsoft/Phi-3-mini-4k-instruct
PHI3_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '<|end|>\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

TEMPLATES = {"smollm2": SMOLLM2_TEMPLATE, "phi3": PHI3_TEMPLATE}
SPECIAL = {
    "smollm2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "phi3": ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
}
NAMED = {
    "smollm2": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    "phi3": {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}


def chat_tokenizer(
    style: Style = "smollm2",
    *,
    backend: Backend = "byte-level",
    rstrip: bool = True,
    add_bos: bool = False,
    merges: Sequence[tuple[str, str]] = (),
) -> PreTrainedTokenizerFast:
    """A tokenizer of fewer than 400 tokens and merges, in which every byte is a token.

    Args:
        style: whose chat template and special tokens.
        backend: "byte-level" (SmolLM2, GPT-2) or "byte-fallback" (Phi-3, Llama: a space becomes "▁", which also stands
            before a text; ASCII letters are tokens, and what has no token falls back to its bytes).
        rstrip: whether Phi-3's role tokens and <|end|> take in the whitespace behind them, as the real ones do.
        add_bos: whether the tokenizer itself puts bos before a text.
        merges: pairs of tokens to merge, for tokens of several characters; a space is written "Ġ" (or "▁"), a newline
            "Ċ". They merge wherever they stand together.
    """
    if backend == "byte-level":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        alphabet = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *(chr(c) for c in range(33, 127))]
    pieces = [*alphabet, *dict.fromkeys(a + b for a, b in merges)]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=list(merges),
        byte_fallback=backend == "byte-fallback",
        unk_token="<unk>" if backend == "byte-fallback" else None,
    )
    tokenizer = Tokenizer(model)
    if backend == "byte-level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    takes_whitespace = rstrip and style == "phi3"
    tokenizer.add_special_tokens(
        [
            AddedToken(token, rstrip=takes_whitespace and token not in ("<s>", "<|endoftext|>"), normalized=False)
            for token in SPECIAL[style]
        ]
    )
    if add_bos:
        bos = NAMED[style]["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATES[style], **NAMED[style])


tokenizer_of = cache(chat_tokenizer)
"""The same tokenizer for the same arguments: not to be changed."""

LONG = 10_000
"""A sequence length that cuts nothing."""
