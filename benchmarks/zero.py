"""Prints what ZeroOptimizer costs beside its peers, on real processes over gloo, and the ZeRO paper's memory table.

    python -m benchmarks.zero                      everything, for 2, 4 and 8 ranks
    python -m benchmarks.zero --worlds 4 --only steps
    python -m benchmarks.zero --worlds 4 --only tokens
    python -m benchmarks.zero --worlds 4 --trace trace.json

Psi is the number of trained elements. For each peer that is installed:

    state     bytes of optimizer state on the fullest rank, in units of the ideal 8 Psi / W
    sent      elements sent a step by the average rank, in units of Psi: its sockets' bytes, as the kernel counts them,
              and what ZeroOptimizer's ranks take from each other through memory that they share. "sockets" is without
              that, as between hosts
    time      a step's time beside DDP + AdamW's in the same turn, median over turns; DDP twice gives the noise, and is
              the mean of both what others are compared with
    cpu       the same of the processor time of all ranks, which other load on the machine disturbs less
    start     peak memory while the optimizer is made, beside that of the model before, in units of the parameters
    peak      the same during a step

How time compares depends on how much of a step is the same for all: forward and backward pass. --only tokens measures
time and cpu for steps of few and of many tokens a rank, beside DDP + AdamW and beside each stage of DeepSpeed, which is
itself taken twice. All take torch's AdamW as its constructor makes it; --fused gives all AdamW(fused=True).

Peers: torch's DistributedDataParallel + AdamW, ZeroRedundancyOptimizer and FSDP2, and DeepSpeed where it imports, with
buckets of the same size; its "reduce" sends each gradient to its owner only, in place of an all-reduce.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.pairs import ratio
from benchmarks.zero_paper import print_paper
from benchmarks.zero_peers import LAYERS, TOKENS, WIDTH, Step, contenders, model, zero
from benchmarks.zero_ranks import Peak, bytes_sent, count_taken, give_back_freed_memory, on_ranks
from benchmarks.zero_trace import overlap, print_overlap, write_trace

__all__ = ["LAYERS", "measure_memory", "on_ranks", "overlap", "print_overlap", "write_trace"]

DDP = ("DDP + AdamW", "DDP + AdamW again")
DEEPSPEED = ("DeepSpeed 2", "DeepSpeed 2 again")
MANY_OR_FEW = (8, 64, 256)  # tokens a rank: from where parameters dominate a step to where its passes do

Seconds = dict[str, list[float]]  # of each turn, by contender


def alternate(running: dict[str, Step], tokens: int, turns: int) -> tuple[Seconds, Seconds]:
    """Wall-clock and processor seconds of steps that take turns; the latter of all ranks together."""
    x = torch.randn(tokens, WIDTH)
    seconds: Seconds = {name: [] for name in running}
    processor: Seconds = {name: [] for name in running}
    names = list(running)
    for turn in range(turns):
        # another order each turn, so that none always follows the same one
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            dist.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            running[name](x, 1)
            dist.barrier()
            seconds[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - start_cpu)
    used = torch.tensor(list(processor.values()), dtype=torch.float64)  # [contenders, turns]
    dist.all_reduce(used)
    return seconds, dict(zip(names, used.tolist(), strict=True))


def beside(found: Seconds, name: str, peers: tuple[str, str]) -> dict[str, float]:
    """Ratio to a peer that was measured twice, and the noise of that."""
    turns = ratio(zip(found[peers[0]], found[name], found[peers[1]], strict=True))
    return {"ratio": turns.ratio, "noise": turns.noise, "seconds": turns.seconds}


def measure_steps(rank: int, world_size: int, turns: int, fused: bool) -> dict[str, dict[str, float]]:
    psi = sum(p.numel() for p in model().parameters())
    x = torch.randn(TOKENS, WIDTH)
    running: dict[str, Step] = {}
    results: dict[str, dict[str, float]] = {}
    taken = count_taken()

    def sent() -> int:
        return bytes_sent() + sum(taken)

    for name, setup in contenders(fused).items():
        torch.manual_seed(0)
        step, state = setup(model())
        step(x, 1)
        dist.barrier()
        before = sent()
        step(x, 1)
        dist.barrier()
        results[name] = {"sent": (sent() - before) / 4 / psi, "state": state() / (8 * psi / world_size)}
        running[name] = step
    for name, every_pass in (("ZeroOptimizer 1, 4 passes", False), ("ZeroOptimizer 2, 4 passes each reduced", True)):
        step, _ = zero(2 if every_pass else 1, every_pass=every_pass)(model())
        step(x, 4)
        dist.barrier()
        before = sent()
        step(x, 4)
        dist.barrier()
        results[name] = {"sent": (sent() - before) / 4 / psi}
    seconds, processor = alternate(running, TOKENS, turns)
    for name in running:
        wall = beside(seconds, name, DDP)
        results[name] |= {
            "seconds": wall["seconds"],
            "time": wall["ratio"],
            "noise": wall["noise"],
            "cpu": beside(processor, name, DDP)["ratio"],
        }
    return results


def measure_tokens(rank: int, world_size: int, turns: int, fused: bool) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by number of tokens and contender."""
    chosen = contenders(fused)
    names = [name for name in chosen if name.startswith(("DDP", "ZeroOptimizer", "DeepSpeed"))]
    if DEEPSPEED[0] in chosen:
        chosen[DEEPSPEED[1]] = chosen[DEEPSPEED[0]]
        names.append(DEEPSPEED[1])
    running = {}
    for name in names:
        torch.manual_seed(0)
        running[name], _ = chosen[name](model())
        for tokens in MANY_OR_FEW:
            running[name](torch.randn(tokens, WIDTH), 1)
    results = {}
    for tokens in MANY_OR_FEW:
        seconds, processor = alternate(running, tokens, turns)
        results[str(tokens)] = {name: _row(seconds, processor, name) for name in names}
    return results


