"""Memory that the ranks of one host share, as the wire between them.

Through sockets a gradient is copied into the kernel and out of it again, by threads that want the processor for it.
Here a rank collects its gradients in a block of memory that the others map too, and each sums its shard straight from
all of them. A byte through a pipe tells that a block is written, or has been read: it wakes who waits for it, orders
what was written before it, and a pipe that ends tells of a process that has gone.

A rank *tells* of what it has written. The others take what they are told in its order, the same on all ranks, and each
answers that it has *read* it; then the memory may be written again. Neither memory nor pipes have names, so they end
with the processes, however these end.
"""

import contextlib
import functools
import mmap
import os
import select
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BLOCKS = 4  # one is filled, two are on their way, and one has not been read by the slowest rank
LENT = 2  # that are filled at once at most: the others are for buckets that were collected elsewhere
TOLD = ("gradients", "flags", "parameters")  # what ranks tell of; a byte is BLOCKS * its place here + the block
GRADIENTS, FLAGS, PARAMETERS = range(3)
READ = 255  # the byte that answers, once it has been read
SWITCH = "PHICORE_SHARED_MEMORY"  # in the environment; 0 turns it off

Total = Callable[[Sequence[Tensor], torch.dtype], Tensor]


@dataclass(slots=True, eq=False)
class Peer:
    """Another rank.

    Attributes:
        rank: its number.
        inbox, outbox: pipes from it and to it.
        told: what it has told of that this rank has not taken.
        read: how much of what this rank told of it has read.
        gone: its end of the inbox is closed.
    """

    rank: int
    inbox: int
    outbox: int
    told: deque[int] = field(default_factory=deque)
    read: int = 0
    gone: bool = False


@dataclass(slots=True, eq=False)
class _Sum:
    """A sum on its way: this rank's part [W * shard], the dtype of the result, and the result [shard]."""

    own: Tensor
    dtype: torch.dtype
    total: Tensor | None = None


