"""Prints what ZeroOptimizer costs beside its peers, on real processes over gloo, and the ZeRO paper's memory table.

    python -m benchmarks.zero                      everything, for 2, 4 and 8 ranks
    python -m benchmarks.zero --worlds 4 --only steps
    python -m benchmarks.zero --worlds 4 --trace trace.json

Psi is the number of trained elements. For each peer that is installed:

    state     bytes of optimizer state on the fullest rank, in units of the ideal 8 Psi / W
    sent      elements sent a step by the average rank, in units of Psi, as the kernel counts its sockets' bytes
    time      a step's time beside DDP + AdamW's in the same turn, median over turns; DDP twice gives the noise, and is
              the mean of both what others are compared with
    cpu       the same of the processor time of all ranks, which other load on the machine disturbs less
    start     peak memory while the optimizer is made, beside that of the model before, in units of the parameters
    peak      the same during a step

Peers: torch's DistributedDataParallel + AdamW, ZeroRedundancyOptimizer and FSDP2, and DeepSpeed where it imports.
"""

import argparse
import contextlib
import datetime
import gc
import importlib.util
import json
import os
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.pairs import ratio

WIDTH, LAYERS, TOKENS = 1024, 8, 64
LEARNING_RATE = 1e-4
BUCKET_MIB = 4  # one layer; small beside the model, so that what is in flight does not hide what is kept
BYTES_SENT = 200  # offset of tcpi_bytes_sent in Linux's struct tcp_info

Step = Callable[[Tensor, int], None]  # input, passes before the update
Setup = Callable[[nn.Module], tuple[Step, Callable[[], int]]]  # -> step, bytes of optimizer state


def model() -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*layers)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors)


def zero(stage: int, *, every_pass: bool = False) -> Setup:
    def setup(network: nn.Module) -> tuple[Step, Callable[[], int]]:
        from phicore import ZeroOptimizer

        optimizer = ZeroOptimizer(
            network.named_parameters(),
            torch.optim.AdamW,
            stage=stage,  # type: ignore[arg-type]
            lr=LEARNING_RATE,
            bucket_bytes=BUCKET_MIB * 2**20 + 2**16,
        )

        def step(x: Tensor, passes: int) -> None:
            for i in range(passes):
                with contextlib.nullcontext() if every_pass or i == passes - 1 else optimizer.no_sync():
                    network(x).square().mean().backward()
            optimizer.step()

        return step, lambda: state_bytes(optimizer)

    return setup


def ddp(network: nn.Module) -> tuple[Step, Callable[[], int]]:
    wrapped = DistributedDataParallel(network, bucket_cap_mb=BUCKET_MIB)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    return _ddp_step(wrapped, optimizer), lambda: state_bytes(optimizer)


def redundancy(network: nn.Module) -> tuple[Step, Callable[[], int]]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped = DistributedDataParallel(network, bucket_cap_mb=BUCKET_MIB)
    optimizer = ZeroRedundancyOptimizer(network.parameters(), torch.optim.AdamW, lr=LEARNING_RATE)
    return _ddp_step(wrapped, optimizer), lambda: state_bytes(optimizer.optim)


