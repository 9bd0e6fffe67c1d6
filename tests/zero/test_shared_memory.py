"""Memory that ranks share as their wire: any order of use against sums by hand, ranks that are late or go, and what
makes ranks do without it."""

import ctypes
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import phicore
from phicore.zero import shared_memory
from phicore.zero.blame import Blame
from phicore.zero.collectives import _sum
from phicore.zero.shared_memory import SWITCH, SharedMemory, open_shared_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has memory without names")
BLOCK = 3000  # bytes, rounded up to a page
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def total(parts, dtype):
    return _sum(parts, dtype, Blame())


def opened(size: int = BLOCK) -> SharedMemory:
    memory = open_shared_memory(None, size, total)
    assert memory is not None
    return memory


def given(rank: int, size: int, dtype: torch.dtype, place: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * rank + place)).to(dtype)


def at_random(seed: int) -> list[str]:
    """Sums, maxima and gathers in one random order on all ranks. Where each rank fills its buckets, how many at once,
    when it finishes what it has started and when it sleeps differ."""
    rank, world = dist.get_rank(), dist.get_world_size()
    alike, apart = random.Random(seed), random.Random(100 * seed + rank)
    memory, wrong, place = opened(), [], 0
    for _ in range(60):
        sizes = [alike.randint(1, 2) * 16 * world for _ in range(alike.randint(1, 7))]
        dtypes = [alike.choice(DTYPES) for _ in sizes]
        places = range(place, place := place + len(sizes))
        exact = [
            torch.stack([given(r, size, dtype, p) for r in range(world)])
            for size, dtype, p in zip(sizes, dtypes, places, strict=True)
        ]
        if alike.random() < 0.7:
            buffers: list[torch.Tensor] = []
            started = []
            for i, values in enumerate(exact):
                while len(buffers) <= i or (len(buffers) < len(exact) and apart.random() < 0.5):
                    like = exact[len(buffers)][rank]
                    block = memory.take(like) if apart.random() < 0.8 else None
                    buffers.append((torch.empty_like(like) if block is None else block).copy_(like))
                if apart.random() < 0.2:
                    time.sleep(0.002)
                wide = torch.promote_types(values.dtype, torch.float32)
                started.append((i, wide, memory.reduce(buffers[i], wide)))
                if alike.random() < 0.1 and not torch.equal(memory.maximum(values[rank]), values.amax(0)):
                    wrong.append("maximum")
                while len(started) > 2 or (started and apart.random() < 0.3):
                    i, wide, finish = started.pop(0)
                    check(finish(), exact[i].to(wide), rank, wrong)
            for i, wide, finish in started:
                check(finish(), exact[i].to(wide), rank, wrong)
        else:
            full = [torch.zeros_like(values[0]) for values in exact]
            for tensor, values in zip(full, exact, strict=True):
                tensor.view(world, -1)[rank] = values[rank].view(world, -1)[rank]
            finishes = [memory.gather(tensor) for tensor in full]
            for finish, tensor, values in zip(finishes, full, exact, strict=True):
                finish()
                shards = torch.stack([values[r].view(world, -1)[r] for r in range(world)])
                if not torch.equal(tensor.view(world, -1), shards):
                    wrong.append(f"gather of {tensor.dtype}")
    dist.barrier()
    return wrong


def check(found: torch.Tensor, parts: torch.Tensor, rank: int, wrong: list[str]) -> None:
    world = len(parts)
    expected = total(list(parts.view(world, world, -1)[:, rank]), found.dtype)
    if not torch.equal(found, expected):
        wrong.append(f"sum of {parts.dtype}")


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_any_order_and_pace_gives_sums_and_shards_to_the_bit(ranks, world, seed):
    assert ranks(world)(at_random, seed) == [[]] * world


def through_an_optimizer() -> tuple[int, int, list[int]]:
    """Open files before and after an optimizer's life, and the block's size after each group of parameters."""
    before = len(os.listdir("/proc/self/fd"))
    optimizer = phicore.ZeroOptimizer(nn.Linear(4, 4).named_parameters(), torch.optim.SGD, lr=0.1)
    memories = [optimizer._reducer.collectives(torch.device("cpu")).memory]
    large = nn.Linear(100, 100)
    optimizer.add_param_group({"params": large.named_parameters(prefix="large")})
    for rows in (2, 3):
        (rows * large(torch.ones(rows, 100))).sum().backward()
        optimizer.step()
    memories.append(optimizer._reducer.collectives(torch.device("cpu")).memory)
    sizes = [memory.block_bytes for memory in memories]
    dist.barrier()
    optimizer.release()
    del optimizer, memories
    return before, len(os.listdir("/proc/self/fd")), sizes


