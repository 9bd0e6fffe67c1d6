"""`python -m phicore_kernels.tune [--shapes N,K ...]`: times the products on this GPU and keeps what is fastest.

For each shape, direction and bucket of rows it times every config (see `autotune`), then both ways of a product: W
decoded inside with the best config, or dequantised first. It writes the configs and the crossover between the two ways.
It takes some minutes, most of them for compiling.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from phicore_kernels import cache
from phicore_kernels.autotune import Bench, Product, bench_on_device, fastest
from phicore_kernels.configs import Config
from phicore_kernels.crossover import crossover, default_crossover
from phicore_kernels.dequantize import dequantize
from phicore_kernels.device import Gpu, gpu_of
from phicore_kernels.matmul import linear, linear_dx
from phicore_kernels.weight import Weight, decode_mode

ROWS = (1, 4, 16, 32, 64, 128, 256, 512)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # [out, in]: an attention and two MLP layers of Llama-8B


def crossover_of(times: list[dict[str, float]]) -> int:
    """The last number of rows before decoding in the product first loses; times ascend in rows."""
    best = 0
    for entry in times:
        if entry["fused"] > entry["dequantized"]:
            break
        best = int(entry["rows"])
    return best


def tune(
    shapes: Iterable[tuple[int, int]],
    rows: Iterable[int],
    dtype: torch.dtype,
    device: torch.device,
    gpu: Gpu,
    bench: Bench,
    progress: Callable[[str], None] = print,
) -> tuple[dict[str, Config], list[dict[str, float]]]:
    """The fastest config by product, and for each number of rows the mean seconds of both ways over shapes and
    directions."""
    weights = [random_weight(n, k, device) for n, k in shapes]
    configs: dict[str, Config] = {}
    times = []
    for m in rows:
        fused, dequantized = [], []
        for weight in weights:
            for backward in (False, True):
                function = linear_dx if backward else linear
                summed, columns = (weight.rows, weight.columns) if backward else (weight.columns, weight.rows)
                mode = decode_mode(weight.packed, weight.columns, dtype)
                product = Product(backward, m, columns, summed, mode, dtype)
                if product.key not in configs:
                    config = fastest(product, gpu, _trial(function, weight, product.bucket, summed, dtype), bench)
                    configs[product.key] = config
                    tiles = "x".join(map(str, config[:3]))
                    progress(f"{product.key}: {tiles}, {config.num_warps} warps, split {config.split}")
                config, x = configs[product.key], torch.randn(m, summed, device=device).to(dtype)
                fused.append(bench(lambda f=function, x=x, w=weight, c=config: f(x, w, config=c)))  # type: ignore[misc]
                dequantized.append(bench(lambda x=x, w=weight, b=backward: _dense(x, w, b)))  # type: ignore[misc]
        times.append({"rows": m, "fused": statistics.mean(fused), "dequantized": statistics.mean(dequantized)})
    return configs, times


def _trial(
    function: Callable[..., Any], weight: Weight, m: int, summed: int, dtype: torch.dtype
) -> Callable[[Config], Any]:
    x = torch.randn(m, summed, device=weight.packed.device).to(dtype)
    return lambda config: function(x, weight, config=config)


def _dense(x: torch.Tensor, weight: Weight, backward: bool) -> torch.Tensor:
    dense = dequantize(weight, x.dtype)
    return x @ dense if backward else x @ dense.T


def random_weight(rows: int, columns: int, device: torch.device) -> Weight:
    """A double-quantised weight of random codes."""
    n = rows * columns
    packed = torch.randint(0, 256, (-(-n // 2),), dtype=torch.uint8, device=device)
    absmax = torch.randint(0, 256, (-(-n // 64),), dtype=torch.uint8, device=device)
    nested = torch.rand(-(-len(absmax) // 256), device=device)
    code_map = torch.linspace(-1, 1, 256, device=device)
    return Weight(packed, absmax, nested, torch.ones((), device=device), code_map, rows, columns, 64)


def _shape(text: str) -> tuple[int, int]:
    out, _, inner = text.partition(",")
    return int(out), int(inner)


def main(arguments: list[str] | None = None, bench: Bench = bench_on_device) -> int:
    parser = argparse.ArgumentParser(prog="python -m phicore_kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="N,K", help="out and in features")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="numbers of rows of x to tune for, ascending")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options = parser.parse_args(arguments)
    device = torch.accelerator.current_accelerator(check_available=True)
    gpu = None if device is None else gpu_of(device)
    if device is None or gpu is None or gpu.kind == "none":
        print("no GPU that torch sees; there is nothing to tune", file=sys.stderr)
        return 1
    if default_crossover(gpu) == 0:
        print(f"{gpu.name}: no products are checked for it; W is always dequantised first", file=sys.stderr)
        return 1
    rows = sorted(options.rows)
    configs, times = tune(options.shapes, rows, getattr(torch, options.dtype), device, gpu, bench)
    for entry in times:
        print(f"{entry['rows']:6.0f} rows: fused {entry['fused']:.2e} s, dequantised {entry['dequantized']:.2e} s")
    best = crossover_of(times)
    file = cache.save(gpu.name, crossover_rows=best, configs=configs)
    crossover.cache_clear()
    print(f"{gpu.name}: decode in the product up to {best} rows; written to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
