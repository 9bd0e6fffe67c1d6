"""Buckets hold every parameter once, and the ranks' pieces every element once."""

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from phicore.zero.layout import ALIGNMENT_BYTES, build_bucket, cut_pieces, pack, refresh_masters, write_masters

SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=8)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


def parameters(shapes, dtypes):
    return [(f"p{i}", nn.Parameter(torch.randn(s).to(d))) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))]


@given(SHAPES, st.data(), st.integers(1, 2000))
def test_pack_keeps_every_parameter_once_and_the_limit(shapes, data, limit):
    named = parameters(shapes, [data.draw(DTYPES) for _ in shapes])
    packed = pack(named, limit)
    assert sorted(name for bucket in packed for name, _ in bucket) == sorted(n for n, p in named if p.numel())
    for bucket in packed:
        assert len({p.dtype for _, p in bucket}) == 1
        assert len(bucket) == 1 or sum(p.nbytes for _, p in bucket) <= limit
        order = [int(name[1:]) for name, _ in bucket]
        assert order == sorted(order, reverse=True)
    large = {name for name, p in named if 2 * p.nbytes > limit and p.numel()}
    assert large == {bucket[0][0] for bucket in packed if 2 * bucket[0][1].nbytes > limit}
    assert all(len(bucket) == 1 for bucket in packed if bucket[0][0] in large)
    completed = [min(int(name[1:]) for name, _ in bucket) for bucket in packed]
    assert completed == sorted(completed, reverse=True)  # as a backward pass completes them


@given(SHAPES, DTYPES, st.integers(1, 9))
def test_pieces_of_all_ranks_cover_every_parameter_once(shapes, dtype, world_size):
    shapes = [shape for shape in shapes if 0 not in shape] or [[2, 3]]
    values = parameters(shapes, [dtype] * len(shapes))
    found = {name: torch.full((p.numel(),), float("nan")) for name, p in values}
    for rank in range(world_size):
        named = [(name, nn.Parameter(p.detach().clone())) for name, p in values]
        bucket = build_bucket(named, rank, world_size)
        cut_pieces(bucket, rank)
        for (_, p), (_, before) in zip(named, values, strict=True):
            assert torch.equal(p, before)
            assert p.untyped_storage().data_ptr() == bucket.flat.untyped_storage().data_ptr()
            assert (p.data_ptr() - bucket.flat.data_ptr()) % ALIGNMENT_BYTES == 0
        for piece in bucket.pieces:
            assert found[piece.name][piece.start : piece.stop].isnan().all()
            found[piece.name][piece.start : piece.stop] = piece.tensor.detach().float()
            assert piece.tensor.dtype == (torch.float32 if dtype.itemsize == 2 else dtype)
            assert torch.equal(bucket.shard[piece.place], piece.tensor.detach().to(dtype))
    for name, p in values:
        assert torch.equal(found[name], p.detach().float().view(-1))


def test_building_a_bucket_lets_go_of_each_parameters_old_memory():
    named = parameters([[100], [50, 3]], [torch.float32] * 2)
    old = [weakref.ref(p.untyped_storage()) for _, p in named]
    pointers = [p.untyped_storage()._weak_ref() for _, p in named]
    build_bucket(named, 0, 2)
    assert [ref() for ref in old] == [None, None]
    assert all(torch.UntypedStorage._expired(pointer) for pointer in pointers)


def test_pieces_write_through_to_the_parameters():
    named = parameters([[4], [4]], [torch.float32] * 2)
    bucket = build_bucket(named, 0, 1)
    cut_pieces(bucket, 0)
    for piece in bucket.pieces:
        piece.tensor.data.fill_(7)
    assert all((p == 7).all() for _, p in named)


def test_masters_keep_what_rounds_to_the_weight_and_follow_the_rest():
    named = parameters([[3]], [torch.bfloat16])
    bucket = build_bucket(named, 0, 1)
    cut_pieces(bucket, 0)
    (piece,) = bucket.pieces
    fine = torch.tensor([1.0 + 2**-12, -2.0 - 2**-12, 3.0])
    piece.tensor.data.copy_(fine)
    write_masters(bucket)
    assert named[0][1].tolist() == [1.0, -2.0, 3.0]
    with torch.no_grad():
        named[0][1][1] = 5.0
        named[0][1][2] = float("nan")
    refresh_masters(bucket)
    assert piece.tensor.tolist() == [fine[0].item(), 5.0, pytest.approx(float("nan"), nan_ok=True)]