def test_it_grows_with_the_buckets_and_leaves_no_file_open(ranks):
    for before, after, (small, large) in ranks(3)(through_an_optimizer):
        assert after == before
        assert small < 40_000 < large


def map_own(process: int, descriptor: int, *more: object, map_=shared_memory._map):
    """What another's numbers mean in a copy of a virtual machine."""
    own = min(int(fd) for fd in os.listdir("/proc/self/fd") if is_lent_memory(f"/proc/self/fd/{fd}"))
    return map_(os.getpid(), own, *more)  # maps that are there already have later ones


def is_lent_memory(path: str) -> bool:
    return os.path.lexists(path) and os.readlink(path).startswith("/memfd:phicore")


def map_small_file(process: int, descriptor: int, *more: object, map_=shared_memory._map):
    with tempfile.TemporaryFile() as file:
        return map_(os.getpid(), file.fileno(), *more)


def without(case: str) -> tuple[bool, list[list[float]], int]:
    """Whether there is shared memory, a step's result, and files left open."""
    before = len(os.listdir("/proc/self/fd"))
    last = dist.get_rank() == dist.get_world_size() - 1
    refuse = mock.Mock(side_effect=OSError("no"))
    patches = {
        "turned off": mock.patch.dict(os.environ, {SWITCH: "0"}),
        "other host": mock.patch.object(shared_memory, "processes_known_here", return_value="elsewhere"),
        "no files": mock.patch.object(os, "memfd_create", refuse),
        "not allowed": mock.patch.object(shared_memory, "_map", refuse),
        "own memory": mock.patch.object(shared_memory, "_map", map_own),
        "small file": mock.patch.object(shared_memory, "_map", map_small_file),
    }
    with patches[case] if last else mock.patch.dict(os.environ):
        model = nn.Linear(3, 2)
        optimizer = phicore.ZeroOptimizer(model.named_parameters(), torch.optim.SGD, lr=0.1)
    shared = optimizer._reducer.collectives(torch.device("cpu")).memory is not None
    model(torch.full((1, 3), float(dist.get_rank()))).sum().backward()
    optimizer.step()
    return shared, model.weight.tolist(), len(os.listdir("/proc/self/fd")) - before


@pytest.mark.parametrize("case", ["turned off", "other host", "no files", "not allowed", "own memory", "small file"])
def test_where_one_rank_cannot_all_use_sockets(ranks, case):
    found = ranks(3)(without, case)
    torch.manual_seed(0)
    expected = nn.Linear(3, 2).weight - 0.1
    for shared, weight, left_open in found:
        assert not shared
        torch.testing.assert_close(torch.tensor(weight), expected.detach())
        assert left_open == 0


