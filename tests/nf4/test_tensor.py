"""phicore.nf4.quantize and NF4Tensor: the format of bitsandbytes, whole tensors at a time."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import phicore
from phicore.nf4 import codec
from phicore.nf4.codebook import LEVELS, dynamic_map
from phicore.nf4.tensor import BLOCK_SIZES, NF4Tensor

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = st.one_of(
    st.integers(1, 700).map(lambda n: (n,)),
    st.tuples(st.integers(1, 40), st.integers(1, 90)),
    st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 20)),
    st.tuples(*[st.integers(1, 6)] * 4),
)
LAYOUTS = ("contiguous", "transposed", "strided", "offset")


def weight_of(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", seed: int = 0) -> Tensor:
    """Gaussian weights in some memory layout, with a run of zeros where a block may fall in it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight = weight * torch.where(torch.rand(shape, generator=generator) < 0.02, 30.0, 1.0)  # outliers, as in models
    if seed % 3 == 0:
        weight.view(-1)[64:256] = 0
    weight = weight.to(dtype)
    if layout == "transposed":
        return weight.mT.contiguous().mT if len(shape) > 1 else weight
    if layout == "strided":
        wide = torch.full((*shape, 2), float("nan"), dtype=dtype)
        wide[..., 0] = weight
        return wide[..., 0]
    if layout == "offset":
        longer = torch.full((weight.numel() + 3,), float("nan"), dtype=dtype)
        longer[3:] = weight.reshape(-1)
        return longer[3:].view(shape)
    return weight


