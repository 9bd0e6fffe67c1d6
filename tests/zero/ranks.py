"""A group of processes that runs functions sent to it: the cost of starting ranks is paid once for many tests."""

import datetime
import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from phicore.zero.shared_memory import SWITCH

SHARED, SOCKETS = "shared memory", "sockets"  # what ZeroOptimizer's collectives go through
TIMEOUT = 30  # seconds for a collective; a rank that waits longer is a failure


class Ranks:
    """Calls a module-level function in every rank at once; a rank's exception fails the test with its traceback."""

    def __init__(self, world_size: int, directory: Path) -> None:
        context = multiprocessing.get_context("forkserver")  # imports torch once for all ranks
        # torch._dynamo: the first step of any torch optimizer imports it
        context.set_forkserver_preload(["torch._dynamo", "phicore", "tests.zero.models"])
        self.world_size, self.broken, self.wire = world_size, False, SHARED
        self.processes, self.pipes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            store = str(directory / "store")
            process = context.Process(target=_serve, args=(there, rank, world_size, store), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        answers = []
        try:
            for pipe in self.pipes:
                pipe.send((function, arguments, self.wire))
            for pipe in self.pipes:
                answers.append(pipe.recv() if pipe.poll(2 * TIMEOUT) else (False, f"no answer in {2 * TIMEOUT} s"))
        except (OSError, EOFError) as error:
            answers.append((False, f"died: {error!r}"))
        failures = [f"rank {rank}: {text}" for rank, (well, text) in enumerate(answers) if not well]
        if failures:
            self.stop()  # the group is in no known state; the next test starts another
            raise AssertionError("\n".join(failures))
        return [value for _, value in answers]

    def stop(self) -> None:
        self.broken = True
        for pipe in self.pipes:
            pipe.close()  # ends _serve's loop
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(pipe: Connection, rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    while True:
        answer: tuple[bool, Any]
        try:
            function, arguments, wire = pipe.recv()
            os.environ[SWITCH] = "0" if wire == SOCKETS else "1"
            torch.manual_seed(0)
            answer = (True, function(*arguments))
        except EOFError:
            return
        except Exception:
            answer = (False, traceback.format_exc())
        gc.collect()
        pipe.send(answer)
