"""phicore export: an adapter that a server reads rightly."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from phicore.cli.console import say
from phicore.cli.merge import MergeOptions, merge
from phicore.cli.options import parse
from phicore.formats import portable


@dataclass(kw_only=True)
class ExportOptions:
    adapter: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")]
    """Directory of an adapter in PEFT's format."""

    target: portable.Target
    """What is to read it."""

    output: str
    """Directory to write; must be missing or empty."""

    max_rank: int | None = None
    """The highest rank that the server is set to take (vLLM's --max-lora-rank); by default what it takes unasked."""

    merge: bool = False
    """Write a model with the adapter folded in (phicore merge) in place of an adapter: the way for DoRA, biases and
    modules trained whole where the target does not take them."""

    model: str | None = None
    """With --merge: model directory, .gguf file, or name on the hub, the base that the adapter was trained on."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """With --merge: of the written weights."""

    overwrite: bool = False
    """Replace an output directory that is there."""


def _idle(options: ExportOptions) -> list[tuple[bool, str, Collection[str]]]:
    return [
        (not options.merge, "without --merge", {"dtype"}),
        (options.merge, "with --merge, which writes no adapter", {"max_rank"}),
    ]


def main(arguments: Sequence[str]) -> None:
    """Parses and writes."""
    options = parse(ExportOptions, arguments, "export", "Write an adapter that a server reads rightly.", _idle)
    if options.merge != (options.model is not None):
        raise ValueError("--merge needs --model, the base to merge into, and --model is for --merge only")
    if options.model is not None:
        merge(
            MergeOptions(
                model=options.model,
                adapter=options.adapter,
                output=options.output,
                dtype=options.dtype,
                overwrite=options.overwrite,
            )
        )
        say(f"{options.output} is a model, which {options.target} serves without an adapter")
        return
    for mended in portable.export(
        options.adapter, options.output, options.target, max_rank=options.max_rank, overwrite=options.overwrite
    ):
        say(f"changed: {mended}")
    say(f"{options.output} fits {options.target}")
