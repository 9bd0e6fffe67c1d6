"""The model of benchmarks.zero, and a step of it by ZeroOptimizer and by each peer."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

WIDTH, LAYERS, TOKENS = 1024, 8, 64
OPTIONS = {"lr": 1e-4}  # of AdamW
BUCKET_MIB = 4  # one layer; small beside the model, so that what is in flight does not hide what is kept

Step = Callable[[Tensor, int], None]  # input, passes before the update
# a model, and options of AdamW -> step, bytes of optimizer state
Setup = Callable[..., tuple[Step, Callable[[], int]]]


def model() -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*layers)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors)


def zero(stage: int, *, every_pass: bool = False, sockets: bool = False) -> Setup:
    """sockets: as between hosts, where ranks share no memory."""

    def setup(network: nn.Module, options: dict[str, Any] = OPTIONS) -> tuple[Step, Callable[[], int]]:
        from phicore import ZeroOptimizer
        from phicore.zero.shared_memory import SWITCH

        with mock.patch.dict(os.environ, {SWITCH: "0"} if sockets else {}):
            optimizer = ZeroOptimizer(
                network.named_parameters(),
                torch.optim.AdamW,
                stage=stage,  # type: ignore[arg-type]
                bucket_bytes=BUCKET_MIB * 2**20 + 2**16,
                **options,
            )

        def step(x: Tensor, passes: int) -> None:
            for i in range(passes):
                with contextlib.nullcontext() if every_pass or i == passes - 1 else optimizer.no_sync():
                    network(x).square().mean().backward()
            optimizer.step()

        return step, lambda: state_bytes(optimizer)

    return setup


def ddp(network: nn.Module, options: dict[str, Any] = OPTIONS) -> tuple[Step, Callable[[], int]]:
    wrapped = DistributedDataParallel(network, bucket_cap_mb=BUCKET_MIB)
    optimizer = torch.optim.AdamW(network.parameters(), **options)
    return _ddp_step(wrapped, optimizer), lambda: state_bytes(optimizer)


def redundancy(network: nn.Module, options: dict[str, Any] = OPTIONS) -> tuple[Step, Callable[[], int]]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped = DistributedDataParallel(network, bucket_cap_mb=BUCKET_MIB)
    optimizer = ZeroRedundancyOptimizer(network.parameters(), torch.optim.AdamW, **options)
    return _ddp_step(wrapped, optimizer), lambda: state_bytes(optimizer.optim)


def _ddp_step(wrapped: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, passes: int) -> None:
        for i in range(passes):
            with contextlib.nullcontext() if i == passes - 1 else wrapped.no_sync():
                wrapped(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def fsdp2(network: nn.Module, options: dict[str, Any] = OPTIONS) -> tuple[Step, Callable[[], int]]:
    from torch.distributed.fsdp import fully_shard

    for layer in network:  # type: ignore[attr-defined]
        if isinstance(layer, nn.Linear):
            fully_shard(layer, reshard_after_forward=False)
    fully_shard(network, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(network.parameters(), **options)

    def step(x: Tensor, passes: int) -> None:
        for i in range(passes):
            network.set_requires_gradient_sync(i == passes - 1)  # type: ignore[operator]
            network(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: state_bytes(optimizer)


def deepspeed(stage: int, **zero_options: Any) -> Setup:
    """Its own defaults beside the size of buckets. In five turns on four ranks overlap_comm, reduce_scatter=False and
    contiguous_gradients=False differed by no more than the noise, and buckets of 5e8 elements were slower."""

    def setup(network: nn.Module, options: dict[str, Any] = OPTIONS) -> tuple[Step, Callable[[], int]]:
        import deepspeed as library

        config = {
            "train_micro_batch_size_per_gpu": TOKENS,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": WIDTH * (WIDTH + 1), **zero_options},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.AdamW(network.parameters(), **options)
        engine, wrapped, _, _ = library.initialize(model=network, optimizer=optimizer, config=config)

        def step(x: Tensor, passes: int) -> None:
            assert passes == 1  # more are a setting of the engine
            engine.backward(engine(x).square().mean())
            engine.step()

        return step, lambda: state_bytes(wrapped.optimizer)

    return setup


def contenders(fused: bool = False) -> dict[str, Setup]:
    """How each is set up, with AdamW as its constructor makes it or with its fused form."""
    found: dict[str, Setup] = {
        "DDP + AdamW": ddp,
        "DDP + AdamW again": ddp,
        "ZeroOptimizer 1": zero(1),
        "ZeroOptimizer 2": zero(2),
        "ZeroOptimizer 2, sockets": zero(2, sockets=True),
        "ZeroRedundancyOptimizer": redundancy,
        "FSDP2": fsdp2,
    }
    if importlib.util.find_spec("deepspeed"):
        found |= {
            "DeepSpeed 1": deepspeed(1),
            "DeepSpeed 2": deepspeed(2),
            "DeepSpeed 2, reduce": deepspeed(2, use_multi_rank_bucket_allreduce=False),
        }
    options = {**OPTIONS, **({"fused": True} if fused else {})}
    return {name: functools.partial(setup, options=options) for name, setup in found.items()}
