"""DoRA's column scaling against the dense norm in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phicore_kernels import dora

BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}
SCALE = "phicore_kernels.dora:scale_columns"


def case(m, n, rank, dtype, seed, k=24):
    """z and the adapter's parts, W A^T and B as the transposed views that phicore has."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    W, A, B = normal(n, k), normal(rank, k).to(dtype), normal(rank, n).to(dtype).T
    WA = (A.float() @ W.T).T
    return W, {
        "z": normal(n, m).to(dtype).T,
        "base_norm_squared": (W * W).sum(1),
        "WA": WA,
        "A": A,
        "B": B,
        "magnitude": (1 + normal(n).abs()).to(dtype),
        "scaling": 0.3,
    }


@settings(max_examples=20)
@given(
    m=st.integers(0, 70),
    n=st.integers(1, 140),
    rank=st.sampled_from((1, 5, 16, 33)),
    dtype=st.sampled_from(tuple(BOUND)),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_scaling_is_by_the_dense_norm(interpreter, relative_error, m, n, rank, dtype, bias, seed):
    W, parts = case(m, n, rank, dtype, seed)
    b = torch.linspace(-1, 1, n).to(dtype) if bias else None
    y, norm_squared = interpreter.call(SCALE, **parts, bias=b)
    dense = W.double() + 0.3 * parts["B"].double() @ parts["A"].double()  # V'
    exact = (dense * dense).sum(1)
    # the factored form loses as much as its terms are larger than their sum
    lost = ((parts["base_norm_squared"] + exact) / exact).max()
    assert relative_error(norm_squared, exact) <= 1e-6 * lost
    expected = parts["z"].double() * parts["magnitude"].double() / exact.sqrt()
    if b is not None:
        expected = expected + b.double()
    assert y.dtype == dtype
    assert relative_error(y, expected) <= BOUND[dtype] + 1e-6 * lost
    naive = dora.naive_scale_columns(**{**parts, "base_norm_squared": parts["base_norm_squared"].double()}, bias=b)
    assert relative_error(naive[1], exact) <= 1e-6 * lost


def test_a_zero_row_gives_a_zero_column(interpreter):
    _, parts = case(3, 4, 2, torch.float32, 0)
    for name in ("base_norm_squared", "WA", "B"):
        parts[name] = parts[name].clone()
        parts[name][1] = 0
    y, norm_squared = interpreter.call(SCALE, **parts)
    assert norm_squared[1] == 0
    assert (y[:, 1] == 0).all()
    assert (y[:, 0] != 0).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_more_than_2_to_the_31_elements(interpreter, transposed):
    y, squared = interpreter.call("tests.kernels.interpreted:scale_columns_far", 2**30 + 64, transposed)
    assert torch.equal(squared, torch.full((32,), 4.0))
    assert torch.equal(y, torch.full((3, 32), 1.5, dtype=torch.bfloat16))
