"""phicore check: what a server would misread of an adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from phicore.cli.console import say
from phicore.cli.options import parse
from phicore.formats import portable


@dataclass(kw_only=True)
class CheckOptions:
    adapter: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")]
    """Directory of an adapter in PEFT's format."""

    target: portable.Target
    """What is to read it."""

    max_rank: int | None = None
    """The highest rank that the server is set to take (vLLM's --max-lora-rank); by default what it takes unasked."""


def main(arguments: Sequence[str]) -> None:
    """Parses and prints; an adapter that does not fit is an error."""
    options = parse(CheckOptions, arguments, "check", "Say what a server would misread of an adapter.")
    findings = portable.check(options.adapter, options.target, max_rank=options.max_rank)
    for finding in findings:
        say(str(finding))
    if findings:
        raise ValueError(f"{options.adapter} does not fit {options.target} as it is")
    say(f"{options.adapter} fits {options.target} as it is")