class SharedMemory:
    """Sums, compares and gathers tensors of all ranks; all must call `reduce`, `maximum` and `gather` in one order.

    Args:
        maps: the memory of each rank, BLOCKS * bytes of a block, whole pages; this rank writes to its own.
        rank: this one.
        peers: the others.
        names: what messages call each rank: its number among those of all groups.
        total: sums parts of all ranks, in a dtype.
        timeout: tells the seconds that another rank may take now.

    Raises:
        torch.distributed.DistNetworkError: from any method: another rank has gone, or does not come within the timeout;
            or an exchange has ended in an error before.
        RuntimeError: from any method that waits: another rank exchanges something else.
    """

    def __init__(
        self,
        maps: Sequence[mmap.mmap],
        rank: int,
        peers: Sequence[Peer],
        names: Sequence[int],
        total: Total,
        timeout: Callable[[], float],
    ) -> None:
        self.rank, self.peers, self.names, self.total, self.timeout = rank, peers, names, total, timeout
        self.maps, self.memory = maps, [torch.frombuffer(memory, dtype=torch.uint8) for memory in maps]
        self.block_bytes = len(maps[rank]) // BLOCKS
        self._told = 0  # how often this rank has told of something
        self._read = 0  # how much of what the ranks told of it has read, its own among it
        self._last_use = [0] * BLOCKS  # how often it had then, for each block
        self._lent: set[int] = set()
        self._sums: deque[_Sum] = deque()  # not taken yet, oldest first
        self._batch: list[tuple[Tensor, int]] = []  # to gather: full [W * shard], and where shards are staged
        self._poll = select.poll()
        self._by_inbox = {peer.inbox: peer for peer in peers}
        for inbox in self._by_inbox:
            os.set_blocking(inbox, False)
            self._poll.register(inbox, select.POLLIN)
        self._close = weakref.finalize(self, _close, [end for peer in peers for end in (peer.inbox, peer.outbox)])
        self._failure = ""  # what the last exchange ended in

    def take(self, like: Tensor) -> Tensor | None:
        """A block to fill and to `reduce`, [n] in the dtype of a tensor [n], or None where there is none now."""
        if like.nbytes > self.block_bytes or len(self._lent) >= LENT or self._batch:
            return None
        with self._exchange():
            self._hear(0)
        block = self._free_block()
        if block is None:
            return None
        self._lent.add(block)
        return self._at(self.rank, block * self.block_bytes, like)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is one that `take` has lent."""
        return self._block_of(tensor) is not None

    def reduce(self, full: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        """Starts a sum over ranks of full [W * shard], which fits into a block; what it returns waits for this rank's
        shard of it, [shard] in dtype."""
        with self._exchange():
            if self._batch:
                self._take_batch()
            block = self._block_of(full)
            if block is None:
                block = self._wait_for_block()
                own = self._at(self.rank, block * self.block_bytes, full).copy_(full)
            else:
                own = full
                self._lent.discard(block)
            self._tell(GRADIENTS, block)
            started = _Sum(own, dtype)
            self._sums.append(started)

        def finish() -> Tensor:
            with self._exchange():
                while started.total is None:
                    self._take_sum()
            return started.total

        return finish

    def gather(self, full: Tensor) -> Callable[[], None]:
        """Starts to bring all shards to full [W * shard], which fits into a block and has this rank's in its place;
        what it returns waits for them."""
        shard = self._shards(full)[self.rank]
        with self._exchange():
            start = self._batch[-1][1] + self._shards(self._batch[-1][0])[0].nbytes if self._batch else 0
            if start + shard.nbytes > len(self.memory[self.rank]):
                self._take_batch()
                start = 0
            if not self._batch:
                self._wait_until_all_is_read()
            self._at(self.rank, start, shard).copy_(shard)
            self._batch.append((full, start))
            batch = self._batch

        def finish() -> None:
            with self._exchange():
                if batch is self._batch:
                    self._take_batch()

        return finish

    def maximum(self, values: Tensor) -> Tensor:
        """The greatest of all ranks' values [n], one by one, which fit into a block; waits for them."""
        with self._exchange():
            if self._batch:
                self._take_batch()
            block = self._wait_for_block()
            self._at(self.rank, block * self.block_bytes, values).copy_(values)
            self._tell(FLAGS, block)
            while self._sums:  # they were told of before
                self._take_sum()
            found = values.clone()
            for rank, theirs in self._take_told(FLAGS).items():
                torch.maximum(found, self._at(rank, theirs * self.block_bytes, values), out=found)
            self._answer()
        return found

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """An exchange that ends in an error, of another rank or a KeyboardInterrupt here, is the last. This rank does
        not know how far it came, so another attempt could take one thing for another."""
        if self._failure:
            raise dist.DistNetworkError(f"no exchange can follow one that failed ({self._failure}); start again")
        try:
            yield
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}"
            self._close()  # the others need not wait for this rank
            raise

    # What has been told

    def _take_told(self, what: int) -> dict[int, int]:
        """The blocks that the others tell of next, by rank; waits for them."""
        self._wait(TOLD[what], lambda peer: bool(peer.told))
        for peer in self.peers:
            if (theirs := peer.told[0] // BLOCKS) != what:
                raise RuntimeError(
                    f"{self._ranks([peer])} exchanges {TOLD[theirs]} while rank {self.names[self.rank]} exchanges "
                    f"{TOLD[what]}; all ranks must call backward and the optimizer's methods in the same order"
                )
        return {peer.rank: peer.told.popleft() % BLOCKS for peer in self.peers}

    def _take_sum(self) -> None:
        blocks = self._take_told(GRADIENTS)
        started = self._sums.popleft()
        parts = [
            self._shards(started.own)[rank] if rank == self.rank else self._part(rank, blocks[rank], started.own)
            for rank in range(len(self.memory))
        ]
        started.total = self.total(parts, started.dtype)
        for rank, block in blocks.items():
            self._let_go(rank, block * self.block_bytes, self.block_bytes)
        self._answer()

    def _take_batch(self) -> None:
        self._tell(PARAMETERS)
        self._last_use = [self._told] * BLOCKS
        self._take_told(PARAMETERS)
        # Each rank begins with another one, so that they do not all read the same memory.
        for peer in sorted(self.peers, key=lambda peer: (peer.rank - self.rank) % len(self.memory)):
            for full, start in self._batch:
                shard = self._shards(full)[peer.rank]
                shard.copy_(self._at(peer.rank, start, shard))
            self._let_go(peer.rank, 0, len(self.maps[peer.rank]))
        self._answer()
        self._batch = []

    # Blocks

    def _free_block(self) -> int | None:
        read = min(self._read, *(peer.read for peer in self.peers))
        free = (b for b, last_use in enumerate(self._last_use) if b not in self._lent and last_use <= read)
        return next(free, None)

    def _wait_for_block(self) -> int:
        self._hear(0)
        while (block := self._free_block()) is None:
            # First what the others wait for, so that no two wait for each other.
            if self._sums:
                self._take_sum()
            else:
                oldest = min(self._last_use[block] for block in range(BLOCKS) if block not in self._lent)
                self._wait_until_read(oldest)
        return block

    def _wait_until_all_is_read(self) -> None:
        while self._sums:
            self._take_sum()
        self._wait_until_read(self._told)

    def _wait_until_read(self, told: int) -> None:
        self._wait("an answer", lambda peer: peer.read >= told)

    def _block_of(self, tensor: Tensor) -> int | None:
        own = self.memory[self.rank]
        start = tensor.data_ptr() - own.data_ptr()
        return start // self.block_bytes if 0 <= start < len(own) else None

    def _at(self, rank: int, start: int, like: Tensor) -> Tensor:
        return self.memory[rank][start : start + like.nbytes].view(like.dtype)

    def _part(self, rank: int, block: int, full: Tensor) -> Tensor:
        """What lies in another rank's block, of the form of full [W * shard], for this rank, [shard]."""
        shard = self._shards(full)[self.rank]
        return self._at(rank, block * self.block_bytes + self.rank * shard.nbytes, shard)

    def _shards(self, full: Tensor) -> Tensor:
        return full.view(len(self.memory), -1)

    def _let_go(self, rank: int, start: int, size: int) -> None:
        """Unmaps pages of another rank that have been read, until they are again: each process would count them as its
        own memory, as often as there are ranks."""
        with contextlib.suppress(OSError):  # a process that locks its memory (mlockall) keeps it
            self.maps[rank].madvise(mmap.MADV_DONTNEED, start, size)

    # Pipes

    def _tell(self, what: int, block: int = 0) -> None:
        self._told += 1
        self._last_use[block] = self._told
        self._say(BLOCKS * what + block)

    def _answer(self) -> None:
        self._read += 1
        self._say(READ)

    def _say(self, what: int) -> None:
        for peer in self.peers:
            os.write(peer.outbox, bytes([what]))

    def _wait(self, what: str, has_come: Callable[[Peer], bool]) -> None:
        start, own = time.monotonic(), f"rank {self.names[self.rank]}"
        while missing := [peer for peer in self.peers if not has_come(peer)]:
            if gone := [peer for peer in missing if peer.gone]:
                raise dist.DistNetworkError(f"{self._ranks(gone)} closed the connection; {own} waits for {what}")
            timeout = self.timeout()
            left = start + timeout - time.monotonic()
            if left <= 0:
                raise dist.DistNetworkError(f"{own} waited {timeout:g} s for {what} from {self._ranks(missing)}")
            self._hear(min(left, 3600))

    def _ranks(self, peers: Sequence[Peer]) -> str:
        return f"rank{'s' * (len(peers) > 1)} {', '.join(str(self.names[peer.rank]) for peer in peers)}"

    def _hear(self, seconds: float) -> None:
        """Reads what the others say, waiting for the first of it at most so long."""
        for inbox, _ in self._poll.poll(1000 * seconds):
            peer, said = self._by_inbox[inbox], os.read(inbox, 4096)
            for what in said:
                if what == READ:
                    peer.read += 1
                else:
                    peer.told.append(what)
            if not said:
                peer.gone = True
                self._poll.unregister(inbox)


def open_shared_memory(group: dist.ProcessGroup | None, block_bytes: int, total: Total) -> SharedMemory | None:
    """Memory with blocks of at least so many bytes. None, on all ranks, where they do not run on one host, or may not
    open each other's memory there, or the environment of one turns it off. Every rank must call it at the same point.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    size = BLOCKS * -(-block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    inboxes: dict[int, int] = {}
    lent: list[int] = []  # descriptors that the others open, and nobody needs after that
    offer = None
    try:
        if os.environ.get(SWITCH) != "0" and hasattr(os, "memfd_create"):
            lent.append(memory := os.memfd_create("phicore"))
            os.ftruncate(memory, size)
            os.pwrite(memory, mark := f"{rank} {uuid.uuid4().hex}".encode(), 0)
            outboxes = {}
            for other in range(world_size):
                if other != rank:
                    inboxes[other], outboxes[other] = os.pipe()
                    lent.append(outboxes[other])
            offer = (processes_known_here(), os.getpid(), memory, mark, outboxes)
    except OSError:  # too many open files, say
        pass
    offers = _all(offer, group)
    peers, maps = [], []
    works = None not in offers and len({known for known, *_ in offers}) == 1
    if works:
        try:
            for other, (_, process, memory, mark, outboxes) in enumerate(offers):
                maps.append(_map(process, memory, size, mark))
                if other != rank:
                    # Open for reading too: while somebody might read, a write to a rank that has done its part and
                    # gone is no SIGPIPE. Who waits for one that is gone is told by the pipe from it.
                    outbox = os.open(f"/proc/{process}/fd/{outboxes[rank]}", os.O_RDWR)
                    peers.append(Peer(other, inboxes[other], outbox))
        except OSError:  # processes of another user, or hidden ones, or others of the same number
            works = False
    works = all(_all(works, group))
    _close(lent)
    if not works:
        _close([*inboxes.values(), *(peer.outbox for peer in peers)])
        return None
    names = dist.get_process_group_ranks(group)
    return SharedMemory(maps, rank, peers, names, total, functools.partial(_timeout, group))


def processes_known_here() -> str:
    """The same for processes that know each other by number: those of one start of a Linux machine and one container.

    Raises:
        OSError: this is no Linux.
    """
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def _map(process: int, descriptor: int, size: int, mark: bytes) -> mmap.mmap:
    """A process's memory, which begins with a mark. Copies of one virtual machine, or a /proc of other processes than
    one's own, have something else under the same numbers."""
    opened = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
    try:
        if os.pread(opened, len(mark), 0) != mark:
            raise OSError(f"process {process} has no such memory here")
        return mmap.mmap(opened, size)
    finally:
        os.close(opened)


def _all(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def _timeout(group: dist.ProcessGroup | None) -> float:
    """Seconds that the group's collectives wait, as it is set now."""
    found = dist.group.WORLD if group is None else group
    if found is None:
        raise RuntimeError("the process group has been destroyed, and an optimizer made in it waits for other ranks")
    return found._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
