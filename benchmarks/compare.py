"""`python -m benchmarks.compare OLD NEW`: figures of two result files that got worse by more than the noise of both.

A figure beside a peer is compared by its advantage over that peer, which another machine or load changes least; one
that stands alone, by its value. Exits 1 when something got worse, or is no longer there.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, number, read

SLACK = 0.02  # what noise of zero, and medians of few turns, leave out


def by_name(result: dict[str, Any]) -> dict[tuple[str, str, str, str | None], Figure]:
    return {
        (suite, figure.group, figure.name, figure.peer): figure
        for suite, found in result["suites"].items()
        for figure in read(found.get("figures", []))
    }


def merit(figure: Figure) -> float | None:
    """Higher is better; None where there is no figure to compare by."""
    if figure.advantage is not None:
        return figure.advantage
    if figure.peer is not None or figure.ours <= 0:
        return None
    return figure.ours if figure.better == "higher" else 1 / figure.ours


def worse(old: Figure, new: Figure) -> float | None:
    """How many times worse new is than old, where that is beyond the noise of both; else None."""
    before, after = merit(old), merit(new)
    if before is None or after is None:
        return None
    noise = old.noise + new.noise + (SLACK if old.noise or new.noise else 0)
    return before / after if before / after > 1 + noise + 1e-9 else None


def regressions(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each figure that got worse and for each suite or figure that is no longer there."""
    lines = [f"suite {name} failed: {found['failed']}" for name, found in new["suites"].items() if "failed" in found]
    missing = [name for name in old["suites"] if name not in new["suites"]]
    lines += [f"suite {name} is not in the new file" for name in missing]
    before, after = by_name(old), by_name(new)
    for key, figure in before.items():
        suite, group, name, peer = key
        where = f"{suite}: {group}, {name}" + (f" beside {peer}" if peer else "")
        if key not in after:
            if suite not in missing and "failed" not in new["suites"][suite]:
                lines.append(f"{where}: no longer there")
            continue
        factor = worse(figure, after[key])
        if factor is not None:
            now = after[key]
            advantage = ""
            if figure.advantage and now.advantage:
                advantage = f", {figure.advantage:.3f} -> {now.advantage:.3f} times better than the peer"
            lines.append(
                f"{where}: {factor:.2f} times worse ({number(figure.ours)} -> {number(now.ours)} {now.unit}{advantage}"
                f"; noise {figure.noise:.1%} and {now.noise:.1%})"
            )
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    old, new = (json.loads(path.read_text()) for path in (options.old, options.new))
    if old["quick"] != new["quick"]:
        print("one file is of the quick form and the other is not: their figures do not compare", file=sys.stderr)
        return 2
    if old["machine"] != new["machine"]:
        print("note: the machines differ; only figures beside a peer say something")
    lines = regressions(old, new)
    print("\n".join(lines) or f"nothing got worse beyond the noise, of {len(by_name(new))} figures")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
