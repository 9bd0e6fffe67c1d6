"""A tiny chat model in a directory and data for it, once for all tests of the commands."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from phicore.formats.huggingface import save_model
from tests.chat_tokenizers import chat_tokenizer

SYSTEM = {"role": "system", "content": "Tag."}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with a byte-level tokenizer and SmolLM2's chat template."""
    torch.manual_seed(0)
    tokenizer = chat_tokenizer("smollm2")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("model") / "tiny"
    save_model(LlamaForCausalLM(config), tokenizer, directory)
    return directory


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve conversations; the file begins with a byte-order mark."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [
        json.dumps(
            {
                "messages": [
                    SYSTEM,
                    {"role": "user", "content": f"{n} Elm St"},
                    {"role": "assistant", "content": f"Number: {n}\nStreet: Elm St"},
                ]
            }
        )
        for n in range(12)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return path
