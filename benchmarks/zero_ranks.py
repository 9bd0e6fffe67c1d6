"""Running a function on real ranks over gloo, and what the kernel says of a process: bytes sent, peak memory."""

import datetime
import functools
import gc
import json
import os
import socket
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.machine import reset_peak, status

BYTES_SENT = 200  # offset of tcpi_bytes_sent in Linux's struct tcp_info
M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def bytes_sent() -> int:
    """Payload bytes that this process has sent through its TCP sockets."""
    total = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(entry))) as copy:
                    info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", info, BYTES_SENT)[0]
        except OSError:
            continue  # not TCP, or closed meanwhile
    return total


@functools.cache
def count_taken() -> list[int]:
    """A list that gets the bytes of whatever ZeroOptimizer takes from other ranks through memory that they share."""
    from phicore.zero.shared_memory import SharedMemory

    taken: list[int] = []
    at = SharedMemory._at

    def counting(self: Any, rank: int, start: int, like: torch.Tensor) -> torch.Tensor:
        if rank != self.rank:
            taken.append(like.nbytes)
        return at(self, rank, start, like)

    SharedMemory._at = counting  # type: ignore[method-assign]
    return taken


class Peak:
    """Peak resident memory since it was made, in bytes above what was resident then."""

    def __init__(self) -> None:
        gc.collect()
        reset_peak()
        self.start = status("VmRSS")

    def bytes(self) -> int:
        return status("VmHWM") - self.start


def give_back_freed_memory(*, at_once: bool = False) -> None:
    """Gives freed memory back to the system, so that it does not hide new memory; from now on too, if at_once is set:
    else peaks would show what malloc keeps, for every contender."""
    import ctypes

    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    if at_once:
        libc.mallopt(M_MMAP_THRESHOLD, 2**18)


def _rank(rank: int, world_size: int, directory: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the libraries' own messages
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=300),
    )
    answers: list[Any] = [None] * world_size
    dist.all_gather_object(answers, function(rank, world_size, *arguments))
    if rank == 0:
        Path(directory, "answers.json").write_text(json.dumps(answers))
    dist.barrier()
    os._exit(0)  # some libraries' exit handlers wait for each other


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Each rank's result of function(rank, world_size, *arguments)."""
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_rank, (world_size, directory, function, arguments), nprocs=world_size)
        return json.loads(Path(directory, "answers.json").read_text())
