"""Ranks meet in a store, whatever earlier starts have left in it."""

import threading
import time

import pytest
import torch.distributed as dist

from phicore.training.rendezvous import meet


def start(store: dist.Store, world_size: int, late: int, found: dict[int, str]) -> None:
    """Ranks as threads, one of them late; each writes its number and reads all others' in what it met them in."""

    def run(rank: int) -> None:
        time.sleep(0.1 * (rank == late))
        part = dist.PrefixStore(meet(store, rank, world_size, 20.0), store)
        part.set(str(rank), f"{rank} of {id(found)}")
        found[rank] = ", ".join(part.get(str(r)).decode() for r in range(world_size))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


def test_a_start_does_not_read_what_an_earlier_one_wrote() -> None:
    """Also with fewer or more ranks, and whoever comes last."""
    store = dist.HashStore()
    for world_size, late in ((3, 0), (3, 2), (2, 0), (4, 1), (4, 0)):
        found: dict[int, str] = {}
        start(store, world_size, late, found)
        expected = ", ".join(f"{r} of {id(found)}" for r in range(world_size))
        assert found == dict.fromkeys(range(world_size), expected)


def test_who_does_not_come_is_named() -> None:
    store = dist.HashStore()
    told: list[str] = []

    def run(rank: int) -> None:
        with pytest.raises(TimeoutError) as raised:
            meet(store, rank, 4, 0.3)
        told.append(str(raised.value))

    other = threading.Thread(target=run, args=(2,))
    other.start()
    run(0)
    other.join(30)
    assert any("ranks 1, 3 did not come within 0.3 s" in text for text in told)
    assert any("rank 0, or another that it waits for, did not come" in text for text in told)
