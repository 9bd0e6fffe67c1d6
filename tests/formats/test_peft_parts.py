"""Adapters for parts of fused layers, in PEFT's format."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import phicore
from phicore.adapters import adapter_layers
from phicore.formats.peft import PREFIX, WEIGHTS
from tests.formats.peft_files import assert_same_files, edit_tensors, kinds, load_in_peft, logits

PARTS = ["q_proj", "v_proj", "gate_proj", "o_proj"]
SPLIT = {
    "plain": {},
    "dora": {"dora": True},
    "patterns": {"rslora": True, "rank_pattern": {"1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
}


def split_adapter(tiny, randomize, **options) -> nn.Module:
    config = phicore.LoRAConfig(**{"rank": 4, "alpha": 7, "target_modules": PARTS, "fused_targets": "split", **options})
    return randomize(phicore.attach(tiny("phi3"), config))


@pytest.mark.parametrize("options", SPLIT.values(), ids=SPLIT)
def test_parts_of_fused_layers(tmp_path, tiny, randomize, options):
    """PEFT reads them as a plain adapter; we as what they are; the same bytes come out again."""
    model = split_adapter(tiny, randomize, **options)
    phicore.save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(load_in_peft(tiny("phi3"), tmp_path)), logits(model), rtol=1e-6, atol=1e-6)
    stored = load_file(tmp_path / WEIGHTS)
    assert stored[f"{PREFIX}model.layers.0.self_attn.qkv_proj.lora_A.weight"].shape == (8, 32)  # q and v, of rank 4

    fresh = phicore.load_adapter(tiny("phi3"), tmp_path)
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-12, atol=1e-12)
    assert kinds(fresh) == kinds(model)
    assert [(n, p.shape) for n, p in fresh.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    phicore.save_adapter(fresh, tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path)

    other = randomize(split_adapter(tiny, randomize, **options), seed=9)
    phicore.load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-12, atol=1e-12)


def test_parts_whose_metadata_is_lost_are_a_plain_adapter(tmp_path, tiny, randomize):
    model = split_adapter(tiny, randomize, dora=True)
    phicore.save_adapter(model, tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors)  # writes the metadata {"format": "pt"} alone
    fresh = phicore.load_adapter(tiny("phi3"), tmp_path)
    torch.testing.assert_close(logits(fresh), logits(model))
    assert {type(layer) for _, layer in adapter_layers(fresh)} == {phicore.DoRALinear}
    phicore.load_adapter(split_adapter(tiny, randomize, dora=True), tmp_path)  # which is split, and the file's can be


def test_a_plain_adapter_does_not_load_into_parts(tmp_path, tiny, randomize, unchanged):
    plain = phicore.LoRAConfig(rank=8, alpha=14, target_modules=["qkv_proj"])
    phicore.save_adapter(randomize(phicore.attach(tiny("phi3"), plain)), tmp_path)
    model = split_adapter(tiny, randomize, target_modules=["q_proj", "v_proj"])
    with unchanged(model), pytest.raises(ValueError, match=r"qkv_proj: the adapter mixes the parts .*cannot be split"):
        phicore.load_adapter(model, tmp_path)


def test_parts_that_differ_from_the_files_are_named(tmp_path, tiny, randomize, unchanged):
    ranks = {"self_attn.q_proj": 2, "self_attn.v_proj": 6}
    phicore.save_adapter(split_adapter(tiny, randomize, target_modules=["q_proj", "v_proj"]), tmp_path)
    model = split_adapter(
        tiny, randomize, target_modules=["q_proj", "v_proj"], rank_pattern=ranks, alpha_pattern={"q_proj": 3.5}
    )
    with unchanged(model), pytest.raises(ValueError, match=r"parts of .*qkv_proj: .*'q_proj': \(4, 7\).* in the file"):
        phicore.load_adapter(model, tmp_path)


def test_parts_put_there_by_hand_are_saved_as_a_plain_adapter(tmp_path, randomize):
    def build() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))

    model = build()
    model[0] = phicore.adapters.FusedLoRALinear(model[0], {"a": 5, "b": 3}, rank={"a": 2, "b": 1}, alpha=3)
    randomize(model.requires_grad_(False)[0].parts.requires_grad_(True))
    phicore.save_adapter(model, tmp_path)
    x = torch.randn(4, 6)
    torch.testing.assert_close(phicore.load_adapter(build(), tmp_path)(x), model(x))
