"""Which optimizers can work on pieces: those whose update of an element depends on that element alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phicore.zero.groups import shown
from phicore.zero.hooks import step_without_hooks

REASONS = {
    "Adafactor": "it shares second moments along a matrix's rows and columns",
    "LBFGS": "its direction and line search need the whole gradient",
    "Muon": "it orthogonalises whole matrices",
    "SparseAdam": "it takes sparse gradients",
}
ADVICE = "ZeroOptimizer splits parameters between ranks at any element; take an element-wise optimizer such as AdamW"
STEPS = 12
SIZES = (1, 4095, 5000, 504)  # of the pieces; beyond the blocks in which 8-bit optimizers share a scale


def check_elementwise(
    optimizer_class: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    device: torch.device,
) -> None:
    """Tries an optimizer on a small matrix, whole and in pieces, with the settings of each group.

    The pieces are dealt out to two optimizers, as ranks hold them: one that takes a norm, or a step size, of all that
    it has differs then too.

    Args:
        optimizer_class: the optimizer.
        options: its defaults.
        groups: the settings of each parameter group.
        device: where it is tried.

    Raises:
        ValueError: the two differ, or it does not run with these options, or not on pieces, or it keeps what
            `ZeroOptimizer` cannot save; with the reason where it is known.
    """
    name = optimizer_class.__name__
    if optimizer_class.__module__.startswith("torch.optim") and name in REASONS:
        raise ValueError(f"{name} is not element-wise: {REASONS[name]}. {ADVICE}")
    tried: set[str] = set()
    for group in groups:
        parameter = nn.Parameter(torch.zeros(96, 100, dtype=torch.float32, device=device))
        optimizer = optimizer_class([{**group, "params": [parameter]}], **options)  # what is wrong with them it says
        # A warm-up may start at 0, and rounding hides small steps.
        settings = {**group, **({"lr": 1.0} if "lr" in optimizer.defaults else {})}
        if shown(settings) not in tried:
            tried.add(shown(settings))
            _try(f"{name}({shown({**options, **group})})", optimizer_class, options, settings, device)


def _try(
    given: str,
    optimizer_class: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    device: torch.device,
) -> None:
    name = optimizer_class.__name__

    def make(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        return optimizer_class([{**settings, "params": parameters}], **options)

    generator = torch.Generator().manual_seed(0)
    where: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}  # whatever the default
    start = torch.randn(96, 100, **where)
    whole = nn.Parameter(start.to(device, copy=True))
    pieces = [nn.Parameter(part.to(device, copy=True)) for part in start.flatten().split(SIZES)]
    # Alike from step to step, as real ones are: some optimizers act on their having gone one way.
    common = torch.randn(96, 100, **where)

    def grads() -> Iterator[Tensor]:  # not kept: making an optimizer is to take no memory but a bucket's
        generator = torch.Generator().manual_seed(1)
        for step in range(STEPS):
            own = torch.randn(96, 100, generator=generator, dtype=torch.float32, device="cpu")
            yield (common + own).to(device) * 2.0**-step

    try:
        _train(make([whole]), [whole], ([grad] for grad in grads()))
    except Exception as error:
        raise ValueError(f"{given} does not run on a 96 x 100 matrix on {device}: {error}") from error
    optimizers = []
    for ours in (slice(0, None, 2), slice(1, None, 2)):
        parts = (grad.flatten().split(SIZES)[ours] for grad in grads())
        try:
            optimizers.append(make(pieces[ours]))
            _train(optimizers[-1], pieces[ours], parts)
        except Exception as error:
            raise ValueError(f"{given} does not run on pieces of a 96 x 100 matrix: {error}. {ADVICE}") from error
    moved = float((whole.detach().cpu() - start).abs().max())
    apart = float((whole.detach().flatten() - torch.cat([piece.detach() for piece in pieces])).abs().max())
    if not apart <= 1e-4 * moved:
        raise ValueError(
            f"{name} is not element-wise: in {STEPS} steps on a 96 x 100 matrix, whole and in pieces, elements that "
            f"moved by {moved:.2g} came out {apart:.2g} apart. {ADVICE}"
        )
    for optimizer in optimizers:
        _check_state(name, optimizer)


def _check_state(name: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuses state that is neither cut with its parameter nor one number, which no file of ours could give back."""
    for parameter, values in optimizer.state.items():
        if not isinstance(parameter, Tensor):
            raise ValueError(f"{name} keeps the state {parameter!r} of no parameter, which is not saved here. {ADVICE}")
        for key, value in values.items():
            if isinstance(value, Tensor):
                known, kind = value.shape == parameter.shape or not value.dim(), f"of shape {list(value.shape)}"
            else:
                known, kind = isinstance(value, int | float), f"of type {type(value).__name__}"
            if not known:
                raise ValueError(
                    f"{name} keeps a state {key} {kind} of a parameter of shape {list(parameter.shape)}; what is saved "
                    f"here has an entry for each element, or is a number. {ADVICE}"
                )


def _train(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], grads: Iterable[Sequence[Tensor]]) -> None:
    """A step for each entry of grads, which has one of each parameter."""
    for step in grads:
        for parameter, grad in zip(parameters, step, strict=True):
            parameter.grad = grad.clone()
        step_without_hooks(optimizer)
