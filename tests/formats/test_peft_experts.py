"""Adapters for stacked experts and other parameters by name, in PEFT's format."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import phicore
from phicore.formats.peft import WEIGHTS
from tests.formats.peft_files import assert_same_files, edit_tensors, load_in_peft, logits

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
STACKS = {
    "both": EXPERTS,
    "one": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    "rslora and patterns": {**EXPERTS, "rank_pattern": {"1.mlp.experts.down_proj": 2}, "rslora": True},
    "some blocks": {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.gate_up_proj"]},
    "one of one": {"target_modules": ["o_proj"], "target_parameters": ["experts.down_proj", "0.mlp.gate.weight"]},
}


@pytest.fixture(params=["mixtral", "gpt-oss"])
def mixture(request, tiny):
    """Builds a mixture of experts: its weights lie as [experts, out, in], or as [experts, in, out] in GPT-OSS."""
    return lambda: tiny(request.param)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # PEFT's mistake: it heeds them
@pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)
def test_parameters(tmp_path, mixture, randomize, options):
    if any("gate.weight" in name for name in options["target_parameters"]) and not hasattr(
        mixture().model.layers[0].mlp, "gate"
    ):
        options = {**options, "target_parameters": ["experts.down_proj", "0.mlp.router.weight"]}
    base = logits(mixture())
    model = randomize(phicore.attach(mixture(), phicore.LoRAConfig(rank=4, alpha=7, **options)))
    assert not torch.allclose(logits(model), base, rtol=1e-2)
    phicore.save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(logits(load_in_peft(mixture(), tmp_path / "ours")), logits(model))
    fresh = phicore.load_adapter(mixture(), tmp_path / "ours")
    assert torch.equal(logits(fresh), logits(model))
    phicore.save_adapter(fresh, tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path / "ours")

    theirs = {**options, "use_rslora": options.get("rslora", False)}
    theirs.pop("rslora", None)
    config = peft.LoraConfig(r=4, lora_alpha=7, task_type="CAUSAL_LM", **theirs)
    other = randomize(peft.get_peft_model(mixture(), config, autocast_adapter_dtype=False).eval(), seed=5)
    other.save_pretrained(tmp_path / "theirs")
    stored, read = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert {key: t.shape for key, t in stored.items()} == {key: t.shape for key, t in read.items()}
    torch.testing.assert_close(logits(phicore.load_adapter(mixture(), tmp_path / "theirs")), logits(other))
    torch.testing.assert_close(logits(phicore.load_adapter(model, tmp_path / "theirs")), logits(other))


def test_parameters_that_differ_from_the_files_are_named(tmp_path, mixture, unchanged):
    def attached(**options) -> nn.Module:
        return phicore.attach(mixture(), phicore.LoRAConfig(**{"rank": 4, "alpha": 7, **EXPERTS, **options}))

    phicore.save_adapter(attached(), tmp_path)
    for options, message in (
        ({"alpha": 8}, "lora_alpha of .*: 7 in the file, 8 here"),
        ({"rank_pattern": {"experts.down_proj": 3}}, r"r of .*\.down_proj: 4 in the file, 3 here"),
        ({"target_parameters": ["experts.down_proj"]}, "unexpected keys: .*experts.base_layer.lora_A.weight"),
    ):
        model = attached(**options)
        with unchanged(model), pytest.raises(ValueError, match=message):
            phicore.load_adapter(model, tmp_path)
    edit_tensors(tmp_path, lambda t: {k: v for k, v in t.items() if "1.mlp.experts.lora_B" not in k})
    model = mixture()
    with unchanged(model), pytest.raises(ValueError, match=r"missing keys: .*1\.mlp\.experts\.lora_B\.weight"):
        phicore.load_adapter(model, tmp_path)