def resident() -> int:
    """Bytes of shared memory that the system counts as this process's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssShmem")).split()[1])


def counted_as_its_own() -> tuple[int, int]:
    before, memory = resident(), opened(2**20)
    full = torch.ones(2**18 // 12 * 12)
    for _ in range(4):
        for finish in [memory.reduce(full, torch.float32) for _ in range(4)]:
            finish()
        for gathered in [memory.gather(full) for _ in range(9)]:
            gathered()
    dist.barrier()
    return resident() - before, memory.block_bytes


def test_a_process_counts_only_its_own_blocks(ranks):
    for bytes_held, block_bytes in ranks(3)(counted_as_its_own):
        assert bytes_held <= 1.05 * shared_memory.BLOCKS * block_bytes


def locked() -> bool:
    memory = opened()
    libc = ctypes.CDLL(None)
    locks = [libc.mlock(ctypes.c_void_p(m.data_ptr()), ctypes.c_size_t(len(m))) for m in memory.memory]
    if any(locks):
        return True  # this user may lock none
    return bool((memory.reduce(torch.ones(32), torch.float32)() == dist.get_world_size()).all())


def test_memory_may_be_locked(ranks):
    """By mlockall, as programs ask whose memory is read by other hardware."""
    assert all(ranks(2)(locked))


def outlived() -> bool:
    """An answer to ranks that are done and have let go of their memory, where SIGPIPE ends a process, as programs ask
    that print into pipes."""
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    memory = opened()
    finish = memory.reduce(torch.ones(16 * dist.get_world_size()), torch.float32)
    if dist.get_rank() == 0:
        time.sleep(0.5)
    correct = bool((finish() == dist.get_world_size()).all())
    del finish, memory
    dist.barrier()
    signal.signal(signal.SIGPIPE, before)
    return correct


def test_ranks_that_are_done_may_go(ranks):
    assert all(ranks(3)(outlived))


def alone(case: str) -> str:
    """What the others are told when the last rank does not come, or goes."""
    memory = opened()
    last = dist.get_world_size() - 1
    full = torch.ones(16 * dist.get_world_size())
    memory.reduce(full, torch.float32)()
    memory.timeout = lambda: 1.0 if case == "late" else 60.0
    if dist.get_rank() == last:
        if case == "late":
            time.sleep(3)
        return ""  # and lets go of its memory
    finish = memory.reduce(full, torch.float32)
    with pytest.raises(dist.DistNetworkError) as caught:
        finish()
    with pytest.raises(dist.DistNetworkError):  # again, as whoever cleans up may ask
        finish()
    return str(caught.value)


def test_who_waits_is_told_for_whom(ranks):
    for text in ranks(3)(alone, "late")[:-1]:
        assert "waited 1 s for gradients from rank 2" in text
    for text in ranks(3)(alone, "gone")[:-1]:
        assert "rank 2 closed the connection" in text


def in_second_pair() -> str:
    pair = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][dist.get_rank() // 2]
    memory = open_shared_memory(pair, BLOCK, total)
    assert memory is not None
    if dist.get_rank() % 2:
        return ""
    with pytest.raises(dist.DistNetworkError) as caught:
        memory.maximum(torch.ones(1))
    return str(caught.value)


def test_ranks_of_a_group_are_named_as_among_all(ranks):
    found = ranks(4)(in_second_pair)
    assert found[2] == "rank 3 closed the connection; rank 2 waits for flags"


def test_who_waits_without_a_process_group_is_told():
    with pytest.raises(RuntimeError, match="the process group has been destroyed"):
        shared_memory._timeout(None)


def failed(case: str) -> list[str]:
    """Errors of a backward pass and step of which rank 0 does not wait for the end, and of the next ones."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = phicore.ZeroOptimizer(model.named_parameters(), torch.optim.SGD, lr=0.1, bucket_bytes=300)
    memory = optimizer._reducer.collectives(torch.device("cpu")).memory
    if dist.get_rank() == 0:  # who waits asks for the timeout
        memory.timeout = mock.Mock(return_value=0.5, side_effect=KeyboardInterrupt if case == "interrupted" else None)
    else:
        time.sleep(2)
    told = []
    for _ in range(3):
        try:
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()
        except (RuntimeError, KeyboardInterrupt) as error:
            told.append(f"{type(error).__name__}: {error}")
        else:
            told.append("a step")
    dist.barrier()
    return told


@pytest.mark.parametrize("case", ["late", "interrupted"])
def test_an_exchange_that_fails_is_the_last(ranks, case):
    """Tried again, it could take one thing for another: what it had told of, it would tell of twice."""
    for rank, (first, *later) in enumerate(ranks(2)(failed, case)):
        assert ("rank 0 closed the connection" if rank == 1 else "0.5 s" if case == "late" else "KeyboardInt") in first
        assert all(text.startswith("DistNetworkError: no exchange can follow one that failed") for text in later)


def with_a_call_of_one_rank() -> str:
    model = nn.Linear(8, 8)
    optimizer = phicore.ZeroOptimizer(model.named_parameters(), torch.optim.SGD, stage=1, lr=0.1)
    model(torch.ones(2, 8)).sum().backward()
    if dist.get_rank() == 0:
        optimizer.finish_reduction()
    with pytest.raises(RuntimeError, match="in the same order") as caught:
        optimizer.step()
    return str(caught.value)


def test_ranks_that_exchange_different_things_are_told(ranks):
    first, second = ranks(2)(with_a_call_of_one_rank)
    assert first.startswith("rank 1 exchanges parameters while rank 0 exchanges flags")
    assert second.startswith("rank 0 exchanges flags while rank 1 exchanges parameters")
