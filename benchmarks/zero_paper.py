"""Table 1 of the ZeRO paper, by counting the bytes of meta tensors in a fake process group."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.zero_peers import state_bytes

WORLDS = (1, 4, 16, 64, 256, 1024)
KINDS = ("paper", "counted", "held")


def paper_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """A transformer of 7.45 billion parameters: 36 layers of width 4096."""
    width = 4096
    yield "embedding", (50257, width)
    for layer in range(36):
        for name, shape in (("qkv", (3, 1)), ("out", (1, 1)), ("up", (4, 1)), ("down", (1, 4))):
            yield f"{layer}.{name}", (shape[0] * width, shape[1] * width)


def print_paper(worlds: Sequence[int] = WORLDS) -> list[dict[str, float]]:
    """Table 1 of Rajbhandari et al. 2019 by counting the bytes of meta tensors in a fake process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    print("\nGB a rank for 7.5B bfloat16 parameters, stage by stage: the paper's formula; the tensors that the paper")
    print("counts; and all there are, which is what a rank needs. The difference is the float32 gradient of a shard.")
    print(
        f"{'ranks':>6}"
        + "".join(f"{f'{what} {stage}':>12}" for stage in (1, 2) for what in KINDS)
        + f"{'sent / Psi':>12}"
    )
    table = []
    for world_size in worlds:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        row: dict[str, float] = {"ranks": world_size}
        for stage in (1, 2):
            row |= _of_stage(stage, world_size)
        dist.destroy_process_group()
        table.append(row)
        cells = "".join(f"{row[f'{what} {stage}']:12.2f}" for stage in (1, 2) for what in KINDS)
        print(f"{world_size:6}{cells}{row['sent']:12.3f}")
    worst = max(abs(row[f"counted {stage}"] / row[f"paper {stage}"] - 1) for row in table for stage in (1, 2))
    print(f"counted beside the paper's formula: at most {worst:.2%} apart")
    return table


def _of_stage(stage: int, world_size: int) -> dict[str, float]:
    """GB a rank, and elements sent in units of Psi, of one stage."""
    from phicore import ZeroOptimizer

    named = [
        (name, nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))) for name, shape in paper_shapes()
    ]
    psi = sum(p.numel() for _, p in named)
    optimizer = ZeroOptimizer(named, torch.optim.AdamW, stage=stage)  # type: ignore[arg-type]
    sent = _count_sent(optimizer, world_size)
    for _ in range(2):
        for _, p in named:
            p.grad = torch.empty_like(p)
        optimizer.finish_reduction()
        grads = [p.grad for _, p in named if p.grad is not None]
        pieces = [piece for group in optimizer.param_groups for piece in group["params"]]
        reduced = sum(piece.grad.nbytes for piece in pieces if piece.grad is not None)
        weights = sum(p.nbytes for _, p in named)
        sent.clear()
        optimizer.step()
    held = weights + sum(g.nbytes for g in grads) + reduced + sum(p.nbytes for p in pieces)
    held += state_bytes(optimizer)
    # The paper reduces bfloat16 gradients: in stage 1 where they are, in stage 2 to 2 bytes an element.
    beyond = reduced if stage == 1 else reduced // 2
    return {
        f"paper {stage}": (4 + 12 / world_size if stage == 1 else 2 + 14 / world_size) * 7.5,
        f"counted {stage}": (held - beyond) / psi * 7.5,
        f"held {stage}": held / psi * 7.5,
        "sent": 2 * sum(sent) / psi,  # the gathers of the last step; the reductions are as many
    }


def _count_sent(optimizer: Any, world_size: int) -> list[float]:
    """A list that gets the elements which each gather sends from this rank."""
    sent: list[float] = []
    choose = optimizer._reducer.collectives

    def counting(device: torch.device) -> Any:
        chosen = choose(device)
        counted = copy.copy(chosen)

        def gather(full: Tensor) -> Callable[[], None]:
            sent.append(full.numel() * (world_size - 1) / world_size)
            return chosen.gather(full)

        counted.gather = gather
        return counted

    optimizer._reducer.collectives = counting
    return sent
