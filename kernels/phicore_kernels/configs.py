"""Tile sizes of the products, as data: one row for each range of M.

The rows were chosen from machine code, not from times: no spills, and few instructions a decoded weight (see
benchmarks/kernels.py). `split` is a ceiling; `choose` splits only as far as the GPU has room for programs.
"""

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


# Tiles that tuning tries beside those of the table, by the same key. Every one is compiled and checked as those are.
EXTRA: dict[tuple[str, int], tuple[Config, ...]] = {
    ("permute", 2): (
        Config(16, 64, 128, 4, 3),
        Config(16, 128, 64, 4, 3),
        Config(16, 256, 64, 8, 3),
        Config(32, 128, 64, 4, 3),
        Config(64, 128, 64, 4, 3),
        Config(128, 128, 64, 8, 2),
    ),
    ("table", 2): (
        Config(16, 32, 128, 4, 2),
        Config(32, 64, 64, 4, 2),
        Config(64, 128, 64, 8, 2),
    ),
    ("table", 4): (Config(32, 64, 32, 4, 2),),
}


def choose(m: int, columns: int, summed: int, mode: str, dtype: torch.dtype, processors: int) -> Config:
    """The table's config for a product of [m, summed] to [m, columns] in dtype, W decoded by `mode`."""
    config = next(config for largest, config in CONFIGS[mode, dtype.itemsize] if m <= largest)
    return config._replace(split=min(config.split, split_to_fill(config, m, columns, summed, processors)))


def split_to_fill(config: Config, m: int, columns: int, summed: int, processors: int) -> int:
    """In how many parts a sum gives two programs to each processor, with at least four steps in each part."""
    programs = -(-m // config.block_m) * -(-columns // config.block_out)
    return min(max(1, 2 * processors // programs), max(1, summed // (4 * config.block_sum)))


def shared_bytes(config: Config, mode: str, itemsize: int) -> int:
    """Not less than the shared memory that a product with this config takes: for each stage a tile of x and of codes
    with their scales; a dense tile of W, and where it is no permutation of codes another on its way to its layout."""
    tile_w = config.block_out * config.block_sum
    stage = config.block_m * config.block_sum * itemsize + tile_w // 2 + tile_w // 32
    return config.num_stages * stage + tile_w * itemsize * (1 if mode == "permute" else 2) + 2048
