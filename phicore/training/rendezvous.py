"""Meeting the other ranks in a store that may still hold what an earlier start of the same ranks left in it.

torchrun's agent keeps its store over restarts, and the addresses in it: ranks that read an old one do not find each
other (pytorch#135712). Here ranks first agree on a prefix that no earlier start has used.
"""

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from phicore.training.lost import first_sentence

PREFIX = "phicore"
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # torchrun's agent says so
PAUSE = 0.02  # seconds between looks
GRACE = 3.0  # seconds in which ranks that wait for the same one say so


def meet(store: dist.Store, rank: int, world_size: int, timeout: float) -> str:
    """A prefix of keys in the store that nothing has yet, the same for all ranks of this start and of no other.

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
    store = dist.PrefixStore(PREFIX, store)
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
        return f"{PREFIX}/{own}"
    while True:
        word = _read(store, "word")
        if word:
            store.set(f"answer {rank}", f"{word} {own}")
            if own in json.loads(_read(store, f"list {word}") or "[]"):
                return f"{PREFIX}/{word}"
        _pause(end, timeout, "rank 0, or another that it waits for,")


def who_is_missing(store: dist.Store, rank: int, world_size: int) -> list[int]:
    """The ranks that do not miss another, as those do that call this; rank 0 where the store has gone with it.

    Args:
        store: of this start of the ranks alone.
        rank, world_size: of this process.
    """
    end = time.monotonic() + GRACE
    try:
        store.set(f"missing {rank}", "another")
        while True:
            silent = [r for r in range(world_size) if not _read(store, f"missing {r}")]
            if not silent or time.monotonic() > end:
                return silent
            time.sleep(PAUSE)
    except RuntimeError:
        return [0]


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _pause(end: float, timeout: float, who: str) -> None:
    if time.monotonic() > end:
        raise TimeoutError(f"{who} did not come within {timeout:g} s; start one process for each rank")
    time.sleep(PAUSE)


def store_in_environment(rank: int, timeout: float) -> dist.Store:
    """The store that MASTER_ADDR and MASTER_PORT name; rank 0 opens it, unless torchrun's agent has.

    Raises:
        TimeoutError: nobody opened it.
        OSError: rank 0 cannot open it.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    opens, waits = rank == 0 and os.environ.get(AGENT_STORE) != "True", timedelta(seconds=timeout)
    try:
        # Who does not come is for `meet` to say: the store would only count.
        return dist.TCPStore(address, port, None, opens, waits, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        place = f"{address}:{port}"
        if opens:
            raise OSError(f"rank 0 cannot open {place} ({first_sentence(error)}); set another MASTER_PORT") from error
        raise TimeoutError(
            f"nobody opened {place}, as rank 0 should, within {timeout:g} s; start it, or set MASTER_ADDR and "
            f"MASTER_PORT to where it is ({first_sentence(error)})"
        ) from error
