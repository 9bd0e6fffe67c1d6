"""The product with a low-rank pair as one operator: its formula, its gradients, and as the dispatcher sees it.

The kernels behind it are tested in tests/kernels; here the reference runs.
"""

import pytest
import torch

import phicore
from phicore.nf4.low_rank import nf4_low_rank, nf4_low_rank_dx

OUT, IN, RANK = 5, 6, 2
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def case(dtype=torch.float64, bias=True, double_quant=True):
    q = phicore.nf4.quantize(torch.randn(OUT, IN), double_quant=double_quant)
    parts = (q.packed, q.absmax, q.nested_absmax, q.offset)
    shapes = ((2, 3, IN), (RANK, IN), (OUT, RANK), (OUT,))
    x, A, B, b = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return q, parts, x, A, B, b if bias else None


@pytest.mark.parametrize(("bias", "with_rows"), [(True, False), (False, False), (False, True)])
def test_values_and_gradients(bias, with_rows):
    q, parts, x, A, B, b = case(bias=bias)

    def f(x, A, B, b):
        return nf4_low_rank(x, A, B, 0.7, *parts, b, [OUT, IN], 64, with_rows)[0]

    W = q.dequantize(torch.float64)
    y, u, rows = nf4_low_rank(x, A, B, 0.7, *parts, b, [OUT, IN], 64, with_rows)
    torch.testing.assert_close(y, x @ (W + 0.7 * B @ A).T + (0 if b is None else b))
    torch.testing.assert_close(u, x @ A.T)
    torch.testing.assert_close(rows, A @ W.T if with_rows else W.new_empty(0, OUT))
    assert not rows.requires_grad
    assert torch.autograd.gradcheck(f, (x, A, B, b))
    assert torch.autograd.gradgradcheck(f, (x, A, B, b))


def test_dx_is_differentiable_too():
    _, parts, *_ = case()
    shapes = ((2, 3, OUT), (2, 3, RANK), (RANK, IN))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def f(grad, left, right):
        return nf4_low_rank_dx(grad, left, right, *parts, [OUT, IN], 64)

    assert torch.autograd.gradcheck(f, inputs)


def test_a_backward_pass_within_autocast_alone():
    _, parts, *inputs = case(torch.float32)
    y = nf4_low_rank(*inputs[:3], 0.7, *parts, inputs[3], [OUT, IN], 64, False)[0]
    expected = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(y.sum(), inputs)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("with_rows", [False, True])
def test_opcheck(with_rows):
    _, parts, x, A, B, b = case(torch.float32, bias=not with_rows, double_quant=with_rows)
    arguments = (x, A, B, 0.7, *parts, b, [OUT, IN], 64, with_rows)
    torch.library.opcheck(nf4_low_rank, arguments, test_utils=OPCHECKS)
    grad, left, right = (torch.randn(s, requires_grad=True) for s in ((2, 3, OUT), (2, 3, RANK), (RANK, IN)))
    torch.library.opcheck(nf4_low_rank_dx, (grad, left, right, *parts, [OUT, IN], 64), test_utils=OPCHECKS)