def _row(seconds: Seconds, processor: Seconds, name: str) -> dict[str, float]:
    row = {"seconds": statistics.median(seconds[name]), "processor": statistics.median(processor[name])}
    for label, peers in (("DDP", DDP), ("DeepSpeed", DEEPSPEED)):
        if peers[0] in seconds:
            row |= {f"time / {label}": beside(seconds, name, peers)["ratio"]}
            row |= {f"cpu / {label}": beside(processor, name, peers)["ratio"]}
            row |= {f"noise of {label}": beside(seconds, name, peers)["noise"]}
    return row


def measure_memory(rank: int, world_size: int, name: str) -> dict[str, float]:
    give_back_freed_memory(at_once=True)
    network = model()
    parameters = sum(p.nbytes for p in network.parameters())
    # First what is needed once, whatever the model's size: the contender's code and torch's, read in when it first
    # runs, and the buffers of the first collectives. Of ZeroOptimizer that is 8 MB, twice its bucket.
    warm_up = model()
    warm_up(torch.randn(TOKENS, WIDTH)).sum().backward()
    torch.optim.AdamW(warm_up.parameters()).step()
    small_step, _ = contenders()[name](nn.Sequential(nn.Linear(WIDTH, 2)))
    small_step(torch.randn(TOKENS, WIDTH), 1)
    del warm_up, small_step
    give_back_freed_memory()
    construction = Peak()
    step, _ = contenders()[name](network)
    start = construction.bytes()
    x = torch.randn(TOKENS, WIDTH)
    for _ in range(2):
        step(x, 1)
    return {"start": start / parameters, "peak": construction.bytes() / parameters}


