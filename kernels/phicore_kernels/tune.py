"""`python -m phicore_kernels.tune`: times both ways of a product on this GPU and writes its crossover."""

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from phicore_kernels.crossover import default_crossover, save
from phicore_kernels.dequantize import dequantize
from phicore_kernels.matmul import linear, linear_dx
from phicore_kernels.weight import Weight

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # [out, in]: an attention and two MLP layers of Llama-8B


def crossover_of(times: list[dict[str, float]]) -> int:
    """The last number of rows before decoding in the product first loses; times ascend in rows."""
    best = 0
    for entry in times:
        if entry["fused"] > entry["dequantized"]:
            break
        best = int(entry["rows"])
    return best


def measure(bench: Callable[[Callable[[], Any]], float], device: torch.device) -> list[dict[str, float]]:
    """Mean seconds over SHAPES and both directions for each number of rows, in bfloat16."""
    weights = [_random_weight(n, k, device) for n, k in SHAPES]
    times = []
    for rows in ROWS:
        fused, dequantized = [], []
        for weight in weights:
            x = torch.randn(rows, weight.columns, dtype=torch.bfloat16, device=device)
            grad = torch.randn(rows, weight.rows, dtype=torch.bfloat16, device=device)
            fused.append(bench(lambda x=x, weight=weight: linear(x, weight)))
            fused.append(bench(lambda grad=grad, weight=weight: linear_dx(grad, weight)))
            dequantized.append(bench(lambda x=x, weight=weight: x @ dequantize(weight, x.dtype).T))
            dequantized.append(bench(lambda grad=grad, weight=weight: grad @ dequantize(weight, grad.dtype)))
        times.append({"rows": rows, "fused": statistics.mean(fused), "dequantized": statistics.mean(dequantized)})
    return times


def _random_weight(rows: int, columns: int, device: torch.device) -> Weight:
    n = rows * columns
    packed = torch.randint(0, 256, (-(-n // 2),), dtype=torch.uint8, device=device)
    absmax = torch.randint(0, 256, (-(-n // 64),), dtype=torch.uint8, device=device)
    nested = torch.rand(-(-len(absmax) // 256), device=device)
    code_map = torch.linspace(-1, 1, 256, device=device)
    return Weight(packed, absmax, nested, torch.ones((), device=device), code_map, rows, columns, 64)


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU that torch sees; there is nothing to tune", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    amd = getattr(properties, "gcnArchName", None) if torch.version.hip is not None else None
    if default_crossover((properties.major, properties.minor), amd) == 0:
        print(f"{properties.name}: no products are checked for it; W is always dequantised first", file=sys.stderr)
        return 1
    from triton.testing import do_bench

    times = measure(lambda call: do_bench(call, return_mode="median") / 1e3, device)
    for entry in times:
        print(f"{entry['rows']:6.0f} rows: fused {entry['fused']:.2e} s, dequantised {entry['dequantized']:.2e} s")
    rows = crossover_of(times)
    print(
        f"{properties.name}: decode in the product up to {rows} rows; written to {save(properties.name, rows, times)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
