"""Meeting the other ranks in a store that may still hold what an earlier start of the same ranks left in it.

torchrun's agent keeps its store over restarts, and the addresses in it: ranks that read an old one do not find each
other (pytorch#135712). Here ranks first agree on a prefix that no earlier start has used.
"""

import json
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

PAUSE = 0.02  # seconds between looks


def meet(store: dist.Store, rank: int, world_size: int, timeout: float) -> dist.Store:
    """A part of the store that is empty and the same for all ranks of this start.

    Rank 0 writes a new word; each other rank answers with that word and one of its own; rank 0 lists the words of all
    who have answered. A rank that has read an old word does not find its own in that word's list, and looks again.

    Args:
        store: as all ranks reach it.
        rank, world_size: of this process.
        timeout: seconds to wait.

    Raises:
        TimeoutError: ranks did not come; rank 0 names them.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout
    store = dist.PrefixStore("phicore", store)
    if rank == 0:
        store.set("word", own)
        answers: dict[int, str] = {}
        while missing := sorted(set(range(1, world_size)) - answers.keys()):
            for other in missing:
                word, _, answer = _read(store, f"answer {other}").partition(" ")
                if word == own:
                    answers[other] = answer
            _pause(end, timeout, f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}")
        store.set(f"list {own}", json.dumps(list(answers.values())))
        return dist.PrefixStore(own, store)
    while True:
        word = _read(store, "word")
        if word:
            store.set(f"answer {rank}", f"{word} {own}")
            if own in json.loads(_read(store, f"list {word}") or "[]"):
                return dist.PrefixStore(word, store)
        _pause(end, timeout, "rank 0, or another that it waits for,")


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _pause(end: float, timeout: float, who: str) -> None:
    if time.monotonic() > end:
        raise TimeoutError(f"{who} did not come within {timeout:g} s; start one process for each rank")
    time.sleep(PAUSE)


def store_in_environment(timeout: float) -> dist.Store:
    """The store that MASTER_ADDR and MASTER_PORT name; rank 0 opens it, unless torchrun's agent has."""
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout))))
    return store
