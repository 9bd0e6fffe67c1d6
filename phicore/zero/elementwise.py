"""Which optimizers can work on pieces: those whose update of an element depends on that element alone."""

from collections.abc import Sequence
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
STEPS = 3
SIZES = (1, 4095, 5000, 504)  # of the pieces; beyond the blocks in which 8-bit optimizers share a scale


def check_elementwise(
    optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any], device: torch.device
) -> None:
    """Tries an optimizer on a small matrix, whole and in pieces.

    Raises:
        ValueError: the two differ, or it does not run with these options, or not on pieces; with the reason where it is
            known.
    """
    name = optimizer_class.__name__
    advice = (
        "ZeroOptimizer splits parameters between ranks at any element; take an element-wise optimizer such as AdamW"
    )
    if optimizer_class.__module__.startswith("torch.optim") and name in REASONS:
        raise ValueError(f"{name} is not element-wise: {REASONS[name]}. {advice}")
    generator = torch.Generator().manual_seed(0)
    where: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}  # whatever the default
    start = torch.randn(96, 100, **where)
    whole = nn.Parameter(start.to(device, copy=True))
    pieces = [nn.Parameter(part.to(device, copy=True)) for part in start.flatten().split(SIZES)]
    tried = {**options, **({"lr": 0.01} if "lr" in options else {})}  # a warm-up may start at 0
    optimizer_class([nn.Parameter(start.to(device, copy=True))], **options)  # what is wrong with the options it says
    grads = [torch.randn(96, 100, **where).to(device) * 10.0**-step for step in range(STEPS)]
    given = f"{name}({shown(options)}) does not run on"
    try:
        _train([whole], [[grad] for grad in grads], optimizer_class, tried)
    except Exception as error:
        raise ValueError(f"{given} a 96 x 100 matrix on {device}: {error}") from error
    try:
        _train(pieces, [grad.flatten().split(SIZES) for grad in grads], optimizer_class, tried)
    except Exception as error:
        raise ValueError(f"{given} pieces of a 96 x 100 matrix: {error}. {advice}") from error
    moved = float((whole.detach().cpu() - start).abs().max())
    apart = float((whole.detach().flatten() - torch.cat([piece.detach() for piece in pieces])).abs().max())
    if not apart <= 1e-4 * moved:
        raise ValueError(
            f"{name} is not element-wise: in {STEPS} steps on a 96 x 100 matrix, whole and in pieces, elements that "
            f"moved by {moved:.2g} came out {apart:.2g} apart. {advice}"
        )


def _train(
    parameters: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    optimizer_class: type[torch.optim.Optimizer],
    options: dict[str, Any],
) -> None:
    """A step for each entry of grads, which has one of each parameter."""
    optimizer = optimizer_class(parameters, **options)
    for step in grads:
        for parameter, grad in zip(parameters, step, strict=True):
            parameter.grad = grad.clone()
        step_without_hooks(optimizer)
