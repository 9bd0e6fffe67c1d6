"""Which NF4 operators run as Triton kernels: on CUDA, ROCm and XPU, as far as a GPU and a product gain from it.

Triton is imported when the first tensor on such a GPU arrives, not before. A CUDA or ROCm GPU that a kernel is not
compiled and checked for runs the torch reference, as does every other device; an XPU runs the kernels if its Triton is
installed, unchecked, since no public Triton compiles for one without it. PHICORE_KERNELS=0 turns all kernels off.
"""

import os
from functools import lru_cache
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor

from phicore.nf4 import codec, ops
from phicore.nf4 import low_rank as low_rank_ops
from phicore.nf4.codebook import dynamic_map

DEVICE_TYPES = ("cuda", "xpu")  # ROCm's GPUs are "cuda" to torch too
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register(device_type: str) -> None:
    """Makes the operators of phicore.nf4.ops run here for a device type that torch.library knows."""
    torch.library.impl("phicore::nf4_dequantize", device_type, dequantize)
    torch.library.impl("phicore::nf4_linear", device_type, linear)
    torch.library.impl("phicore::nf4_project_with_rows", device_type, project_with_rows)
    torch.library.impl("phicore::nf4_linear_dx", device_type, linear_dx)
    torch.library.impl("phicore::nf4_low_rank", device_type, low_rank)
    torch.library.impl("phicore::nf4_low_rank_dx", device_type, low_rank_dx)


def on_device(x: Tensor) -> bool:
    """Whether x lies where kernels may run, and operators that fuse more than one step are worth a call.

    Also of a GPU that turns out to have no kernels: the operators settle that, out of torch.compile's sight.
    """
    return x.device.type in DEVICE_TYPES and x.dtype in DTYPES


@lru_cache(maxsize=32)
def has_kernels(device: torch.device) -> bool:
    """Whether the kernels that only encode and decode run on a device."""
    if device.type not in DEVICE_TYPES or os.environ.get("PHICORE_KERNELS") == "0":
        return False
    if find_spec("triton") is None or find_spec("phicore_kernels") is None:
        return False
    if device.type == "xpu":
        return find_spec("triton.backends.intel") is not None
    if torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (7, 5)
    from phicore_kernels.crossover import AMD

    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0] in AMD


def fuses(x: Tensor, rows: int) -> bool:
    """Whether a product with this many rows of x decodes W in the product; otherwise W is dequantised first."""
    if x.dtype not in DTYPES or not has_kernels(x.device):
        return False
    from phicore_kernels.crossover import crossover

    return rows <= crossover(x.device)


def dequantize(packed, absmax, nested_absmax, offset, shape, block_size, dtype):
    if dtype not in DTYPES or not has_kernels(packed.device):
        return ops.reference_dequantize(packed, absmax, nested_absmax, offset, shape, block_size, dtype)
    from phicore_kernels.dequantize import dequantize as kernel

    flat = _weight(packed, absmax, nested_absmax, offset, (1, prod(shape)), block_size)
    return kernel(flat, dtype).view(shape)


def linear(x, packed, absmax, nested_absmax, offset, bias, shape, block_size):
    if not fuses(x, _rows(x)):
        return ops.reference_linear(x, packed, absmax, nested_absmax, offset, bias, shape, block_size)
    from phicore_kernels.matmul import linear as kernel

    weight = _weight(packed, absmax, nested_absmax, offset, shape, block_size)
    bias = bias if bias is None else bias.contiguous()
    return ops.unflat(kernel(ops.flat(x), weight, bias), x)


def project_with_rows(x, rows, packed, absmax, nested_absmax, offset, shape, block_size):
    m = _rows(x)
    if not fuses(x, m + len(rows)):
        return ops.reference_project_with_rows(x, rows, packed, absmax, nested_absmax, offset, shape, block_size)
    from phicore_kernels.matmul import linear as kernel

    weight = _weight(packed, absmax, nested_absmax, offset, shape, block_size)
    both = kernel(torch.cat([ops.flat(x), rows]), weight)  # [m + r, out] from one decoding of W
    return ops.unflat(both[:m], x), both[m:].clone()  # an operator's results share no memory


