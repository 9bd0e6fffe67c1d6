"""How parameters lie in flat buckets, and which part of each a rank updates.

A bucket is one flat tensor [world_size * shard]; its parameters are views into it, each rank owns one shard. What of a
parameter lies in a rank's shard is a piece: the tensor that the inner optimizer sees. Pieces, rather than whole shards,
keep what torch's optimizers do for each parameter: its own step count, and no update where there was no gradient.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# Parameters start at multiples of this: matrix products want aligned operands. Padding is never optimizer state.
ALIGNMENT_BYTES = 64

Named = tuple[str, Tensor]


@dataclass(slots=True, eq=False)
class Slot:
    """A parameter's place in its bucket.

    Attributes:
        name: of the parameter.
        parameter: a view into the bucket.
        offset: its first element's, in the bucket.
        used: it has had a gradient, on this rank, that no step has consumed.
        reduced: what tells the gradient that was reduced last from a later one (stage 1).
    """

    name: str
    parameter: Tensor
    offset: int
    used: bool = False
    reduced: tuple[int, int] | None = None


@dataclass(slots=True, eq=False)
class Piece:
    """What this rank updates of one parameter.

    Attributes:
        name: of the parameter.
        start, stop: the elements, of the flattened parameter.
        offset: of element `start` in the shard.
        tensor: [stop - start] what the inner optimizer updates: a view into the shard, or the float32 master.
    """

    name: str
    start: int
    stop: int
    offset: int
    tensor: Tensor

    @property
    def place(self) -> slice:
        """Where it lies in the shard."""
        return slice(self.offset, self.offset + self.stop - self.start)


@dataclass(slots=True, eq=False)
class Bucket:
    """Parameters of one group, dtype and device in one flat tensor.

    Attributes:
        slots: the parameters, in the order in which they lie.
        flat: [world_size * shard] the parameters' memory.
        shard: [shard] this rank's part of it.
        pieces: of the parameters that reach into the shard.
        wide: dtype of the pieces and of the reduced gradient: float32 for 16-bit parameters.
        grad: [shard] the reduced gradient; None when there is none.
        buffer: [world_size * shard] this rank's gradients while a round fills them in; only to be read where it is
            the gradient itself (`is_lent`).
        filled: the slots that the open round has filled.
    """

    slots: list[Slot]
    flat: Tensor
    shard: Tensor
    pieces: list[Piece]
    wide: torch.dtype
    grad: Tensor | None = None
    buffer: Tensor | None = None
    is_lent: bool = False
    filled: set[Slot] = field(default_factory=set)

    @property
    def has_masters(self) -> bool:
        """Whether pieces are float32 copies of 16-bit parameters."""
        return self.wide != self.flat.dtype

    @property
    def padding(self) -> list[tuple[int, int]]:
        """Elements [start, stop) of the buffer that are no parameter's."""
        ends = [slot.offset + slot.parameter.numel() for slot in self.slots]
        starts = [*(slot.offset for slot in self.slots[1:]), self.flat.numel()]
        return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]

    @property
    def is_filled(self) -> bool:
        """Whether all its parameters have their gradients in this round."""
        return len(self.filled) == len(self.slots)


def pack(named: Sequence[Named], bucket_bytes: int) -> list[list[Named]]:
    """Fills buckets with parameters of one dtype and device each, last parameter first: the order of the backward pass.

    A parameter of more than half of bucket_bytes has a bucket for itself: its gradient is then the bucket's, which
    saves a copy, and smaller ones do not wait for it. The buckets are in the order in which a backward pass completes
    them; one that is opened early and stays open, as that of a few biases does, must not hold up those after it.
    """
    packed: list[tuple[int, list[Named]]] = []  # with the place of the last parameter
    open_buckets: dict[tuple[torch.dtype, torch.device], tuple[int, list[Named]]] = {}
    for place, (name, parameter) in enumerate(reversed(named)):
        if parameter.numel() == 0:
            continue
        if 2 * parameter.nbytes > bucket_bytes:
            packed.append((place, [(name, parameter)]))
            continue
        key = (parameter.dtype, parameter.device)
        _, bucket = open_buckets.get(key, (place, []))
        if sum(p.nbytes for _, p in bucket) + parameter.nbytes > bucket_bytes:
            packed.append(open_buckets[key])
            bucket = []
        bucket.append((name, parameter))
        open_buckets[key] = (place, bucket)
    return [bucket for _, bucket in sorted([*packed, *open_buckets.values()], key=lambda entry: entry[0])]


def offsets(sizes: Iterable[int], alignment: int, world_size: int) -> tuple[list[int], int]:
    """First elements of parameters of these sizes, and the shard's size so that world_size shards hold them all."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += _round_up(size, alignment)
    return starts, _round_up(-(-end // world_size), alignment)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def build_bucket(named: Sequence[Named], rank: int, world_size: int) -> Bucket:
    """Moves parameters into a new flat tensor. Beside them it needs memory for this one bucket only, since each
    parameter's old memory is let go as soon as it has been copied."""
    first = named[0][1]
    starts, size = offsets((p.numel() for _, p in named), ALIGNMENT_BYTES // first.element_size(), world_size)
    flat = torch.zeros(world_size * size, dtype=first.dtype, device=first.device)
    slots = []
    for (name, parameter), start in zip(named, starts, strict=True):
        place = flat[start : start + parameter.numel()].view(parameter.shape)
        place.copy_(parameter.detach())
        parameter.data = place
        slots.append(Slot(name, parameter, start))
    wide = torch.float32 if first.dtype.itemsize == 2 else first.dtype
    return Bucket(slots, flat, flat[rank * size : (rank + 1) * size], [], wide)


def cut_pieces(bucket: Bucket, rank: int) -> None:
    """Gives a bucket this rank's pieces; masters are copied from the parameters' present values."""
    size = bucket.shard.numel()
    for slot in bucket.slots:
        begin = max(slot.offset, rank * size)
        end = min(slot.offset + slot.parameter.numel(), (rank + 1) * size)
        if begin < end:
            # nn.Parameter shares its argument's memory; .to copies where the dtype differs.
            tensor = nn.Parameter(bucket.flat[begin:end].to(bucket.wide))
            bucket.pieces.append(Piece(slot.name, begin - slot.offset, end - slot.offset, begin - rank * size, tensor))


def moved_out(bucket: Bucket) -> str | None:
    """Name of a parameter that is no longer a view into its bucket, so that updates would not reach it."""
    start, size = bucket.flat.data_ptr(), bucket.flat.element_size()
    for slot in () if bucket.flat.is_meta else bucket.slots:
        if slot.parameter.data_ptr() != start + slot.offset * size:
            return slot.name
    return None


def refresh_masters(bucket: Bucket) -> None:
    """Takes over weights that were written from outside (a checkpoint, a merge): a master stays where it rounds to the
    weight that is there, and is replaced where it does not."""
    for piece in bucket.pieces if bucket.has_masters else ():
        weight, master = bucket.shard[piece.place], piece.tensor.data
        torch.where(master.to(weight.dtype) == weight, master, weight.to(bucket.wide), out=master)


def write_masters(bucket: Bucket) -> None:
    """Rounds the masters into the shard."""
    for piece in bucket.pieces if bucket.has_masters else ():
        bucket.shard[piece.place].copy_(piece.tensor.detach())
