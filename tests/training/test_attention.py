"""Short examples' attention by plain products: its value and gradients are those of float64, rounded once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from phicore.training.attention import LONGEST, SHORTEST, attends_plainly, causal_attention


def operands(heads: tuple[int, ...], n: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(*heads, n, width, dtype=dtype, requires_grad=True) for _ in range(3)]


def passes(attend, given_: list[Tensor], grad: Tensor) -> list[Tensor]:
    y = attend(*given_)
    return [y.detach(), *torch.autograd.grad(y, given_, grad.to(y.dtype))]


@given(
    heads=st.sampled_from(((), (1,), (2, 3))),
    n=st.integers(1, 40),
    width=st.integers(1, 9),
    scale=st.sampled_from((None, 0.3)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_are_those_of_float64_rounded_once(heads, n, width, scale, dtype, seed):
    torch.manual_seed(seed)
    short = operands(heads, n, width, dtype)
    grad = torch.randn(*heads, n, width, dtype=dtype)

    def exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    exact = passes(exactly, [t.detach().double().requires_grad_() for t in short], grad)
    ours = passes(lambda *qkv: causal_attention(*qkv, scale), short, grad)
    for found, wanted in zip(ours, exact, strict=True):
        assert found.dtype == dtype
        assert float((found.double() - wanted).norm()) <= float(wanted.norm()) * torch.finfo(dtype).eps + 1e-5


def test_operands_of_another_layout(relative_error):
    q, k, v = (t.transpose(1, 2) for t in operands((2,), 30, 3 * 8, torch.bfloat16) for t in [t.view(2, 30, 3, 8)])
    y = causal_attention(q, k, v)
    assert relative_error(y, scaled_dot_product_attention(*(t.double() for t in (q, k, v)), is_causal=True)) < 5e-3


def test_autocast_does_not_reach_the_scores():
    given_ = operands((2,), 30, 8, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = causal_attention(*given_)
    assert torch.equal(y, causal_attention(*given_))


def test_only_operands_are_kept(saved_for_backward):
    given_ = operands((2,), 30, 8, torch.bfloat16)
    saved = saved_for_backward(lambda: causal_attention(*given_), nn.Module())
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in given_}


@pytest.mark.parametrize(
    ("n", "dtype", "key_heads", "expected"),
    [
        (SHORTEST, torch.bfloat16, 4, True),
        (LONGEST, torch.float16, 4, True),
        (SHORTEST - 1, torch.bfloat16, 4, False),
        (LONGEST + 1, torch.bfloat16, 4, False),
        (SHORTEST, torch.float32, 4, False),
        (SHORTEST, torch.bfloat16, 2, False),
    ],
)
def test_what_it_is_for(n, dtype, key_heads, expected):
    q, k, v = (torch.empty(1, heads, n, 8, dtype=dtype) for heads in (4, key_heads, key_heads))
    assert attends_plainly(q, k, v) == expected
