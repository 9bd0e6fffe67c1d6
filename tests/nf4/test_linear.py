"""phicore.nf4.linear, NF4Linear and the operators under them: equal to a dense product with the decoded weight."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear as dense_linear
from transformers.pytorch_utils import Conv1D

import phicore
from phicore.nf4 import ops
from phicore.nf4.tensor import NF4Tensor
from phicore.products import EMULATED

OUT, IN = 23, 37  # no multiple of a block, odd count


def make(out: int = OUT, inner: int = IN, *, bias: bool = True, dtype: torch.dtype = torch.float32, **options):
    """An NF4Linear whose bias is not zero."""
    layer = nn.Linear(inner, out, bias=bias, dtype=dtype)
    return phicore.NF4Linear.from_linear(layer, **options)


def decoded(layer: phicore.NF4Linear, dtype: torch.dtype) -> Tensor:
    return layer.nf4.dequantize(dtype)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """In which dtype the weight is decoded for an x of this one, and the product taken."""
    return torch.float32 if dtype in EMULATED else dtype


def parts(q: NF4Tensor) -> tuple:
    return q.packed, q.absmax, q.nested_absmax, q.offset


# ===== the function =====


@given(
    lead=st.sampled_from(((), (1,), (5,), (0,), (2, 3), (2, 0, 3))),
    out=st.integers(1, 20),
    inner=st.integers(1, 70),
    bias=st.booleans(),
    double_quant=st.booleans(),
    block_size=st.sampled_from((32, 64, 256)),
)
def test_equals_the_dense_product_forward_and_backward(lead, out, inner, bias, double_quant, block_size):
    q = phicore.nf4.quantize(torch.randn(out, inner), block_size, double_quant)
    w = q.dequantize(torch.float64)
    x = torch.randn(*lead, inner, dtype=torch.float64, requires_grad=True)
    b = torch.randn(out, dtype=torch.float64, requires_grad=True) if bias else None
    grad = torch.randn(*lead, out, dtype=torch.float64)

    y = phicore.nf4.linear(x, q, b)
    torch.testing.assert_close(y, x @ w.T + (b if bias else 0), rtol=1e-12, atol=1e-12)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ w, rtol=1e-12, atol=1e-12)
    if bias:
        torch.testing.assert_close(b.grad, grad.reshape(-1, out).sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("emulated", [(), (torch.bfloat16, torch.float16)], ids=["plain", "emulated"])
@pytest.mark.parametrize(("out", "inner"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("lead", [(), (3,), (2, 0)])
def test_sizes_of_zero(lead, out, inner, emulated, monkeypatch):
    monkeypatch.setattr("phicore.products.EMULATED", emulated)
    q = phicore.nf4.quantize(torch.empty(out, inner, dtype=torch.bfloat16))
    x = torch.randn(*lead, inner, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(out, dtype=torch.bfloat16, requires_grad=True)
    y = phicore.nf4.linear(x, q, b)
    assert torch.equal(y, b.expand(*lead, out))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(b.grad, torch.full_like(b, torch.Size(lead).numel()))


@pytest.mark.parametrize("double_quant", [False, True])
def test_gradcheck_and_gradgradcheck(double_quant):
    q = phicore.nf4.quantize(torch.randn(5, 7), double_quant=double_quant)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def f(x, b):
        return phicore.nf4.linear(x, q, b)

    assert torch.autograd.gradcheck(f, (x, b))
    assert torch.autograd.gradgradcheck(f, (x, b))
    assert torch.autograd.gradgradcheck(lambda x: (phicore.nf4.linear(x, q) ** 2).sum(), (x,))


def test_only_the_bias_or_only_x_may_need_a_gradient():
    layer = make(bias=True)
    x = torch.randn(4, IN)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((OUT,), 4.0))
    layer.requires_grad_(False)
    x.requires_grad_(True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, decoded(layer, x.dtype).sum(0).expand(4, IN))
    assert not layer(x.detach()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_x_of_any_strides(dtype):
    layer = make(dtype=dtype)
    wide = computed_in(dtype)
    w, bias = decoded(layer, wide), layer.bias.to(wide)
    base = torch.randn(3, IN, 5, 2).to(dtype)
    for x in (base[..., 0].mT, base[0, :, :, 1].T, base[:, :, 0, 0][::2], torch.randn(IN).to(dtype).expand(4, IN)):
        assert x.shape[-1] == IN
        x = x.detach().requires_grad_(True)
        y = layer(x)
        assert y.dtype == dtype
        # the same kernel on the same numbers; rows one after the other, for which torch rounds once
        expected = dense_linear(x.to(wide).reshape(-1, IN), w, bias).to(dtype)
        torch.testing.assert_close(y.reshape(expected.shape), expected)
        grad = torch.randn(y.shape[::-1]).to(dtype).permute(*reversed(range(y.ndim)))  # not contiguous either
        (given,) = torch.autograd.grad(y, x, grad)
        assert given.dtype == dtype
        torch.testing.assert_close(given, (grad.to(wide) @ w).to(dtype))


def test_bias_of_another_dtype_is_cast_and_gets_its_own_gradient():
    q = phicore.nf4.quantize(torch.randn(OUT, IN))
    b = torch.randn(OUT, requires_grad=True)
    x = torch.randn(4, IN).bfloat16()
    y = phicore.nf4.linear(x, q, b)
    assert y.dtype == torch.bfloat16
    wide = computed_in(torch.bfloat16)
    torch.testing.assert_close(y, dense_linear(x.to(wide), q.dequantize(wide), b.bfloat16().to(wide)).bfloat16())
    y.sum().backward()
    assert b.grad.dtype == torch.float32
    torch.testing.assert_close(b.grad, torch.full((OUT,), 4.0))


def test_autocast():
    layer = make()
    x = torch.randn(4, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        z, rows = layer.project_with_rows(x, torch.randn(2, IN))
    assert y.dtype == z.dtype == rows.dtype == torch.bfloat16
    wide = computed_in(torch.bfloat16)
    w = decoded(layer, wide)
    torch.testing.assert_close(y, dense_linear(x.bfloat16().to(wide), w, layer.bias.bfloat16().to(wide)).bfloat16())
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, w.float().sum(0).expand(4, IN), rtol=2e-2, atol=2e-2)
    assert layer.absmax.dtype == torch.uint8  # autocast's own rule would have cast the scales
    assert layer.nested_absmax.dtype == torch.float32


def test_layers_that_compute_otherwise_are_refused():
    """Conv1D holds its weight as [in, out], and would be transposed without a word."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for layer in (Conv1D(64, 64), Doubled(64, 64)):
        with pytest.raises(TypeError, match=f"takes no {type(layer).__name__}"):
            phicore.NF4Linear.from_linear(layer)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_what_is_no_float_is_refused(dtype):
    q, x = phicore.nf4.quantize(torch.randn(OUT, IN)), torch.ones(4, IN, dtype=dtype)
    for multiply in (lambda: phicore.nf4.linear(x, q), lambda: phicore.NF4Linear.from_nf4(q)(x)):
        with pytest.raises(TypeError, match=f"x is {dtype}, .* convert x first"):
            multiply()
    with pytest.raises(TypeError, match=f"decodes to a float dtype, got {dtype}"):
        q.dequantize(dtype)


