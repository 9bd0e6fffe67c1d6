"""Prints what `import phicore` costs beside `import torch`: medians of alternating fresh processes."""

import statistics
import subprocess
import sys
import time

PAIRS = 7


def seconds(module: str) -> float:
    """Wall seconds of a fresh interpreter that imports a module."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def main() -> None:
    seconds("phicore")  # warms the file cache and writes bytecode
    turns = [(seconds("torch"), seconds("phicore"), seconds("torch")) for _ in range(PAIRS)]
    ratio = statistics.median(ours / torch for torch, ours, _ in turns)
    noise = statistics.median(again / torch for torch, _, again in turns)
    torch_seconds = statistics.median(torch for torch, _, _ in turns)
    print(f"import torch {torch_seconds:.2f} s; phicore / torch {ratio:.3f}; torch / torch (noise) {noise:.3f}")


if __name__ == "__main__":
    main()
