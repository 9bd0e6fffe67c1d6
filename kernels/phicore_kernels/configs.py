"""Tile sizes of the products, as data: one row for each range of M.

The rows were chosen from machine code, not from times: no spills, and few instructions a decoded weight (see
benchmarks/kernels.py). `split` is a ceiling; `choose` splits only as far as the GPU has room for programs.
"""

from functools import lru_cache
from typing import NamedTuple

import torch


class Config(NamedTuple):
    """Sizes of the tiles and how a program runs.

    Attributes:
        block_m, block_out, block_sum: rows of x, columns of the result and summed length of a step. The side of W's
            tile that lies along its rows must be a multiple of 32.
        num_warps, num_stages: threads / 32, and steps that are loaded ahead.
        split: programs that share a sum.
    """

    block_m: int
    block_out: int
    block_sum: int
    num_warps: int
    num_stages: int
    split: int = 1


# How a weight is decoded (see phicore_kernels.decode) and the bytes of the compute dtype -> (largest M, config) rows.
CONFIGS: dict[tuple[str, int], tuple[tuple[int, Config], ...]] = {
    ("permute", 2): (
        (16, Config(16, 128, 128, 4, 3, 16)),
        (32, Config(32, 64, 128, 4, 3, 8)),
        (64, Config(64, 64, 64, 4, 3, 4)),
        (1 << 31, Config(128, 128, 64, 8, 3)),
    ),
    ("table", 2): (
        (16, Config(16, 64, 128, 4, 2, 16)),
        (64, Config(64, 64, 64, 4, 2, 4)),
        (1 << 31, Config(128, 128, 64, 8, 2)),
    ),
    ("table", 4): (  # three TF32 products for each of float32 on NVIDIA
        (16, Config(16, 64, 64, 4, 2, 16)),
        (1 << 31, Config(64, 64, 32, 4, 2)),
    ),
    ("any", 2): (
        (16, Config(16, 32, 32, 4, 1, 16)),
        (1 << 31, Config(64, 32, 32, 4, 1)),
    ),
    ("any", 4): (
        (16, Config(16, 32, 32, 4, 1, 16)),
        (1 << 31, Config(32, 32, 32, 4, 1)),
    ),
}


def choose(m: int, columns: int, summed: int, mode: str, dtype: torch.dtype, device: torch.device) -> Config:
    """The config for a product of [m, summed] to [m, columns] in dtype, W decoded by `mode`."""
    config = next(config for largest, config in CONFIGS[mode, dtype.itemsize] if m <= largest)
    programs = -(-m // config.block_m) * -(-columns // config.block_out)
    # Two programs for each processor, and not fewer than four steps in each part of a sum.
    split = min(config.split, max(1, 2 * processors(device) // programs), max(1, summed // (4 * config.block_sum)))
    return config._replace(split=split)


@lru_cache(maxsize=32)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 108 (an A100) where none is."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 108
