"""DoRA's scaling of columns: against float64, and the same bits by torch's operators and as machine code."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from phicore.adapters import scaled_rows as scaling
from phicore.adapters.scaled_rows import scaled_rows


@pytest.fixture(scope="module", autouse=True)
def _as_machine_code(machine_code: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
    with machine_code(scaling, "SCALE", "GRADIENTS"):
        yield


def step(rows: int, out: int, dtype: torch.dtype, bias: bool, strided: bool, seed: int) -> tuple[Tensor, ...]:
    """y and the gradients of v, scale and the bias; and the four by float64."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(out, rows, generator=generator).t() if strided else torch.randn(rows, out, generator=generator)
    v = v.to(dtype).requires_grad_()
    grad = torch.randn(rows, out, generator=generator).to(dtype)
    scale = (torch.rand(out, generator=generator) + 0.5).requires_grad_()
    b = torch.randn(out, generator=generator).requires_grad_() if bias else None
    inputs = (v, scale, b) if b is not None else (v, scale)
    y = scaled_rows(v, scale, b)
    exact = v.double() * scale.double() + (0 if b is None else b.double())
    gradients = torch.autograd.grad(y, inputs, grad)
    return y, *gradients, exact, *torch.autograd.grad(exact, inputs, grad.double())


@given(
    rows=st.sampled_from((0, 1, 15, 16, 17, 33, 64, 100)),
    out=st.sampled_from((0, 1, 7, 16, 31, 40, 64, 129)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    bias=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_machine_code_and_torchs_operators_give_the_same_bits(rows, out, dtype, bias, strided, seed):
    by_machine_code = step(rows, out, dtype, bias, strided, seed)
    with mock.patch.dict(os.environ, PHICORE_KERNELS="0"), mock.patch.object(scaling, "SCALED", 640):
        by_operators = step(rows, out, dtype, bias, strided, seed)
    assert all(map(torch.equal, by_machine_code, by_operators))
    half = len(by_machine_code) // 2
    precision = torch.finfo(dtype).eps
    for given_, exact in zip(by_machine_code[:half], by_machine_code[half:], strict=True):
        torch.testing.assert_close(given_.double(), exact.double(), rtol=2 * precision, atol=1e-5 + precision)


@pytest.mark.parametrize("bias", [False, True])
def test_machine_code_runs(bias):
    def refuse(*args: object) -> None:
        raise AssertionError("scaled by torch's operators")

    gradients = mock.patch.object(scaling.GRADIENTS, "function", refuse)
    with gradients, mock.patch.object(scaling, "_scale", refuse):
        step(32, 24, torch.bfloat16, bias, False, 0)


def test_zeros_keep_their_sign():
    v = torch.tensor([[0.0, -0.0, 1.0, -1.0]]).bfloat16().expand(16, 4).contiguous().requires_grad_()
    y = scaled_rows(v, torch.tensor([1.0, 1.0, 0.0, 0.0], requires_grad=True))
    assert y.signbit().tolist() == [[False, True, False, True]] * 16


def test_scales_of_no_number_and_large_ones():
    v = torch.randn(32, 24).bfloat16()
    scale = torch.ones(24)
    scale[:3] = torch.tensor([float("nan"), float("inf"), 3e38])

    def both() -> list[Tensor]:
        a, b = v.clone().requires_grad_(), scale.clone().requires_grad_()
        y = scaled_rows(a, b)
        return [y.detach(), *torch.autograd.grad(y, (a, b), torch.ones_like(y))]

    given_ = both()
    with mock.patch.dict(os.environ, PHICORE_KERNELS="0"):
        exact = both()
    for one, other in zip(given_, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
