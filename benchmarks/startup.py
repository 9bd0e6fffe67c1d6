"""What it takes to start: `import phicore` beside `import torch`; a process's way to the end of its first step of
fine-tuning, beside transformers and PEFT; and the lines of code that a reader has before them.

    python -m benchmarks.startup [--quick] [--json FILE]
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import figures, finetune, lines
from benchmarks.figures import Figure
from benchmarks.layers import peer_name
from benchmarks.pairs import compare


def importing(module: str) -> None:
    """A fresh interpreter that imports a module."""
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, stderr=subprocess.DEVNULL)


def first_step(who: str, method: str, options: argparse.Namespace) -> None:
    """A process that loads the demo's model and data, attaches an adapter and takes one step."""
    with finetune.Side(who, method, options) as side:
        side.answer()
        side.step()


def measure(options: argparse.Namespace) -> list[Figure]:
    pair = compare(lambda: importing("phicore"), lambda: importing("torch"), options.turns, warm_ups=1)
    print(f"import phicore / import torch {pair}", flush=True)
    found = [figures.timed("import", "import phicore", "import torch", pair, unit="s")]
    for method in options.methods:
        start = time.perf_counter()
        pair = compare(
            lambda: first_step("phicore", method, options),  # noqa: B023 (called at once)
            lambda: first_step("peft", method, options),  # noqa: B023
            options.first_steps,
            warm_ups=0 if options.quick else 1,  # reads the files once
        )
        found.append(
            figures.timed("from process start to the first step done", method, peer_name(method), pair, unit="s")
        )
        print(f"first step of {method} / peft {pair}; {time.perf_counter() - start:.0f} s", flush=True)
    return found + lines.measure()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--methods", nargs="+", choices=finetune.METHODS, default=["qlora"])
    parser.add_argument("--turns", type=int, default=5, help="of imports")
    parser.add_argument("--first-steps", type=int, default=2, help="turns of first steps")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if not finetune.MODEL.is_dir():
        raise SystemExit("the demo's model and data are missing; run `make demo-data` first")
    if options.quick:
        options.turns, options.first_steps = 2, 1
    dtype, why = figures.dtype(options.dtype)
    options.dtype = str(dtype).removeprefix("torch.")
    options.steps, options.batch_size, options.eval_examples = 1, 2, 1
    found = measure(options)
    if options.json:
        figures.write(options.json, {"dtype": f"{options.dtype} ({why})", "turns of imports": options.turns}, found)


if __name__ == "__main__":
    main()
