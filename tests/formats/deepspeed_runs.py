"""Trains with the real DeepSpeed and saves checkpoints: `python -m tests.formats.deepspeed_runs DIRECTORY RANKS`.

For each of RUNS, DIRECTORY/<name> gets the checkpoint "three" after three steps and facts.pt: what DeepSpeed itself
says of its state then, the losses of the three steps after it, and the weights at their end.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

WORLD_SIZE = 2  # in tests
ROWS = 4  # of a batch, on each rank
COMMON = {"train_micro_batch_size_per_gpu": ROWS, "zero_allow_untested_optimizer": True}
ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1, "torch_adam": True}}
RUNS: dict[str, dict[str, Any]] = {
    "stage 1": {"zero_optimization": {"stage": 1}, "optimizer": ADAMW},
    "stage 2": {"zero_optimization": {"stage": 2}},  # the others have the two groups of `groups`
    "round robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "aligned": {
        "zero_optimization": {"stage": 2, "parameter_alignment": True},
        "gradient_clipping": 0.5,
        "optimizer": ADAMW,
    },
    "bfloat16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "float16": {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True, "initial_scale_power": 6}},
    "elastic": {"zero_optimization": {"stage": 2, "elastic_checkpoint": True}},
    "plain": {"zero_optimization": {"stage": 0}, "optimizer": ADAMW},
}


class Net(nn.Module):
    """Odd sizes, a tied weight, a frozen bias, a buffer, and one parameter that no batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.scale = nn.Parameter(torch.ones(1))
        self.first = nn.Linear(13, 37)
        self.middle = nn.Linear(37, 37)
        self.last = nn.Linear(37, 37, bias=False)
        self.last.weight = self.middle.weight
        self.norm = nn.LayerNorm(37)
        self.head = nn.Linear(37, 5)
        self.unused = nn.Linear(7, 3)
        self.register_buffer("count", torch.arange(3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.middle(torch.tanh(self.first(x))))
        return self.head(self.norm(self.last(h))) * self.scale


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Named parameters with and without weight decay."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [(name, p) for name, p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [(name, p) for name, p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def batch(step: int, rank: int) -> Tensor:
    """[ROWS, 13]"""
    return torch.randn(ROWS, 13, generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def run(name: str, engine: Any, directory: Path) -> None:
    from deepspeed.utils import safe_get_full_optimizer_state

    model = engine.module
    dtype = model.first.weight.dtype
    losses = []
    facts: dict[str, Any] = {"losses": losses}
    for step in range(6):
        if step == 3:
            engine.save_checkpoint(str(directory), tag="three")
            if name in (
                "stage 1",
                "aligned",
            ):  # it has no such answers for an optimizer that it was given, or by halves
                for key in ("exp_avg", "exp_avg_sq"):
                    facts[key] = {
                        n: safe_get_full_optimizer_state(p, key).clone()
                        for n, p in model.named_parameters()
                        if p.requires_grad
                    }
        loss = loss_of(engine, batch(step, dist.get_rank()).to(dtype))
        engine.backward(loss)
        engine.step()
        dist.all_reduce(loss := loss.detach().clone())
        losses.append(float(loss) / dist.get_world_size())
    facts["weights"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    if dist.get_rank() == 0:
        torch.save(facts, directory / "facts.pt")


def work(rank: int, world_size: int, directory: str, store: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # it wants them, though the group is there
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # Without these it compiles an extension for a minute and a half, and refuses float16 on most CPUs.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    type(get_accelerator()).is_fp16_supported = lambda self: True  # type: ignore[method-assign]
    for name, config in RUNS.items():
        model = Net()
        if "optimizer" in config:
            given = {"model_parameters": [p for p in model.parameters() if p.requires_grad]}
        else:
            plain = [{**group, "params": [p for _, p in group["params"]]} for group in groups(model)]
            given = {"optimizer": torch.optim.AdamW(plain, lr=0.01)}
        Path(directory, name).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        run(name, deepspeed.initialize(model=model, config={**COMMON, **config}, **given)[0], Path(directory, name))
    dist.barrier()
    os._exit(0)  # its exit handlers wait for each other


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        ranks = int(sys.argv[2])
        mp.spawn(work, (ranks, sys.argv[1], f"{place}/store"), nprocs=ranks)
