"""Which operators run as kernels, and that they then give what the reference gives, gradients included."""

from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

from phicore.nf4 import codec, kernels
from phicore.nf4.tensor import quantize
from phicore_kernels.weight import level_table
from tests.kernels.interpreted import Interpreter
from tests.kernels.weights import random_weight

OPERATORS = "tests.kernels.interpreted:operators"
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def interpreter():
    interpreter = Interpreter()
    yield interpreter
    interpreter.pool.shutdown()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("crossover", "calls"),
    [
        # forward and backward of linear, of project_with_rows and of low_rank: 6 rows of x and 3 more in one product
        (9, {"dequantize": 1, "linear": 3, "linear_dx": 3}),
        (6, {"dequantize": 3, "linear": 1, "linear_dx": 3}),  # x alone, without the rows
        (0, {"dequantize": 7, "linear": 0, "linear_dx": 0}),
    ],
)
def test_operators_and_gradients_are_those_of_the_formula(interpreter, relative_error, crossover, calls, double_quant):
    weight = random_weight(20, 64, double_quant=double_quant)
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 3, 64), (20,), (3, 64), (20, 3), (2, 3, 20))
    x, bias, rows, B, grad = (torch.randn(size, generator=generator) for size in sizes)
    given, called = interpreter.call(OPERATORS, x, weight, bias, rows, B, grad, crossover)
    assert called == calls
    dense = codec.decode_blocks(
        weight.packed,
        weight.absmax if not double_quant else codec.decode_absmax(*weight[1:4]),
        20 * 64,
        64,
        torch.float32,
    ).view(20, 64)
    assert torch.equal(given["dense"], dense)
    w = dense.double()
    u = x.double() @ rows.double().T
    expected = {
        "v": x.double() @ w.T + 0.5 * u @ B.double().T,
        "u": u,
        "va": rows.double() @ w.T,
        "dv": grad.double() @ (w + 0.5 * B.double() @ rows.double()),
        "y": x.double() @ w.T + bias.double(),
        "dx": grad.double() @ w,
        "db": grad.double().sum((0, 1)),
        "z": x.double() @ w.T,
        "wa": rows.double() @ w.T,
        "dz": grad.double() @ w,
    }
    for name, value in expected.items():
        assert relative_error(given[name], value) <= 1e-6, name


@pytest.mark.parametrize(("capability", "there"), [((7, 0), False), ((7, 5), True), ((9, 0), True)])
def test_gpus_with_kernels(capability, there):
    kernels.has_kernels.cache_clear()
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=capability):
        assert kernels.has_kernels(CUDA) == there
    kernels.has_kernels.cache_clear()
    assert not kernels.has_kernels(torch.device("cpu"))


@pytest.mark.parametrize(("name", "there"), [("gfx942:sramecc+:xnack-", True), ("gfx1100", True), ("gfx906", False)])
def test_amd_gpus_with_kernels(name, there):
    kernels.has_kernels.cache_clear()
    properties = mock.Mock(gcnArchName=name)
    with (
        mock.patch.object(torch.version, "hip", "7.0"),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
    ):
        assert kernels.has_kernels(CUDA) == there
    kernels.has_kernels.cache_clear()


@pytest.mark.parametrize("there", [True, False])
def test_an_xpu_has_kernels_if_its_triton_is_there(there):
    kernels.has_kernels.cache_clear()
    specs = {"triton": 1, "phicore_kernels": 1, "triton.backends.intel": 1 if there else None}
    with mock.patch.object(kernels, "find_spec", side_effect=specs.__getitem__):
        assert kernels.has_kernels(torch.device("xpu", 0)) == there
    kernels.has_kernels.cache_clear()


def test_kernels_can_be_turned_off(monkeypatch):
    kernels.has_kernels.cache_clear()
    monkeypatch.setenv("PHICORE_KERNELS", "0")
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)):
        assert not kernels.has_kernels(CUDA)
    kernels.has_kernels.cache_clear()


def test_without_triton_the_reference_runs():
    kernels.has_kernels.cache_clear()
    with mock.patch.object(kernels, "find_spec", return_value=None):
        assert not kernels.has_kernels(CUDA)
    kernels.has_kernels.cache_clear()


@pytest.mark.parametrize("table", [kernels._code_map, level_table])
def test_tables_are_not_allocated_by_the_thread_that_first_needs_them(table):
    # what it allocates while torch.compile warms a CUDA graph up must not stay: tests/gpu has the graph
    made = []

    class Mode(TorchFunctionMode):  # of this thread alone
        def __torch_function__(self, function, types, args=(), kwargs=None):
            made.append(function(*args, **(kwargs or {})))
            return made[-1]

    with Mode():
        assert table.__wrapped__(torch.device("meta")).is_meta
    assert not any(isinstance(t, torch.Tensor) and t.is_meta for t in made)


def test_float64_is_the_references():
    q = quantize(torch.randn(4, 32))
    with mock.patch.object(kernels, "has_kernels", return_value=True):
        assert not kernels.fuses(torch.ones(1, 2, dtype=torch.float64), 1)
        given = kernels.dequantize(q.packed, q.absmax, q.nested_absmax, q.offset, [4, 32], 64, torch.float64)
    assert torch.equal(given, q.dequantize(torch.float64))


def test_quantize_encodes_by_the_kernels_where_they_are():
    weight = torch.randn(8, 64)
    with (
        mock.patch.object(kernels, "has_kernels", return_value=True),
        mock.patch("phicore_kernels.quantize.encode_blocks", side_effect=codec.encode_blocks) as blocks,
        mock.patch("phicore_kernels.quantize.encode_absmax", side_effect=lambda a, _: codec.encode_absmax(a)) as scales,
    ):
        q = quantize(weight)
    assert (blocks.call_count, scales.call_count) == (1, 1)
    assert torch.equal(q.packed, quantize(weight).packed)
