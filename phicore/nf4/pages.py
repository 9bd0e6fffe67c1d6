"""Memory of large tensors on a CPU: as it is taken, and as it is given back."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

LARGE = 8 << 20  # bytes from which the C library takes memory straight from the kernel, sooner or later
MUCH = 64 << 20  # bytes freed, after which a loop gives them back
PAGE = 2 << 20  # a large page of x86-64, and of AArch64 with 4 KiB pages


def empty(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty(n), asking Linux for large pages where it is large and on the CPU.

    New memory is mapped as it is first written to, a page at a time; for a decoded weight that takes longer than to
    decode it, unless pages are large. The kernel may decline, and does without a word; nothing else changes.
    """
    out = torch.empty(n, dtype=dtype, device=device)
    size = n * dtype.itemsize
    if size >= LARGE and out.device.type == "cpu" and (advise := _madvise()) is not None:
        first = -(-out.data_ptr() // PAGE) * PAGE  # whole pages within, so that resident memory does not grow
        last = (out.data_ptr() + size) // PAGE * PAGE
        advise(first, last - first, mmap.MADV_HUGEPAGE)
    return out


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux only
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def give_back_freed_memory() -> None:
    """Gives freed memory back to the system. glibc keeps what lies between blocks in use, in pieces that the
    activations of training do not fit into: once a model was quantized, 0.4 of the 1.8 GB that fine-tuning
    SmolLM2-135M took."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


class Freed:
    """Gives freed memory back as a loop goes on that makes large tensors for a moment, and each time small ones that
    stay. These come to lie in what was freed, so that the next large ones need new memory: making DoRA layers over a
    model of 0.4 GB took 2.3 GB that way."""

    def __init__(self) -> None:
        self._bytes = 0

    def add(self, nbytes: int) -> None:
        """Counts what has been freed, and gives it back where it is much."""
        self._bytes += nbytes
        if self._bytes >= MUCH:
            self._bytes = 0
            give_back_freed_memory()
