"""A profiler trace of one step, and how much of the communication lies within its backward pass."""

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.zero_peers import TOKENS, WIDTH, model, zero


def write_trace(rank: int, world_size: int, path: str) -> None:
    x = torch.randn(TOKENS * 8, WIDTH)
    # Sockets, as between hosts: through shared memory nothing travels beside the backward pass.
    step, _ = zero(2, sockets=True)(model())
    step(x, 1)
    with torch.profiler.profile() as profile:
        step(x, 1)
    if rank == 0:
        profile.export_chrome_trace(path)


def overlap(events: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds of a trace in which gradients travelled, and how many of them lie within the backward pass.

    The backward pass is from the first to the last function of autograd's engine; collectives are recorded by the
    threads that run them. What travels after the update (the gathers) is counted by itself.
    """
    spans = [(event["name"], event["ts"], event["ts"] + event["dur"]) for event in events if event.get("ph") == "X"]
    engine = [(start, stop) for name, start, stop in spans if name.startswith("autograd::engine::evaluate_function")]
    begin, end = min(start for start, _ in engine), max(stop for _, stop in engine)
    kinds = ("all_to_all", "_reduce_scatter_base", "reduce_scatter")
    moved = [span for span in spans if span[0].partition(":")[0] in ("gloo", "nccl")]
    reduced = _union([(start, stop) for name, start, stop in moved if name.partition(":")[2] in kinds])
    others = _union([(start, stop) for name, start, stop in moved if name.partition(":")[2] not in kinds])
    return {
        "backward": end - begin,
        "reducing": sum(stop - start for start, stop in reduced),
        "within": sum(max(0.0, min(stop, end) - max(start, begin)) for start, stop in reduced),
        "others": sum(stop - start for start, stop in others),
    }


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The time that any of these spans covers, as spans that do not meet."""
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def print_overlap(path: str) -> None:
    found = overlap(json.loads(Path(path).read_text())["traceEvents"])
    ms = {key: value / 1e3 for key, value in found.items()}
    print(
        f"{path}: one step, for chrome://tracing or ui.perfetto.dev\n"
        f"a backward pass of {ms['backward']:.1f} ms; gradients travel for {ms['reducing']:.1f} ms, of which "
        f"{ms['within']:.1f} ms ({found['within'] / found['reducing']:.0%}) within it; other collectives, after it: "
        f"{ms['others']:.1f} ms"
    )
