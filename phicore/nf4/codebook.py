"""The two code books of the NF4 format: 16 levels for weights, 256 values for the absmax of blocks.

NF4 (Dettmers et al. 2023, "QLoRA", section 3) places 16 levels at quantiles of a normal distribution; the absmax of
the blocks are themselves coded in 8 bits with a "dynamic" map (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
Quantization", section 1.3). The values below are those of the bitsandbytes format, to the bit.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

# Ascending; the code of a weight is its index.
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
ZERO_CODE = 7  # LEVELS[7] == 0.0; pads an odd count and fills all-zero blocks


Table = TypeVar("Table", Tensor, tuple[Tensor, ...])


def table(make: Callable[[torch.device], Table]) -> Callable[[torch.device], Table]:
    """Keeps what a function makes for each device.

    A tensor that is made within a transform of torch.func or a mode of fake tensors ends with it, so it is not kept.
    torch.compile takes the tensor as a constant; a cache of functools it would look through, with a warning.
    """
    kept: dict[torch.device, Table] = {}

    @wraps(make)
    def made_once(device: torch.device) -> Table:
        found = kept.get(device)
        if found is None:
            found = make(device)
            if all(map(_is_plain, found if isinstance(found, tuple) else (found,))):
                kept[device] = found
        return found

    made_once._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as torch.compiler.assume_constant_result
    return made_once


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@table
def levels(device: torch.device) -> Tensor:
    """The NF4 levels, float32 [16]."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


def midpoints(values: Tensor) -> Tensor:
    """The float32 bounds between neighbouring code values: [n] -> [n - 1]. A value on a bound takes the lower code."""
    return (values[:-1] + values[1:]) / 2


@table
def dynamic_map(device: torch.device) -> Tensor:
    """The signed 8-bit "dynamic" map, float32 [256], ascending; entry 127 is 0.

    Seven decades: for i in 0..6 the 2^i bin means of linspace(0.1, 1, 2^i + 1), scaled by 10^(i - 6), with both
    signs; then 0 and 1. It resolves small values finely at a large range.
    """
    positive = []
    where: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, **where)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10 ** (i - 6))
    half = torch.cat(positive)  # [127]
    return torch.cat([half, -half, torch.tensor([0.0, 1.0], **where)]).sort().values.to(device)
