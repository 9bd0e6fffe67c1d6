"""The kernels beside their peers: times on the GPU at hand, or with --static what their machine code says without one.

    python -m benchmarks.kernels [--quick] [--json FILE] [--output DIR]
    python -m benchmarks.kernels --static [--targets sm_90 gfx942 ...] [--kernels TEXT] [--json FILE] [--output DIR]

On a GPU: triton.testing.do_bench of every product, forward and backward, over M and the layers of three models, beside
bitsandbytes, dense cuBLAS and the roofline (benchmarks/kernel_times.py). It writes times.json and a picture for each
operation.

--static: for each kernel and target, instructions for each weight in the hottest loop (in the whole kernel where
nothing loops), those of the memory pipe apart (they issue at a quarter of the rate), bytes read for a weight,
registers, spills, shared memory, occupancy and tensor-core instructions; and for each operation its launches and
temporary memory. bitsandbytes' kernels stand beside, read from its installed library. It writes static.json and
static.png.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import kernel_code, kernel_peers
from phicore_kernels.aot import TARGETS, compile_launch
from phicore_kernels.catalogue import catalogue

# Targets of the project on sm_90, in instructions for a weight.
AIMS = {
    "dequantize bfloat16": 8.0,
    "encode_blocks bfloat16": 25.0,
    "matmul forward bfloat16 16x128x128 split 16": 5.5,
    "matmul forward bfloat16 32x64x128 split 8": 7.5,
    "matmul forward bfloat16 128x128x64": 9.0,
    "matmul backward bfloat16 128x128x64": 9.0,
}


def static(targets: list[str], kernels: str = "") -> dict[str, Any]:
    """The report: "kernels" of this package whose name holds a text, "peers", "operations" and "notes"."""
    report: dict[str, Any] = {"kernels": [], "peers": [], "operations": [], "notes": []}
    for target in targets:
        report["kernels"] += [
            kernel_code.row(entry, compile_launch(entry.launch, target), AIMS.get(entry.name))
            for entry in catalogue(target)
            if kernels in entry.name
        ]
        peers, notes = kernel_peers.rows(target)
        report["peers"] += peers
        report["notes"] += [f"{target}: {note}" for note in notes]
    for row in report["kernels"]:
        row["aim"] = row["aim"] if row["target"] == "sm_90" else None
    report["operations"] = [asdict(operation) for operation in kernel_code.operations()]
    try:
        report["operations"] += [asdict(operation) for operation in kernel_peers.operations()]
    except ImportError as error:
        report["notes"].append(f"bitsandbytes' operations are not counted: {error}")
    report["minimum_bytes_a_weight"] = kernel_code.MINIMUM_BYTES
    return report


COLUMNS = (
    ("inst/w", "instructions_a_weight", "7.2f"), ("mem/w", "memory_instructions_a_weight", "6.2f"),
    ("aim", "aim", "5g"), ("bytes/w", "bytes_read_a_weight", "8.4f"), ("regs", "registers", "5"),
    ("spills", "spills", "7"), ("shared", "shared_bytes", "7"), ("warps", "warps_a_multiprocessor", "6"),
    ("occ", "occupancy", "5.0%"), ("MMA", "tensor_core_instructions", "4"),
)  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    widths = [max(len(title) + 1, len(f"{0:{form}}")) for title, _, form in COLUMNS]
    heads = "".join(f"{title:>{width}}" for (title, _, _), width in zip(COLUMNS, widths, strict=True))
    lines = [f"{'target':8} {'kernel':60}{heads}"]
    for row in report["kernels"] + report["peers"]:
        cells = ""
        for (_, key, form), width in zip(COLUMNS, widths, strict=True):
            cells += f"{'-' if row[key] is None else format(row[key], form):>{width}}"
        missed = " missed" if row["aim"] is not None and row["instructions_a_weight"] > row["aim"] else ""
        lines.append(f"{row['target']:8} {row['kernel']:60}{cells}{missed}")
    lines.append(f"least bytes to read for a weight: {report['minimum_bytes_a_weight']:.3f}")
    lines.append(
        "bitsandbytes' products take more shared memory at launch than is written: their occupancy is at most that"
    )
    lines.append(f"\n{'one call, 4096 x 4096, bfloat16':60}{'launches':>9}{'temporary MiB':>14}{'bytes/w':>9}")
    for row in report["operations"]:
        temporary = row["temporary_bytes"] / 2**20
        lines.append(f"{row['name']:60}{row['launches']:>9}{temporary:>14.2f}{row['bytes_read_a_weight']:>9.3f}")
    return "\n".join(lines + [f"note: {note}" for note in report["notes"]])


def picture(report: dict[str, Any], path: Path, target: str) -> None:
    """Bars of instructions a weight on a target, the memory pipe's darker, peers' grey, aims as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in report["kernels"] + report["peers"] if r["target"] == target and r["instructions_a_weight"]]
    # What decodes weights one by one goes off the scale.
    shown = [r for r in shown if r["instructions_a_weight"] <= 110]
    names = [r["kernel"] for r in shown]
    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.24 * len(shown)))
    colours = [("#bdbdbd", "#636363") if "bitsandbytes" in name else ("#9ecae1", "#3182bd") for name in names]
    axes.barh(names, [r["instructions_a_weight"] for r in shown], color=[c for c, _ in colours], label="all")
    memory = [r["memory_instructions_a_weight"] for r in shown]
    axes.barh(names, memory, color=[c for _, c in colours], label="memory pipe")
    aims = [(r["aim"], i) for i, r in enumerate(shown) if r["aim"] is not None]
    axes.scatter([a for a, _ in aims], [i for _, i in aims], marker="|", s=200, color="#d62728", label="aim")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel(f"instructions for a weight, {target}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--static", action="store_true", help="read machine code; needs no GPU")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=["sm_80", "sm_90", "gfx942"])
    parser.add_argument("--kernels", default="", help="--static: only kernels whose name holds this text")
    parser.add_argument("--quick", action="store_true", help="times: one model and a few M")
    parser.add_argument("--output", type=Path, default=Path("runs/kernels"), help="directory for JSON and pictures")
    parser.add_argument("--json", type=Path, help="write the JSON here too")
    options = parser.parse_args(arguments)
    if not options.static:
        from benchmarks import kernel_times

        return kernel_times.main(options.output, options.json, quick=options.quick)
    report = static(options.targets, options.kernels)
    if not report["kernels"]:
        print(f"no kernel's name holds {options.kernels!r}", file=sys.stderr)
        return 1
    print(table(report))
    target = "sm_90" if "sm_90" in options.targets else options.targets[0]
    options.output.mkdir(parents=True, exist_ok=True)
    for file in [options.output / "static.json", *([options.json] if options.json else [])]:
        file.write_text(json.dumps(report, indent=1))
    picture(report, options.output / "static.png", target)
    print(f"written: {options.output}/static.json, static.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
