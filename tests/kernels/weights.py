"""NF4 weights of random codes and scales, and what they amount to in float64."""

import torch
from torch import Tensor

from phicore.nf4.codebook import LEVELS, dynamic_map
from phicore_kernels.weight import Weight

CPU = torch.device("cpu")


def random_weight(
    rows: int, columns: int, block_size: int = 64, double_quant: bool = True, seed: int = 0, device: str = "cpu"
) -> Weight:
    """Every code and every nested scale occurs; scales are positive and of the size of 1."""
    n = rows * columns
    blocks = -(-n // block_size)
    packed = torch.zeros((n + 1) // 2, dtype=torch.uint8, device=device)
    if double_quant:
        absmax = torch.zeros(blocks, dtype=torch.uint8, device=device)
        nested = torch.zeros(-(-blocks // 256), device=device)
        offset = torch.ones((), device=device)
        weight = Weight(packed, absmax, nested, offset, dynamic_map(CPU).to(device), rows, columns, block_size)
    else:
        weight = Weight(packed, torch.zeros(blocks, device=device), None, None, None, rows, columns, block_size)
    if device == "meta":
        return weight
    generator = torch.Generator().manual_seed(seed)
    weight.packed.random_(0, 256, generator=generator)
    if weight.nested_absmax is None:
        weight.absmax.uniform_(0.5, 1.5, generator=generator)
    else:
        weight.absmax.random_(0, 256, generator=generator)
        weight.nested_absmax.uniform_(0.2, 0.4, generator=generator)
    return weight


def exact(weight: Weight) -> Tensor:
    """The weight in float64, [rows, columns], written out without the code under test."""
    n = weight.rows * weight.columns
    index = torch.arange(n)
    byte = weight.packed.long()[index // 2]
    code = torch.where(index % 2 == 0, byte // 16, byte % 16)
    block = index // weight.block_size
    if weight.nested_absmax is None:
        scale = weight.absmax.double()[block]
    else:
        value = dynamic_map(CPU).double()[weight.absmax.long()[block]]
        scale = value * weight.nested_absmax.double()[block // 256] + weight.offset.double()
    return (torch.tensor(LEVELS, dtype=torch.float64)[code] * scale).view(weight.rows, weight.columns)
