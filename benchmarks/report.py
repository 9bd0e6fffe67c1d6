"""`python -m benchmarks.report FILE [--docs docs]`: writes benchmarks.md and its pictures from a result file."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, number, read
from benchmarks.machine import ROOT
from benchmarks.suites import SUITES

INTRODUCTION = """\
How to read it: each bar says how many times better phicore is than what stands behind "beside": right of 1 it is
better, left of 1 worse; blue beyond the noise, grey within it, red worse beyond it. The band around 1 is the noise: how
far apart the peer and the peer again lie in the same measure. Times and their ratios are medians over alternating turns
(peer, phicore, peer again) in one run with a fixed number of threads. "Times better" is the median of the ratios within
turns, and not the ratio of the two medians beside it: where the machine's load changes between turns, the two differ.
What is counted (bytes, graphs, lines) has no noise. `make bench` measures all of this anew, `make bench SUITE=layers
QUICK=1` a part of it in little time, and `python -m benchmarks.compare OLD NEW` lists what got worse between two result
files."""


def markdown(result: dict[str, Any], source: str) -> str:
    """The document, from the result file's content alone; `source` is the file's name in the repository."""
    return "\n\n".join(["# phicore beside its peers", _head(result, source), INTRODUCTION, *_sections(result)]) + "\n"


def _head(result: dict[str, Any], source: str) -> str:
    machine, versions = result["machine"], result["versions"]
    flags = ", ".join(machine["flags"]) or "none that matter"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    minutes = sum(suite["seconds"] for suite in result["suites"].values()) / 60
    lines = [
        f"Made from `{source}` by `benchmarks/report.py`; do not edit.",
        f"Measured on {result['date']} at commit {result['commit']}, in {minutes:.1f} minutes with {result['threads']} "
        f"threads, on {machine['cpu']} ({machine['cores']} cores, {machine['memory_gib']} GiB; {flags}"
        f"{'; ' + ', '.join(machine['gpus']) if machine['gpus'] else '; no GPU'}). {packages}.",
    ]
    if result["quick"]:
        lines.insert(1, "**This is the quick form: few turns and small sizes, so its figures are noisy.**")
    absent = [name for name, version in versions.items() if version is None]
    if absent:
        lines.append(f"Not installed, and so not compared with: {', '.join(absent)}.")
    unmeasured = [name for name in SUITES if name not in result["suites"]]
    if unmeasured:
        lines.append(f"Suites that this file does not have: {', '.join(unmeasured)}.")
    return "\n\n".join(lines)


def _sections(result: dict[str, Any]) -> list[str]:
    sections = []
    for name, suite in result["suites"].items():
        sections.append(f"## {SUITES[name].title}")
        if "failed" in suite:
            sections.append(f"**This suite failed: {suite['failed']}**")
            continue
        if suite["settings"]:
            sections.append("; ".join(f"{key}: {_plain(value)}" for key, value in suite["settings"].items()) + ".")
        sections.append(f"![{SUITES[name].title}](benchmarks/{name}.png)")
        sections.append(_table(read(suite["figures"])))
    return sections


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(figures: Sequence[Figure]) -> str:
    rows = ["| measured | of | phicore | beside | its value | times better | noise |", "|---|---|--:|---|--:|--:|--:|"]
    for f in figures:
        advantage = "" if f.advantage is None else f"{f.advantage:.2f}"
        noise = "" if f.peer is None or not f.noise else f"{f.noise:.1%}"
        theirs = "" if f.theirs is None else f"{number(f.theirs)} {f.unit}".strip()
        ours = f"{number(f.ours)} {f.unit}".strip()
        rows.append(f"| {f.group} | {f.name} | {ours} | {f.peer or ''} | {theirs} | {advantage} | {noise} |")
    return "\n".join(rows)


BETTER, EVEN, WORSE, BAND = "#2b6cb0", "#8a8f98", "#c53030", "#d9dde3"


def picture(title: str, figures: Sequence[Figure], path: Path) -> None:
    """A panel for each group: bars of the advantage on a log scale, or of the values where there is no peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple[str, bool], list[Figure]] = {}  # figures that stand alone apart from those beside a peer
    for figure in figures:
        groups.setdefault((figure.group, figure.peer is not None), []).append(figure)
    rows = [len(members) for members in groups.values()]
    drawn, panels = pyplot.subplots(
        len(groups), 1, figsize=(10, 0.8 + sum(0.27 * n + 0.75 for n in rows)), squeeze=False,
        gridspec_kw={"height_ratios": [n + 1.2 for n in rows]}, layout="constrained",
    )  # fmt: skip
    for axes, ((group, beside_peer), members) in zip(panels[:, 0], groups.items(), strict=True):
        axes.set_title(group, loc="left", fontsize=10, fontweight="bold")
        axes.set_yticks(range(len(members)), [f"{f.name}" for f in members], fontsize=8)
        axes.set_ylim(len(members) - 0.4, -0.6)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(left=False, labelsize=8)
        (_advantages if beside_peer else _values)(axes, members)
    drawn.suptitle(title, x=0.01, ha="left", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(drawn)


def _advantages(axes: Any, figures: Sequence[Figure]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    known = [f.advantage for f in figures if f.advantage]
    low, high = min([*known, 0.8]) / 1.1, max([*known, 1.25]) * 1.1
    axes.set_xscale("log")
    axes.set_xlim(low, high * (high / low) ** 0.55)  # room for what is written behind the bars
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 1, 1.25, 2, 4, 8, 16, 32, 64, 128) if low <= t <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color="#eceef1", zorder=0)
    for i, f in enumerate(figures):
        axes.barh(i, 1 + f.noise - 1 / (1 + f.noise), left=1 / (1 + f.noise), height=0.95, color=BAND, zorder=1)
        text = f"{number(f.ours)} {f.unit}".strip()
        if f.peer is not None:
            text = f"{number(f.ours)} beside {number(f.theirs)} {f.unit}".rstrip()
            if f.peer not in f.name:
                text += f" ({f.peer})"
        if f.advantage:
            color = BETTER if f.advantage > 1 + f.noise else WORSE if f.advantage < 1 / (1 + f.noise) else EVEN
            axes.barh(i, f.advantage - 1, left=1, height=0.62, color=color, zorder=2)
            text = f"{f.advantage:.2f}x   {text}"
        axes.text(max(f.advantage or 1, 1 + f.noise) * 1.01, i, f" {text}", va="center", fontsize=7.5, zorder=3)
    axes.axvline(1, color="black", linewidth=0.8, zorder=4)


def _values(axes: Any, figures: Sequence[Figure]) -> None:
    axes.barh(range(len(figures)), [f.ours for f in figures], height=0.62, color=EVEN)
    for i, f in enumerate(figures):
        axes.text(f.ours, i, f" {number(f.ours)} {f.unit}", va="center", fontsize=7.5)
    axes.set_xlim(0, 1.25 * max(f.ours for f in figures) or 1)


def write(source: Path, docs: Path) -> None:
    """Writes docs/benchmarks.md and docs/benchmarks/*.png from a result file."""
    result = json.loads(source.read_text())
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "benchmarks.md").write_text(markdown(result, name_in_repository(source)))
    for name, suite in result["suites"].items():
        if "failed" not in suite:
            picture(SUITES[name].title, read(suite["figures"]), docs / "benchmarks" / f"{name}.png")


def name_in_repository(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args(arguments)
    write(options.file, options.docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
