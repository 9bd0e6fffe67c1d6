"""NF4 on the CPU beside bitsandbytes and torchao: time, error and extra memory of encoding and decoding; time and
memory of quantizing a model's directory beside transformers with bitsandbytes.

    python -m benchmarks.nf4 [--quick] [--rows 3072 --columns 3072] [--turns 9] [--threads 2] [--json FILE]

Time: alternating turns of the peer, phicore and the peer again, all warmed before. Each decodes what it encoded.

Error: ||decoded - w|| / ||w|| of weights from a normal distribution, in float32.

Memory: a fresh process for each figure. After a small and a whole call the allocator gives back what it has kept, the
kernel's high-water mark of resident memory is reset, and read after one more call. The result is part of the figure.
Linux only.

torchao's NF4 is another format: levels of four digits, scales in linear int8, always double-quantised.
"""

import argparse
import ctypes
import json
import logging
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import figures, quantize_memory
from benchmarks.figures import Figure
from benchmarks.machine import compile_formulas, reset_peak, status
from benchmarks.pairs import compare

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BLOCK_SIZE = 64
# Of layers: a small model's attention and feed-forward, and those of larger ones. What a call costs shows in them.
SMALL = ((576, 576), (1536, 576), (1024, 1024), (2048, 2048))
Call = Callable[[], Any]
logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of GPU libraries that it does not load


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
PEERS = ("bitsandbytes", "torchao")


# ===== memory, in a process of its own =====


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
    reset_peak()
    result = encode() if what == "encode" else decode(coded)
    after = status("VmHWM") - before
    del result
    return after


def in_fresh_process(*arguments: Any) -> float:
    """Megabytes of `extra_memory` with these arguments."""
    command = [sys.executable, "-m", "benchmarks.nf4", "--memory", json.dumps(arguments)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return int(run.stdout.splitlines()[-1]) / 1e6


# ===== figures =====


def timed(options: argparse.Namespace) -> list[Figure]:
    """Encoding and decoding beside each peer that has the format."""
    found = []
    for dtype in options.dtypes:
        weight = torch.randn(options.rows, options.columns).to(DTYPES[dtype])
        for double_quant in (True,) if options.quick else (False, True):
            encode, decode = phicore_calls(weight, double_quant)
            coded = encode()
            for peer in PEERS:
                if peer == "torchao" and not double_quant:
                    continue
                their_encode, their_decode = LIBRARIES[peer](weight, double_quant)
                their_coded = their_encode()
                for what, ours, theirs in (
                    ("encode", encode, their_encode),
                    ("decode", lambda: decode(coded), lambda: their_decode(their_coded)),  # noqa: B023 (called at once)
                ):
                    pair = compare(ours, theirs, options.turns)
                    name = f"{dtype}{', double-quantised' if double_quant else ''}, beside {peer}"
                    found.append(figures.timed(f"time to {what}", name, peer, pair))
                    print(f"{what} {name:45} / peer {pair}", flush=True)
    return found


def small_weights(options: argparse.Namespace) -> list[Figure]:
    """Decoding the weights of single layers to float32, beside bitsandbytes."""
    found = []
    for rows, columns in SMALL:
        weight = torch.randn(rows, columns)
        for double_quant in (False, True):
            encode, decode = phicore_calls(weight, double_quant)
            their_encode, their_decode = bitsandbytes_calls(weight, double_quant)
            coded, their_coded = encode(), their_encode()
            pair = compare(lambda: decode(coded), lambda: their_decode(their_coded), 10 * options.turns)  # noqa: B023
            name = f"{rows} x {columns}, float32{', double-quantised' if double_quant else ''}"
            found.append(figures.timed("time to decode", name, "bitsandbytes", pair))
            print(f"decode {name:45} / bitsandbytes {pair}", flush=True)
    return found


def errors(options: argparse.Namespace) -> list[Figure]:
    """Relative error of a weight that went through the format."""
    weight = torch.randn(options.rows, options.columns)

    def error(library: str) -> float:
        encode, decode = LIBRARIES[library](weight, True)
        return float((decode(encode()) - weight).norm() / weight.norm())

    ours = error("phicore")
    return [
        figures.counted("error of normal weights, double-quantised", f"beside {peer}", "", ours, peer, error(peer))
        for peer in PEERS
    ]


def memory(options: argparse.Namespace) -> list[Figure]:
    """Extra memory of encoding and decoding, double-quantised."""
    found = []
    for dtype in options.dtypes:
        for what in ("encode", "decode"):
            taken = {
                library: in_fresh_process(library, what, dtype, True, options.rows, options.columns)
                for library in LIBRARIES
            }
            for peer in PEERS:
                name = f"{dtype}, beside {peer}"
                found.append(
                    figures.counted(
                        f"extra memory to {what}", name, "MB", taken["phicore"], peer, taken[peer], noise=0.05
                    )
                )
            print(f"{what} {dtype:9} extra MB: {', '.join(f'{k} {v:.1f}' for k, v in taken.items())}", flush=True)
    return found


def whole_model(options: argparse.Namespace) -> list[Figure]:
    """Quantizing a directory of bfloat16 weights into another one."""
    size = (1, 512, 1000) if options.quick else (4, 1536, 16_000)
    found = quantize_memory.beside_transformers(*size)

    def figure(what: str, field: str, unit: str, factor: float) -> Figure:
        ours, theirs = ([factor * run[field] for run in found[task]] for task in ("quantize", "quantize_peer"))
        noise = max(abs(second / first - 1) for first, second in (ours, theirs))
        values = statistics.mean(ours), "transformers + bitsandbytes", statistics.mean(theirs)
        return figures.counted("quantizing a model's directory", what, unit, *values, noise=noise)

    return [figure("time", "seconds", "s", 1.0), figure("peak memory", "VmHWM", "MB", 1e-6)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="1M weights, bfloat16, five turns, without memory of single calls"
    )
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--columns", type=int, default=3072)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--memory", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(extra_memory(*options.memory))
        return
    if options.quick:
        options.rows, options.columns, options.dtypes, options.turns = 1024, 1024, ["bfloat16"], 5
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    formulas = compile_formulas()
    found = [*timed(options), *errors(options), *whole_model(options)]
    if not options.quick:
        found += small_weights(options) + memory(options)
    if options.json:
        weights = f"{options.rows * options.columns / 1e6:.1f}M"
        settings = {"weights": weights, "block size": BLOCK_SIZE, "formulas": formulas, "turns": options.turns}
        figures.write(options.json, settings, found)


if __name__ == "__main__":
    main()