def formula(q: NF4Tensor, dtype: torch.dtype) -> Tensor:
    """The decoded weight from the parts, index by index, in float32 and rounded once."""
    n = math.prod(q.shape)
    codes = torch.stack([q.packed // 16, q.packed % 16], dim=1).view(-1)[:n].long()
    absmax = q.absmax
    if q.nested_absmax is not None:
        blocks = torch.arange(len(absmax)) // 256
        absmax = dynamic_map(absmax.device)[absmax.long()] * q.nested_absmax[blocks] + q.offset
    return (torch.tensor(LEVELS)[codes] * absmax[torch.arange(n) // q.block_size]).to(dtype).view(q.shape)


@pytest.fixture(scope="module")
def theirs():
    """bitsandbytes' quantize_4bit and dequantize_4bit."""
    import bitsandbytes.functional

    return bitsandbytes.functional


@given(
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    block_size=st.sampled_from(BLOCK_SIZES),
    seed=st.integers(0, 10_000),
)
def test_parts_equal_those_of_bitsandbytes(theirs, shape, dtype, layout, block_size, seed):
    weight = weight_of(shape, dtype, layout, seed)
    assert weight.isfinite().all()

    q = phicore.nf4.quantize(weight, block_size, double_quant=False)
    packed, state = theirs.quantize_4bit(weight, blocksize=block_size, quant_type="nf4", compress_statistics=False)
    assert torch.equal(q.packed, packed.view(-1))
    # bitsandbytes' CPU stores 1e-38 as the absmax of a short last block that is all zero
    assert torch.equal(q.absmax, torch.where(state.absmax == 1e-38, 0, state.absmax))

    q = phicore.nf4.quantize(weight, block_size, double_quant=True)
    packed, state = theirs.quantize_4bit(weight, blocksize=block_size, quant_type="nf4", compress_statistics=True)
    assert torch.equal(q.packed, packed.view(-1))
    if weight.any():
        assert torch.equal(q.offset, state.offset)
        assert torch.equal(q.nested_absmax, state.state2.absmax)
    # its 8-bit codes come from a table of 65,536 bins; where all absmax are equal a code has no meaning
    meaningful = (q.nested_absmax > 0).repeat_interleave(256)[: len(q.absmax)]
    assert ((q.absmax.int() - state.absmax.view(-1).int()).abs() <= 1)[meaningful].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block_size", "shape"), [(32, (3, 7, 787)), (64, (5, 3, 11, 301)), (4096, (1_053_001,))])
def test_parts_equal_those_of_bitsandbytes_over_many_blocks(theirs, block_size, shape, dtype):
    """Several blocks of scales and, for the largest, of work; rows that blocks straddle; odd counts."""
    weight = weight_of(shape, dtype, seed=5)
    q = phicore.nf4.quantize(weight, block_size)
    packed, state = theirs.quantize_4bit(weight, blocksize=block_size, quant_type="nf4", compress_statistics=True)
    assert len(q.nested_absmax) > 1
    assert weight.numel() % 2
    assert torch.equal(q.packed, packed.view(-1))
    assert torch.equal(q.offset, state.offset)
    assert torch.equal(q.nested_absmax, state.state2.absmax)
    # Its codes come from a table of 65,536 bins; ours are the nearest, so never farther than its.
    absmax = phicore.nf4.quantize(weight, block_size, double_quant=False).absmax
    scaled = (absmax - q.offset) * (1 / q.nested_absmax).repeat_interleave(256)[: len(absmax)]
    ours, bnb = (
        (dynamic_map(CPU)[codes.view(-1).long()].double() - scaled.double()).abs() for codes in (q.absmax, state.absmax)
    )
    assert (ours <= bnb).all()
    assert (ours <= (dynamic_map(CPU).double() - scaled.double()[:, None]).abs().min(dim=1).values + 2**-24).all()


@given(
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    to=st.sampled_from((*DTYPES, torch.float64, None)),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_dequantize_is_the_formula_bit_for_bit(shape, dtype, to, block_size, double_quant, seed):
    q = phicore.nf4.quantize(weight_of(shape, dtype, seed=seed), block_size, double_quant)
    decoded = q.dequantize(to)
    assert decoded.dtype == (to or dtype)
    assert torch.equal(decoded, formula(q, to or dtype))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [64, 256])
def test_dequantize_equals_bitsandbytes(theirs, dtype, block_size, double_quant):
    # its AVX-512 decode is wrong where the last dimension is not a multiple of the block size
    weight = weight_of((24, 512), dtype, seed=1)
    q = phicore.nf4.quantize(weight, block_size, double_quant)
    packed, state = theirs.quantize_4bit(
        weight, blocksize=block_size, quant_type="nf4", compress_statistics=double_quant
    )
    if double_quant:
        state.absmax = q.absmax.view_as(state.absmax)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(q.dequantize(), theirs.dequantize_4bit(packed, state), rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
def test_empty(shape, double_quant):
    q = phicore.nf4.quantize(torch.empty(shape, dtype=torch.bfloat16), double_quant=double_quant)
    assert q.packed.shape == q.absmax.shape == (0,)
    decoded = q.dequantize()
    assert decoded.shape == shape
    assert decoded.dtype == torch.bfloat16


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [16 * 4096, 16 * 4096 - 33])
def test_no_temporary_is_larger_than_a_chunk(monkeypatch, dtype, n, double_quant):
    """Whatever the size of a weight, only its parts, and on the way back the weight itself, are made in one piece."""
    monkeypatch.setattr(codec, "CHUNK", 4096)
    monkeypatch.setattr(codec, "DECODE_CHUNK", 4096)
    weight = torch.randn(n).to(dtype)
    phicore.nf4.quantize(weight).dequantize()  # makes the tables, once a process
    with Sizes() as sizes:
        q = phicore.nf4.quantize(weight, 64, double_quant)
    assert {s for s in sizes.seen(but=weight) if s > 4096 * 4} == {q.packed.nbytes}
    with Sizes() as sizes:
        decoded = q.dequantize()
    assert {s for s in sizes.seen(but=q.packed) if s > 4096 * 4} == {decoded.nbytes}


class Sizes(TorchDispatchMode):
    """Records the storages that operations give back."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = max(storage.nbytes(), self.storages.get(storage.data_ptr(), 0))
        return result

    def seen(self, but: Tensor) -> list[int]:
        """Their bytes, without the one of a tensor that was there before."""
        return [n for pointer, n in self.storages.items() if pointer != but.untyped_storage().data_ptr()]


@pytest.mark.parametrize("n", [64, 70, 128, 129])
def test_zero_weights_stay_exact_zeros(n):
    q = phicore.nf4.quantize(torch.zeros(n), double_quant=False)
    assert (q.packed == 0x77).all()
    assert not q.absmax.any()
    assert torch.equal(q.dequantize(), torch.zeros(n))
    assert torch.equal(phicore.nf4.quantize(torch.zeros(n)).dequantize(), torch.zeros(n))


def test_a_zero_block_among_others_is_0x77_and_decodes_to_zero():
    weight = torch.randn(4, 64)
    weight[2] = 0
    for double_quant in (False, True):
        q = phicore.nf4.quantize(weight, double_quant=double_quant)
        assert (q.packed.view(4, 32)[2] == 0x77).all()
        assert not q.dequantize()[2].any()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("tiny", [1e-38, 1e-39, 1e-42, 1.4e-45])
def test_denormal_blocks_stay_finite_and_small(tiny, double_quant):
    weight = torch.randn(4, 64)
    weight[1] = tiny
    weight[3] = -tiny
    decoded = phicore.nf4.quantize(weight, double_quant=double_quant).dequantize()
    assert decoded.isfinite().all()
    if not double_quant:
        assert decoded[1].abs().max() <= tiny


@pytest.mark.parametrize(("tiny", "byte"), [(1e-38, 0xFF), (1e-40, 0x77)])
def test_denormal_blocks_have_the_bytes_of_bitsandbytes(theirs, tiny, byte):
    weight = torch.full((128,), tiny)
    q = phicore.nf4.quantize(weight, double_quant=False)
    packed, state = theirs.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert (q.packed == byte).all()
    assert torch.equal(q.packed, packed.view(-1))
    assert torch.equal(q.absmax, state.absmax)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_on_gaussian_weights(relative_error, dtype, double_quant):
    weight = (torch.randn(128, 512) * 0.02).to(dtype)
    error = relative_error(phicore.nf4.quantize(weight, double_quant=double_quant).dequantize(), weight)
    assert 0.08 < error < 0.1  # facts/nf4.md: about 0.092


def test_levels_are_fixed_points():
    # A decoded weight encodes to itself: absmax times a level is that level again.
    weight = torch.randn(30, 70)
    once = phicore.nf4.quantize(weight, double_quant=False)
    twice = phicore.nf4.quantize(once.dequantize(), double_quant=False)
    assert torch.equal(once.packed, twice.packed)
    assert torch.equal(once.absmax, twice.absmax)


def test_bits_a_weight():
    weight = torch.randn(256, 256)
    assert phicore.nf4.quantize(weight, double_quant=False).nbytes * 8 / weight.numel() == 4.5
    # 8 / 64 for the codes, 32 / (64 * 256) for their absmax, and one offset
    assert phicore.nf4.quantize(weight).nbytes == weight.numel() // 2 + 1024 + 4 * 4 + 4


def test_the_weight_is_not_changed_and_not_kept():
    weight = torch.nn.Parameter(torch.randn(10, 30))
    before = weight.detach().clone()
    q = phicore.nf4.quantize(weight)
    assert torch.equal(weight, before)
    assert not q.dequantize().requires_grad


def test_meta_has_the_same_parts():
    for double_quant in (False, True):
        q = phicore.nf4.quantize(torch.empty(7, 11, device="meta"), double_quant=double_quant)
        real = phicore.nf4.quantize(torch.randn(7, 11), double_quant=double_quant)
        assert q.device.type == "meta"
        assert {k: (v.shape, v.dtype) for k, v in q.parts().items()} == {
            k: (v.shape, v.dtype) for k, v in real.parts().items()
        }
        assert q.dequantize().shape == (7, 11)


@pytest.mark.parametrize("double_quant", [False, True])
def test_copies(double_quant):
    q = phicore.nf4.quantize(torch.randn(7, 11), double_quant=double_quant)
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(other.dequantize(), q.dequantize())
        assert other.packed.data_ptr() != q.packed.data_ptr()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 37, 76])
def test_nan_and_inf_are_refused(bad, where):
    weight = torch.randn(7, 11)
    weight.view(-1)[where] = bad
    with pytest.raises(ValueError, match=r"\(7, 11\) holds 1 NaN or Inf"):
        phicore.nf4.quantize(weight)


@pytest.mark.parametrize("weight", [torch.arange(8), torch.zeros(8, dtype=torch.float64), torch.zeros(8) > 0])
def test_other_dtypes_are_refused(weight):
    with pytest.raises(TypeError, match=f"got {weight.dtype}"):
        phicore.nf4.quantize(weight)


def test_a_mean_of_absmax_that_overflows_is_refused():
    weight = torch.full((8, 64), 3e38)
    with pytest.raises(ValueError, match=r"\(8, 64\) is so large .* use double_quant=False"):
        phicore.nf4.quantize(weight)
    assert torch.equal(phicore.nf4.quantize(weight, double_quant=False).dequantize(), weight)


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="got list"):
        phicore.nf4.quantize([1.0, 2.0])


@pytest.mark.parametrize("block_size", [0, -64, 1, 16, 63, 65, 8192, 64.5, None])
def test_other_block_sizes_are_refused(block_size):
    with pytest.raises(ValueError, match="block_size must be one of 32, 64"):
        phicore.nf4.quantize(torch.randn(8), block_size)


@pytest.mark.parametrize("double_quant", [False, True])
def test_parts_that_do_not_fit_are_refused_by_name(double_quant):
    q = phicore.nf4.quantize(torch.randn(7, 11), double_quant=double_quant)
    rest = {"shape": q.shape, "dtype": q.dtype, "block_size": q.block_size}
    parts = dict.fromkeys(("packed", "absmax", "nested_absmax", "offset")) | q.parts()
    for name, part in q.parts().items():
        longer = torch.zeros(part.numel() + 1, dtype=part.dtype)
        other_dtype = part.to(torch.float16)
        for wrong in (longer, other_dtype, *([] if name == "nested_absmax" else [None])):
            with pytest.raises(ValueError, match=rf"^{name} of an NF4 weight of shape \(7, 11\), block_size 64"):
                NF4Tensor(**{**parts, name: wrong}, **rest)
    with pytest.raises(ValueError, match="block_size must be one of"):
        NF4Tensor(**parts, **{**rest, "block_size": 48})


def test_a_compiler_and_a_fake_tensor_see_decoding_as_one_operator():
    """On the CPU it is called without the dispatcher, which they must not lose."""
    q = phicore.nf4.quantize(torch.randn(1024, 2100))  # so large that memory is asked for by address
    with FakeTensorMode() as mode:
        fake = NF4Tensor(*map(mode.from_tensor, q.parts().values()), q.shape, q.dtype, q.block_size)
        assert fake.dequantize(torch.bfloat16).shape == q.shape
    seen = []

    def backend(graph, _):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    decoded = torch.compile(lambda: q.dequantize(), fullgraph=True, backend=backend)()
    assert torch.equal(decoded, q.dequantize())
    assert seen == [torch.ops.phicore.nf4_dequantize]
