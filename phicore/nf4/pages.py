"""Memory for large results on a CPU."""

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

LARGE = 8 << 20  # bytes from which the C library takes memory straight from the kernel, sooner or later
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
