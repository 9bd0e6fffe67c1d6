"""An NF4 weight as the kernels take it, and its naive decoding."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from phicore_kernels.device import to_stay

GROUP = 32  # weights that a thread decodes together: 16 bytes, one load; no block of scales is smaller
NESTED_BLOCK_SIZE = 256  # absmax values that share one nested absmax

# Dettmers et al. 2023, "QLoRA", appendix E; the code of a weight is the index.
LEVELS: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Weight(NamedTuple):
    """The parts of an NF4 weight of `rows` x `columns` values (a flat one has one row).

    Attributes:
        packed: uint8 [ceil(n / 2)], two codes a byte, the earlier weight in the high nibble.
        absmax: float32 [ceil(n / block_size)]; double-quantised, uint8 codes.
        nested_absmax: float32 [ceil(n_blocks / 256)], or None.
        offset: float32 [], or None.
        code_map: float32 [256], the values of the 8-bit codes, or None.
        rows, columns: of the weight, row-major; n = rows * columns.
        block_size: weights that share one absmax: a power of two, at least 32.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    code_map: Tensor | None
    rows: int
    columns: int
    block_size: int

    def kernel_arguments(self) -> dict[str, Tensor | None]:
        """The tensors under the names that every kernel gives them."""
        return {
            "packed": self.packed,
            "absmax": self.absmax,
            "nested_absmax": self.nested_absmax,
            "offset": self.offset,
            "code_map": self.code_map,
            "levels": level_table(self.packed.device),
        }


@lru_cache(maxsize=32)
def level_table(device: torch.device) -> Tensor:
    """LEVELS as float32 [16]."""
    return to_stay(torch.tensor(LEVELS, dtype=torch.float32, device="cpu"), device)


def block_shift(weight: Weight) -> int:
    """log2 of the groups in a block of scales."""
    return (weight.block_size // GROUP).bit_length() - 1


def decode_mode(packed: Tensor, columns: int, dtype: torch.dtype, permute: bool | None = None) -> str:
    """How a kernel decodes to dtype: "permute", "table" or "any" (see phicore_kernels.decode).

    Args:
        packed: the codes; a view that does not start at 16 bytes is read weight by weight.
        columns: weights that a row holds; whole groups of 32 are read at once.
        dtype: of the decoded weights.
        permute: whether the device has the byte permutation that "permute" needs; None asks the device.
    """
    if columns == 0 or columns % GROUP or packed.data_ptr() % 16:
        return "any"
    if dtype.itemsize != 2:
        return "table"
    return "permute" if (has_permute(packed.device) if permute is None else permute) else "table"


@lru_cache(maxsize=32)
def has_permute(device: torch.device) -> bool:
    """Whether a device runs PTX with prmt and the paired roundings of sm_80. The interpreter on a CPU has its own."""
    if device.type != "cuda":
        return device.type in ("cpu", "meta")
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def naive_scales(weight: Weight) -> Tensor:
    """The absmax of each block, float32 [n_blocks]: code_map[code] * nested_absmax + offset if double-quantised."""
    if weight.nested_absmax is None:
        return weight.absmax
    assert weight.code_map is not None
    nested = weight.nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: len(weight.absmax)]
    return weight.code_map[weight.absmax.long()] * nested + weight.offset


def naive_decode(weight: Weight, dtype: torch.dtype) -> Tensor:
    """level * absmax in float32, rounded once to dtype: [rows, columns]."""
    n = weight.rows * weight.columns
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1).view(-1)[:n].long()
    scales = naive_scales(weight).repeat_interleave(weight.block_size)[:n]
    return (level_table(weight.packed.device)[codes] * scales).to(dtype).view(weight.rows, weight.columns)
