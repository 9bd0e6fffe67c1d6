"""Gradients on their way from the backward pass to the shards.

One synchronised backward pass is one round: every rank reduces every bucket once, in the same order. A bucket starts
as soon as its parameters and the buckets before it have their gradients, while the backward pass goes on; what is left
at the pass's end, for parameters that it did not reach on this rank, starts then with zeros in their place. So ranks
stay in step whichever parameters each of them uses.
"""

import weakref
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from phicore.zero.collectives import Collectives
from phicore.zero.layout import Bucket, Slot

MAX_IN_FLIGHT = 2  # buckets being reduced at once: enough to overlap, and all that stage 2 holds beside its shards
BUCKETS_KEPT = MAX_IN_FLIGHT + 1  # as much memory of them is kept between steps; one is filled while two travel


class _Hook:
    """Tells the reducer of a parameter's gradient. Holds it weakly, and a bucket by its place there: a dropped
    optimizer must not reduce any more, and a hook that held its own parameter would keep it alive for ever."""

    def __init__(self, reducer: "GradientReducer", place: int) -> None:
        self.reducer, self.place = weakref.ref(reducer), place

    def __call__(self, parameter: Tensor) -> None:
        reducer = self.reducer()
        if reducer is not None:
            reducer.on_gradient(*reducer.watched[self.place])


