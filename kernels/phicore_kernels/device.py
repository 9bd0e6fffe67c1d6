"""What the kernels ask of a GPU, in one place that tests can replace."""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Gpu(NamedTuple):
    """A GPU.

    Attributes:
        name: the product's.
        kind: "nvidia", "amd", "xpu", or "none" for the CPU on which Triton's interpreter runs.
        capability: NVIDIA's compute capability, else (0, 0).
        architecture: AMD's, as "gfx942", else "".
        processors: multiprocessors, compute units or Xe cores.
        shared_limit: bytes of shared memory that one program can have.
    """

    name: str
    kind: str
    capability: tuple[int, int]
    architecture: str
    processors: int
    shared_limit: int


NONE = Gpu("none", "none", (0, 0), "", 108, 163 << 10)  # sized as an A100


@lru_cache(maxsize=32)
def gpu_of(device: torch.device) -> Gpu:
    """The GPU that a device names; NONE for a CPU and for meta tensors."""
    if device.type not in ("cuda", "xpu"):
        return NONE
    from triton.runtime import driver

    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    properties = module.get_device_properties(index)
    limits = driver.active.utils.get_device_properties(index)  # the numbers that Triton's own launches obey
    kind = "xpu" if device.type == "xpu" else "amd" if torch.version.hip is not None else "nvidia"
    return Gpu(
        name=properties.name,
        kind=kind,
        capability=(properties.major, properties.minor) if kind == "nvidia" else (0, 0),
        architecture=properties.gcnArchName.partition(":")[0] if kind == "amd" else "",
        processors=limits["multiprocessor_count"],
        shared_limit=limits["max_shared_mem"],
    )


def to_stay(table: Tensor, device: torch.device) -> Tensor:
    """A table on a device, for as long as the process lives.

    A thread of its own moves it: while torch.compile warms a CUDA graph up (mode="reduce-overhead"), all that the
    calling thread allocates goes to the graph's pool, and torch raises if more than the results is left there.
    """
    with ThreadPoolExecutor(1) as other:
        return other.submit(table.to, device).result()
