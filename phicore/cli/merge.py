"""phicore merge: fold an adapter into a model and write a directory that transformers loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import phicore
from phicore import atomic
from phicore.adapters.merging import merge_for_good
from phicore.cli.console import say, stage
from phicore.cli.options import parse
from phicore.training.precision import DTYPES


@dataclass(kw_only=True)
class MergeOptions:
    model: str
    """Model directory, .gguf file, or name on the hub: the base that the adapter was trained on. For one of qlora
    or qdora, either the full-precision model, which lacks the NF4 rounding that the adapter was trained with (so its
    answers differ a little), or what `phicore quantize` writes of that with the run's block_size and double_quant: this
    gives the trained model itself, its adapted layers dense and the others in NF4."""

    adapter: str
    """Directory of an adapter in PEFT's format."""

    output: str
    """Directory to write; must be missing or empty."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the written weights, in which the base is read too: one in float32 is rounded to it before. The sum of both is
    made in float32 and rounded once."""

    overwrite: bool = False
    """Replace an output directory that is there."""


def main(arguments: Sequence[str]) -> None:
    """Parses and merges."""
    merge(parse(MergeOptions, arguments, "merge", "Fold an adapter into its base, and write a model directory."))


def merge(options: MergeOptions) -> None:
    """Loads, merges and writes."""
    from phicore.formats.huggingface import load_model, save_model
    from phicore.formats.peft_fields import read_config

    atomic.check_apart(options.output, options.model, options.adapter)
    atomic.check_free(options.output, overwrite=options.overwrite)
    read_config(Path(options.adapter))  # before the model is loaded, which takes long
    with stage(f"loading {options.model}"):
        model, tokenizer = load_model(options.model, DTYPES[options.dtype])
    phicore.load_adapter(model, options.adapter)
    errors = merge_for_good(model)
    say(f"merged {len(errors)} layers; rounding to {options.dtype} costs a relative {max(errors.values()):.1e} at most")
    with stage(f"writing {options.output}"):
        save_model(model, tokenizer, options.output, overwrite=options.overwrite)
