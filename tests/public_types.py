"""A user's script whose types `mypy` checks (pyproject.toml names it beside the package); it is never run."""

from typing import assert_type

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import phicore
from phicore import nf4
from phicore.adapters import activate, mixed


class Model(nn.Module):
    pass


class Examples(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([1]), "labels": torch.tensor([1])}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
    return model(batch["input_ids"]).sum(), batch["labels"].sum().item()


def number_format(weight: Tensor) -> None:
    q = nf4.quantize(weight, block_size=64, double_quant=True)
    assert_type(q, nf4.NF4Tensor)
    assert_type(q.dequantize(dtype=torch.bfloat16), Tensor)
    assert_type(q.nested_absmax, Tensor | None)
    assert_type(nf4.linear(weight, q), Tensor)
    assert_type(phicore.NF4Linear.from_linear(nn.Linear(4, 4)), phicore.NF4Linear)


def adapters(model: Model) -> None:
    assert_type(phicore.quantize_(model, exclude_modules=["lm_head"]), Model)
    assert_type(phicore.attach(model, phicore.LoRAConfig(rank=8, target_modules=["q_proj"]), name="default"), Model)
    assert_type(phicore.load_adapter(model, "adapter"), Model)
    assert_type(activate(model, {"default": 1.0}), Model)
    with phicore.disabled(model) as base, mixed(model, ["default", None]) as rows:
        assert_type(base, Model)
        assert_type(rows, Model)
    assert_type(phicore.merge(model), dict[str, float])
    assert_type(phicore.unmerge(model), Model)
    assert_type(phicore.DoRALinear(nn.Linear(4, 4), rank=2, alpha=4).magnitude, nn.Parameter)


def optimizer(model: Model) -> None:
    zero = phicore.ZeroOptimizer(model.named_parameters(), torch.optim.AdamW, stage=2, lr=1e-4)
    assert_type(zero.clip_grad_norm_(1.0), Tensor)
    assert_type(zero.step(lambda: 1.0), float)
    torch.optim.lr_scheduler.LambdaLR(zero, lambda step: 1.0)


def training(model: Model) -> None:
    trainer = phicore.Trainer(model, phicore.TrainConfig(steps=1), Examples(), [{"x": 1}], loss_fn=loss)
    assert_type(trainer.fit().loss, float)
    assert_type(trainer.evaluate(Examples()), float)
