"""phicore quantize: write a model's linear layers in NF4, in bitsandbytes' layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import phicore
from phicore.cli.console import gigabytes, say, stage
from phicore.cli.options import parse
from phicore.training.precision import DTYPES


@dataclass(kw_only=True)
class QuantizeOptions:
    model: str
    """Model directory, .gguf file, or name on the hub."""

    output: str
    """Directory to write; must be missing or empty."""

    target_modules: tuple[str, ...] = ("all-linear",)
    """Layers to quantize: all-linear (all but the output head), or names or ".name" suffixes."""

    exclude_modules: tuple[str, ...] = ()
    """Names or suffixes of layers to leave as they are."""

    block_size: int = 64
    """Weights that share a scale."""

    double_quant: bool = True
    """Hold the scales in 8 bits."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the weights that are not quantized, and the compute dtype that the directory names."""

    overwrite: bool = False
    """Replace an output directory that is there."""


def main(arguments: Sequence[str]) -> None:
    """Parses, quantizes and writes."""
    options = parse(QuantizeOptions, arguments, "quantize", "Write a model in NF4.")
    from phicore.formats.streaming import NotStreamable, quantize_directory

    targets = options.target_modules[0] if options.target_modules == ("all-linear",) else options.target_modules
    try:
        with stage(f"quantizing {options.model} into {options.output}"):
            before, after = quantize_directory(
                options.model,
                options.output,
                DTYPES[options.dtype],
                targets,
                options.exclude_modules,
                block_size=options.block_size,
                double_quant=options.double_quant,
                overwrite=options.overwrite,
            )
    except NotStreamable as reason:
        say(f"{reason}; it is loaded whole")
        before, after = _in_memory(options, targets)
    say(f"{gigabytes(before)} before, {gigabytes(after)} after")


def _in_memory(options: QuantizeOptions, targets: str | tuple[str, ...]) -> tuple[int, int]:
    from phicore.formats.huggingface import load_model, save_model

    with stage(f"loading {options.model}"):
        model, tokenizer = load_model(options.model, DTYPES[options.dtype])
    before = sum(t.nbytes for t in model.parameters())
    with stage("quantizing"):
        phicore.quantize_(
            model,
            targets,
            options.exclude_modules,
            block_size=options.block_size,
            double_quant=options.double_quant,
        )
    after = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    with stage(f"writing {options.output}"):
        save_model(model, tokenizer, options.output, overwrite=options.overwrite)
    return before, after
