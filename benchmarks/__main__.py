"""`python -m benchmarks`: measures phicore beside its peers and writes where it stands.

Runs suites one after the other, each in processes of its own with a fixed number of threads; writes one JSON file with
the machine and all versions, prints one table, draws the pictures and writes docs/benchmarks.md from the file.

    python -m benchmarks [--suite finetune layers nf4 zero kernels startup] [--quick] [--output FILE] [--docs DIR]

All suites together write benchmarks/results/full.json (quick.json) and docs/; a part of them writes into
runs/benchmarks, so that the committed document stays whole. A suite that fails is named at the end, in the file and in
the document, and makes the exit status 1.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.figures import number, read
from benchmarks.machine import ROOT, commit, machine, versions
from benchmarks.suites import SUITES


def run_suite(name: str, *, quick: bool, threads: int) -> dict[str, Any]:
    """Settings, figures and seconds of a suite; or, with what came before it failed, the error in one line."""
    suite = SUITES[name]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "figures.json"
        command = suite.command(str(output), quick=quick, threads=threads)
        # What it prints is the user's to see; its standard error too, and the last line of that is the reason.
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            last = ""
            for line in process.stderr:
                sys.stderr.write(line)
                last = line.strip() or last
        seconds = round(time.perf_counter() - start, 1)
        if process.returncode:
            return {"seconds": seconds, "failed": f"exit status {process.returncode}: {_without_paths(last)}"}
        try:
            data = json.loads(output.read_text())
            figures = suite.figures(data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return {"seconds": seconds, "failed": _without_paths(f"its JSON is not as expected: {error!r}")}
    settings = data.get("settings", {}) if isinstance(data, dict) else {}
    return {"seconds": seconds, "settings": settings, "figures": [asdict(figure) for figure in figures]}


def _without_paths(text: str) -> str:
    """Files of a machine by their last part only."""
    return re.sub(r"(?<![\w.])(?:/[\w.+-]+)+/", "", text)


def measure(names: list[str], output: Path, *, quick: bool, threads: int) -> dict[str, Any]:
    """Runs suites; the file is written anew after each, so that a run that is cut short keeps what it has."""
    result: dict[str, Any] = {
        "quick": quick,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "threads": threads,
        "machine": machine(),
        "versions": versions(),
        "suites": {},
    }
    for name in names:
        print(f"===== {name}: {SUITES[name].title} =====", flush=True)
        result["suites"][name] = run_suite(name, quick=quick, threads=threads)
        output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="phicore beside its peers", title_justify="left")
    for column in ("suite", "measured", "of", "phicore", "peer", "", "times better", "noise"):
        table.add_column(column, justify="right" if column in ("phicore", "", "times better", "noise") else "left")
    for name, suite in result["suites"].items():
        for figure in read(suite.get("figures", [])):
            table.add_row(
                name, figure.group, figure.name, f"{number(figure.ours)} {figure.unit}", figure.peer or "",
                number(figure.theirs), f"{figure.advantage:.2f}" if figure.advantage else "-", f"{figure.noise:.1%}",
            )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--suite", nargs="+", choices=list(SUITES), default=list(SUITES), help="default: all")
    parser.add_argument("--quick", action="store_true", help="smaller and noisier, for a look")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="the JSON file")
    parser.add_argument("--docs", type=Path, help="where benchmarks.md and its pictures go")
    options = parser.parse_args(arguments)
    whole = set(options.suite) == set(SUITES)
    results = ROOT / ("benchmarks/results" if whole else "runs/benchmarks")
    output = options.output or results / ("quick.json" if options.quick else "full.json")
    docs = options.docs or (ROOT / "docs" if whole else results)
    start = time.perf_counter()
    output.parent.mkdir(parents=True, exist_ok=True)
    result = measure(options.suite, output, quick=options.quick, threads=options.threads)
    print_table(result)
    report.write(output, docs)
    print(f"written: {output}, {docs / 'benchmarks.md'} and its pictures; {time.perf_counter() - start:.0f} s in all")
    failed = {name: suite["failed"] for name, suite in result["suites"].items() if "failed" in suite}
    for name, why in failed.items():
        print(f"suite {name} FAILED: {why}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