def test_shapes_that_do_not_fit_are_refused():
    q = phicore.nf4.quantize(torch.randn(OUT, IN))
    with pytest.raises(ValueError, match=rf"x of shape \(4, 36\) does not fit .* \[{OUT}, {IN}\]"):
        phicore.nf4.linear(torch.randn(4, IN - 1), q)
    with pytest.raises(ValueError, match=rf"bias must have shape \[{OUT}\], got \[1\]"):
        phicore.nf4.linear(torch.randn(4, IN), q, torch.randn(1))
    for shape in ((OUT * IN,), (1, OUT, IN)):
        flat = phicore.nf4.quantize(torch.randn(shape))
        with pytest.raises(ValueError, match=r"weight of shape \[out, in\]"):
            phicore.nf4.linear(torch.randn(4, IN), flat)
        with pytest.raises(ValueError, match=r"weight of shape \[out, in\]"):
            phicore.NF4Linear.from_nf4(flat)


def test_a_weight_that_is_not_coded_is_refused():
    with pytest.raises(TypeError, match=r"takes an NF4Tensor, got a Tensor; phicore.nf4.quantize\(weight\) makes one"):
        phicore.nf4.linear(torch.randn(4, IN), torch.randn(OUT, IN))


def test_project_with_rows_is_both_products_and_rows_get_no_gradient():
    layer = make()
    w = decoded(layer, torch.float64)
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    y, z = layer.project_with_rows(x, rows)
    torch.testing.assert_close(y, x @ w.T)
    torch.testing.assert_close(z, rows @ w.T)
    assert not z.requires_grad
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ w)
    assert rows.grad is None
    torch.testing.assert_close(layer.project(x), x @ w.T)


