"""Which config a product runs with: what was tuned for it on this GPU, or the table of `configs`.

Tuning times every candidate that fits the GPU's shared memory, for a product by direction, dtype, way of decoding, M
rounded up to a bucket, N and K. `python -m phicore_kernels.tune` does that ahead of time; with PHICORE_AUTOTUNE=1 a
product that was not tuned is, when it is first met, which takes tens of seconds each. Without either nothing is timed.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from phicore_kernels import cache
from phicore_kernels.configs import CONFIGS, EXTRA, Config, choose, shared_bytes, split_to_fill
from phicore_kernels.device import Gpu, gpu_of

Bench = Callable[[Callable[[], Any]], float]
"""Seconds that a call takes."""


class Product(NamedTuple):
    """A product of [m, summed] to [m, columns], W decoded by `mode` to dtype."""

    backward: bool
    m: int
    columns: int
    summed: int
    mode: str
    dtype: torch.dtype

    @property
    def bucket(self) -> int:
        """M rounded up to a power of two, 16 to 8192: below, tiles have 16 rows anyway."""
        return min(max(16, 1 << (self.m - 1).bit_length()), 8192)

    @property
    def key(self) -> str:
        direction, dtype = "backward" if self.backward else "forward", str(self.dtype).removeprefix("torch.")
        return f"{direction} {dtype} {self.mode} M{self.bucket} {self.columns}x{self.summed}"


_tuned_here: dict[tuple[str, str], Config] = {}
"""What this process tuned, by GPU and key: its file may be no place to write to, or another process's by now."""


def config_of(product: Product, device: torch.device, trial: Callable[[Config], None]) -> Config:
    """The config to run a product with.

    Args:
        product: what is computed.
        device: where.
        trial: runs the product with a config, for the case that it is tuned now.
    """
    gpu = gpu_of(device)
    known = cache.load(gpu.name).configs
    if (config := known.get(product.key) or _tuned_here.get((gpu.name, product.key))) is not None:
        return config
    if os.environ.get("PHICORE_AUTOTUNE") == "1" and device.type != "cpu" and not _capturing(device):
        config = fastest(product, gpu, trial, lambda call: bench_on_device(call, device))
        _tuned_here[gpu.name, product.key] = config
        try:
            cache.save(gpu.name, configs={product.key: config})
        except OSError as error:
            message = f"what was tuned is kept for this process only, since it cannot be written: {error}"
            warnings.warn(message, stacklevel=2)
        return config
    return choose(product.m, product.columns, product.summed, product.mode, product.dtype, gpu.processors)


def candidates(product: Product, gpu: Gpu) -> list[Config]:
    """Configs worth timing: tiles no taller than M asks for, that fit into shared memory, with sums in one to sixteen
    parts as far as each part has two steps and the GPU room for the programs. The table's own choice comes first."""
    kind = product.mode, product.dtype.itemsize
    chosen = choose(product.m, product.columns, product.summed, product.mode, product.dtype, gpu.processors)
    found = [chosen]
    for tiles in dict.fromkeys([config._replace(split=1) for _, config in CONFIGS[kind]] + list(EXTRA.get(kind, ()))):
        if tiles.block_m > max(16, product.bucket):
            continue
        fill = split_to_fill(tiles, product.m, product.columns, product.summed, gpu.processors)
        found += [tiles._replace(split=split) for split in sorted({1, fill, 2 * fill, max(1, fill // 2)})]
    fitting = [
        config
        for config in dict.fromkeys(found)
        if shared_bytes(config, *kind) <= gpu.shared_limit
        and config.split <= 16
        and (config.split == 1 or 2 * config.split <= -(-product.summed // config.block_sum))
    ]
    return fitting or [chosen]


def fastest(product: Product, gpu: Gpu, trial: Callable[[Config], None], bench: Bench) -> Config:
    """The candidate whose trial takes the least time; one that the GPU refuses is passed over."""
    from triton.runtime.errors import OutOfResources, PTXASError

    best: tuple[float, Config] | None = None
    for config in candidates(product, gpu):
        try:
            seconds = bench(lambda config=config: trial(config))  # type: ignore[misc]
        except (OutOfResources, PTXASError):
            continue
        if best is None or seconds < best[0]:
            best = seconds, config
    if best is None:
        raise RuntimeError(f"{gpu.name} runs none of the configs for {product.key}; report this, with the GPU's name")
    return best[1]


def bench_on_device(call: Callable[[], Any], device: torch.device | None = None) -> float:
    """Median seconds of a call on a GPU (default: the current one), its caches cold."""
    from triton.testing import do_bench

    if device is not None and device.index is not None:  # do_bench's events are the current device's
        with torch.accelerator.device_index(device.index):
            return bench_on_device(call)
    return float(do_bench(call, return_mode="median")) / 1e3


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be timed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
