"""phicore generate: answer prompts with a model and, if given, an adapter."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import phicore
from phicore.adapters.merging import merge_for_good
from phicore.cli.console import say
from phicore.cli.options import parse
from phicore.training.encoding import render
from phicore.training.precision import DTYPES, choose_dtype


@dataclass(kw_only=True)
class GenerateOptions:
    model: str
    """Model directory, .gguf file, or name on the hub; a directory that `phicore quantize` wrote, too."""

    prompt: tuple[str, ...]
    """What to answer, one or several."""

    adapter: str | None = None
    """Directory of an adapter in PEFT's format."""

    system: str | None = None
    """System message of the chat."""

    chat: bool = True
    """Put the prompt through the tokenizer's chat template, if it has one; otherwise it is continued as it stands."""

    quantize: bool = False
    """Round the model's linear layers to NF4, as qlora and qdora train over them; give the run's block_size and
    double_quant. With an adapter, the layers that it adapts are dense again once it is merged into them."""

    block_size: int = 64
    """Weights that share a scale in NF4."""

    double_quant: bool = True
    """Hold NF4's scales in 8 bits."""

    max_new_tokens: int = 128
    """Tokens an answer may have."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and products; auto as in `phicore finetune` with an adapter."""


def _idle(options: GenerateOptions) -> list[tuple[bool, str, Collection[str]]]:
    return [(not options.quantize, "without --quantize", {"block_size", "double_quant"})]


def main(arguments: Sequence[str]) -> None:
    """Parses, answers and prints."""
    options = parse(GenerateOptions, arguments, "generate", "Answer prompts, greedily.", _idle)
    for answer in answers(options):
        say(answer)


def answers(options: GenerateOptions) -> list[str]:
    """The answers to options.prompt, in order."""
    from phicore.formats.huggingface import load_model
    from phicore.formats.peft_fields import read_config
    from phicore.training.generation import generate

    if not options.prompt:
        raise ValueError("--prompt is empty; give at least one")
    if options.adapter is not None:
        read_config(Path(options.adapter))  # before the model is loaded, which takes long
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype(device)[0] if options.dtype == "auto" else DTYPES[options.dtype]
    model, tokenizer = load_model(options.model, dtype)
    torch.nn.Module.to(model, device)
    if options.quantize:
        coding = {(m.block_size, m.double_quant) for m in model.modules() if isinstance(m, phicore.NF4Linear)}
        if not coding:
            phicore.quantize_(model, block_size=options.block_size, double_quant=options.double_quant)
        elif coding != {(options.block_size, options.double_quant)}:
            raise ValueError(f"{options.model} is in NF4 already, and not as --quantize asks; leave that out")
    if options.adapter is not None:
        phicore.load_adapter(model, options.adapter)
        merge_for_good(model)
    prompts = [_rendered(tokenizer, prompt, options) for prompt in options.prompt]
    chat = options.chat and bool(tokenizer.chat_template)  # the template writes its own special tokens
    return generate(model, tokenizer, prompts, options.max_new_tokens, batch_size=16, add_special_tokens=not chat)


def _rendered(tokenizer: Any, prompt: str, options: GenerateOptions) -> str:
    if not options.chat or not tokenizer.chat_template:
        if options.system is not None:
            raise ValueError("--system needs a chat: a tokenizer with a chat template, and no --no-chat")
        return prompt
    system = [{"role": "system", "content": options.system}] if options.system is not None else []
    messages = [*system, {"role": "user", "content": prompt}]
    return render(tokenizer, messages, add_generation_prompt=True)