def linear_dx(grad, packed, absmax, nested_absmax, offset, shape, block_size):
    if not fuses(grad, _rows(grad)):
        return ops.reference_linear_dx(grad, packed, absmax, nested_absmax, offset, shape, block_size)
    from phicore_kernels.matmul import linear_dx as kernel

    weight = _weight(packed, absmax, nested_absmax, offset, shape, block_size)
    return ops.unflat(kernel(ops.flat(grad), weight), grad)


def low_rank(x, A, B, scale, packed, absmax, nested_absmax, offset, bias, shape, block_size, with_rows):
    parts = (packed, absmax, nested_absmax, offset)
    m = _rows(x)
    if not fuses(x, m + with_rows * len(A)):
        return low_rank_ops.reference_low_rank(x, A, B, scale, *parts, bias, shape, block_size, with_rows)
    from phicore_kernels.matmul import LowRank
    from phicore_kernels.matmul import linear as kernel

    weight = _weight(*parts, shape, block_size)
    u = torch.nn.functional.linear(ops.flat(x), A)  # [m, rank]
    if not with_rows:
        bias = bias if bias is None else bias.contiguous()
        y, rows = kernel(ops.flat(x), weight, bias, LowRank(u, B.t(), scale)), A.new_empty((0, shape[0]))
    else:  # A's rows go through W beside x's, with zeros for u
        left = torch.nn.functional.pad(u, (0, 0, 0, len(A)))
        both = kernel(torch.cat([ops.flat(x), A]), weight, None, LowRank(left, B.t(), scale))
        y, rows = both[:m], both[m:].clone()  # an operator's results share no memory
    return ops.unflat(y, x), ops.unflat(u, x), rows


def low_rank_dx(grad, left, right, packed, absmax, nested_absmax, offset, shape, block_size):
    parts = (packed, absmax, nested_absmax, offset)
    if not fuses(grad, _rows(grad)):
        return low_rank_ops.reference_low_rank_dx(grad, left, right, *parts, shape, block_size)
    from phicore_kernels.matmul import LowRank
    from phicore_kernels.matmul import linear_dx as kernel

    weight = _weight(*parts, shape, block_size)
    return ops.unflat(kernel(ops.flat(grad), weight, LowRank(ops.flat(left), right, 1.0)), grad)


def encode_blocks(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """codec.encode_blocks, by a kernel where there is one; the same bits."""
    if not has_kernels(flat.device):
        return codec.encode_blocks(flat, block_size)
    from phicore_kernels.quantize import encode_blocks as kernel

    return kernel(flat.contiguous(), block_size)  # a weight with even gaps is flattened to a view


def encode_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """codec.encode_absmax, by a kernel where there is one; the same bits from the same mean."""
    if not has_kernels(absmax.device):
        return codec.encode_absmax(absmax)
    from phicore_kernels.quantize import encode_absmax as kernel

    return kernel(absmax, _code_map(absmax.device))


def _weight(packed, absmax, nested_absmax, offset, shape, block_size) -> Any:
    from phicore_kernels.weight import Weight

    code_map = None if nested_absmax is None else _code_map(packed.device)
    parts = (part if part is None else part.contiguous() for part in (packed, absmax, nested_absmax, offset))
    return Weight(*parts, code_map, *shape, block_size)


@lru_cache(maxsize=32)
def _code_map(device: torch.device) -> Tensor:
    from phicore_kernels.device import to_stay

    return to_stay(dynamic_map(torch.device("cpu")), device)


def _rows(x: Tensor) -> int:
    return prod(x.shape[:-1])


for _device_type in DEVICE_TYPES:
    register(_device_type)
