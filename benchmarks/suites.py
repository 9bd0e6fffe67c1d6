"""The suites: how each is run, in full and quickly, and how its JSON becomes figures."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.figures import Figure, read


@dataclass(frozen=True)
class Suite:
    """A suite is a module of this package that takes --json FILE.

    Attributes:
        module: after `python -m benchmarks.`.
        title: what it is about, in words.
        full, quick: options of the two forms.
        figures: the module's JSON as figures; the default is for modules that write figures themselves.
        threaded: whether it takes --threads.
    """

    module: str
    title: str
    full: Sequence[str] = ()
    quick: Sequence[str] = ("--quick",)
    figures: Callable[[Any], list[Figure]] = field(default=lambda data: read(data["figures"]))
    threaded: bool = True

    def command(self, output: str, *, quick: bool, threads: int) -> list[str]:
        options = [*(self.quick if quick else self.full), "--json", output]
        if self.threaded:
            options += ["--threads", str(threads)]
        return [sys.executable, "-m", f"benchmarks.{self.module}", *options]


SUITES = {
    "layers": Suite("layers", "Layers: a step of one adapted linear layer"),
    "nf4": Suite("nf4", "Number format: NF4 encoding and decoding"),
}
