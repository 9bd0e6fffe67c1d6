"""Every kernel in every form that a model can meet, as launches on meta tensors: what the compile checks go through."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from phicore_kernels.configs import CONFIGS, EXTRA, Config
from phicore_kernels.dequantize import GROUPS, dequantize_launch
from phicore_kernels.dora import BLOCK_M, BLOCK_N, scale_columns_launch
from phicore_kernels.launch import Launch
from phicore_kernels.matmul import LowRank, matmul_launches
from phicore_kernels.quantize import VALUES, encode_absmax_launch, encode_blocks_launch
from phicore_kernels.weight import Weight


class Entry(NamedTuple):
    """A launch to check.

    Attributes:
        name: kernel, direction, dtype, tile and variant, as "matmul forward bfloat16 16x64x128".
        launch: on meta tensors of a layer of 4096 x 4096.
        weights: that a program decodes or encodes (in one step of its loop, for a product; 0: not a matter of weights).
        product: whether it must use tensor cores.
        vector: whether it must load 16 bytes at once.
    """

    name: str
    launch: Launch
    weights: int
    product: bool
    vector: bool


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_weight(rows: int, columns: int, block_size: int = 64, double_quant: bool = True) -> Weight:
    """An NF4 weight without data."""
    packed = empty(-(-rows * columns // 2), dtype=torch.uint8)
    blocks = -(-rows * columns // block_size)
    if not double_quant:
        return Weight(packed, empty(blocks), None, None, None, rows, columns, block_size)
    nested = empty(-(-blocks // 256))
    absmax = empty(blocks, dtype=torch.uint8)
    return Weight(packed, absmax, nested, empty(), empty(256), rows, columns, block_size)


def catalogue(target: str) -> Iterator[Entry]:
    """All entries for a target; NVIDIA's decode 16 bits by permutation, AMD's from a table.

    sm_75 and gfx1100 (RDNA 3) have no products: Triton has no tensor cores for the one, and the other's 256 registers
    spill. There W is dequantised first.
    """
    yield from _dequantize(target)
    yield from _quantize()
    if target not in ("sm_75", "gfx1100"):
        yield from _matmul(target)
    yield _dora()


def _dequantize(target: str) -> Iterator[Entry]:
    permute = target.startswith("sm") and target != "sm_75"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for note, weight in (
            ("", meta_weight(4096, 4096)),
            (" plain absmax", meta_weight(4096, 4096, double_quant=False)),
            (" tail", meta_weight(4095, 4095)),
        ):
            launch = dequantize_launch(weight, empty(weight.rows, weight.columns, dtype=dtype), permute)
            yield Entry(f"dequantize {_name(dtype)}{note}", launch, GROUPS * 32, False, True)


def _quantize() -> Iterator[Entry]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        flat, packed = empty(1 << 24, dtype=dtype), empty(1 << 23, dtype=torch.uint8)
        launch = encode_blocks_launch(flat, packed, empty(1 << 18), 64)
        yield Entry(f"encode_blocks {_name(dtype)}", launch, VALUES, False, True)
    codes = empty(1 << 18, dtype=torch.uint8)
    launch = encode_absmax_launch(empty(1 << 18), empty(), empty(255), codes, empty(1 << 10))
    yield Entry("encode_absmax", launch, 0, False, False)


def _matmul(target: str) -> Iterator[Entry]:
    way = "permute" if target.startswith("sm") else "table"
    sixteen = [config for _, config in CONFIGS[way, 2]]
    for backward in (False, True):
        for config in sixteen:
            yield _product(target, backward, torch.bfloat16, config)
        for dtype, mode in ((torch.bfloat16, way), (torch.float32, "table")):
            for config in EXTRA[mode, dtype.itemsize]:
                split = 8 if config.block_m < 128 else 1
                yield _product(target, backward, dtype, config._replace(split=split), note=" for tuning")
        yield _product(target, backward, torch.float16, sixteen[-1])
        for config in (sixteen[0], sixteen[-1]):
            yield _product(target, backward, torch.bfloat16, config, bias=not backward, low_rank=True)
        yield _product(target, backward, torch.bfloat16, sixteen[0]._replace(split=1))
        for _, config in CONFIGS["table", 4]:
            yield _product(target, backward, torch.float32, config)
        for dtype in (torch.bfloat16, torch.float32):
            for _, config in CONFIGS["any", dtype.itemsize]:
                yield _product(target, backward, dtype, config, columns=4095)
        for config in (sixteen[0], sixteen[-1]):  # whole groups, a last step that is not
            yield _product(target, backward, torch.bfloat16, config, columns=4064)
        # M, N and K of 1 are compiled in as constants; one variant has everything at once.
        yield _product(target, backward, torch.bfloat16, sixteen[0], m=1)
        config = CONFIGS["any", 2][0][1]
        yield _product(target, backward, torch.bfloat16, config, bias=not backward, low_rank=True, columns=1, m=1)
    x, out = empty(16, 4096, dtype=torch.bfloat16), empty(16, 4096, dtype=torch.bfloat16)
    addition = matmul_launches(x, meta_weight(4096, 4096), out, backward=False, config=sixteen[0], permute=True)[1]
    yield Entry("add_parts bfloat16", addition, 0, False, True)


def _product(
    target: str,
    backward: bool,
    dtype: torch.dtype,
    config: Config,
    bias: bool = False,
    low_rank: bool = False,
    columns: int = 4096,
    m: int | None = None,
    note: str = "",
) -> Entry:
    rows = m or config.block_m * 16
    summed, out_columns = (4096, columns) if backward else (columns, 4096)
    launch = matmul_launches(
        empty(rows, summed, dtype=dtype),
        meta_weight(4096, columns),
        empty(rows, out_columns, dtype=dtype),
        backward=backward,
        bias=empty(out_columns, dtype=dtype) if bias else None,
        low_rank=LowRank(empty(rows, 16, dtype=dtype), empty(out_columns, 16, dtype=dtype).T, 2.0)
        if low_rank
        else None,
        config=config,
        permute=target.startswith("sm"),
        precision="tf32x3" if target.startswith("sm") else "ieee",
        shared_operands=target in ("sm_90", "sm_100"),
    )[0]
    name = f"matmul {'backward' if backward else 'forward'} {_name(dtype)} "
    name += "x".join(map(str, config[:3])) + (f" split {config.split}" if config.split > 1 else "")
    name += " low-rank" * low_rank + (f" columns {columns}" if columns != 4096 else "")
    name += ("" if m is None else f" M {m}") + note
    weights = config.block_out * config.block_sum if columns > 1 else 0  # a sum of one is no loop
    return Entry(name, launch, weights, True, columns % 32 == 0)


def _dora() -> Entry:
    m, n, rank, dtype = 16 * BLOCK_M, 64 * BLOCK_N, 16, torch.bfloat16
    launch = scale_columns_launch(
        empty(m, n, dtype=dtype),
        empty(n),
        empty(rank, n, dtype=dtype).T,
        empty(rank, rank),
        empty(n, rank, dtype=dtype),
        empty(n, dtype=dtype),
        2.0,
        empty(n, dtype=dtype),
        empty(m, n, dtype=dtype),
        empty(n),
    )
    return Entry("dora bfloat16", launch, 0, False, True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
