"""`python -m benchmarks.kernels --static`: what the kernels cost, read from the machine code made for GPUs not at hand.

For each kernel and target: instructions for each weight in the hottest loop (in the whole kernel where nothing loops),
those of the memory pipe apart (they issue at a quarter of the rate), registers, spills, shared memory, warps that fit
on a multiprocessor, tensor-core instructions. Writes static.json and static.png.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from phicore_kernels.aot import TARGETS, Compiled, compile_launch
from phicore_kernels.catalogue import Entry, catalogue

MEMORY_PIPE = re.compile(r"^(LD|ST|ATOM|RED|SHFL|MATCH|UBLKCP)")
TENSOR_CORES = re.compile(r"^(HMMA|HGMMA|UTC\w*MMA)")
# CUDA C++ Programming Guide, compute capabilities: warps, and KiB of shared memory, on a multiprocessor.
MULTIPROCESSOR = {
    "sm_75": (32, 64), "sm_80": (64, 164), "sm_86": (48, 100), "sm_89": (48, 100), "sm_90": (64, 228),
    "sm_100": (64, 228), "sm_120": (48, 100),
}  # fmt: skip
# Targets of the project on sm_90, in instructions for a weight.
AIMS = {
    "dequantize bfloat16": 8.0,
    "encode_blocks bfloat16": 25.0,
    "matmul forward bfloat16 16x128x128 split 16": 5.5,
    "matmul forward bfloat16 32x64x128 split 8": 7.5,
    "matmul forward bfloat16 128x128x64": 9.0,
    "matmul backward bfloat16 128x128x64": 9.0,
}
# 4 bits, 8 bits a block of 64, 32 bits a nested block of 256 blocks: what any kernel must read.
MINIMUM_BYTES = 0.5 + 1 / 64 + 4 / 16384


def row(entry: Entry, compiled: Compiled) -> dict[str, Any]:
    """The figures of one kernel on one target; None where they are not known for it (AMD) or make no sense."""
    figures: dict[str, Any] = {"target": compiled.target, "kernel": entry.name, **compiled.resources}
    figures |= {"shared_bytes": compiled.shared, "warps_a_multiprocessor": None, "tensor_core_instructions": None}
    figures |= {"instructions_a_weight": None, "memory_instructions_a_weight": None, "aim": None}
    if compiled.target.startswith("gfx"):
        return figures
    loop = compiled.hot_loop()
    opcodes = compiled.opcodes(loop)
    figures["tensor_core_instructions"] = sum(n for name, n in opcodes.items() if TENSOR_CORES.match(name))
    figures["warps_a_multiprocessor"] = occupancy(compiled)
    if entry.weights:
        a_thread = entry.weights / compiled.threads
        memory = sum(n for name, n in opcodes.items() if MEMORY_PIPE.match(name) and not name.startswith("LDGDEPBAR"))
        figures["instructions_a_weight"] = round(len(loop) / a_thread, 2)
        figures["memory_instructions_a_weight"] = round(memory / a_thread, 2)
    if compiled.target == "sm_90":
        figures["aim"] = AIMS.get(entry.name)
    return figures


def occupancy(compiled: Compiled) -> int:
    """Warps that fit on a multiprocessor: bounded by 65,536 registers (given in eights a thread), shared memory (with
    1 KiB of the system's for each program) and the hardware's own limit."""
    limit, shared = MULTIPROCESSOR[compiled.target]
    warps = compiled.threads // 32
    registers = -(-compiled.resources["registers"] // 8) * 8
    programs = min(65536 // (registers * compiled.threads), limit // warps, (shared << 10) // (compiled.shared + 1024))
    return programs * warps


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        f"{'target':8} {'kernel':56} {'inst/w':>7} {'mem/w':>6} {'aim':>5} {'regs':>5} {'spills':>6} {'shared':>7}"
    ]
    for r in rows:
        cells = (r["instructions_a_weight"], r["memory_instructions_a_weight"], r["aim"])
        total, memory, aim = ("-" if cell is None else f"{cell:g}" for cell in cells)
        missed = " missed" if r["aim"] is not None and r["instructions_a_weight"] > r["aim"] else ""
        lines.append(
            f"{r['target']:8} {r['kernel']:56} {total:>7} {memory:>6} {aim:>5} {r['registers']:5} {r['spills']:6} "
            f"{r['shared_bytes']:7}{missed}"
        )
    return "\n".join([*lines, f"bytes to read for a weight: {MINIMUM_BYTES:.3f}"])


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of instructions a weight on sm_90, the memory pipe's darker, aims as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in rows if r["target"] == "sm_90" and r["instructions_a_weight"] is not None]
    names = [r["kernel"] for r in shown]
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.28 * len(shown)))
    axes.barh(names, [r["instructions_a_weight"] for r in shown], color="#9ecae1", label="all")
    axes.barh(names, [r["memory_instructions_a_weight"] for r in shown], color="#3182bd", label="memory pipe")
    aims = [(r["aim"], i) for i, r in enumerate(shown) if r["aim"] is not None]
    axes.scatter([a for a, _ in aims], [i for _, i in aims], marker="|", s=200, color="#d62728", label="aim")
    axes.invert_yaxis()
    axes.set_xlabel("instructions for a weight, sm_90")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--static", action="store_true", required=True, help="read machine code; needs no GPU")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=["sm_80", "sm_90"])
    parser.add_argument("--kernels", default="", help="only kernels whose name holds this text")
    parser.add_argument("--output", type=Path, default=Path("runs/kernels"))
    parser.add_argument("--json", type=Path, help="write the JSON here too")
    options = parser.parse_args(arguments)
    rows = [
        row(entry, compile_launch(entry.launch, target))
        for target in options.targets
        for entry in catalogue(target)
        if options.kernels in entry.name
    ]
    if not rows:
        print(f"no kernel's name holds {options.kernels!r}", file=sys.stderr)
        return 1
    print(table(rows))
    options.output.mkdir(parents=True, exist_ok=True)
    for file in [options.output / "static.json", *([options.json] if options.json else [])]:
        file.write_text(json.dumps(rows, indent=1))
    picture(rows, options.output / "static.png")
    print(f"written: {options.output}/static.json, static.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
