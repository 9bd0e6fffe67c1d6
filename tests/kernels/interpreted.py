"""Runs kernels on a CPU in Triton's interpreter, in a process of its own.

Triton reads TRITON_INTERPRET when it is imported and when a kernel is decorated, so the flag cannot be set for some
tests of a process only: other tests compile kernels, and torch.compile imports triton too. The tests stay where they
are and call `Interpreter.call`; arguments and results travel as pickles.
"""

import dataclasses
import importlib
import multiprocessing
import os
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any


def _start() -> None:
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
    # torch.empty then holds NaN (floats) or the largest value (integers), so what a kernel forgets to write shows.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def _call(request: bytes) -> bytes:
    function, args, options = pickle.loads(request)
    module, _, name = function.partition(":")
    return pickle.dumps(getattr(importlib.import_module(module), name)(*args, **options))


class Interpreter:
    """call("phicore_kernels.matmul:linear", x, weight) runs the function in the interpreter's process."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_start)

    def call(self, function: str, *args: Any, **options: Any) -> Any:
        return pickle.loads(self.pool.submit(_call, pickle.dumps((function, args, options))).result())


# --- what runs in the interpreter's process -------------------------------------------------------------------------


def run_last_program(launch: Any) -> None:
    """Runs a launch's program that is last on each axis alone. Results stay where the kernel wrote them: nothing is
    copied back."""
    from unittest import mock

    from triton.runtime import interpreter

    builder, (x, y) = interpreter.interpreter_builder, (*launch.grid, 1)[:2]
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    with (
        mock.patch.object(builder, "set_grid_dim", side_effect=lambda *_: set_dim(x, y, 1)),
        mock.patch.object(builder, "set_grid_idx", side_effect=lambda *_: set_index(x - 1, y - 1, 0)),
        mock.patch.object(interpreter.GridExecutor, "_restore_args_dev"),
    ):
        launch.kernel[(1,)](**launch.arguments, **launch.constants)


def zero_pages(n: int, dtype: Any) -> Any:
    """Zeros [n] that take no memory until they are written (numpy's zeros are calloc's; torch writes its own)."""
    import numpy
    import torch

    return torch.from_numpy(numpy.zeros(n * dtype.itemsize, dtype=numpy.uint8)).view(dtype)


def far_weight(rows: int, columns: int) -> Any:
    """A weight of zero pages but for its last 8192 values: code 15, scale 2."""
    import torch

    from phicore_kernels.weight import Weight

    n = rows * columns
    packed, absmax = zero_pages(n // 2, torch.uint8), zero_pages(n // 64, torch.float32)
    packed[-4096:], absmax[-128:] = 255, 2.0
    return Weight(packed, absmax, None, None, None, rows, columns, 64)


def dequantize_far(n: int) -> Any:
    """The last 8192 values of far_weight(1, n)."""
    import torch

    from phicore_kernels.dequantize import dequantize_launch

    out = zero_pages(n, torch.bfloat16)
    out[-8192:] = torch.nan
    run_last_program(dequantize_launch(far_weight(1, n), out))
    return out[-8192:].clone()


def linear_far(rows: int, columns: int) -> Any:
    """x far_weight^T for the last 32 rows; x [3, columns], rows of ones, twos and threes with 2^30 elements between."""
    import torch

    from phicore_kernels.configs import Config
    from phicore_kernels.matmul import matmul_launches

    x = zero_pages(2**31 + columns, torch.float16).as_strided((3, columns), (2**30, 1))
    x[0], x[1], x[2] = 1, 2, 3
    out = zero_pages(3 * rows, torch.float16).view(3, rows)
    weight = far_weight(rows, columns)
    (launch,) = matmul_launches(x, weight, out, backward=False, config=Config(16, 32, 32, 4, 1))
    run_last_program(launch)
    return out[:, -32:].clone()


def linear_dx_far(columns: int) -> Any:
    """g far_weight for the last 32 columns of 64 rows; g [3, 64] of ones, twos and threes, its rows and those of the
    low-rank term's right side 2^30 elements apart."""
    import torch

    from phicore_kernels.configs import Config
    from phicore_kernels.matmul import LowRank, matmul_launches

    grad = zero_pages(2**31 + 64, torch.float16).as_strided((3, 64), (2**30, 1))
    grad[0], grad[1], grad[2] = 1, 2, 3
    out = zero_pages(3 * columns, torch.float16).view(3, columns)
    left = torch.tensor([0, 0, 2], dtype=torch.float16).expand(3, 3)
    right = zero_pages(2**31 + columns, torch.float16).as_strided((3, columns), (2**30, 1))
    right[2, -32:] = 0.5
    (launch,) = matmul_launches(
        grad, far_weight(64, columns), out, backward=True, config=Config(16, 32, 32, 4, 1),
        low_rank=LowRank(left, right, 10.0),
    )  # fmt: skip
    run_last_program(launch)
    return out[:, -32:].clone()


