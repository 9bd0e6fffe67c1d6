"""Decoding as machine code: the bits of codec.decode_blocks, whatever the shape."""

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


@pytest.fixture(scope="module", autouse=True)
def _as_machine_code(machine_code: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
    with machine_code(compiled, "BFLOAT16", "FLOAT32"):
        yield


@pytest.fixture
def never_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("decoded by torch's operators")

    monkeypatch.setattr(codec, "decode_blocks", refuse)


def coded(n: int, block_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(-(-n // block_size), generator=generator)
    return packed, absmax * 10.0 ** torch.randint(-44, 38, absmax.shape, generator=generator)


@given(
    n=st.integers(0, 5000),
    block_size=st.sampled_from((32, 64, 128, 4096)),
    dtype=st.sampled_from((*DTYPES, torch.float16)),
    layout=st.sampled_from(("plain", "strided", "a byte into its memory")),
    threads=st.sampled_from((1, 2)),
    seed=st.integers(0, 2**31),
)
def test_the_bits_are_those_of_torchs_operators(n, block_size, dtype, layout, threads, seed):
    packed, absmax = coded(n, block_size, seed)
    exact = codec.decode_blocks(packed, absmax, n, block_size, dtype)
    if layout == "strided":
        packed, absmax = (torch.stack([t, t], dim=1)[:, 0] for t in (packed, absmax))
    elif layout != "plain":
        packed = torch.cat([packed[:1], packed])[1:]
    torch.set_num_threads(threads)
    try:
        decoded = compiled.decode_blocks(packed, absmax, n, block_size, dtype)
    finally:
        torch.set_num_threads(1)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_machine_code_decodes(dtype, never_codec):
    packed, absmax = coded(1024, 64, 0)
    assert compiled.decode_blocks(packed, absmax, 1024, 64, dtype).shape == (1024,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_absmax_that_are_no_numbers(dtype):
    packed = torch.arange(256, dtype=torch.uint8).repeat(4)
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000], dtype=torch.int32)
    absmax = torch.cat([bits.view(torch.float32), torch.zeros(26)])
    decoded = compiled.decode_blocks(packed, absmax, 2048, 64, dtype)
    exact = codec.decode_blocks(packed, absmax, 2048, 64, dtype)
    torch.testing.assert_close(decoded, exact, rtol=0, atol=0, equal_nan=True)
    assert decoded[: 4 * 64].isnan().all()


def test_subnormal_numbers_stay_what_they_are():
    """A library that is linked for fast maths makes them zero, in all that the thread computes."""
    packed, absmax = coded(1024, 64, 0)
    compiled.decode_blocks(packed, absmax, 1024, 64, torch.float32)
    assert (torch.full((64,), 1e-40) * 0.5).min() > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_modes_and_default_dtypes(mode, never_codec):
    packed, absmax = coded(1024, 64, 0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mode():
            decoded = compiled.decode_blocks(packed, absmax, 1024, 64, torch.bfloat16)
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


@pytest.mark.parametrize("formula", [compiled.BFLOAT16, compiled.FLOAT32])
def test_the_formulas_themselves_are_exact(formula):
    """As torch runs them without a compiler, so that a fault of the formula is told from one of the compiler."""
    *given, out = formula.examples()
    *_, words, absmax = given
    dtype = torch.float32 if out.dtype == torch.float32 else torch.bfloat16
    formula.function(*given, out)
    packed, scales = words.view(torch.uint8).view(-1), absmax.view(torch.float32)
    exact = codec.decode_blocks(packed, scales, 2 * len(packed), 64, dtype)
    assert torch.equal(out.view(dtype).view(-1), exact)
