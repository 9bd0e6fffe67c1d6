"""Memory that comes back is lent again, and no more of it is kept than was asked for."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from phicore.zero.scratch import Scratch

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def kept(scratch: Scratch) -> int:
    return sum(block.nbytes for block in scratch._free)


@given(st.lists(st.tuples(st.integers(1, 300), DTYPES, st.booleans()), max_size=20), st.integers(0, 3000))
def test_what_is_lent_is_nobody_elses(asked, keep_bytes):
    scratch, lent = Scratch(keep_bytes), []
    for number, (size, dtype, give_one_back) in enumerate(asked):
        tensor = scratch.take(torch.empty(size, dtype=dtype))
        assert (tensor.shape, tensor.dtype) == ((size,), dtype)
        lent.append((tensor.fill_(number), number))
        if give_one_back:
            scratch.give(lent.pop(0)[0])
        assert kept(scratch) <= keep_bytes
        assert all((tensor == number).all() for tensor, number in lent)


def test_memory_is_used_again():
    scratch = Scratch(1000)
    first = scratch.take(torch.empty(200))
    place = first.data_ptr()
    scratch.give(first)
    assert scratch.take(torch.empty(90, dtype=torch.float64)).data_ptr() == place
    assert scratch.take(torch.empty(200)).data_ptr() != place  # lent already


def test_large_memory_is_kept_rather_than_small_and_none_beyond_the_limit():
    scratch = Scratch(1000)
    lent = [scratch.take(torch.empty(size)) for size in (1, 100, 200, 251)]  # 4, 400, 800 and 1,004 bytes
    for tensor in lent:
        scratch.give(tensor)
    assert kept(scratch) == 800


def test_other_devices_have_allocators_of_their_own():
    scratch = Scratch(1000)
    tensor = scratch.take(torch.empty(5, device="meta"))
    assert tensor.is_meta
    scratch.give(tensor)
    assert kept(scratch) == 0


def test_the_default_device_is_no_matter():
    scratch = Scratch(1000)
    with torch.device("meta"):
        tensor = scratch.take(torch.empty(5, device="cpu"))
        scratch.give(tensor)
    assert tensor.device.type == "cpu"
    assert kept(scratch) == 20
