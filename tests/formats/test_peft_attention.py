"""Adapters for nn.MultiheadAttention, in PEFT's format."""

from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import phicore
from phicore.formats.peft import WEIGHTS
from tests.formats.peft_files import assert_same_files, kinds, load_in_peft, logits


class Attending(nn.Module):
    """Token ids [B, T] -> .logits [B, T, 7]."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.head = nn.Linear(8, 7)

    def forward(self, input_ids: Tensor):
        x = self.embed(input_ids)
        widths = self.attention.kdim, self.attention.vdim
        return SimpleNamespace(logits=self.head(self.attention(x, *(x[..., :width] for width in widths))[0]))


def attending(**options) -> nn.Module:
    torch.manual_seed(3)
    return Attending(**options).double().eval()


ATTENTIONS = {
    "plain": {},
    "rslora": {"rslora": True},
    "pattern": {"rank_pattern": {"attention": 2}, "alpha_pattern": {"attention": 3}},
    "parts": {"fused_targets": "split"},
    "parts of two ranks": {"fused_targets": "split", "rslora": True, "rank_pattern": {"attention.k_proj": 3}},
    "two ranks": {"rank_pattern": {"out_proj": 2}, "alpha_pattern": {"out_proj": 3.5}},
    "larger out_proj": {"rank_pattern": {"out_proj": 6}, "alpha_pattern": {"out_proj": 10.5}},
}


@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention(tmp_path, randomize, options):
    config = phicore.LoRAConfig(rank=4, alpha=7, target_modules=["attention", "head"], **options)
    model = randomize(phicore.attach(attending(), config))
    phicore.save_adapter(model, tmp_path / "ours")
    other = load_in_peft(attending(), tmp_path / "ours")
    assert not torch.allclose(logits(model), logits(attending()), rtol=1e-2)
    torch.testing.assert_close(logits(other), logits(model))
    fresh = phicore.load_adapter(attending(), tmp_path / "ours")
    torch.testing.assert_close(logits(fresh), logits(model))
    assert kinds(fresh) == kinds(model)
    assert [(n, p.shape) for n, p in fresh.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    phicore.save_adapter(fresh, tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path / "ours")
    again = randomize(phicore.attach(attending(), config), seed=8)
    torch.testing.assert_close(logits(phicore.load_adapter(again, tmp_path / "ours")), logits(model))


def there_and_back(tmp_path, randomize, config: peft.LoraConfig) -> nn.Module:
    """What we read of an adapter that PEFT wrote; it is the same model, and writes the same tensors."""
    other = randomize(peft.get_peft_model(attending(), config, autocast_adapter_dtype=False).eval())
    other.save_pretrained(tmp_path / "theirs")
    model = phicore.load_adapter(attending(), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(other))
    phicore.save_adapter(model, tmp_path / "ours")
    stored, read = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert stored.keys() == read.keys()
    assert all(torch.equal(tensor, read[key]) for key, tensor in stored.items())
    return model


def test_attention_that_peft_wrote(tmp_path, randomize):
    pattern = {"attention": 2}
    there_and_back(
        tmp_path,
        randomize,
        peft.LoraConfig(r=4, lora_alpha=7, target_modules=["attention", "head"], rank_pattern=pattern),
    )


@pytest.mark.filterwarnings('ignore:bias="lora_only" leaves attention.in_proj.bias frozen, as PEFT does')
@pytest.mark.parametrize("targets", [["attention", "head"], ["attention"]])
def test_biases_of_an_attention_and_other_layers(tmp_path, randomize, targets):
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=targets, bias="lora_only")
    model = there_and_back(tmp_path, randomize, config)
    fresh = phicore.LoRAConfig(rank=4, alpha=7, target_modules=targets, bias="lora_only")
    again = randomize(phicore.attach(attending(), fresh), seed=8)
    assert any(name.startswith("attention.out_proj.trained_bias") for name, p in again.named_parameters())
    torch.testing.assert_close(logits(phicore.load_adapter(again, tmp_path / "ours")), logits(model))
    expected = logits(model)
    phicore.merge(model)
    torch.testing.assert_close(logits(model), expected)
    phicore.unmerge(model)
    torch.testing.assert_close(logits(model), expected)
    with phicore.disabled(model):
        torch.testing.assert_close(logits(model), logits(attending()))


@pytest.mark.parametrize(("options", "dora"), [({}, True), ({"kdim": 6, "vdim": 5}, False), ({"kdim": 6}, True)])
@pytest.mark.parametrize("fused_targets", ["raise", "split"])
def test_attention_that_peft_refuses(tmp_path, randomize, options, dora, fused_targets):
    config = phicore.LoRAConfig(rank=4, alpha=7, target_modules=["attention"], dora=dora, fused_targets=fused_targets)
    model = randomize(phicore.attach(attending(**options), config))
    phicore.save_adapter(model, tmp_path)
    fresh = phicore.load_adapter(attending(**options), tmp_path)
    torch.testing.assert_close(logits(fresh), logits(model))
    assert kinds(fresh) == kinds(model)
    with pytest.raises(ValueError, match=r"MultiheadAttention does not support DoRA|Only same embed for query"):
        peft.PeftModel.from_pretrained(attending(**options), tmp_path)


def test_attention_that_a_file_cannot_hold_is_named(tmp_path, randomize, unchanged):
    config = phicore.LoRAConfig(rank=4, alpha=7, target_modules=["attention"], alpha_pattern={"out_proj": 9})
    model = phicore.attach(attending(), config)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"one rank and one alpha for in_proj and out_proj of attent"),
    ):
        phicore.save_adapter(model, tmp_path / "never")
    larger = phicore.LoRAConfig(rank=4, alpha=7, target_modules=["attention"])
    phicore.save_adapter(randomize(phicore.attach(attending(), larger)), tmp_path)
    config.alpha_pattern, config.rank_pattern = {"out_proj": 3.5}, {"out_proj": 2}
    model = phicore.attach(attending(), config)
    with unchanged(model), pytest.raises(ValueError, match=r"attention\.out_proj has a higher rank than 2"):
        phicore.load_adapter(model, tmp_path)
