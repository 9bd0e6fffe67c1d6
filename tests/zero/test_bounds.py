"""What ZeRO promises in bytes: optimizer state on each rank, and elements through the sockets."""

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import phicore
from benchmarks.zero_paper import print_paper
from benchmarks.zero_ranks import bytes_sent, count_taken
from tests.zero.ranks import SHARED, SOCKETS


def step_costs(options: dict[str, Any], passes: int, no_sync: bool, dtype: torch.dtype) -> tuple[float, float, float]:
    """State bytes, and elements in a step through sockets and through shared memory, in units of the parameters'
    elements."""
    taken = count_taken()
    model = nn.Sequential(*[nn.Linear(257, 257) for _ in range(6)]).to(dtype)
    psi = sum(p.numel() for p in model.parameters())
    optimizer = phicore.ZeroOptimizer(model.named_parameters(), torch.optim.AdamW, bucket_bytes=2**19, **options)
    x = torch.ones(2, 257, dtype=dtype)

    def step() -> None:
        for place in range(passes):
            with optimizer.no_sync() if no_sync and place < passes - 1 else nullcontext():
                model(x).sum().backward()
        optimizer.step()

    step()
    dist.barrier()
    taken.clear()
    before = bytes_sent()
    step()
    dist.barrier()
    sent = bytes_sent() - before
    tensors = {id(t): t.nbytes for state in optimizer.state.values() for t in state.values()}
    masters = sum(p.nbytes for group in optimizer.param_groups for p in group["params"]) if dtype.itemsize == 2 else 0
    elements = dtype.itemsize * psi
    return (sum(tensors.values()) + masters) / psi, sent / elements, sum(taken) / elements


@pytest.mark.parametrize("wire", [SHARED, SOCKETS])
@pytest.mark.parametrize(
    ("world_size", "stage", "passes", "no_sync", "dtype"),
    [
        *[(world_size, 2, 1, False, torch.float32) for world_size in (2, 4, 8)],
        (8, 1, 4, True, torch.float32),
        (4, 1, 1, False, torch.bfloat16),
        (4, 2, 4, False, torch.float32),
        (4, 2, 4, True, torch.float32),
        (4, 2, 1, False, torch.bfloat16),
    ],
)
def test_state_and_wire_are_at_the_bounds(ranks, wire, world_size, stage, passes, no_sync, dtype):
    with mock.patch.object(group := ranks(world_size), "wire", wire):
        found = group(step_costs, {"stage": stage}, passes, no_sync, dtype)
    per_element = 12 if dtype == torch.bfloat16 else 8
    assert max(state for state, *_ in found) == pytest.approx(per_element / world_size, rel=0.02)
    reductions = 1 if no_sync else passes
    bound = (reductions + 1) * (world_size - 1) / world_size
    sent, taken = ([costs[place] for costs in found] for place in (1, 2))
    here, other = (taken, sent) if wire == SHARED else (sent, taken)
    assert sum(here) / world_size == pytest.approx(bound, rel=0.03)
    assert max(here) == pytest.approx(bound, rel=0.05)
    assert max(other) < 0.01


def test_the_papers_memory_table_is_what_the_tensors_hold(capsys):
    table = print_paper(worlds=(1, 64))
    assert [row["ranks"] for row in table] == [1, 64]
    for row in table:
        for stage in (1, 2):
            assert row[f"counted {stage}"] == pytest.approx(row[f"paper {stage}"], rel=0.02)
            float32_shard = (4 if stage == 1 else 2) / row["ranks"] * 7.5  # GB beyond the paper's gradients
            assert row[f"held {stage}"] - row[f"counted {stage}"] == pytest.approx(float32_shard, rel=0.02)
        assert row["sent"] == pytest.approx(2 * (1 - 1 / row["ranks"]), rel=0.03)
    assert "at most 0.0" in capsys.readouterr().out
