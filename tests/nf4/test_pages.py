"""Asking for large pages: which memory is named, and that nothing depends on the answer."""

import sys
from unittest import mock

import pytest
import torch

from phicore.nf4 import pages

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_whole_pages_inside_the_tensor_are_named(dtype):
    calls = []
    with mock.patch.object(pages, "_madvise", return_value=lambda *call: calls.append(call)):
        out = pages.empty(5_000_001, dtype, CPU)
    assert (out.shape, out.dtype) == ((5_000_001,), dtype)
    ((first, size, advice),) = calls
    start, stop = out.data_ptr(), out.data_ptr() + out.numel() * dtype.itemsize
    assert first % pages.PAGE == 0
    assert size % pages.PAGE == 0
    assert start <= first < start + pages.PAGE
    assert stop - pages.PAGE < first + size <= stop
    assert advice == 14  # MADV_HUGEPAGE


def test_small_memory_and_other_devices_are_left_alone():
    with mock.patch.object(pages, "_madvise", side_effect=AssertionError("asked")):
        pages.empty(100, torch.float32, CPU)
        pages.empty(10_000_000, torch.float32, torch.device("meta"))


def test_a_system_without_it_gives_plain_memory():
    with mock.patch.object(pages, "_madvise", return_value=None):
        assert pages.empty(5_000_000, torch.float32, CPU).fill_(1).sum() == 5_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="the call is Linux's")
def test_linux_takes_the_call():
    out = pages.empty(5_000_000, torch.float32, CPU)
    first = -(-out.data_ptr() // pages.PAGE) * pages.PAGE
    assert pages._madvise()(first, pages.PAGE, 14) in (0, -1)  # -1: a kernel without large pages
