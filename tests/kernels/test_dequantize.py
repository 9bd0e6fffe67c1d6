"""The one-launch dequantise kernel: bit for bit the torch reference, whichever way it decodes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phicore.nf4.codebook import LEVELS
from phicore.nf4.ops import nf4_dequantize
from phicore_kernels import weight as kernel_weight
from tests.kernels.weights import exact, random_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOUND = {torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def test_both_packages_hold_the_same_levels():
    assert kernel_weight.LEVELS == LEVELS


@settings(max_examples=25)
@given(
    rows=st.integers(1, 70),
    columns=st.one_of(st.integers(1, 100), st.sampled_from((32, 64, 96, 128, 160))),
    block_size=st.sampled_from((32, 64, 256, 4096)),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    permute=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_values_are_those_of_the_reference_bit_for_bit(
    interpreter, rows, columns, block_size, double_quant, dtype, permute, seed
):
    weight = random_weight(rows, columns, block_size, double_quant, seed)
    given = interpreter.call("phicore_kernels.dequantize:dequantize", weight, dtype, permute=permute)
    assert given.dtype == dtype
    assert given.shape == (rows, columns)
    parts = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
    assert torch.equal(given, nf4_dequantize(*parts, [rows, columns], block_size, dtype))
    assert torch.equal(given, kernel_weight.naive_decode(weight, dtype))
    assert ((given.double() - exact(weight)).abs() <= BOUND[dtype] * exact(weight).abs()).all()


@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("shape", [(2, 8192), (3, 5461), (1, 20000), (0, 64), (5, 0)])
def test_several_programs_and_short_tails(interpreter, shape, permute):
    # a program decodes 8192 weights: whole programs, a tail below a group, one far below a program, and nothing
    weight = random_weight(*shape)
    given = interpreter.call("phicore_kernels.dequantize:dequantize", weight, torch.bfloat16, permute=permute)
    assert torch.equal(given, kernel_weight.naive_decode(weight, torch.bfloat16))


def test_codes_that_do_not_start_at_16_bytes(interpreter):
    weight = random_weight(8, 64)
    shifted = weight._replace(packed=torch.cat([weight.packed[:1], weight.packed])[1:])
    assert shifted.packed.data_ptr() % 16
    given = interpreter.call("phicore_kernels.dequantize:dequantize", shifted, torch.bfloat16)
    assert torch.equal(given, kernel_weight.naive_decode(weight, torch.bfloat16))


def test_extreme_scales(interpreter):
    weight = random_weight(8, 64, double_quant=False)
    weight.absmax.copy_(torch.tensor([0.0, 1e-38, 1e-45, 3e38, 65504.0, 7e4, 1.0, 1e-8]))
    for dtype in (torch.bfloat16, torch.float16):
        for permute in (True, False):
            given = interpreter.call("phicore_kernels.dequantize:dequantize", weight, dtype, permute=permute)
            assert torch.equal(given, kernel_weight.naive_decode(weight, dtype))


def test_more_than_2_to_the_31_weights(interpreter):
    given = interpreter.call("tests.kernels.interpreted:dequantize_far", 2**31 + 8192)
    assert torch.equal(given, torch.full((8192,), 2.0, dtype=torch.bfloat16))
