"""Times of the products on the GPU at hand, beside bitsandbytes, dense cuBLAS (or rocBLAS) and the roofline.

The device and the timer are arguments, so that everything else runs in a test on a CPU.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import phicore
from benchmarks.kernel_code import MINIMUM_BYTES
from phicore.nf4 import ops
from phicore.nf4.low_rank import nf4_low_rank
from phicore_kernels import matmul
from phicore_kernels.weight import Weight

# [out, in] of the linear layers, from the models' published configurations.
LAYERS = {
    "Phi-3-mini": {"qkv": (9216, 3072), "o": (3072, 3072), "gate_up": (16384, 3072), "down": (3072, 8192)},
    "Phi-3-medium": {"qkv": (7680, 5120), "o": (5120, 5120), "gate_up": (35840, 5120), "down": (5120, 17920)},
    "Llama-8B": {"q": (4096, 4096), "k": (1024, 4096), "gate": (14336, 4096), "down": (4096, 14336)},
}
ROWS = tuple(1 << i for i in range(14))  # 1 ... 8192
QUICK_ROWS = (1, 16, 64, 512, 4096)
FUSED_ROWS = 512  # decoding in the product is not timed above: no GPU gains from it there
RANK = 16
DTYPE = torch.bfloat16

Bench = Callable[[Callable[[], Any]], tuple[float, float, float]]
"""Milliseconds of a call: the median, and the quantiles 0.2 and 0.8."""


class Roof(NamedTuple):
    """What the GPU reaches at best, measured on it: bytes and operations a second."""

    bytes_a_second: float
    operations_a_second: float


class Contender(NamedTuple):
    """One way to compute an operation.

    Attributes:
        operation: "forward", "forward with LoRA" or "backward".
        name: who computes it, and how.
        run: computes it.
        weight_bytes: that must be read for W.
    """

    operation: str
    name: str
    run: Callable[[], Tensor]
    weight_bytes: float


def contenders(w: Tensor, m: int, peers: bool) -> Iterator[Contender]:
    """All ways of the products of a weight [out, in] and m rows; the first of an operation is dense, from W decoded."""
    q = phicore.nf4.quantize(w)
    n, k = w.shape
    device, coded = q.device, MINIMUM_BYTES * n * k
    x, grad = (torch.randn(m, size, device=device).to(DTYPE) for size in (k, n))
    A, B = torch.randn(RANK, k, device=device).to(DTYPE) / k**0.5, torch.randn(n, RANK, device=device).to(DTYPE)
    dense = q.dequantize(DTYPE)
    parts, shape = (q.packed, q.absmax, q.nested_absmax, q.offset), [n, k]
    weight = Weight(*parts, _code_map(device), n, k, q.block_size)

    def with_lora(y: Tensor) -> Tensor:
        return torch.addmm(y, x @ A.t(), B.t(), alpha=2.0)

    def dequantized_first() -> Tensor:
        return torch.nn.functional.linear(x, q.dequantize(DTYPE))

    def low_rank() -> Tensor:
        return nf4_low_rank(x, A, B, 2.0, *parts, None, shape, q.block_size, False)[0]

    forward, lora, backward = "forward", "forward with LoRA", "backward"
    yield Contender(forward, "dense", lambda: x @ dense.t(), 2.0 * n * k)
    yield Contender(forward, "phicore", lambda: ops.nf4_linear(x, *parts, None, shape, q.block_size), coded)
    yield Contender(forward, "phicore, dequantised first", dequantized_first, coded)
    yield Contender(lora, "dense", lambda: with_lora(x @ dense.t()), 2.0 * n * k)
    yield Contender(lora, "phicore", low_rank, coded)
    yield Contender(backward, "dense", lambda: grad @ dense, 2.0 * n * k)
    yield Contender(backward, "phicore", lambda: ops.nf4_linear_dx(grad, *parts, shape, q.block_size), coded)
    yield Contender(backward, "phicore, dequantised first", lambda: grad @ q.dequantize(DTYPE), coded)
    if m <= FUSED_ROWS:
        yield Contender(forward, "phicore, decoded inside", lambda: matmul.linear(x, weight), coded)
        yield Contender(backward, "phicore, decoded inside", lambda: matmul.linear_dx(grad, weight), coded)
    if peers:
        import bitsandbytes as bnb
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)

        def forward_of_peer() -> Tensor:
            with torch.no_grad():
                return bnb.matmul_4bit(x, packed.t(), quant_state=state)

        def backward_of_peer() -> Tensor:  # what its autograd function does: dequantise, then multiply
            return grad @ functional.dequantize_4bit(packed, state)

        yield Contender(forward, "bitsandbytes", forward_of_peer, coded)
        yield Contender(lora, "bitsandbytes", lambda: with_lora(forward_of_peer()), coded)
        yield Contender(backward, "bitsandbytes", backward_of_peer, coded)


def measure_roof(device: torch.device, bench: Bench, size: int = 8192) -> Roof:
    """The best of a copy and of a dense product, of size x size numbers."""
    a = torch.randn(size, size, device=device).to(DTYPE)
    b, out = torch.randn_like(a), torch.empty_like(a)
    copied = bench(lambda: out.copy_(a))[0] / 1e3
    multiplied = bench(lambda: torch.mm(a, b, out=out))[0] / 1e3
    return Roof(2 * a.nbytes / copied, 2 * size**3 / multiplied)


def measure(
    layers: dict[str, tuple[int, int]],
    rows: tuple[int, ...],
    device: torch.device,
    bench: Bench,
    roof: Roof,
    peers: bool,
    progress: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """One row of figures for each layer, m and contender.

    Raises:
        RuntimeError: a contender's result differs from the dense one's.
    """
    found = []
    for layer, (n, k) in layers.items():
        w = (torch.randn(n, k, device=device) / k**0.5).to(DTYPE)
        for m in rows:
            expected: dict[str, Tensor] = {}
            for contender in contenders(w, m, peers):
                result = contender.run()
                error = _difference(result, expected.setdefault(contender.operation, result))
                if not error < 0.02:
                    raise RuntimeError(
                        f"{layer}, {m} rows, {contender.operation}: {contender.name} differs from dense by {error:.2%}"
                    )
                median, low, high = bench(contender.run)
                extra = 2 * (m * n + m * k) + (2 * RANK * (n + k) if "LoRA" in contender.operation else 0)
                moved = contender.weight_bytes + extra
                operations = 2 * m * n * k + (2 * m * RANK * (n + k) if "LoRA" in contender.operation else 0)
                best = 1e3 * max(moved / roof.bytes_a_second, operations / roof.operations_a_second)
                row = {
                    "layer": layer, "out": n, "in": k, "rows": m, "operation": contender.operation,
                    "contender": contender.name, "ms": median, "ms_p20": low, "ms_p80": high,
                    "gb_a_second": moved / median / 1e6, "tflop_a_second": operations / median / 1e9,
                    "roofline_ms": best, "error": error,
                }  # fmt: skip
                found.append(row)
                progress(
                    f"{layer:22} {m:5} rows  {contender.operation:18} {contender.name:28} {median:9.4f} ms "
                    f"{row['gb_a_second']:8.0f} GB/s {row['tflop_a_second']:7.1f} TFLOP/s, {best / median:.1%} of roof"
                )
    return found


def pictures(figures: list[dict[str, Any]], directory: Path, title: str) -> list[Path]:
    """One picture for each operation: milliseconds over M for each layer, with the roofline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for operation in dict.fromkeys(f["operation"] for f in figures):
        layers = list(dict.fromkeys(f["layer"] for f in figures))
        columns = min(4, len(layers))
        height = -(-len(layers) // columns)
        drawing, axes = pyplot.subplots(height, columns, figsize=(4 * columns, 3 * height), squeeze=False)
        for panel, layer in zip(axes.flat, layers, strict=False):
            mine = [f for f in figures if f["layer"] == layer and f["operation"] == operation]
            for name in dict.fromkeys(f["contender"] for f in mine):
                points = [(f["rows"], f["ms"]) for f in mine if f["contender"] == name]
                panel.loglog(*zip(*points, strict=True), marker=".", label=name)
            best = [(f["rows"], f["roofline_ms"]) for f in mine if f["contender"] == "phicore"]
            panel.loglog(*zip(*best, strict=True), color="black", linestyle=":", label="roofline")
            panel.set_title(layer, fontsize=9)
            panel.set_xlabel("rows of x")
            panel.set_ylabel("ms")
        for panel in axes.flat[len(layers) :]:
            panel.axis("off")
        axes.flat[0].legend(fontsize=7)
        drawing.suptitle(f"{operation}, {title}")
        drawing.tight_layout()
        path = directory / f"times-{operation.replace(' ', '-')}.png"
        drawing.savefig(path, dpi=120)
        pyplot.close(drawing)
        written.append(path)
    return written


def main(
    output: Path,
    copy: Path | None,
    *,
    quick: bool,
    device: torch.device | None = None,
    bench: Bench | None = None,
    layers: dict[str, tuple[int, int]] | None = None,
    rows: tuple[int, ...] | None = None,
) -> int:
    """Measures, prints, and writes times.json and the pictures into a directory, and the JSON to `copy` too.

    device, bench, layers, rows: for tests; by default the GPU, triton.testing.do_bench and what stands above.
    """
    device = device or torch.accelerator.current_accelerator(check_available=True)
    if device is None or device.type not in ("cuda", "xpu", "cpu"):
        print(
            "python -m benchmarks.kernels times kernels and found no GPU (torch sees none); "
            "--static reports on their machine code without one",
            file=sys.stderr,
        )
        return 1
    layers = layers or {
        f"{model} {layer}": shape
        for model, shapes in LAYERS.items()
        if not quick or model == "Llama-8B"
        for layer, shape in shapes.items()
    }
    rows = rows or (QUICK_ROWS if quick else ROWS)
    bench = bench or _do_bench
    torch.manual_seed(0)
    roof = measure_roof(device, bench, 8192 if device.type != "cpu" else 16)
    settings = _settings(device, roof)
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    figures = measure(layers, rows, device, bench, roof, settings["bitsandbytes"] is not None)
    output.mkdir(parents=True, exist_ok=True)
    for file in [output / "times.json", *([copy] if copy else [])]:
        file.write_text(json.dumps({"settings": settings, "times": figures}, indent=1))
    written = pictures(figures, output, settings["gpu"])
    print(f"written: {output}/times.json, {', '.join(path.name for path in written)}")
    return 0


def _settings(device: torch.device, roof: Roof) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    from phicore_kernels.device import gpu_of

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "gpu": gpu_of(device).name,
        "dtype": str(DTYPE).removeprefix("torch."),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "bitsandbytes": installed("bitsandbytes"),
        "measured_gb_a_second": round(roof.bytes_a_second / 1e9, 1),
        "measured_tflop_a_second": round(roof.operations_a_second / 1e12, 1),
    }


def _do_bench(call: Callable[[], Any]) -> tuple[float, float, float]:
    from triton.testing import do_bench

    return tuple(do_bench(call, quantiles=[0.5, 0.2, 0.8]))  # type: ignore[return-value]


def _difference(given: Tensor, expected: Tensor) -> float:
    return float((given.float() - expected.float()).norm() / expected.float().norm())


def _code_map(device: torch.device) -> Tensor:
    from phicore.nf4.codebook import dynamic_map

    return dynamic_map(device)
