"""ZeroOptimizer: any element-wise optimizer of torch, with its state split over the ranks."""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from phicore.zero import layout, state
from phicore.zero.agreement import copy_from_first_rank, read_alike
from phicore.zero.arguments import check_choices
from phicore.zero.blame import Blame
from phicore.zero.collectives import Collectives, choose_collectives
from phicore.zero.consolidate import gather_states
from phicore.zero.elementwise import check_elementwise
from phicore.zero.groups import as_group, describe, named_groups
from phicore.zero.hooks import step_without_hooks
from phicore.zero.layout import Bucket, Named
from phicore.zero.norm import total_norm
from phicore.zero.reduction import BUCKETS_KEPT, GradientReducer
from phicore.zero.scratch import Scratch

BUCKET_BYTES = 25 * 2**20  # torch's DistributedDataParallel has the same


class ZeroOptimizer(torch.optim.Optimizer):
    """An element-wise torch optimizer whose state is split over ranks (ZeRO stages 1 and 2, Rajbhandari et al. 2019).

    Use it in place of DistributedDataParallel and an optimizer: it reduces the gradients itself, while the backward
    pass runs. With Psi trained elements on W ranks, each rank holds Psi/W elements of optimizer state, and of float32
    masters where parameters are bfloat16 or float16, and sends 2 Psi (W-1)/W elements a step. Without a process group
    it is the inner optimizer, which takes the gradients where they are.

    The two stages differ in where gradients stay until `step`:

    - Stage 1: in `p.grad`, Psi elements. A second backward pass adds to them and reduces their sum again; put all but
      the last one within `no_sync()` to reduce once.
    - Stage 2: in the shards, Psi/W elements in float32 beside the few buckets on their way; `p.grad` is None after
      the pass, so `optimizer.zero_grad()` drops gradients and `model.zero_grad()` cannot. With A passes before a step,
      each is reduced: (A+1) Psi (W-1)/W elements a step. With all but the last within `no_sync()` it sends
      2 Psi (W-1)/W again, and holds Psi elements, as stage 1 does.

    `step` consumes the gradients. Parameters must get their gradients by backward passes in the same number on all
    ranks. Which of them a pass reaches may differ, but each pass before the last one must reach some on every rank; and
    where one pass feeds two optimizers of a process group, all ranks must reach parameters in one order. A parameter
    that got no gradient on any rank is not updated, as in torch. Frozen parameters may be given: they are optimized
    from when they are unfrozen. At construction all parameters given are set to rank 0's values. They become views
    into flat buckets; keep the Parameter objects. Buffers, such as a batch norm's running statistics, stay each rank's
    own.

    `param_groups` hold this rank's pieces of the parameters, with settings that schedulers may change as usual.
    To clip, use this class's `clip_grad_norm_`: torch's sees this rank's gradients (none in stage 2), not the reduced
    ones.

    Args:
        params: model.named_parameters(), or dicts of {"params": named parameters, settings ...}.
        optimizer_class: such as torch.optim.AdamW.
        stage: 1 or 2.
        reduction: "mean" over ranks, as DistributedDataParallel has it, or "sum".
        process_group: the ranks; default all.
        bucket_bytes: what a bucket holds at most, unless one parameter is larger. Results do not depend on it. On a CPU
            up to three times as much memory is kept between steps for buckets to use again; where ranks share memory,
            four times the largest bucket besides.
        **options: of optimizer_class, which are its own defaults where none are given. On a CPU fused=True, where there
            is such a form, makes an update several times faster; of AdamW seven times.

    Raises:
        TypeError: parameters without names; an optimizer_class that is not one.
        ValueError: another stage or reduction; bucket_bytes that are no whole number above 0; no parameters, or one
            that is given twice; a dtype other than float32, float64, bfloat16, float16; an optimizer that, with the
            settings of some group, is not element-wise, or whose state is neither an entry for each element nor a
            number; ranks that were given different parameters or settings. What is wrong on one rank is raised on
            every rank.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = ZeroOptimizer(model.named_parameters(), torch.optim.AdamW, stage=2, lr=1e-3)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> norm = optimizer.clip_grad_norm_(1.0)
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Named] | Iterable[dict[str, Any]],
        optimizer_class: type[torch.optim.Optimizer],
        *,
        stage: Literal[1, 2] = 2,
        reduction: Literal["mean", "sum"] = "mean",
        process_group: dist.ProcessGroup | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        **options: Any,
    ) -> None:
        self.process_group, self.bucket_bytes = process_group, bucket_bytes
        self.world_size = dist.get_world_size(process_group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(process_group) if dist.is_initialized() else 0
        if self.world_size < 1:
            raise ValueError("this rank is not in process_group; only ranks that are can make a ZeroOptimizer over it")
        self._class, self._options = optimizer_class, options
        self._names: list[list[str]] = []  # of each group, as given
        self._shapes: dict[str, torch.Size] = {}
        self._frozen: dict[str, tuple[int, Tensor]] = {}  # group and parameter
        self._inner: torch.optim.Optimizer | None = None

        def read() -> list[dict[str, Any]]:
            check_choices(optimizer_class, stage, reduction, bucket_bytes)
            return named_groups(params, known={})

        own = {"stage": stage, "reduction": reduction, "bucket_bytes": bucket_bytes}
        groups = self._agree_on_groups(read, {**own, **options})
        self._device = _device_of(groups)
        check_elementwise(optimizer_class, options, [state.settings(group) for group in groups], self._device)
        scale = 1.0 / self.world_size if reduction == "mean" else 1.0
        scratch = Scratch(BUCKETS_KEPT * bucket_bytes)
        self._blame = Blame()
        collectives = _collectives_by_device(process_group, self.world_size, scratch, self._blame)
        self._reducer = GradientReducer(stage, scale, collectives, alone=self.world_size == 1)
        self.overflows_are_shared = False  # its scaler looks at the reduced gradients of all ranks
        self._ready = False
        super().__init__(groups, options)  # calls add_param_group for each
        self._ready = True
        assert self._inner is not None
        # The very objects of the inner optimizer: what schedulers and loss scalers write is what it reads.
        self.param_groups, self.state, self.defaults = self._inner.param_groups, self._inner.state, self._inner.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds {"params": named parameters, settings ...}, on all ranks at the same point.

        Raises:
            TypeError, ValueError: as the constructor does; nothing has been added then.
        """
        if self._ready:
            (param_group,) = self._agree_on_groups(lambda: named_groups([as_group(param_group)], self._shapes), {})
            check_elementwise(self._class, self._options, [state.settings(param_group)], self._device)
        named = param_group["params"]
        trained = [(name, p) for name, p in named if p.requires_grad]
        frozen = [(name, p) for name, p in named if not p.requires_grad]
        if self.world_size > 1:
            copy_from_first_rank([p for _, p in frozen], self.process_group)
        group = {**state.settings(param_group), "params": _pieces(self._make_buckets(trained))}
        if self._inner is None:
            self._inner = self._class([group], **self.defaults)
        else:
            self._inner.add_param_group(group)
        if self._ready:  # gradients that are there already count, as in torch
            self._reducer.round_due = self._reducer.changed = True
        self._frozen.update({name: (len(self._names), p) for name, p in frozen})
        self._names.append([name for name, _ in named])
        self._shapes.update({name: p.shape for name, p in named})

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, backward passes accumulate in `p.grad` and reduce nothing; the next pass outside reduces all."""
        before, self._reducer.syncing = self._reducer.syncing, False
        try:
            yield
        finally:
            self._reducer.syncing = before
            self._reducer.round_due = self._reducer.changed = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients.

        Raises:
            ValueError: set_to_none is False; a gradient of zero is not the absence of one to an optimizer.
        """
        if not set_to_none:
            raise ValueError("ZeroOptimizer.zero_grad drops gradients; it cannot keep them as zeros")
        self._reducer.drop()
        self._blame.clear()
        for group in self.param_groups:
            for piece in group["params"]:
                piece.grad = None
        for _, parameter in self._frozen.values():
            parameter.grad = None

    def finish_reduction(self) -> None:
        """Waits until this rank has the reduced gradients of its pieces. `step` and `clip_grad_norm_` do it; all ranks
        must call it at the same point."""
        written = None if self._reducer.round_due else self._reducer.changed_after_reduction()
        if written is not None:
            raise RuntimeError(
                f"the gradient of {written} was written to after it had been reduced, which would have no effect; to "
                f"clip or scale use this optimizer's clip_grad_norm_ and scale_gradients_, and take the model out of a "
                f"DistributedDataParallel, in whose place this optimizer reduces"
            )
        now = dist.get_world_size(self.process_group) if dist.is_initialized() else 1
        if now != self.world_size:
            raise RuntimeError(
                f"this optimizer was made for {self.world_size} ranks and there are {now}; make it after "
                f"init_process_group, and use it before destroy_process_group"
            )
        if not (self._has_changed() or self._reducer.changed):
            return
        self._reducer.finish()
        if self._exchange_flags():
            self._exchange_flags()  # for those that have been unfrozen, which have buckets now
        for bucket in self._reducer.buckets:
            gradients = self._reducer.gradients(bucket)
            for piece in bucket.pieces:
                piece.tensor.grad = gradients.get(piece.name)
        self._reducer.changed = False

    def _has_changed(self) -> bool:
        """Whether, on any rank, gradients that had been reduced were taken away since, or frozen parameters train now.
        Ranks agree by a byte, where nothing else that all of them know says that there is something new."""
        here = self._reducer.dropped() or any(_trains(parameter) for _, parameter in self._frozen.values())
        if self.world_size == 1 or self._reducer.changed or not (self._reducer.stage == 1 or self._frozen):
            return here
        anywhere = torch.tensor([here], dtype=torch.uint8, device=self._device)
        return bool(self._maximum(anywhere))

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scales the reduced gradients so that their total norm is at most max_norm, as torch's clip_grad_norm_ does.

        Args:
            norm_type: above 0, or inf.

        Returns:
            The norm before clipping, a scalar, the same on every rank.

        Raises:
            ValueError: a norm_type of 0 or below, or a max_norm below 0 (or NaN).
            RuntimeError: the norm is not finite and error_if_nonfinite is set; on every rank, before any scaling.
        """
        if not (norm_type := float(norm_type)) > 0:
            raise ValueError(f"norm_type must be above 0 or inf, got {norm_type}")
        if not max_norm >= 0:
            raise ValueError(f"max_norm must be at least 0 (inf to learn the norm alone), got {max_norm}")
        self.finish_reduction()
        total = total_norm(self._gradients(), norm_type, self._device, self.world_size, self.process_group)
        if all(bucket.wide != torch.float64 for bucket in self._reducer.buckets):
            total = total.float()
        if error_if_nonfinite and not total.isfinite():
            raise RuntimeError(f"the total norm of the gradients is {total.item()}, so they cannot be clipped")
        if not math.isinf(max_norm):
            self._scale(torch.clamp(max_norm / (total + 1e-6), max=1.0))
        return total

    @torch.no_grad()
    def scale_gradients_(self, factor: float | Tensor) -> None:
        """Multiplies the reduced gradients, as by 1 / (tokens in all batches of all ranks) with reduction="sum"."""
        self.finish_reduction()
        self._scale(factor)

    def _scale(self, factor: float | Tensor) -> None:
        self._reducer.scaled = True  # also where this rank owns nothing that has a gradient: all ranks must know
        if grads := self._gradients():
            torch._foreach_mul_(grads, factor)

    def has_gradients(self) -> bool:
        """Whether `finish_reduction` found a gradient of any parameter, on any rank."""
        return any(slot.used for bucket in self._reducer.buckets for slot in bucket.slots)

    def own_gradients_were_finite(self) -> bool:
        """Whether what this rank gave since the last `zero_grad` to the reductions that are finished was finite. It
        answers which rank a NaN came from; alone there is nothing to tell apart, and it is True."""
        return not self._blame.is_on(self.rank)

    def release(self) -> None:
        """Takes no more gradients, so that another ZeroOptimizer may be made over these parameters."""
        self._reducer.release()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """torch.amp.GradScaler.step asks for it first.

        Raises:
            TypeError: the scaler is torch's, which would look for overflows in this rank's pieces only.
        """
        if not self.overflows_are_shared:
            raise TypeError(
                "torch.amp.GradScaler sees this rank's part of the gradients at most, and ranks would differ in which "
                "steps they skip; use phicore.zero.GradScaler in its place, which is called alike"
            )
        return False

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates this rank's pieces, exchanges them with the other ranks, and drops the gradients.

        Args:
            closure: computes and differentiates the loss, once.

        Returns:
            The closure's loss.

        Raises:
            RuntimeError: a parameter's memory was replaced after construction, as `model.to(dtype)` does, or (stage 1)
                a gradient was written to after it had been reduced.
        """
        assert self._inner is not None
        for bucket in self._reducer.buckets:
            if (name := layout.moved_out(bucket)) is not None:
                raise RuntimeError(
                    f"{name} has other memory than when this optimizer was made, which would not be updated; move the "
                    f"model to its device and dtype before making the optimizer"
                )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.finish_reduction()
        for bucket in self._reducer.buckets:
            layout.refresh_masters(bucket)
        self._inner.state = self.state  # that a user may have begun anew, by another in its place
        step_without_hooks(self._inner)  # this step's own are called around it
        gathers = []
        for bucket in self._reducer.buckets:
            if any(slot.used for slot in bucket.slots):  # the same on every rank since the flags were exchanged
                layout.write_masters(bucket)
                gathers.append(self._reducer.collectives(bucket.flat.device).gather(bucket.flat))
        for finish in gathers:
            finish()
        self.zero_grad()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the state by parameter name; see `phicore.zero.state`. Tensors are the live ones."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        found = self._state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            found = found if (changed := after(self, found)) is None else changed
        return found

    def _state_dict(self) -> dict[str, Any]:
        pieces = [piece for bucket in self._reducer.buckets for piece in bucket.pieces]
        return {
            "format": state.FORMAT,
            "rank": self.rank,
            "world_size": self.world_size,
            "shapes": {name: list(shape) for name, shape in self._shapes.items()},
            "slices": {piece.name: [piece.start, piece.stop] for piece in pieces},
            "frozen": list(self._frozen),
            "state": self._state_by_name(),
            "param_groups": [
                {**state.settings(group), "params": list(names)}
                for group, names in zip(self.param_groups, self._names, strict=True)
            ],
        }

    def full_state_dict(self, *, first_rank_only: bool = False) -> dict[str, Any]:
        """The whole state in torch.optim's format, on the CPU; all ranks must call it at the same point.

        It loads into a plain optimizer_class over the same parameters in the same order, frozen ones included. Beside
        its result a rank needs memory for one bucket. Masters of 16-bit parameters are under "masters" by name, which
        plain optimizers pass over.

        Args:
            first_rank_only: the others return an empty dict.
        """
        keep = self.rank == 0 or not first_rank_only
        whole = gather_states(
            self._reducer.buckets,
            self._state_by_name(),
            self._reducer.collectives,
            self.process_group,
            self.world_size,
            keep=keep,
        )
        if not keep:
            return {}
        groups = zip(self.param_groups, self._names, strict=True)
        return state.write_full(whole, [{**_own(group), "params": names} for group, names in groups])

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Loads a state of any world size. Parameters are loaded with the model, before or after.

        Args:
            state_dict: the `state_dict` of this rank, from a run on as many ranks; or those of all ranks of a run, in
                a list; or a full state, of `full_state_dict` or of a plain torch optimizer.

        Raises:
            ValueError: it is of other parameters, shapes, groups or of another optimizer, or lacks what this rank
                needs. Nothing has been loaded then.
        """
        # Hooks may write to a copy, as torch has it; where this class takes a list, they get one.
        given: Any = copy.copy(state_dict) if isinstance(state_dict, Mapping) else list(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            given = given if (changed := before(self, given)) is None else changed
        self._load(given)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load(self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        source = state.read(state_dict, self._shapes, self._names)
        state.check_settings(source, self.defaults, self._class.__name__)
        for name in self._frozen:
            if any(part.state for part in source.slices.get(name, [])):
                raise ValueError(f"the state has been trained for {name}, which is frozen here; unfreeze it first")
        pieces = [(bucket, piece) for bucket in self._reducer.buckets for piece in bucket.pieces]
        # All is looked at before anything changes, and copied a parameter at a time: the state is not held twice.
        cuts = [state.cut(source, piece.name, piece.start, piece.stop) for _, piece in pieces]
        for group, settings in zip(self.param_groups, source.groups, strict=True):
            group.update(_own(settings))
        by_tensor = {id(piece): group for group in self.param_groups for piece in group["params"]}
        self.state.clear()
        for (bucket, piece), parts in zip(pieces, cuts, strict=True):
            values = state.joined(parts)
            master = values.pop(state.MASTER, None)
            if bucket.has_masters:
                weights = bucket.shard[piece.place]
                piece.tensor.copy_(weights if master is None else master)
            group = by_tensor[id(piece.tensor)]
            if values:
                self.state[piece.tensor] = {key: state.as_kept(v, piece.tensor, group) for key, v in values.items()}

    def __deepcopy__(self, memo: Any) -> "ZeroOptimizer":
        raise TypeError("a ZeroOptimizer holds its model's memory and cannot be copied; take its full_state_dict")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a ZeroOptimizer holds its model's memory and cannot be pickled; save its state_dict")

    # What a rank holds

    def _state_by_name(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for bucket in self._reducer.buckets:
            for piece in bucket.pieces:
                values = dict(self.state.get(piece.tensor, {}))
                if bucket.has_masters:
                    values[state.MASTER] = piece.tensor.detach()
                if values:
                    found[piece.name] = values
        return found

    def _gradients(self) -> list[Tensor]:
        return [piece.grad for group in self.param_groups for piece in group["params"] if piece.grad is not None]

    # What ranks agree on

    def _agree_on_groups(
        self, read: Callable[[], list[dict[str, Any]]], options: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Groups of (name, parameter)."""
        return read_alike(
            read, lambda groups: describe(groups, self._class, options), self.world_size, self.process_group
        )

    def _maximum(self, flags: Tensor) -> Tensor:
        return self._reducer.collectives(flags.device).maximum(flags)

    def _exchange_flags(self) -> bool:
        """Makes slot.used mean "on any rank", and gives buckets to parameters that were unfrozen on any rank. True if
        there were such. Ranks also tell each other whose gradients they have seen not to be finite."""
        slots = [slot for bucket in self._reducer.buckets for slot in bucket.slots]
        frozen = list(self._frozen.items())
        flags = [slot.used for slot in slots] + [_trains(parameter) for _, (_, parameter) in frozen]
        if self.world_size > 1:
            known = self._blame.ranks
            shared = torch.tensor([*flags, *(rank in known for rank in range(self.world_size))], dtype=torch.uint8)
            shared = shared.to(self._device)
            found = [bool(flag) for flag in self._maximum(shared).tolist()]
            flags, blamed = found[: len(flags)], found[len(flags) :]
            known.update(rank for rank, flag in enumerate(blamed) if flag)
        for slot, used in zip(slots, flags, strict=False):
            slot.used = used
        unfrozen = [entry for entry, flag in zip(frozen, flags[len(slots) :], strict=True) if flag]
        by_group: dict[int, list[Named]] = {}
        for name, (group, parameter) in unfrozen:
            by_group.setdefault(group, []).append((name, parameter))
            del self._frozen[name]
        for group, named in by_group.items():
            buckets = self._make_buckets(named)
            self._reducer.reduce_now(buckets)
            self.param_groups[group]["params"].extend(_pieces(buckets))
        return bool(unfrozen)

    def _make_buckets(self, named: Sequence[Named]) -> list[Bucket]:
        buckets = []
        for members in layout.pack(named, self.bucket_bytes):
            bucket = layout.build_bucket(members, self.rank, self.world_size)
            if self.world_size > 1:
                copy_from_first_rank([bucket.flat], self.process_group)
            layout.cut_pieces(bucket, self.rank)
            buckets.append(bucket)
        self._reducer.add(buckets)
        return buckets


def _pieces(buckets: Iterable[Bucket]) -> list[Tensor]:
    return [piece.tensor for bucket in buckets for piece in bucket.pieces]


def _own(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's settings as they are now; a learning rate may be a tensor, which schedulers write to."""
    return copy.deepcopy(state.settings(group))


def _trains(frozen: Tensor) -> bool:
    """Whether a parameter that was frozen has been unfrozen, if only for a backward pass."""
    return frozen.requires_grad or frozen.grad is not None


def _collectives_by_device(
    group: dist.ProcessGroup | None, world_size: int, scratch: Scratch, blame: Blame
) -> Callable[[torch.device], Collectives]:
    return functools.cache(lambda device: choose_collectives(group, world_size, device, scratch, blame))


def _device_of(groups: Sequence[Mapping[str, Any]]) -> torch.device:
    """Where ranks exchange what is not a parameter: the first parameter's device, or the CPU for one without memory."""
    device = next((p.device for group in groups for _, p in group["params"]), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device