def _ddp_step(wrapped: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, passes: int) -> None:
        for i in range(passes):
            with contextlib.nullcontext() if i == passes - 1 else wrapped.no_sync():
                wrapped(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def fsdp2(network: nn.Module) -> tuple[Step, Callable[[], int]]:
    from torch.distributed.fsdp import fully_shard

    for layer in network:  # type: ignore[attr-defined]
        if isinstance(layer, nn.Linear):
            fully_shard(layer, reshard_after_forward=False)
    fully_shard(network, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)

    def step(x: Tensor, passes: int) -> None:
        for i in range(passes):
            network.set_requires_gradient_sync(i == passes - 1)  # type: ignore[operator]
            network(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: state_bytes(optimizer)


def deepspeed(stage: int) -> Setup:
    def setup(network: nn.Module) -> tuple[Step, Callable[[], int]]:
        import deepspeed as library

        config = {
            "train_micro_batch_size_per_gpu": TOKENS,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": WIDTH * (WIDTH + 1)},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
        engine, wrapped, _, _ = library.initialize(model=network, optimizer=optimizer, config=config)

        def step(x: Tensor, passes: int) -> None:
            assert passes == 1  # more are a setting of the engine
            engine.backward(engine(x).square().mean())
            engine.step()

        return step, lambda: state_bytes(wrapped.optimizer)

    return setup


def contenders() -> dict[str, Setup]:
    found: dict[str, Setup] = {
        "DDP + AdamW": ddp,
        "DDP + AdamW again": ddp,
        "ZeroOptimizer 1": zero(1),
        "ZeroOptimizer 2": zero(2),
        "ZeroRedundancyOptimizer": redundancy,
        "FSDP2": fsdp2,
    }
    if importlib.util.find_spec("deepspeed"):
        found |= {"DeepSpeed 1": deepspeed(1), "DeepSpeed 2": deepspeed(2)}
    return found


def bytes_sent() -> int:
    """Payload bytes that this process has sent through its TCP sockets."""
    total = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(entry))) as copy:
                    info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", info, BYTES_SENT)[0]
        except OSError:
            continue  # not TCP, or closed meanwhile
    return total


class Peak:
    """Peak resident memory since it was made, in bytes above what was resident then."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        self.start = _status("VmRSS")

    def bytes(self) -> int:
        return _status("VmHWM") - self.start


def _status(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


def measure_steps(rank: int, world_size: int, turns: int) -> dict[str, dict[str, float]]:
    psi = sum(p.numel() for p in model().parameters())
    x = torch.randn(TOKENS, WIDTH)
    running = {}
    results: dict[str, dict[str, float]] = {}
    for name, setup in contenders().items():
        torch.manual_seed(0)
        step, state = setup(model())
        step(x, 1)
        dist.barrier()
        before = bytes_sent()
        step(x, 1)
        dist.barrier()
        results[name] = {"sent": (bytes_sent() - before) / 4 / psi, "state": state() / (8 * psi / world_size)}
        running[name] = step
    for name, every_pass in (("ZeroOptimizer 1, 4 passes", False), ("ZeroOptimizer 2, 4 passes each reduced", True)):
        step, _ = zero(2 if every_pass else 1, every_pass=every_pass)(model())
        step(x, 4)
        dist.barrier()
        before = bytes_sent()
        step(x, 4)
        dist.barrier()
        results[name] = {"sent": (bytes_sent() - before) / 4 / psi}
    seconds: dict[str, list[float]] = {name: [] for name in running}
    processor: dict[str, list[float]] = {name: [] for name in running}
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
    ddp_twice = ("DDP + AdamW", "DDP + AdamW again")
    for name in running:
        used = torch.tensor([processor[ddp_twice[0]], processor[name], processor[ddp_twice[1]]], dtype=torch.float64)
        dist.all_reduce(used)
        beside = ratio(zip(seconds[ddp_twice[0]], seconds[name], seconds[ddp_twice[1]], strict=True))
        results[name] |= {
            "seconds": beside.seconds,
            "time": beside.ratio,
            "noise": beside.noise,
            "cpu": ratio(tuple(turn) for turn in used.t().tolist()).ratio,
        }
    return results


def measure_memory(rank: int, world_size: int, name: str) -> dict[str, float]:
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
    _trim()
    construction = Peak()
    step, _ = contenders()[name](network)
    start = construction.bytes()
    x = torch.randn(TOKENS, WIDTH)
    for _ in range(2):
        step(x, 1)
    return {"start": start / parameters, "peak": construction.bytes() / parameters}


def _trim() -> None:
    """Gives freed memory back, so that it does not hide new memory."""
    import ctypes

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _rank(rank: int, world_size: int, directory: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the libraries' own messages
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=300),
    )
    answers: list[Any] = [None] * world_size
    dist.all_gather_object(answers, function(rank, world_size, *arguments))
    if rank == 0:
        Path(directory, "answers.json").write_text(json.dumps(answers))
    dist.barrier()
    os._exit(0)  # some libraries' exit handlers wait for each other


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Each rank's result of function(rank, world_size, *arguments)."""
    # Freed buffers go back to the system at once; else peaks would show what malloc keeps, for every contender.
    os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
    if function is measure_memory:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_rank, (world_size, directory, function, arguments), nprocs=world_size)
        return json.loads(Path(directory, "answers.json").read_text())


