"""NF4 encode and decode as functions of flat tensors, against formulas written out naively."""

import itertools
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad

import phicore
from phicore.nf4 import codebook, codec

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# NF4 as published (Dettmers et al. 2023, appendix E); the tests do not take the table from the code.
LEVELS = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def naive_map() -> Tensor:
    """The dynamic map: seven decades of bin means with both signs, zero and one."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        for low, high in itertools.pairwise(edges):
            mean = float((low + high) / 2 * 10 ** (i - 6))
            values += [mean, -mean]
    return torch.tensor(sorted(values))


def unpack(packed: Tensor, n: int) -> Tensor:
    """Codes one by one: the earlier weight in the high nibble."""
    codes = []
    for byte in packed.tolist():
        codes += [byte // 16, byte % 16]
    return torch.tensor(codes[:n], dtype=torch.int64)


def naive_decode(codes: Tensor, absmax: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """level * absmax of the block that the index falls in, in float32, then rounded once."""
    return (LEVELS[codes] * absmax[torch.arange(len(codes)) // block_size]).to(dtype)


def test_code_books_are_those_of_bitsandbytes():
    import bitsandbytes.functional as functional

    assert torch.equal(codebook.levels(CPU), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(codebook.dynamic_map(CPU), functional.create_dynamic_map())


def test_code_books_are_the_published_ones():
    table = codebook.dynamic_map(CPU)
    assert torch.equal(codebook.levels(CPU), LEVELS)
    assert codebook.LEVELS[codebook.ZERO_CODE] == 0
    assert table.dtype == torch.float32
    assert table.shape == (256,)
    assert (table.diff() > 0).all()
    assert table[127] == 0
    assert table[255] == 1
    assert float(table[0]) == pytest.approx(-0.99297, abs=1e-5)
    torch.testing.assert_close(table, naive_map(), rtol=1e-6, atol=0)


def test_a_weight_on_a_midpoint_takes_the_lower_code():
    bounds = (LEVELS[:-1] + LEVELS[1:]) / 2
    above = torch.nextafter(bounds, torch.tensor(2.0))
    flat = torch.cat([bounds, above, torch.tensor([1.0, -1.0])])  # absmax 1, so that the scaled weight is the weight
    packed, absmax = codec.encode_blocks(flat, 32)
    assert absmax.tolist() == [1.0]
    assert unpack(packed, 32).tolist() == [*range(15), *range(1, 16), 15, 0]


def test_codes_count_the_midpoints_below_on_every_edge():
    """At and beside each midpoint and each edge of the cells by which codes are looked up."""
    bounds = (LEVELS[:-1] + LEVELS[1:]) / 2
    edges = (torch.arange(codec.CELLS) - codec.CELLS / 2) / (codec.CELLS / 2 - 1)
    values = torch.cat([bounds, edges, -edges, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0])]).clamp(-1, 1)
    around = [values]
    for direction in (-2.0, 2.0):
        beside = values
        for _ in range(4):
            beside = torch.nextafter(beside, torch.tensor(direction))
            around.append(beside.clamp(-1, 1))
    values = torch.cat(around)
    values = torch.nn.functional.pad(values, (0, -len(values) % 31)).view(-1, 31)
    flat = torch.nn.functional.pad(values, (0, 1), value=1.0).view(-1)  # absmax 1: the scaled weight is the weight
    packed, absmax = codec.encode_blocks(flat, 32)
    assert (absmax == 1).all()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)
    assert torch.equal(codes.long(), (flat[:, None] > bounds).sum(dim=1))


@given(
    n=st.integers(1, 700),
    block_size=st.sampled_from((32, 64, 128, 512)),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from((1e-30, 1e-3, 1.0, 1e4)),
    seed=st.integers(0, 2**31),
)
def test_each_code_is_the_nearest_level(n, block_size, dtype, scale, seed):
    scale = scale if dtype != torch.float16 else 1.0
    flat = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    packed, absmax = codec.encode_blocks(flat, block_size)
    assert packed.dtype == torch.uint8
    assert packed.shape == ((n + 1) // 2,)
    assert absmax.dtype == torch.float32
    assert torch.equal(absmax, torch.stack([block.float().abs().max() for block in flat.split(block_size)]))
    scaled = flat.double() / absmax.double()[torch.arange(n) // block_size]
    distance = (scaled[:, None] - LEVELS.double()).abs()  # [n, 16]
    chosen = distance.gather(1, unpack(packed, n)[:, None]).squeeze(1)
    assert (chosen <= distance.min(dim=1).values + 1e-6).all()  # two roundings to float32 may move a near tie
    if n % 2:
        assert packed[-1] % 16 == 7


@given(
    n=st.integers(0, 700),
    block_size=st.sampled_from((32, 64, 256)),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    threads=st.sampled_from((1, 2)),
    seed=st.integers(0, 2**31),
)
def test_decode_is_the_formula_bit_for_bit(n, block_size, dtype, threads, seed):
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(-(-n // block_size), generator=generator) * 10 ** torch.randint(-4, 4, (1,)).float()
    with mock.patch.object(torch, "get_num_threads", return_value=threads):  # each has a lookup of its own
        decoded = codec.decode_blocks(packed, absmax, n, block_size, dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, naive_decode(unpack(packed, n), absmax, block_size, dtype))


@given(
    n=st.integers(0, 3000),
    block_size=st.sampled_from((32, 64, 1024)),
    chunk=st.sampled_from((1, 64, 96, 1000)),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from((1, 2)),
)
def test_the_chunk_size_does_not_show(n, block_size, chunk, dtype, threads):
    flat = torch.randn(n).to(dtype)
    packed, absmax = codec.encode_blocks(flat, block_size)
    decoded = codec.decode_blocks(packed, absmax, n, block_size, dtype)
    patched = mock.patch.multiple(codec, CHUNK=chunk, DECODE_CHUNK=chunk)
    with patched, mock.patch.object(torch, "get_num_threads", return_value=threads):
        packed_in_steps, absmax_in_steps = codec.encode_blocks(flat, block_size)
        decoded_in_steps = codec.decode_blocks(packed, absmax, n, block_size, dtype)
    assert torch.equal(packed, packed_in_steps)
    assert torch.equal(absmax, absmax_in_steps)
    assert torch.equal(decoded, decoded_in_steps)


def test_more_than_one_chunk_of_the_real_size():
    n = codec.CHUNK + 64 * 3 + 17
    flat = torch.randn(n)
    packed, absmax = codec.encode_blocks(flat, 64)
    head, tail = codec.encode_blocks(flat[: codec.CHUNK], 64), codec.encode_blocks(flat[codec.CHUNK :], 64)
    assert torch.equal(packed, torch.cat([head[0], tail[0]]))
    assert torch.equal(absmax, torch.cat([head[1], tail[1]]))
    decoded = codec.decode_blocks(packed, absmax, n, 64, torch.float32)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:n].long()
    assert torch.equal(decoded, naive_decode(codes, absmax, 64, torch.float32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_weight_shows_in_the_absmax_of_its_block_alone(bad):
    flat = torch.randn(200)
    flat[100] = bad
    _, absmax = codec.encode_blocks(flat, 64)
    assert absmax.isfinite().tolist() == [True, False, True, True]


@given(n=st.integers(1, 600), spread=st.sampled_from((0.0, 1e-6, 0.1, 3.0)), seed=st.integers(0, 2**31))
def test_absmax_codes_are_the_nearest_of_the_map(n, spread, seed):
    absmax = 1 + spread * torch.rand(n, generator=torch.Generator().manual_seed(seed))
    codes, nested_absmax, offset = codec.encode_absmax(absmax)
    assert codes.dtype == torch.uint8
    assert torch.equal(offset, absmax.mean())
    centred = absmax - offset
    blocks = centred.split(256)
    assert torch.equal(nested_absmax, torch.stack([block.abs().max() for block in blocks]))
    for block, scale, code in zip(blocks, nested_absmax, codes.split(256), strict=True):
        if scale == 0:
            continue  # any code decodes to the offset
        scaled = (block * (1 / scale)).clamp(-1, 1)
        distance = (scaled.double()[:, None] - naive_map().double()).abs()  # [block, 256]
        chosen = distance.gather(1, code.long()[:, None]).squeeze(1)
        assert (chosen <= distance.min(dim=1).values + 2**-23).all()  # a value on a bound has two that are as near


def test_an_absmax_on_a_midpoint_takes_the_lower_code():
    table = codebook.dynamic_map(CPU)
    bounds = (table[:-1] + table[1:]) / 2
    above = torch.nextafter(bounds, torch.tensor(2.0))
    for values, expected in ((bounds, range(255)), (above, range(1, 256))):
        for value, code in zip(values, expected, strict=True):
            # mean 0 and largest 1, so that the scaled absmax is the absmax
            codes, nested_absmax, offset = codec.encode_absmax(torch.stack([value, -value, *torch.tensor([1.0, -1.0])]))
            assert (offset, nested_absmax.item()) == (0, 1)
            assert codes[0] == code


@given(n=st.integers(0, 600), seed=st.integers(0, 2**31))
def test_absmax_decode_is_the_formula_bit_for_bit(n, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator)
    nested_absmax, offset = torch.rand(-(-n // 256), generator=generator), torch.rand((), generator=generator)
    table = codebook.dynamic_map(CPU)
    expected = [table[int(code)] * nested_absmax[i // 256] + offset for i, code in enumerate(codes)]
    decoded = codec.decode_absmax(codes, nested_absmax, offset)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, torch.stack(expected) if expected else torch.empty(0))


def test_absmax_survive_double_quantisation_to_a_percent_of_their_spread():
    absmax = 2 + torch.rand(1000)
    decoded = codec.decode_absmax(*codec.encode_absmax(absmax))
    assert (decoded - absmax).abs().max() < 0.01


@pytest.mark.parametrize("within", ["transform", "mode"])
def test_a_table_made_within_a_transform_or_a_mode_is_not_kept(within):
    made = codebook.table(lambda device: 2 * torch.arange(3.0, device=device))
    if within == "transform":
        grad(lambda x: (x * made(CPU)).sum())(torch.ones(3))
    else:
        with FakeTensorMode():
            made(CPU)
    kept = made(CPU)
    assert kept.tolist() == [0, 2, 4]
    assert kept.untyped_storage().nbytes() == 12  # a transform's tensor has no memory of its own
    assert made(CPU) is kept


SUMS = """
weight = torch.linspace(-1, 1, 3000, dtype=torch.float32, device="cpu").sin().view(30, 100)
q = phicore.nf4.quantize(weight)
wide, narrow = q.dequantize(torch.float32), q.dequantize(torch.bfloat16)
sums = [t.double().sum().item() for t in (q.packed, q.absmax, q.nested_absmax, wide, narrow)]
"""


@pytest.mark.parametrize("default", ["dtype(torch.bfloat16)", "dtype(torch.float64)", 'device("meta")'])
def test_the_callers_defaults_change_nothing(default):
    """In a process of its own, so that the tables are made under them."""
    program = f"import torch, phicore; torch.set_default_{default}\n{SUMS}\nprint(sums)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    here = {"torch": torch, "phicore": phicore}
    exec(SUMS, here)
    assert found.stdout == f"{here['sums']}\n", found.stderr
