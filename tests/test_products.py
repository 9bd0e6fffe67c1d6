"""16-bit products where the CPU has none: which those are, and that results are the exact ones, rounded once."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from phicore import products

HALVES = (torch.bfloat16, torch.float16)
sizes = st.integers(0, 20)


@pytest.fixture(autouse=True)
def _emulating_in_small_pieces():
    with mock.patch.object(products, "EMULATED", HALVES), mock.patch.object(products, "PIECE", 60):
        yield


def half(*shape: int, dtype: torch.dtype, strided: bool = False) -> Tensor:
    return torch.randn(shape[::-1]).to(dtype).t() if strided else torch.randn(shape).to(dtype)


def rounded_once(given: Tensor, exact: Tensor, terms: Tensor) -> bool:
    """Whether each element is the exact one, rounded to its dtype, but for a float32 sum's error."""
    assert given.shape == exact.shape
    half_step = torch.finfo(given.dtype).eps / 2
    tiny = torch.finfo(given.dtype).smallest_normal * torch.finfo(given.dtype).eps
    return bool(((given.double() - exact).abs() <= 1.01 * half_step * exact.abs() + 1e-6 * terms + tiny).all())


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"bf16": True, "fp16": True}, ()),
        ({"bf16": True, "fp16": False}, (torch.float16,)),
        ({"bf16": False, "fp16": False}, HALVES),
        ({}, HALVES),  # torch built without oneDNN
    ],
)
def test_torch_is_asked_what_it_asks_itself(answers, expected):
    questions = {f"_is_mkldnn_{name}_supported": (lambda answer=answer: answer) for name, answer in answers.items()}
    with mock.patch.object(torch.ops, "mkldnn", SimpleNamespace(**questions)), avx512(True, True):
        assert products.emulated_dtypes() == expected


def avx512(there: bool, bfloat16: bool):
    return mock.patch.multiple(
        torch.cpu, _is_avx512_supported=lambda: there, _is_avx512_bf16_supported=lambda: bfloat16
    )


@pytest.mark.parametrize(
    ("there", "bfloat16", "expected"),
    [
        (True, True, ()),
        (True, False, (torch.bfloat16,)),  # Skylake to Ice Lake: oneDNN says yes, and takes several times as long
        (False, False, ()),  # Arm's BF16
    ],
)
def test_the_cpu_is_asked_whether_its_avx512_knows_bfloat16(there, bfloat16, expected):
    yes = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True, _is_mkldnn_fp16_supported=lambda: True)
    with mock.patch.object(torch.ops, "mkldnn", yes), avx512(there, bfloat16):
        assert products.emulated_dtypes() == expected


def test_only_16_bit_tensors_on_a_cpu():
    x = torch.ones(2)
    assert products.emulated(x.bfloat16())
    assert products.emulated(x, torch.float16)  # as autocast would cast it
    assert not products.emulated(x)
    assert not products.emulated(x.bfloat16(), torch.float32)
    assert not products.emulated(x.bfloat16().to("meta"))
    with mock.patch.object(products, "EMULATED", (torch.float16,)):
        assert not products.emulated(x.bfloat16())


@given(n=sizes, k=sizes, m=sizes, dtype=st.sampled_from(HALVES), strided=st.booleans(), scale=st.sampled_from((1, 0.3)))
def test_narrow_products_are_rounded_once(n, k, m, dtype, strided, scale):
    a, b, y = half(n, k, dtype=dtype, strided=strided), half(k, m, dtype=dtype), half(n, m, dtype=dtype)
    exact, terms = scale * (a.double() @ b.double()), a.double().abs() @ b.double().abs()
    assert rounded_once(products.matmul(a, b, scale), exact, terms)
    assert rounded_once(products.addmm(y, a, b, scale), y.double() + exact, terms + y.double().abs())
    wide = products.matmul(a, b, scale, torch.float32)
    assert wide.dtype == torch.float32
    assert rounded_once(wide, exact, terms)


def test_blocks_of_a_weight_share_a_piece_of_memory():
    weight = torch.randn(40, 7).bfloat16()
    pieces = {block.untyped_storage().data_ptr(): block.untyped_storage().nbytes()
              for _, block in products.row_blocks(weight)}  # fmt: skip
    assert list(pieces.values()) == [4 * 7 * (60 // 7)]
    wide = weight.float()
    assert all(block.data_ptr() == wide[rows].data_ptr() for rows, block in products.row_blocks(wide))


@given(n=sizes, inner=sizes, out=sizes, rank=st.integers(0, 5), dtype=st.sampled_from(HALVES), strided=st.booleans())
def test_products_by_blocks_are_rounded_once(n, inner, out, rank, dtype, strided):
    x, W, A = (half(rows, inner, dtype=dtype, strided=strided) for rows in (n, out, rank))
    u, B, bias = half(n, rank, dtype=dtype), half(out, rank, dtype=dtype), half(out, dtype=dtype)
    y, WA = x.new_empty(n, out), torch.empty(rank, out)
    products.linear(x, products.row_blocks(W), y, bias, (u, B), 0.3, (A, WA))
    x64, W64, A64, u64, B64, bias64 = (t.double() for t in (x, W, A, u, B, bias))
    terms = x64.abs() @ W64.T.abs() + u64.abs() @ B64.T.abs() + bias64.abs()
    assert rounded_once(y, x64 @ W64.T + bias64 + 0.3 * u64 @ B64.T, terms)
    assert rounded_once(WA, A64 @ W64.T, A64.abs() @ W64.T.abs())
    g = half(n, out, dtype=dtype, strided=strided)
    dx = products.linear_dx(g, products.row_blocks(W), inner, u, A)
    assert rounded_once(dx, g.double() @ W64 + u64 @ A64, g.double().abs() @ W64.abs() + u64.abs() @ A64.abs())


def test_the_default_device_is_no_matter():
    a, b, g, W = (half(*shape, dtype=torch.bfloat16) for shape in ((2, 40), (40, 3), (5, 7), (7, 6)))
    with torch.device("meta"):
        found = products.matmul(a, b), products.linear_dx(g, products.row_blocks(W), 6)
    assert torch.equal(found[0], products.matmul(a, b))
    assert torch.equal(found[1], products.linear_dx(g, products.row_blocks(W), 6))


def test_for_the_dispatcher():
    operator = torch.ops.phicore.wide_addmm
    halves = [half(*shape, dtype=torch.bfloat16).requires_grad_() for shape in ((5, 7), (5, 3), (3, 7))]
    torch.library.opcheck(operator, (*halves, 0.3, torch.float32))
    for shapes in (((5, 7), (5, 3), (3, 7)), ((2, 3), (2, 40), (40, 3))):  # by rows, and by a long sum
        y, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
        assert torch.autograd.gradcheck(lambda y, a, b: operator(y, a, b, 0.3, torch.float64), (y, a, b))
        assert torch.autograd.gradgradcheck(lambda a, b: operator(None, a, b, 0.3, torch.float64), (a, b))