def print_steps(world_size: int, turns: int) -> dict[str, Any]:
    answers = on_ranks(world_size, measure_steps, turns)
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


def paper_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """A transformer of 7.45 billion parameters: 36 layers of width 4096."""
    width = 4096
    yield "embedding", (50257, width)
    for layer in range(36):
        for name, shape in (("qkv", (3, 1)), ("out", (1, 1)), ("up", (4, 1)), ("down", (1, 4))):
            yield f"{layer}.{name}", (shape[0] * width, shape[1] * width)


def print_paper() -> list[dict[str, float]]:
    """Table 1 of Rajbhandari et al. 2019 by counting the bytes of meta tensors in a fake process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from phicore import ZeroOptimizer

    print("\nGB a rank for 7.5B bfloat16 parameters: the paper's formula, and the bytes of the tensors there are")
    print(f"{'ranks':>6}{'paper 1':>10}{'counted 1':>11}{'paper 2':>10}{'counted 2':>11}{'sent / Psi':>12}")
    table = []
    for world_size in (1, 4, 16, 64, 256, 1024):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        row: dict[str, float] = {"ranks": world_size}
        for stage in (1, 2):
            named = [
                (name, nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta")))
                for name, shape in paper_shapes()
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
            total = weights + sum(g.nbytes for g in grads) + reduced + sum(p.nbytes for p in pieces)
            total += state_bytes(optimizer)
            row |= {
                f"paper {stage}": (4 + 12 / world_size if stage == 1 else 2 + 14 / world_size) * 7.5,
                f"counted {stage}": total / psi * 7.5,
                "sent": 2 * sum(sent) / psi,  # the gathers of the last step; the reductions are as many
            }
            del named, grads, pieces, optimizer
        dist.destroy_process_group()
        table.append(row)
        print(
            f"{world_size:6}{row['paper 1']:10.1f}{row['counted 1']:11.1f}{row['paper 2']:10.1f}"
            f"{row['counted 2']:11.1f}{row['sent']:12.3f}"
        )
    print(
        "counted beyond the paper: reduced gradients are float32 here, 4 Psi/W bytes, where the paper has none (1) or 2"
    )
    return table


def _count_sent(optimizer: Any, world_size: int) -> list[float]:
    """A list that gets the elements which each gather sends from this rank."""
    sent: list[float] = []
    choose = optimizer._reducer.collectives

    def counting(device: torch.device) -> Any:
        from phicore.zero.collectives import Collectives

        chosen = choose(device)

        def gather(full: Tensor) -> Callable[[], None]:
            sent.append(full.numel() * (world_size - 1) / world_size)
            return chosen.gather(full)

        return Collectives(chosen.reduce, gather)

    optimizer._reducer.collectives = counting
    return sent


def write_trace(rank: int, world_size: int, path: str) -> None:
    x = torch.randn(TOKENS * 8, WIDTH)
    step, _ = zero(2)(model())
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--only", choices=["paper", "steps", "memory"])
    parser.add_argument("--turns", type=int, default=15)
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
            figures[f"steps, {world_size} ranks"] = print_steps(world_size, options.turns)
        if options.only in (None, "memory"):
            figures[f"memory, {world_size} ranks"] = print_memory(world_size)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
