"""Both ways to reduce and to gather, against the sum over ranks in float64."""

import pytest
import torch
import torch.distributed as dist

from phicore.zero import collectives
from phicore.zero.blame import Blame
from phicore.zero.collectives import backend, choose_collectives
from phicore.zero.scratch import Scratch

CPU = torch.device("cpu")


def values(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank)).to(dtype)


def both_ways(dtype: torch.dtype) -> list[float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    size = 5 * world
    exact = sum(values(r, size, dtype).double() for r in range(world)).view(world, 5)[rank]
    errors = []
    scratch = Scratch(10**6)
    for reduce, more in (
        (collectives._sum_after_all_to_all, [scratch, Blame()]),
        (collectives._sum_after_all_to_all, [scratch, Blame()]),  # into memory that has been used
        (collectives._reduce_scatter_shard, []),
    ):
        shard = reduce(values(rank, size, dtype), torch.float32, None, *more)()
        assert shard.dtype == torch.float32
        errors.append(float((shard.double() - exact).abs().max()))
    for gather in (collectives._broadcast_each_shard, collectives._all_gather_shards):
        full = torch.full((world, 5), float("nan"), dtype=dtype)
        full[rank] = rank
        gather(full.view(-1), None)()
        errors.append(float((full - torch.arange(world, dtype=dtype)[:, None]).abs().max()))
    return errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reduce_and_gather(each_world, dtype):
    for local_sum, again, scattered, *gathered in each_world(both_ways, dtype):
        assert max(local_sum, again) < 1e-6  # in float32, also where the gradients are not
        assert scattered < (1e-6 if dtype == torch.float32 else 0.1)
        assert gathered == [0, 0]


def chosen() -> tuple[str, bool]:
    group = dist.new_group(list(range(dist.get_world_size())), backend="gloo")
    full = torch.ones(2 * dist.get_world_size())
    choose_collectives(group, dist.get_world_size(), CPU, Scratch(0), Blame()).reduce(full, torch.float32)()
    return backend(None, CPU), backend(group, CPU) == "gloo"


def test_gloo_is_recognised(ranks):
    assert ranks(2)(chosen) == [("gloo", True)] * 2


def test_one_rank_needs_no_group():
    alone = choose_collectives(None, 1, CPU, Scratch(0), Blame())
    full = torch.ones(4, dtype=torch.bfloat16)
    shard = alone.reduce(full, torch.float32)()
    assert shard.tolist() == [1.0] * 4
    assert shard.dtype == torch.float32
    assert alone.gather(full)() is None


def float16_sum() -> float:
    world = dist.get_world_size()
    full = torch.full((4 * world,), 40_000.0, dtype=torch.float16)
    shard: torch.Tensor = collectives._reduce_scatter_shard(full, torch.float32, None)()
    assert bool((full == 40_000).all())
    return float(shard[0])


def test_float16_gradients_do_not_overflow_in_a_backend_that_sums_in_float16(ranks):
    assert ranks(2)(float16_sum) == [80_000.0] * 2