def test_nothing_dense_is_saved_for_backward():
    layer = make(96, 64)
    x = torch.randn(50, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
        y, _ = layer.project_with_rows(y @ torch.randn(96, 64), torch.randn(2, 64))
    weight_bytes = {part.data_ptr() for part in layer.nf4.parts().values()}
    # the product of the two lines saves one matrix of its own
    own = [t for t in kept if t.data_ptr() not in weight_bytes]
    assert [tuple(t.shape) for t in own] == [(96, 64)]
    assert len(kept) - len(own) == 2 * 4
    y.sum().backward()
    assert x.grad.shape == x.shape


# ===== the operators =====

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(double_quant, bias):
    q = phicore.nf4.quantize(torch.randn(OUT, IN), double_quant=double_quant)
    x = torch.randn(2, 3, IN, requires_grad=True)
    b = torch.randn(OUT, requires_grad=True) if bias else None
    shape = [OUT, IN]
    torch.library.opcheck(ops.nf4_linear, (x, *parts(q), b, shape, 64), test_utils=OPCHECKS)
    if bias:
        return
    torch.library.opcheck(ops.nf4_dequantize, (*parts(q), shape, 64, torch.bfloat16), test_utils=OPCHECKS)
    grad = torch.randn(2, 3, OUT, requires_grad=True)
    torch.library.opcheck(ops.nf4_linear_dx, (grad, *parts(q), shape, 64), test_utils=OPCHECKS)
    rows = torch.randn(4, IN)
    torch.library.opcheck(ops.nf4_project_with_rows, (x, rows, *parts(q), shape, 64), test_utils=OPCHECKS)


def test_fake_tensors_have_the_real_shapes_and_dtypes():
    for lead in ((), (0,), (2, 3)):
        for dtype in (torch.float32, torch.bfloat16):
            layer = make(dtype=dtype)
            x = torch.randn(*lead, IN).to(dtype)
            fake = copy.deepcopy(layer).to("meta")(x.to("meta"))
            assert fake.is_meta
            assert (fake.shape, fake.dtype) == (layer(x).shape, dtype)


# ===== torch.compile =====


def gradients(f, layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_(True)
    y = f(x)
    return [y, *torch.autograd.grad((y.float() ** 2).sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_in_one_graph_equals_eager(double_quant, dtype):
    torch._dynamo.reset()
    layer = make(double_quant=double_quant, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, IN).to(dtype)
    for a, b in zip(gradients(compiled, layer, x), gradients(layer, layer, x), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_under_autocast_equals_eager():
    torch._dynamo.reset()
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(4, IN)
        for a, b in zip(gradients(compiled, layer, x), gradients(layer, layer, x), strict=True):
            torch.testing.assert_close(a, b)
        assert layer(x.double()).dtype == torch.float64  # autocast leaves float64 alone, as in nn.Linear


def test_a_new_batch_size_does_not_compile_again():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for batch in (3, 5, 8, 13):
        x = torch.randn(batch, IN)
        for a, b in zip(gradients(compiled, layer, x), gradients(layer, layer, x), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_inductor_equals_eager():
    torch._dynamo.reset()
    layer = make()
    net = nn.Sequential(layer, nn.GELU())
    x = torch.randn(4, IN)
    for a, b in zip(gradients(torch.compile(net, fullgraph=True), net, x), gradients(net, net, x), strict=True):
        torch.testing.assert_close(a, b)


# ===== the module =====


@pytest.mark.parametrize("bias", [False, True])
def test_from_linear(bias, relative_error):
    linear = nn.Linear(64, 48, bias=bias).eval()
    layer = phicore.NF4Linear.from_linear(linear)
    assert not layer.training
    assert layer.bias is linear.bias  # shared, so that a tied or trained bias stays so
    assert [name for name, _ in layer.named_parameters()] == (["bias"] if bias else [])
    assert relative_error(decoded(layer, torch.float32), linear.weight) < 0.11
    assert f"bias={bias}" in repr(layer)


def test_from_nf4_shares_the_parts():
    q = phicore.nf4.quantize(torch.randn(OUT, IN).bfloat16(), 128, double_quant=False)
    layer = phicore.NF4Linear.from_nf4(q)
    assert layer.packed is q.packed
    assert layer.absmax is q.absmax
    assert (layer.block_size, layer.double_quant, layer.dtype) == (128, False, torch.bfloat16)
    assert torch.equal(layer.nf4.dequantize(), q.dequantize())


OPTIONS = [
    {"double_quant": d, "bias": b, "block_size": s} for d in (False, True) for b in (False, True) for s in (64, 256)
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_dict_round_trips(options):
    layer = make(**options)
    state = layer.state_dict()
    assert set(state) == {
        "packed", "absmax", *(["nested_absmax", "offset"] if options["double_quant"] else []),
        *(["bias"] if options["bias"] else []),
    }  # fmt: skip
    x = torch.randn(4, IN)
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)

    other = phicore.NF4Linear(IN, OUT, **options)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(x), layer(x))

    empty = phicore.NF4Linear(IN, OUT, **options, device="meta")
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    empty.load_state_dict(state, strict=True, assign=True)
    assert torch.equal(empty(x), layer(x))


def test_a_state_of_another_layout_is_refused():
    single, double = make(double_quant=False), make(double_quant=True)
    for source, target in ((single, double), (double, single)):
        before = {k: v.clone() for k, v in target.state_dict().items()}
        with pytest.raises(RuntimeError, match=r"absmax must be torch.(uint8|float32) \(double_quant="):
            target.load_state_dict(source.state_dict(), strict=False)
        assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())
    cast = {k: v.half() if v.is_floating_point() else v for k, v in double.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"nested_absmax must be torch.float32 .*, got torch.float16"):
        make().load_state_dict(cast)
    with pytest.raises(RuntimeError, match="size mismatch for packed"):
        make().load_state_dict(make(OUT + 1).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        make().load_state_dict(make(bias=False).state_dict())


CASTS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "type": (lambda m: m.type(torch.bfloat16), torch.bfloat16),
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "there and back": (lambda m: m.half().float(), torch.float32),
    "to device": (lambda m: m.to("cpu"), torch.float32),
}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", CASTS)
def test_a_cast_leaves_the_weight_and_moves_the_compute_dtype(name, double_quant):
    cast, dtype = CASTS[name]
    layer = make(double_quant=double_quant)
    before = decoded(layer, torch.float32)
    net = cast(nn.Sequential(layer))
    assert net[0] is layer
    assert layer.dtype == layer.bias.dtype == dtype
    for part in layer.nf4.parts().values():
        assert part.dtype in (torch.uint8, torch.float32)
    assert torch.equal(decoded(layer, torch.float32), before)
    assert layer(torch.randn(2, IN, dtype=dtype)).dtype == dtype


def test_meta_layers_can_be_cast_and_emptied():
    layer = phicore.NF4Linear(IN, OUT, device="meta").bfloat16()
    assert layer.dtype == torch.bfloat16
    assert layer.nested_absmax.dtype == torch.float32
    layer = layer.to_empty(device="cpu")
    assert layer.packed.device.type == "cpu"
    assert layer.nested_absmax.dtype == torch.float32
    assert make().to("meta").packed.is_meta


def test_copies():
    layer = make()
    x = torch.randn(3, IN)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        assert other.packed.data_ptr() != layer.packed.data_ptr()
        assert (other.dtype, other.block_size) == (layer.dtype, layer.block_size)


def test_block_size_is_checked():
    with pytest.raises(ValueError, match="block_size must be one of"):
        phicore.NF4Linear(4, 4, block_size=48)
    with pytest.raises(ValueError, match="block_size must be one of"):
        phicore.NF4Linear.from_linear(nn.Linear(4, 4), block_size=48)


def test_a_state_dict_of_the_transposed_shape_is_refused():
    """Its parts have the same sizes."""
    layer = phicore.NF4Linear.from_linear(nn.Linear(64, 128, bias=False))
    buffer = io.BytesIO()
    torch.save(nn.Sequential(layer).state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    with pytest.raises(RuntimeError, match=r"0\.packed: of a weight of shape \[128, 64\], the layer's is \[64, 128\]"):
        nn.Sequential(phicore.NF4Linear(128, 64, bias=False)).load_state_dict(state)
    for known in (state, dict(state)):  # with what torch keeps beside the tensors and without
        nn.Sequential(phicore.NF4Linear(64, 128, bias=False)).load_state_dict(known)


@pytest.mark.parametrize("kind", [lambda layer: layer, phicore.LoRALinear, phicore.DoRALinear])
def test_a_weight_that_was_never_loaded_is_named(kind):
    layer = kind(phicore.NF4Linear.from_linear(nn.Linear(64, 32, device="meta")))
    assert layer(torch.randn(2, 64, device="meta")).shape == (2, 32)
    with pytest.raises(RuntimeError, match="meta"):
        layer(torch.randn(2, 64))
