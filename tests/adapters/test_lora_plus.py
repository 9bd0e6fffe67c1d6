"""LoRA+'s parameter groups, and the Trainer that uses them."""

from pathlib import Path

import pytest
import torch
from torch import nn

import phicore
from phicore.adapters import lora_plus_groups


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9))
    return phicore.attach(
        layers, phicore.LoRAConfig(rank=2, dora=True, target_modules=["0", "1"], modules_to_save=["2"])
    )


def test_every_b_learns_faster_and_everything_is_in_one_group():
    adapted = model()
    rest, b = lora_plus_groups(adapted.named_parameters(), learning_rate=1e-3, ratio=16)
    assert (rest["lr"], b["lr"]) == (1e-3, 16e-3)
    names = {parameter: name for name, parameter in adapted.named_parameters()}
    assert {names[p] for p in b["params"]} == {"0.lora_B", "1.lora_B"}
    assert {names[p] for p in rest["params"]} == {
        "0.lora_A", "0.magnitude", "1.lora_A", "1.magnitude", "2.trained.weight", "2.trained.bias"
    }  # fmt: skip


def test_a_tied_head_may_stand_before_its_embedding():
    tied = nn.ModuleDict({"head": nn.Linear(4, 9, bias=False), "embed": nn.Embedding(9, 4)})
    tied["head"].weight = tied["embed"].weight
    phicore.attach(tied, phicore.LoRAConfig(rank=2, target_modules=["embed"], ensure_weight_tying=True))
    _, b = lora_plus_groups(tied.named_parameters(), learning_rate=1e-3, ratio=16)
    assert b["lr"] == 16e-3
    assert [p is tied["embed"].lora_B for p in b["params"]] == [True]


def test_a_model_without_adapters_has_one_group():
    assert len(lora_plus_groups(nn.Linear(2, 2).named_parameters(), 1e-3, 1)) == 1
    with pytest.raises(ValueError, match=r"16 has no effect: no lora_B trains \(of 2 .* the first is weight\)"):
        lora_plus_groups(nn.Linear(2, 2).named_parameters(), 1e-3, 16)


def test_what_is_refused():
    with pytest.raises(ValueError, match="must be above 0, got 0"):
        lora_plus_groups(model().named_parameters(), 1e-3, 0)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        lora_plus_groups(nn.Linear(2, 2).requires_grad_(False).named_parameters(), 1e-3, 16)
    with pytest.raises(ValueError, match=r"lora_plus_ratio must be above 0, got -1"):
        phicore.TrainConfig(lora_plus_ratio=-1)


def test_the_first_step_of_adamw_moves_each_weight_by_its_rate(tmp_path: Path):
    adapted = model()
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    rows = torch.arange(1, 9).view(2, 4)
    config = phicore.TrainConfig(
        output=str(tmp_path), steps=1, batch_size=2, learning_rate=1e-3, lora_plus_ratio=8, warmup_steps=0, max_norm=0
    )
    phicore.Trainer(adapted, config, [{"input_ids": row, "labels": row} for row in rows]).fit()
    moved = {n: (p - before[n]).abs().max() for n, p in adapted.named_parameters() if p.requires_grad}
    for name in ("0.lora_B", "1.lora_B"):
        torch.testing.assert_close(moved[name], torch.tensor(8e-3), rtol=1e-3, atol=0)
    torch.testing.assert_close(moved["2.trained.weight"], torch.tensor(1e-3), rtol=1e-2, atol=0)
