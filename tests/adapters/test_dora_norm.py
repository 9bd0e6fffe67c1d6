"""The norm of DoRA's direction against the dense one: factored, where its terms cancel, in 16 bits, of zero rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import phicore
from phicore import NF4Linear
from phicore.adapters import dora_norm
from tests.adapters.dora_layers import IN, OUT, cancelling, norm_used, row_error, trained


@given(out=st.integers(1, 30), inner=st.integers(1, 40), rank=st.integers(1, 9), scale=st.sampled_from((0.1, 1.0, 4.0)))
def test_factored_norm_equals_the_dense_norm(out, inner, rank, scale):
    W, A = torch.randn(out, inner, dtype=torch.float64), torch.randn(rank, inner, dtype=torch.float64)
    B = torch.randn(out, rank, dtype=torch.float64)
    squared = dora_norm.factored_norm_squared((W**2).sum(1), W @ A.T, A, B, scale)
    torch.testing.assert_close(squared, ((W + scale * B @ A) ** 2).sum(1))


def test_factored_norm_of_nothing_is_not_below_zero():
    A, B = torch.randn(5, 40), torch.randn(200, 5)
    W = -(B @ A)  # V' = 0 but for rounding, which may go below
    squared = dora_norm.factored_norm_squared((W**2).sum(1), W @ A.T, A, B, 1.0)
    assert (squared >= 0).all()
    assert (squared == 0).any()
    assert squared.max() < 1e-3


@pytest.mark.parametrize("kind", ["linear", "nf4", "lora+nf4"])
@pytest.mark.parametrize("ratio", [1.0, 0.3, 0.11, 0.09, 0.03, 1e-2, 1e-3])
def test_norm_in_float32_under_cancellation(layer_of, kind, ratio):
    layer, exact = cancelling(kind, layer_of, torch.float32, ratio)
    norm = norm_used(layer, torch.randn(2, 12))
    assert norm.dtype == torch.float32
    assert row_error(norm, exact) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "nf4"])
@pytest.mark.parametrize("std", [1e-3, 1e-2, 0.1])
def test_norm_in_16_bits(layer_of, randomize, kind, dtype, std):
    base, W, _ = layer_of(kind, 96, 200, dtype=dtype)
    layer = randomize(phicore.DoRALinear(base, rank=8, alpha=16), std=std)
    exact = (W + 2 * layer.lora_B.detach().double() @ layer.lora_A.detach().double()).norm(dim=1)
    assert row_error(norm_used(layer, torch.randn(2, 200).to(dtype)), exact) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [0.3, 0.1, 0.03])
def test_norm_in_16_bits_under_cancellation(layer_of, dtype, ratio):
    # B is rounded to 16 bits before the exact norm is taken, so V' is what the stored numbers say
    layer, exact = cancelling("linear", layer_of, dtype, ratio)
    assert row_error(norm_used(layer, torch.randn(2, 12).to(dtype)), exact) < 1e-2


# Above the threshold W A^T stays a product of bfloat16 numbers: three roundings of 2^-9, times ||W|| ||s B A|| /
# ||V'||^2, which is about the root of 2 there. Below it the row is summed densely in float32.
@pytest.mark.parametrize(("ratio", "bound"), [(1.0, 3 * 2**-9 * 2**0.5), (0.1, 1e-4), (1e-2, 1e-4), (1e-3, 1e-3)])
def test_autocast_does_not_reach_the_norm(layer_of, ratio, bound):
    layer, exact = cancelling("linear", layer_of, torch.float32, ratio)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm = norm_used(layer, torch.randn(2, 12))
        merged = layer.merged_weight()
    assert row_error(norm, exact) < bound
    assert torch.equal(merged, layer.merged_weight())


@pytest.mark.parametrize("kind", ["linear", "lora+linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("B_too", [False, True])
def test_zero_rows_stay_finite(layer_of, randomize, kind, dtype, B_too):
    base, _, _ = layer_of(kind, OUT, IN, dtype=dtype)
    plain = base if kind == "linear" else base.base
    dead = [0, 5]
    with torch.no_grad():
        plain.weight[dead] = 0
        if kind != "linear":
            base.lora_B[dead] = 0
    layer = randomize(phicore.DoRALinear(base, rank=4, alpha=7.0))
    if B_too:
        with torch.no_grad():
            layer.lora_B[dead] = 0
    x = torch.randn(3, IN).to(dtype).requires_grad_(True)
    y = layer(x)
    grads = torch.autograd.grad(y.float().pow(2).sum(), (x, *trained(layer)))
    assert all(t.isfinite().all() for t in (y, *grads, layer.merged_weight()))
    if B_too:  # V' is zero there: nothing but the bias is left
        torch.testing.assert_close(y[:, dead], layer.bias[dead].expand(3, 2))
    else:  # V' is s B A alone, of length m after scaling
        assert layer.merged_weight()[dead].norm(dim=1).tolist() == pytest.approx(
            layer.magnitude[dead].abs().tolist(), rel=1e-2
        )


@pytest.mark.parametrize("held", ["dense", "transposed", "nf4", "double-quantised nf4"])
@pytest.mark.parametrize("ratio", [1.0, 1e-2])
def test_norm_operator_for_the_dispatcher(held, ratio):
    out, inner, rank = 6, 70, 6
    W = torch.randn(inner, out).t() if held == "transposed" else torch.randn(out, inner)
    weight, parts, block_size = W, [W.to(torch.bfloat16)], 0
    if "nf4" in held:
        coded = phicore.nf4.quantize(W, 64, "double" in held)
        weight, parts, block_size = coded.dequantize(), [*NF4Linear.from_nf4(coded)._parts()], 64
    else:
        weight = parts[0].float()
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    A, B = V[:rank], -(1 - ratio) * U[:, :rank] * S[:rank]  # takes all but that part away
    arguments = weight.square().sum(1), weight @ A.t(), A, B / 0.7, 0.7, parts, [out, inner], block_size
    operator = torch.ops.phicore.dora_norm_squared
    torch.testing.assert_close(operator(*arguments), (weight + B @ A).square().sum(1), rtol=1e-3, atol=0)
    torch.library.opcheck(operator, arguments)
