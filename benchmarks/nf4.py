"""NF4 encoding and decoding on the CPU beside bitsandbytes (and torchao, if it is installed): time, and extra memory.

    python benchmarks/nf4.py [--rows 3072 --columns 3072] [--turns 15] [--threads 1]

Time: each turn runs phicore, the other, and phicore again. The ratio is the median over the turns of other / phicore,
the noise the median of phicore / phicore with its spread. Both are warmed before. Each decodes what it encoded.

Memory: a fresh process for each figure. After a small and a whole call the allocator gives back what it has kept, the
kernel's high-water mark of resident memory is reset, and read after one more call. The result is part of the figure, so
its bytes are printed beside. Linux only.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BLOCK_SIZE = 64
Call = Callable[[], Any]


# ===== the libraries: (encode, decode of what it gave) =====


def phicore_calls(weight: torch.Tensor, double_quant: bool) -> tuple[Call, Callable[[Any], Any]]:
    import phicore

    return (
        lambda: phicore.nf4.quantize(weight, BLOCK_SIZE, double_quant),
        lambda q: q.dequantize(),
    )


def bitsandbytes_calls(weight: torch.Tensor, double_quant: bool) -> tuple[Call, Callable[[Any], Any]]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return (
        lambda: quantize_4bit(weight, blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=double_quant),
        lambda coded: dequantize_4bit(*coded),
    )


def torchao_calls(weight: torch.Tensor, double_quant: bool) -> tuple[Call, Callable[[Any], Any]]:
    # Always double-quantised, and another format: levels of four digits, scales in linear int8.
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    return lambda: to_nf4(weight, BLOCK_SIZE), lambda q: q.get_original_weight()


LIBRARIES = {"phicore": phicore_calls, "bitsandbytes": bitsandbytes_calls, "torchao": torchao_calls}


# ===== time =====


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(ours: Call, theirs: Call, turns: int) -> dict[str, float]:
    """Medians over alternating turns of ours, theirs and ours again."""
    for call in (ours, theirs, ours, theirs):
        call()
    timed = [(seconds(ours), seconds(theirs), seconds(ours)) for _ in range(turns)]
    again = sorted(c / a for a, _, c in timed)
    return {
        "ours_ms": 1e3 * statistics.median(a for a, _, _ in timed),
        "theirs_ms": 1e3 * statistics.median(b for _, b, _ in timed),
        "ratio": statistics.median(b / ((a + c) / 2) for a, b, c in timed),
        "noise": statistics.median(again),
        "noise_low": again[len(again) // 10],
        "noise_high": again[-1 - len(again) // 10],
    }


# ===== memory, in a process of its own =====


def status(field: str) -> int:
    """Bytes that /proc/self/status gives for a field."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def extra_memory(library: str, what: str, dtype: str, double_quant: bool, rows: int, columns: int) -> int:
    """Bytes by which resident memory rises at most during a call, above what was resident before it."""
    torch.set_num_threads(1)
    for size in ((512, 512), (rows, columns)):
        weight = torch.randn(size).to(DTYPES[dtype])
        encode, decode = LIBRARIES[library](weight, double_quant)
        coded = encode()
        decode(coded)
    if what == "encode":
        del coded
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    result = encode() if what == "encode" else decode(coded)
    after = status("VmHWM") - before
    del result
    return after


def in_fresh_process(*arguments: Any) -> float:
    command = [sys.executable, __file__, "--memory", json.dumps(arguments)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return int(run.stdout.splitlines()[-1]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="NF4 encoding and decoding beside bitsandbytes.")
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--columns", type=int, default=3072)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(extra_memory(*options.memory))
        return
    torch.set_num_threads(options.threads)
    peers = ["bitsandbytes"]
    try:
        torchao_calls(torch.zeros(64, 64), True)
        peers.append("torchao")
    except ImportError as error:
        print(f"without torchao: {error}")
    print(f"{options.rows * options.columns / 1e6:.1f}M weights, {torch.get_num_threads()} thread(s)")
    print(f"{'':46} {'phicore':>9} {'other':>9} {'other/phicore':>13}  phicore/phicore (noise, 10 % to 90 %)")
    for dtype in DTYPES:
        weight = torch.randn(options.rows, options.columns).to(DTYPES[dtype])
        for double_quant in (False, True):
            encode, decode = phicore_calls(weight, double_quant)
            coded = encode()
            for peer in peers:
                if peer == "torchao" and not double_quant:
                    continue
                their_encode, their_decode = LIBRARIES[peer](weight, double_quant)
                their_coded = their_encode()
                for what, ours, theirs in (
                    ("encode", encode, their_encode),
                    ("decode", lambda: decode(coded), lambda: their_decode(their_coded)),  # noqa: B023 (called at once)
                ):
                    found = compare(ours, theirs, options.turns)
                    print(
                        f"{what} {dtype:9} {'double' if double_quant else 'single':7} beside {peer:14}"
                        f"{found['ours_ms']:>12.2f} {found['theirs_ms']:>9.2f} ms {found['ratio']:>10.2f}  "
                        f"{found['noise']:>7.3f} ({found['noise_low']:.2f} to {found['noise_high']:.2f})",
                        flush=True,
                    )
    print("\nextra resident memory at its peak, result included, MB")
    for dtype in DTYPES:
        for what in ("encode", "decode"):
            figures = [
                f"{library} {in_fresh_process(library, what, dtype, True, options.rows, options.columns):.1f}"
                for library in ("phicore", *peers)
            ]
            n = options.rows * options.columns
            size = n / 2 + n / BLOCK_SIZE if what == "encode" else n * DTYPES[dtype].itemsize
            print(f"{what} {dtype:9} double: {', '.join(figures)}; the result has {size / 1e6:.1f}", flush=True)


if __name__ == "__main__":
    main()