def parts_far(rows: int) -> Any:
    """The last 32 numbers of the second part of a split sum, of a result [33, rows]: 32 times 1 * 2."""
    from unittest import mock

    import torch

    from phicore_kernels.configs import Config
    from phicore_kernels.matmul import matmul_launches

    x, out = torch.ones(33, 64, dtype=torch.float16), zero_pages(33 * rows, torch.float16).view(33, rows)

    def empty(*shape: int, dtype: Any, device: Any) -> Any:
        return zero_pages(shape[0] * shape[1] * shape[2], dtype).view(shape)

    with mock.patch.object(torch, "empty", empty):
        product, _ = matmul_launches(
            x, far_weight(rows, 64), out, backward=False, config=Config(16, 32, 32, 4, 1, split=2)
        )
    run_last_program(product)
    return product.arguments["out"][1, -1, -32:].clone()


def add_parts_far(n: int) -> Any:
    """The last four sums of two parts of n numbers."""
    import torch

    from phicore_kernels.configs import Config
    from phicore_kernels.matmul import matmul_launches
    from tests.kernels.weights import random_weight

    x, out = torch.ones(1, 64, dtype=torch.float16), torch.ones(1, 32, dtype=torch.float16)
    _, addition = matmul_launches(x, random_weight(32, 64), out, backward=False, config=Config(16, 32, 32, 4, 1, 2))
    parts, total = zero_pages(2 * n, torch.float32).view(2, n), zero_pages(n, torch.float16)
    parts[0, -4:], parts[1, -4:] = 1, 2
    arguments = {**addition.arguments, "parts": parts, "out": total, "size": n, "OUT": n}
    run_last_program(dataclasses.replace(addition, arguments=arguments, grid=(-(-n // 1024),)))
    return total[-4:].clone()


def encode_far(n: int) -> Any:
    """Codes and scales of the last 64 of n weights, which alone are not zero."""
    import torch

    from phicore_kernels.quantize import encode_blocks_launch

    flat = zero_pages(n, torch.bfloat16)
    flat[-64:] = torch.linspace(-1, 1, 64)
    packed, absmax = zero_pages(n // 2, torch.uint8), zero_pages(n // 64, torch.float32)
    run_last_program(encode_blocks_launch(flat, packed, absmax, 64))
    return flat[-64:].clone(), packed[-32:].clone(), absmax[-1:].clone()


def scale_columns_far(n: int, transposed: bool) -> Any:
    """DoRA's scaling of the last 32 of n columns of z [3, n], ones, by their norms 2 and magnitude 3."""
    import torch

    from phicore_kernels.dora import scale_columns_launch

    z, y = zero_pages(3 * n, torch.bfloat16), zero_pages(3 * n, torch.bfloat16).view(3, n)
    z = z.view(n, 3).T if transposed else z.view(3, n)
    z[:, -32:] = 1
    base, magnitude, squared = (zero_pages(n, torch.float32) for _ in range(3))
    base[-32:], magnitude[-32:] = 4, 3
    WA, B = zero_pages(n, torch.float32).view(n, 1), zero_pages(n, torch.float32).view(n, 1)
    run_last_program(scale_columns_launch(z, base, WA, torch.ones(1, 1), B, magnitude, 1.0, None, y, squared))
    return y[:, -32:].clone(), squared[-32:].clone()


_registered: set[str] = set()


@contextmanager
def as_on_a_gpu(crossover: int = 1 << 30) -> Iterator[None]:
    """phicore's operators and layers take the ways that they take on a GPU with this crossover, on the CPU."""
    from unittest import mock

    from phicore import products
    from phicore.adapters import dora_scale
    from phicore.nf4 import kernels

    if "cpu" not in _registered:
        kernels.register("cpu")
        dora_scale.register("cpu")
        _registered.add("cpu")
    with (
        mock.patch.object(kernels, "has_kernels", return_value=True),
        mock.patch.object(kernels, "DEVICE_TYPES", ("cuda", "cpu")),
        mock.patch.object(products, "EMULATED", ()),  # a GPU has products of 16 bits
        mock.patch("phicore_kernels.crossover.crossover", return_value=crossover),
    ):
        yield


def on_a_gpu(body: str, args: tuple[Any, ...], crossover: int = 1 << 30) -> None:
    """Runs a function of tests.gpu.bodies on the CPU, whose kernels the interpreter runs."""
    import torch

    from tests.gpu import bodies

    with as_on_a_gpu(crossover):
        getattr(bodies, body)(torch.device("cpu"), *args)


def operators(
    x: Any, weight: Any, bias: Any, rows: Any, pair_B: Any, grad: Any, crossover: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """phicore's operators, dispatched as on a GPU with this crossover: results, and calls of each kernel."""
    from contextlib import ExitStack
    from unittest import mock

    import torch

    from phicore.nf4 import ops
    from phicore.nf4.low_rank import nf4_low_rank

    parts = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
    shape, block_size = [weight.rows, weight.columns], weight.block_size
    names = ("dequantize:dequantize", "matmul:linear", "matmul:linear_dx")
    with ExitStack() as stack:
        stack.enter_context(as_on_a_gpu(crossover))
        spies = {}
        for name in names:
            module, function = name.split(":")
            module = importlib.import_module(f"phicore_kernels.{module}")
            spy = mock.patch.object(module, function, wraps=getattr(module, function))
            spies[function] = stack.enter_context(spy)
        x.requires_grad_()
        bias.requires_grad_()
        y = ops.nf4_linear(x, *parts, bias, shape, block_size)
        dx, db = torch.autograd.grad(y, (x, bias), grad)
        z, wa = ops.nf4_project_with_rows(x, rows, *parts, shape, block_size)
        (dz,) = torch.autograd.grad(z, x, grad)
        v, u, va = nf4_low_rank(x, rows, pair_B, 0.5, *parts, None, shape, block_size, True)
        (dv,) = torch.autograd.grad(v, x, grad)
        dense = ops.nf4_dequantize(*parts, shape, block_size, torch.float32)
        results = {"v": v, "u": u, "va": va, "dv": dv} | {
            "y": y,
            "dx": dx,
            "db": db,
            "z": z,
            "wa": wa,
            "dz": dz,
            "dense": dense,
        }
    return {k: v.detach() for k, v in results.items()}, {name: spy.call_count for name, spy in spies.items()}


def tune_small(gpu: Any, arguments: list[str], home: str, slow: int) -> tuple[int, str, list[tuple[int, ...]]]:
    """`python -m phicore_kernels.tune` as on a GPU, every candidate run once: what it returns and prints, and the
    shapes of what was timed. A product takes a second for each column of its tile, dequantising first `slow`."""
    import contextlib
    import io
    from unittest import mock

    import torch

    from phicore_kernels import matmul, tune

    calls: list[tuple[int, ...]] = []
    configs: list[Any] = []
    launches = matmul.matmul_launches

    def bench(call: Any) -> float:
        configs.clear()
        calls.append(tuple(call().shape))
        return configs[0].block_out if configs else slow

    def note(*args: Any, config: Any, **options: Any) -> Any:
        configs.append(config)
        return launches(*args, config=config, **options)

    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"XDG_CACHE_HOME": home}),
        mock.patch.object(tune, "gpu_of", return_value=gpu),
        mock.patch.object(torch.accelerator, "current_accelerator", return_value=torch.device("cpu")),
        mock.patch.object(matmul, "matmul_launches", note),
        contextlib.redirect_stdout(printed),
    ):
        status = tune.main(arguments, bench)
    return status, printed.getvalue(), calls


def time_small(directory: str) -> str:
    """benchmarks.kernel_times on a small layer, with a timer that says 2 ms. What it prints. Only what asks for a
    kernel by name runs one; the operators run their references."""
    import contextlib
    import io
    from pathlib import Path

    import torch

    from benchmarks import kernel_times

    printed, output = io.StringIO(), Path(directory)
    with contextlib.redirect_stdout(printed):
        status = kernel_times.main(
            output, output / "copy.json", quick=True, device=torch.device("cpu"), bench=lambda _: (2.0, 1.0, 3.0),
            layers={"small q": (64, 128)}, rows=(1, 20),
        )  # fmt: skip
    assert status == 0
    return printed.getvalue()


def device_of_run() -> tuple[Any, Any]:
    """(devices made current, kernels launched while one was) of a launch whose tensor pretends to lie on cuda:1."""
    from unittest import mock

    import torch

    from phicore_kernels import launch

    entered: list[Any] = []
    tensor = mock.Mock(spec=torch.Tensor, device=torch.device("cuda", 1))
    inside = mock.MagicMock()
    inside.__enter__.side_effect = lambda *_: entered.append("in")
    inside.__exit__.side_effect = lambda *_: entered.append("out")
    kernel = mock.MagicMock()
    kernel.__getitem__.return_value.side_effect = lambda **_: entered.append("launch")
    with mock.patch.object(torch.accelerator, "device_index", return_value=inside) as index:
        launch.Launch(kernel, (1,), {"none": None, "x": tensor}, {}, {}).run()
    return index.call_args.args, entered
