"""Choosing the dtype that a model computes in."""

import statistics
import time

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PREFERENCE = 1.2  # bfloat16 must be this much faster than float32 to be chosen on a CPU


def choose_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype for a device, and the reason in words.

    The rule: on a GPU bfloat16 where its tensor cores know it (compute capability 8.0 on), float32 otherwise. On a
    CPU a matrix product of a small model's size (256 x 1024 x 1024) is timed in both dtypes, five alternating pairs;
    bfloat16 is chosen if its median is at least 1.2 times as fast, float32, which is exact, otherwise. CPUs with AMX
    or AVX512-BF16 pass; others emulate bfloat16 several times slower.
    """
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= 8 or torch.version.hip is not None
        name = torch.cuda.get_device_name(device)
        return (torch.bfloat16 if native else torch.float32), f"{name} {'has' if native else 'lacks'} bfloat16 products"
    if device.type != "cpu":
        return torch.float32, f"no rule for {device.type}"
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    operands = {dtype: (torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)) for dtype in times}
    for turn in range(6):
        for dtype, (a, b) in operands.items():
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            if turn:  # the first turn warms up
                times[dtype].append(time.perf_counter() - start)
    ratio = statistics.median(times[torch.float32]) / statistics.median(times[torch.bfloat16])
    chosen = torch.bfloat16 if ratio >= PREFERENCE else torch.float32
    return chosen, f"a bfloat16 matrix product runs at {ratio:.2f}x the speed of float32 on this CPU"
