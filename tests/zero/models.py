"""The model and data of these tests: a batch is a function of seed and step, and ranks take equal or unequal parts."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import phicore


class Net(nn.Module):
    """Odd sizes, a tied weight, a frozen bias, and two branches of which a batch takes either or both."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = nn.Linear(13, 37)
        self.left = nn.Linear(37, 37)
        self.right = nn.Linear(37, 37)
        self.last = nn.Linear(37, 37, bias=False)
        self.last.weight = self.left.weight
        self.head = nn.Linear(37, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.head.bias.requires_grad_(False)
        self.to(dtype)

    def forward(self, x: Tensor, branches: str = "both") -> Tensor:
        h = torch.tanh(self.first(x))
        if branches in ("both", "left"):
            h = h + torch.tanh(self.left(h))
        if branches in ("both", "right"):
            h = h + torch.tanh(self.right(h))
        return self.head(torch.tanh(self.last(h)) if branches != "none" else h)


def batch(step: int, size: int = 12) -> tuple[Tensor, Tensor]:
    """Inputs [size, 13] and targets [size, 5]."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(size, 13, generator=generator), torch.randn(size, 5, generator=generator)


def loss_sum(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    dtype = next(model.parameters()).dtype
    return (model(x.to(dtype), **options).float() - y).square().sum()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def farthest(a: Any, b: Any) -> float:
    """The largest difference between two dicts of tensors."""
    assert a.keys() == b.keys()
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


Micro = tuple[Tensor, Tensor, str]
Plan = Callable[[int, int, int], list[Micro]]  # step, rank, world size -> that rank's micro-batches


def equal_parts(step: int, rank: int, world_size: int) -> list[Micro]:
    """One micro-batch of 12 / world_size examples."""
    x, y = batch(step)
    size = len(x) // world_size
    part = slice(rank * size, (rank + 1) * size)
    return [(x[part], y[part], "both")]


def unequal_parts(step: int, rank: int, world_size: int) -> list[Micro]:
    """Three micro-batches, whose sizes depend on step, rank and place."""
    parts = []
    for place in range(3):
        x, y = batch(1000 * step + 10 * rank + place, size=1 + (step + 2 * rank + place) % 4)
        parts.append((x, y, "both"))
    return parts


def total_size(plan: Plan, step: int, world_size: int) -> int:
    """Examples of all micro-batches of all ranks."""
    return sum(len(x) for rank in range(world_size) for x, _, _ in plan(step, rank, world_size))


def train_alone(
    plan: Plan,
    steps: int,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    build: Callable[[], nn.Module] = Net,
    **options: Any,
) -> dict[str, Tensor]:
    """Weights after one process has taken all ranks' batches with a plain optimizer: what the ranks must reach."""
    world_size = dist.get_world_size()
    result: list[dict[str, Tensor]] = [{}]
    if dist.get_rank() == 0:  # the others wait for it, instead of doing the same on the same cores
        model = build()
        optimizer = make(model)
        for step in range(steps):
            optimizer.zero_grad()
            for rank in range(world_size):
                backward(model, plan, step, rank, world_size)
            finish_step(model, optimizer, step, **options)
        result = [weights(model)]
    dist.broadcast_object_list(result)
    return result[0]


def backward(model: nn.Module, plan: Plan, step: int, rank: int, world_size: int) -> None:
    """A backward pass for each micro-batch; over all ranks they add up to the mean loss."""
    for x, y, branches in plan(step, rank, world_size):
        (loss_sum(model, x, y, branches=branches) / total_size(plan, step, world_size)).backward()


def finish_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    clip: float | None = None,
    before: Callable[[nn.Module, int], None] | None = None,
) -> None:
    if before is not None:
        before(model, step)
    if clip is not None and hasattr(optimizer, "clip_grad_norm_"):
        optimizer.clip_grad_norm_(clip)
    elif clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


def train_here(
    plan: Plan,
    steps: int,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    build: Callable[[], nn.Module] = Net,
    **options: Any,
) -> dict[str, Tensor]:
    """Weights after this rank has trained with the others; the optimizer sums over ranks."""
    model = build()
    optimizer = make(model)
    for step in range(steps):
        backward(model, plan, step, dist.get_rank(), dist.get_world_size())
        finish_step(model, optimizer, step, **options)
    return weights(model)


def parameters(*shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    """Of ones, by the names a, b, c ..."""
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in zip("abcdef", shapes, strict=False)}


def sgd(named: dict[str, nn.Parameter], stage: int = 2, **options) -> phicore.ZeroOptimizer:
    return phicore.ZeroOptimizer(named.items(), torch.optim.SGD, **{"stage": stage, "lr": 1.0, **options})
