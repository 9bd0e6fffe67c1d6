"""The encoding kernels against the torch reference, to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phicore.nf4 import codec
from phicore.nf4.codebook import LEVELS, dynamic_map
from tests.kernels.weights import CPU

BLOCKS, ABSMAX = "phicore_kernels.quantize:encode_blocks", "phicore_kernels.quantize:encode_absmax"


@settings(max_examples=40)
@given(
    n=st.one_of(st.integers(1, 700), st.sampled_from((4096, 8192, 5000))),
    block_size=st.sampled_from((32, 64, 512, 4096)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    scale=st.sampled_from((1e-3, 1.0, 1e4, 1e-40)),
    seed=st.integers(0, 2**31),
)
def test_codes_and_scales_are_those_of_the_reference(interpreter, n, block_size, dtype, scale, seed):
    if dtype == torch.float16 or (dtype == torch.bfloat16 and scale == 1e-40):
        scale = 1.0  # float16 has no such range; the interpreter reads a bfloat16 below 1e-38 as zero
    flat = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    packed, absmax = interpreter.call(BLOCKS, flat, block_size)
    expected_packed, expected_absmax = codec.encode_blocks(flat, block_size)
    assert torch.equal(absmax, expected_absmax)
    assert torch.equal(packed, expected_packed)


def test_bounds_and_edges_of_bins(interpreter):
    # absmax 1, so that the scaled weight is the weight: each bound and each edge of a bin with both its neighbours
    levels = torch.tensor(LEVELS)
    points = torch.cat([(levels[:-1] + levels[1:]) / 2, levels, (torch.arange(-17, 18) + 0.5).clamp(-16, 16) / 16])
    near = [torch.nextafter(points, torch.full_like(points, end)) for end in (-2.0, 2.0)]
    flat = torch.cat([points, *near]).clamp(-1, 1)
    flat = torch.cat([flat, torch.linspace(-1, 1, 8192 - len(flat))])
    flat.view(-1, 64)[:, 0] = 1.0
    packed, _ = interpreter.call(BLOCKS, flat, 64)
    assert torch.equal(packed, codec.encode_blocks(flat, 64)[0])


def test_more_than_2_to_the_31_weights(interpreter):
    flat, packed, absmax = interpreter.call("tests.kernels.interpreted:encode_far", 2**31 + 4096)
    expected_packed, expected_absmax = codec.encode_blocks(flat, 64)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_the_absmax_of_its_block(interpreter, bad):
    flat = torch.ones(256)
    flat[130] = bad
    _, absmax = interpreter.call(BLOCKS, flat, 64)
    assert absmax.isfinite().tolist() == [True, True, False, True]


def test_all_zero_blocks_have_the_code_of_zero(interpreter):
    packed, absmax = interpreter.call(BLOCKS, torch.zeros(129), 64)
    assert (packed == 0x77).all()
    assert absmax.tolist() == [0, 0, 0]


@given(n=st.integers(1, 600), spread=st.sampled_from((0.0, 1e-6, 0.3)), seed=st.integers(0, 2**31))
@settings(max_examples=20)
def test_double_quantisation_is_that_of_the_reference(interpreter, n, spread, seed):
    absmax = 1 + spread * torch.rand(n, generator=torch.Generator().manual_seed(seed))
    given = interpreter.call(ABSMAX, absmax, dynamic_map(CPU))
    for part, expected in zip(given, codec.encode_absmax(absmax), strict=True):
        assert torch.equal(part, expected)


def test_every_code_of_the_map_and_empty_weights(interpreter):
    table = dynamic_map(CPU)
    absmax = torch.cat([table, table, -table])  # the offset moves all a little; codes cover the map
    given = interpreter.call(ABSMAX, absmax, table)
    for part, expected in zip(given, codec.encode_absmax(absmax), strict=True):
        assert torch.equal(part, expected)
    packed, none = interpreter.call(BLOCKS, torch.empty(0), 64)
    assert packed.numel() == none.numel() == 0
    assert [part.numel() for part in interpreter.call(ABSMAX, none, table)] == [0, 0, 1]


def test_naive_is_the_reference_too():
    from phicore_kernels import quantize

    flat = torch.randn(1001)
    for part, expected in zip(quantize.naive_encode_blocks(flat, 64), codec.encode_blocks(flat, 64), strict=True):
        assert torch.equal(part, expected)
    absmax = torch.rand(300)
    naive = quantize.naive_encode_absmax(absmax, dynamic_map(CPU))
    for part, expected in zip(naive, codec.encode_absmax(absmax), strict=True):
        assert torch.equal(part, expected)
