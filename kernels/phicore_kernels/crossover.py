"""Up to how many rows of x a product that decodes W beats dequantising W first, as data.

No product of this package has been timed yet. The defaults lie where bitsandbytes' fused kernels stop to win on the
same GPUs; `python -m phicore_kernels.tune` times both ways on the GPU at hand and keeps what it finds (`cache`).
"""

from functools import lru_cache

import torch

from phicore_kernels import cache
from phicore_kernels.device import Gpu, gpu_of

# Compute capability -> rows; the highest that is not above the GPU's holds. Below sm_80 Triton has no tensor cores.
NVIDIA: tuple[tuple[tuple[int, int], int], ...] = (
    ((0, 0), 0),
    ((8, 0), 128),
    ((8, 6), 256),
    ((9, 0), 64),
    ((12, 0), 256),
)
# Architecture of an AMD GPU -> rows. The kernels are not checked on others, nor products on gfx1100.
AMD: dict[str, int] = {"gfx942": 16, "gfx1100": 0}
XPU = 16  # as gfx942, whose way of decoding it shares


def default_crossover(gpu: Gpu) -> int:
    """The rows of the tables above for a GPU, 0 where W is always dequantised first."""
    if gpu.kind == "xpu":
        return XPU
    if gpu.kind == "amd":
        return AMD.get(gpu.architecture, 0)
    return next(rows for least, rows in reversed(NVIDIA) if gpu.capability >= least)


@lru_cache(maxsize=32)
def crossover(device: torch.device) -> int:
    """The most rows for which products on a GPU decode W themselves: as tuned there, or the default."""
    gpu = gpu_of(device)
    default = default_crossover(gpu)
    tuned = cache.load(gpu.name).crossover_rows if default else None
    return default if tuned is None else tuned
