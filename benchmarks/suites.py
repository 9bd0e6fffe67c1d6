"""The suites: how each is run, in full and quickly, and how its JSON becomes figures."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.figures import Figure, counted, read


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


# ===== suites whose JSON has a form of its own =====

OURS = ("ZeroOptimizer 1", "ZeroOptimizer 2", "ZeroOptimizer 2, sockets")
DDP = "DDP + AdamW"


def zero_figures(data: dict[str, Any]) -> list[Figure]:
    """benchmarks.zero: {"steps, 2 ranks": {contender: figures}, "memory, 2 ranks": ...,
    "tokens, 2 ranks": {tokens: {contender: figures}}, "paper": ...}."""
    found = []
    for section, rows in data.items():
        what, _, ranks = section.partition(", ")
        if what == "tokens":
            found += [f for tokens, row in rows.items() for f in _by_tokens(row, f"{ranks}, {tokens} tokens a rank")]
        elif what in ("steps", "memory"):
            peers = [name for name in rows if name not in OURS and "again" not in name and "passes" not in name]
            for ours in filter(rows.__contains__, OURS):
                for peer in peers:
                    found += (_steps if what == "steps" else _memory)(rows, ours, peer, ranks)
    return sorted(found, key=lambda figure: figure.group)


def _steps(rows: dict[str, Any], ours: str, peer: str, ranks: str) -> list[Figure]:
    mine, theirs, name = rows[ours], rows[peer], f"{ours}, {ranks}, beside {peer}"
    return [
        Figure(group="step time", name=name, unit="ms", ours=mine["ms"], peer=peer, theirs=theirs["ms"],
               advantage=theirs["time"] / mine["time"], noise=rows[f"{DDP} again"]["noise"]),
        counted("bytes sent in a step", name, "x the parameters", mine["sent"], peer, theirs["sent"]),
        counted("optimizer state on the fullest rank", name, "x the ideal", mine["state"], peer, theirs["state"]),
    ]  # fmt: skip


def _memory(rows: dict[str, Any], ours: str, peer: str, ranks: str) -> list[Figure]:
    group, name, unit = "peak memory of a step above the model's", f"{ours}, {ranks}, beside {peer}", "x the parameters"
    return [counted(group, name, unit, rows[ours]["peak"], peer, rows[peer]["peak"], noise=0.05)]


def _by_tokens(rows: dict[str, Any], where: str) -> list[Figure]:
    """Beside the two peers that each turn holds twice."""
    return [
        Figure(group="step time by tokens", name=f"{ours}, {where}, beside {peer}", unit="ms",
               ours=1e3 * rows[ours]["seconds"], peer=peer, theirs=1e3 * rows[peer]["seconds"],
               advantage=1 / rows[ours][f"time / {short}"], noise=rows[ours][f"noise of {short}"])
        for ours in filter(rows.__contains__, OURS)
        for short, peer in (("DDP", DDP), ("DeepSpeed", "DeepSpeed 2"))
        if peer in rows
    ]  # fmt: skip


def kernel_figures(data: Any) -> list[Figure]:
    """benchmarks.kernels --static: rows with instructions_a_weight, one for each kernel and target, and rows with
    launches, one for each operation; in a list, or in lists under keys of a dict. What else is there is passed over."""
    lists = [data] if isinstance(data, list) else list(data.values())
    rows = [row for rows in lists if isinstance(rows, list) for row in rows if isinstance(row, dict)]
    found = []
    for row in rows:
        if row.get("instructions_a_weight") is not None:
            aim = row.get("aim")
            group, ours = f"instructions for a weight, {row['target']}", row["instructions_a_weight"]
            found.append(counted(group, row["kernel"], "", ours, None if aim is None else "the aim", aim))
        if row.get("spills"):
            found.append(counted("registers spilled", f"{row['kernel']}, {row['target']}", "", row["spills"]))
        if row.get("launches") is not None:
            found.append(counted("launches of one call", row["name"], "", row["launches"]))
    if not found:
        raise ValueError("no rows with instructions_a_weight")
    return sorted(found, key=lambda figure: figure.group)


SUITES = {
    suite.module: suite
    for suite in (
        Suite("finetune", "End to end: fine-tuning SmolLM2-135M"),
        Suite("layers", "Layers: a step of one adapted linear layer"),
        Suite("nf4", "Number format: NF4 encoding and decoding"),
        Suite("zero", "Sharding: ZeroOptimizer on real processes", full=("--worlds", "2", "4", "--turns", "9"),
              figures=zero_figures, threaded=False),
        Suite("kernels", "Kernels: machine code for GPUs that are not at hand", full=("--static",),
              quick=("--static", "--targets", "sm_90", "--kernels", "bfloat16"), figures=kernel_figures,
              threaded=False),
        Suite("startup", "Start-up, and lines of code"),
    )
}  # fmt: skip