def print_steps(world_size: int, turns: int, fused: bool) -> dict[str, Any]:
    answers = on_ranks(world_size, measure_steps, turns, fused)
    psi = sum(p.numel() for p in model().parameters())
    bound = 2 * (world_size - 1) / world_size
    print(f"\n{world_size} ranks, Psi = {psi / 1e6:.1f}M, bound of elements sent {bound:.3f} Psi, {turns} turns")
    print(f"{'':40}{'state / ideal':>14}{'sent / Psi':>12}{'ms a step':>11}{'time / DDP':>12}{'cpu / DDP':>11}")
    columns = {"state": (14, 3), "sent": (12, 3), "ms": (11, 1), "time": (12, 3), "cpu": (11, 3)}
    summary = {}
    for name, first in answers[0].items():
        rows = [answer[name] for answer in answers]
        # Ranks leave a step together, so the first one's times stand for all.
        summary[name] = row = {**first, "sent": statistics.mean(r["sent"] for r in rows)}
        if "state" in first:
            row["state"] = max(r["state"] for r in rows)
            row["ms"] = 1e3 * row.pop("seconds")
        cells = [f"{row[key]:{w}.{digits}f}" if key in row else " " * w for key, (w, digits) in columns.items()]
        print(f"{name:40}{''.join(cells)}".rstrip())
    return summary


def print_tokens(world_size: int, turns: int, fused: bool) -> dict[str, Any]:
    (found, *_) = on_ranks(world_size, measure_tokens, turns, fused)
    print(f"\n{world_size} ranks, {turns} turns: time and processor time of a step, by tokens a rank")
    columns = [key for key in next(iter(next(iter(found.values())).values())) if " / " in key]
    print(f"{'tokens':>6}  {'':28}{'ms':>8}{'cpu ms':>9}" + "".join(f"{column:>18}" for column in columns))
    for tokens, rows in found.items():
        for name, row in rows.items():
            cells = f"{1e3 * row['seconds']:8.1f}{1e3 * row['processor'] / world_size:9.1f}"
            print(f"{tokens:>6}  {name:28}{cells}" + "".join(f"{row[column]:18.3f}" for column in columns))
        noises = {key: value for key, value in row.items() if key.startswith("noise")}
        print(f"{'':8}" + ", ".join(f"{key} {value:.1%}" for key, value in noises.items()))
    return found


def print_memory(world_size: int) -> dict[str, Any]:
    print(f"\n{world_size} ranks: peak memory above the model's, in units of the parameters' bytes, fullest rank")
    print(f"{'':40}{'making it':>14}{'a step':>12}")
    summary = {}
    for name in contenders():
        if name.endswith("again"):
            continue
        rows = on_ranks(world_size, measure_memory, name)
        summary[name] = {key: max(row[key] for row in rows) for key in rows[0]}
        print(f"{name:40}{summary[name]['start']:14.2f}{summary[name]['peak']:12.2f}")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--only", choices=["paper", "steps", "tokens", "memory"])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--fused", action="store_true", help="AdamW(fused=True) for all")
    parser.add_argument("--quick", action="store_true", help="2 ranks, three turns, steps only")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument(
        "--trace",
        help="write a profiler trace of one step at the first world size here and print how much of the communication "
        "lies within the backward pass, and nothing else",
    )
    options = parser.parse_args()
    if options.quick:
        options.worlds, options.turns, options.only = [2], 3, "steps"
    if options.trace:
        on_ranks(options.worlds[0], write_trace, options.trace)
        print_overlap(options.trace)
        return
    figures: dict[str, Any] = {}
    if options.only in (None, "paper"):
        figures["paper"] = print_paper()
    for world_size in options.worlds:
        if options.only in (None, "steps"):
            figures[f"steps, {world_size} ranks"] = print_steps(world_size, options.turns, options.fused)
        if options.only in (None, "tokens"):
            figures[f"tokens, {world_size} ranks"] = print_tokens(world_size, options.turns, options.fused)
        if options.only in (None, "memory"):
            figures[f"memory, {world_size} ranks"] = print_memory(world_size)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