def is_watched(parameter: Tensor) -> bool:
    """Whether a reducer that is alive takes this parameter's gradients."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return any(isinstance(hook, _Hook) and hook.reducer() is not None for hook in hooks.values())


class GradientReducer:
    """Reduces gradients to shards, `bucket.grad`.

    Stage 1 keeps `p.grad`, and a shard is the reduction of all that has accumulated there. Stage 2 takes `p.grad` away
    as it comes, and adds each round's reduction to the shard.

    Args:
        stage: 1 or 2.
        scale: factor for the sum over ranks.
        collectives: for a device.
        alone: there are no other ranks. Gradients then stay in `p.grad` in both stages, but for 16-bit parameters.
    """

    def __init__(
        self,
        stage: int,
        scale: float,
        collectives: Callable[[torch.device], Collectives],
        *,
        alone: bool = False,
    ) -> None:
        self.stage, self.scale, self.alone = stage, scale, alone
        self.collectives = collectives
        self.watched: list[tuple[Bucket, Slot]] = []  # what hooks tell of
        self.scaled = False  # the reduced gradients are no more what p.grad amounts to
        self.buckets: list[Bucket] = []  # in the order in which they are reduced
        self.syncing = True
        self.round_due = True  # this rank may hold gradients that no round has carried
        self.changed = True  # shards are not what the optimizer saw last
        self._next = 0  # bucket of the open round
        self._open = False
        self._backward: int | None = None  # the pass whose end closes the open round
        self._in_flight: deque[tuple[Bucket, Callable[[], Tensor], Tensor | None]] = deque()  # buffers not lent
        self._handles: list[RemovableHandle] = []
        self._places: dict[Bucket, float] = {}  # where in a backward pass a bucket is ready, from 0 to 1

    def add(self, buckets: Sequence[Bucket]) -> None:
        """Reduces the gradients of a parameter group's new buckets from now on."""
        if self._open:
            self.close_round()
        self.wait()
        for index, bucket in enumerate(buckets):
            # A backward pass goes through all groups side by side.
            self._places[bucket] = (index + 0.5) / len(buckets)
            for slot in bucket.slots:
                if slot.parameter.requires_grad:  # torch takes no hook for others; they wait for the end of the round
                    hook = _Hook(self, len(self.watched))
                    self.watched.append((bucket, slot))
                    self._handles.append(slot.parameter.register_post_accumulate_grad_hook(hook))
        self.buckets = sorted(self._places, key=self._places.__getitem__)
        sizes: dict[torch.device, int] = {}
        for bucket in buckets:
            sizes[bucket.flat.device] = max(sizes.get(bucket.flat.device, 0), bucket.flat.nbytes)
        for device, size in sizes.items():
            self.collectives(device).prepare(size)

    def release(self) -> None:
        """Takes no more gradients."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def on_gradient(self, bucket: Bucket, slot: Slot) -> None:
        """Takes a gradient that the backward pass has just put in place."""
        slot.used = self.changed = True
        if self.scaled and self.stage == 1 and not self._stays(bucket):
            raise RuntimeError(
                f"{slot.name} gets another gradient after gradients were clipped or scaled, which stage 1 would undo; "
                f"clip once, before step, or use stage 2"
            )
        if not self.syncing:
            return
        if bucket.buffer is None and self._open and self.buckets.index(bucket) < self._next:
            self.close_round()  # a nested backward pass (reentrant checkpointing) comes back to a bucket that has left
        self._open = True
        if self._backward != (task := torch._C._current_graph_task_id()):
            self._backward = task
            Variable._execution_engine.queue_callback(self._end_of_backward)
        if not self._stays(bucket):
            self._fill(bucket, slot)
        while self._next < len(self.buckets) and self.buckets[self._next].is_filled:
            self._start_next()

    def _end_of_backward(self) -> None:
        self._backward = None
        if self._open:
            self.close_round()

    def _stays(self, bucket: Bucket) -> bool:
        """Whether the bucket's gradients need no reduction: the inner optimizer can take them where they are."""
        return self.alone and not bucket.has_masters

    def gradients(self, bucket: Bucket) -> dict[str, Tensor]:
        """The reduced gradients of the pieces that have one, [stop - start] each, by name."""
        if self._stays(bucket):
            grads = {slot.name: slot.parameter.grad for slot in bucket.slots}
            # .data has a version counter of its own: what this optimizer writes is told from what others write.
            return {name: grad.data.reshape(-1) for name, grad in grads.items() if grad is not None}
        used = {slot.name for slot in bucket.slots if slot.used}
        assert bucket.grad is not None
        return {piece.name: bucket.grad[piece.place] for piece in bucket.pieces if piece.name in used}

    def _fill(self, bucket: Bucket, slot: Slot) -> None:
        grad = _dense_gradient(slot)
        again = self.stage == 2 and slot in bucket.filled
        if _can_be_lent(grad, bucket) and not again:
            bucket.buffer, bucket.is_lent = grad.detach().view(-1), True
        else:
            if bucket.buffer is None or bucket.is_lent:
                own, bucket.is_lent = self._take(bucket), False
                bucket.buffer = own if bucket.buffer is None else own.copy_(bucket.buffer)
            place = _place(bucket.buffer, slot).view(grad.shape)
            if again:
                place += grad
            else:
                place.copy_(grad)
        bucket.filled.add(slot)
        if self.stage == 2:
            slot.parameter.grad = None
        else:
            slot.reduced = _identity(grad)

    def _take(self, bucket: Bucket) -> Tensor:
        """A buffer whose padding is zero: what lay there before might not be finite, and no rank would be to blame."""
        buffer = self.collectives(bucket.flat.device).take(bucket.flat)
        for start, stop in bucket.padding:
            buffer[start:stop] = 0
        return buffer

    def _start_next(self) -> None:
        self._next += 1
        bucket = self.buckets[self._next - 1]
        if not (self.scaled and self.stage == 1 and bucket.grad is not None):  # p.grad is not scaled
            self._start(bucket)

    @torch.no_grad()
    def reduce_now(self, buckets: Sequence[Bucket]) -> None:
        """Reduces what lies in `p.grad` of buckets that have just been added."""
        for bucket in buckets:
            self._start(bucket)
        self.wait()

    def _start(self, bucket: Bucket) -> None:
        if self._stays(bucket):
            for slot in bucket.slots:
                if slot.parameter.grad is not None:
                    slot.used, slot.reduced = True, _identity(_dense_gradient(slot))
            return
        for slot in bucket.slots:
            if slot in bucket.filled:
                continue
            if slot.parameter.grad is not None:  # from a pass within no_sync, or set by hand
                slot.used = True
                self._fill(bucket, slot)
            else:
                if bucket.buffer is None:
                    bucket.buffer = self._take(bucket)
                _place(bucket.buffer, slot).zero_()
        assert bucket.buffer is not None
        finish = self.collectives(bucket.flat.device).reduce(bucket.buffer, bucket.wide)
        self._in_flight.append((bucket, finish, None if bucket.is_lent else bucket.buffer))
        bucket.buffer, bucket.is_lent = None, False
        bucket.filled.clear()
        while len(self._in_flight) > MAX_IN_FLIGHT:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        bucket, finish, buffer = self._in_flight.popleft()
        total = finish()
        if buffer is not None:
            self.collectives(buffer.device).give(buffer)
        if self.scale != 1:
            total.mul_(self.scale)
        if self.stage == 2 and bucket.grad is not None:
            bucket.grad += total
        else:
            bucket.grad = total

    @torch.no_grad()
    def close_round(self) -> None:
        """Starts the buckets that the open round has not started."""
        while self._next < len(self.buckets):
            self._start_next()
        self._next, self._open, self.round_due, self.changed = 0, False, False, True

    @torch.no_grad()
    def finish(self) -> None:
        """Brings every gradient to its shard; every rank must call it at the same point."""
        if self._open or self.round_due:
            self.close_round()
        self.wait()

    def wait(self) -> None:
        """Waits for the reductions that are on their way."""
        while self._in_flight:
            self._finish_oldest()

    def dropped(self) -> bool:
        """Whether gradients that had been reduced were taken away since (stage 1), as by model.zero_grad(); they do not
        count then."""
        found = False
        for bucket in self.buckets:
            for slot in bucket.slots:
                if slot.reduced is not None and slot.parameter.grad is None:
                    slot.used, slot.reduced, found = False, None, True
        return found

    def changed_after_reduction(self) -> str | None:
        """Name of a parameter whose gradient was written to after it had been reduced (stage 1)."""
        for bucket in self.buckets:
            for slot in bucket.slots:
                grad = slot.parameter.grad
                if grad is not None and _identity(grad) != slot.reduced:
                    return slot.name
        return None

    def drop(self) -> None:
        """Forgets all gradients."""
        if self._open:
            self.close_round()  # other ranks have started its buckets or will
        self.wait()
        for bucket in self.buckets:
            bucket.grad = None
            for slot in bucket.slots:
                slot.used, slot.reduced, slot.parameter.grad = False, None, None
        self.scaled = False
        self.round_due = self.changed = True


def _dense_gradient(slot: Slot) -> Tensor:
    grad = slot.parameter.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise TypeError(f"{slot.name} has a {grad.layout} gradient; ZeroOptimizer reduces dense ones only")
    return grad


def _can_be_lent(grad: Tensor, bucket: Bucket) -> bool:
    """Whether a gradient can be the bucket's buffer, with nothing to copy or to pad.

    In stage 1 a later backward pass may add to it while it is on its way. That pass's round reduces it again, and what
    arrived in between is replaced.
    """
    return grad.shape.numel() == bucket.flat.numel() and grad.dtype == bucket.flat.dtype and grad.is_contiguous()


def _place(buffer: Tensor, slot: Slot) -> Tensor:
    return buffer[slot.offset : slot.offset + slot.parameter.numel()]


def _identity(grad: Tensor) -> tuple[int, int]:
    """Changes when a gradient is replaced or written to."""
    return grad.data_ptr(), grad._version
