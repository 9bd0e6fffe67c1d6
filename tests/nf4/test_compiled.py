"""Decoding as machine code: the bits of torch's operators, whatever the shape."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from phicore import nf4
from phicore.nf4 import codec, compiled, quantize

DTYPES = (torch.bfloat16, torch.float32)
NAMES = ("BFLOAT16", "FLOAT32", "NESTED_BFLOAT16", "NESTED_FLOAT32")


@pytest.fixture(scope="module", autouse=True)
def _as_machine_code(machine_code: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
    with machine_code(compiled, *NAMES):
        yield


@pytest.fixture
def never_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("decoded by torch's operators")

    monkeypatch.setattr(codec, "decode_blocks", refuse)


def coded(n: int, block_size: int, seed: int, double_quant: bool = False) -> tuple[torch.Tensor | None, ...]:
    """packed, absmax, nested_absmax and offset of n weights."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator)
    blocks = -(-n // block_size)
    if double_quant:
        codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
        return packed, codes, torch.rand(-(-blocks // 256), generator=generator), torch.tensor(0.4)
    absmax = torch.rand(blocks, generator=generator)
    return packed, absmax * 10.0 ** torch.randint(-44, 38, absmax.shape, generator=generator), None, None


def by_operators(packed, absmax, nested_absmax, offset, n, block_size, dtype):
    if nested_absmax is not None:
        absmax = codec.decode_absmax(absmax, nested_absmax, offset)
    return codec.decode_blocks(packed, absmax, n, block_size, dtype)


@given(
    n=st.one_of(st.integers(0, 5000), st.integers(0, 20000)),
    block_size=st.sampled_from((32, 64, 128, 4096)),
    dtype=st.sampled_from((*DTYPES, torch.float16)),
    double_quant=st.booleans(),
    layout=st.sampled_from(("plain", "strided", "a byte into its memory")),
    threads=st.sampled_from((1, 2)),
    seed=st.integers(0, 2**31),
)
def test_the_bits_are_those_of_torchs_operators(n, block_size, dtype, double_quant, layout, threads, seed):
    packed, *scales = coded(n, block_size, seed, double_quant)
    exact = by_operators(packed, *scales, n, block_size, dtype)
    if layout == "strided":
        packed, *scales = (
            t if t is None or not t.dim() else torch.stack([t, t], dim=1)[:, 0] for t in (packed, *scales)
        )
    elif layout != "plain":
        packed = torch.cat([packed[:1], packed])[1:]
    torch.set_num_threads(threads)
    try:
        decoded = compiled.decode(packed, *scales, n, block_size, dtype)
    finally:
        torch.set_num_threads(1)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, exact)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_weights_in_pieces(dtype, double_quant, monkeypatch):
    """As weights beyond PIECE; blocks of 64, so that a piece has two groups of 256 blocks."""
    monkeypatch.setattr(compiled, "PIECE", 2 * 256 * 64)
    for n in (compiled.PIECE, 2 * compiled.PIECE, 2 * compiled.PIECE + 3 * 64, 3 * compiled.PIECE + 1):
        parts = coded(n, 64, n, double_quant)
        assert torch.equal(compiled.decode(*parts, n, 64, dtype), by_operators(*parts, n, 64, dtype))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_machine_code_decodes(dtype, double_quant, never_codec):
    assert compiled.decode(*coded(1024, 64, 0, double_quant), 1024, 64, dtype).shape == (1024,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_absmax_that_are_no_numbers(dtype):
    packed = torch.arange(256, dtype=torch.uint8).repeat(4)
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000], dtype=torch.int32)
    absmax = torch.cat([bits.view(torch.float32), torch.zeros(26)])
    decoded = compiled.decode(packed, absmax, None, None, 2048, 64, dtype)
    exact = codec.decode_blocks(packed, absmax, 2048, 64, dtype)
    torch.testing.assert_close(decoded, exact, rtol=0, atol=0, equal_nan=True)
    assert decoded[: 4 * 64].isnan().all()


def test_subnormal_numbers_stay_what_they_are():
    """A library that is linked for fast maths makes them zero, in all that the thread computes."""
    compiled.decode(*coded(1024, 64, 0), 1024, 64, torch.float32)
    assert (torch.full((64,), 1e-40) * 0.5).min() > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_modes_and_default_dtypes(mode, never_codec):
    parts = coded(1024, 64, 0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mode():
            decoded = compiled.decode(*parts, 1024, 64, torch.bfloat16)
    finally:
        torch.set_default_dtype(default)
    assert decoded.dtype == torch.bfloat16


def test_transforms_and_compilers_get_the_same_weight():
    q = quantize(torch.randn(24, 40))
    x = torch.randn(3, 5, 40)

    def product(x: torch.Tensor) -> torch.Tensor:
        return nf4.linear(x, q)

    exact = x @ codec.decode_blocks(*_parts(q), 960, 64, torch.float32).view(24, 40).T
    torch.testing.assert_close(product(x), exact)
    torch.testing.assert_close(torch.func.vmap(product)(x), exact)
    gradient: Callable[..., torch.Tensor] = torch.func.grad(lambda x: product(x).sum())
    torch.testing.assert_close(gradient(x), exact.new_ones(3, 5, 24) @ q.dequantize())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.compile(product, fullgraph=True, backend="aot_eager")(x), exact)


def test_modes_that_watch_operators_see_every_one():
    q, x = quantize(torch.randn(24, 40)), torch.randn(3, 40)
    exact = x @ q.dequantize().T
    graph = make_fx(lambda x: x @ q.dequantize().T)(x)
    torch.testing.assert_close(graph(x), exact)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(q.dequantize(), FakeTensor)


def _parts(q):
    return q.packed, codec.decode_absmax(q.absmax, q.nested_absmax, q.offset)


@pytest.mark.parametrize("name", NAMES)
def test_the_formulas_themselves_are_exact(name):
    """As torch runs them without a compiler, so that a fault of the formula is told from one of the compiler."""
    formula = getattr(compiled, name)
    *given, out = formula.examples()
    formula.function(*given, out)
    words, absmax, *nested = given[3:]
    dtype = torch.bfloat16 if out.dtype == torch.int16 else torch.float32
    if nested:
        nested_absmax, offset = (t.view(torch.float32) for t in nested)
        scales = absmax.to(torch.uint8), nested_absmax, offset
    else:
        scales = absmax.view(torch.float32), None, None
    packed = words.reshape(-1).view(torch.uint8)
    assert torch.equal(out.view(dtype).view(-1), by_operators(packed, *scales, 2 * len(packed), 64, dtype))
