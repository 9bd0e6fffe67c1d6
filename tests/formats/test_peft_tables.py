"""Tables of embeddings and heads that PEFT saves beside an adapter, and pairs that it ties."""

import peft
import pytest
import torch
from safetensors.torch import load_file

import phicore
from phicore.formats.peft import PREFIX, WEIGHTS
from tests.formats.peft_files import edit, edit_tensors, logits
from tests.formats.test_peft import theirs


def test_a_table_that_peft_saved_beside_its_adapter(tmp_path, tiny, randomize, unchanged):
    """PEFT adds an adapted embedding's own table to the file: it is passed over if it is the model's, or named."""
    other = theirs(tiny, randomize, "embedding")
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        other.save_pretrained(tmp_path)
    key = f"{PREFIX}model.embed_tokens.base_layer.weight"
    assert key in load_file(tmp_path / WEIGHTS)
    model = phicore.load_adapter(tiny("llama"), tmp_path)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-6, atol=1e-6)

    phicore.load_adapter(model, tmp_path)  # into the attached adapter, too
    edit_tensors(tmp_path, lambda tensors: {**tensors, key: tensors[key] + 1})
    for spared in (tiny("llama"), model):
        with unchanged(spared), pytest.raises(ValueError, match=r"embed_tokens\.base_layer\.weight .*another table"):
            phicore.load_adapter(spared, tmp_path)


@pytest.mark.parametrize("family", ["llama", "tied llama"])
def test_tables_of_a_resized_vocabulary_that_peft_saved_beside_an_adapter(tmp_path, tiny, randomize, unchanged, family):
    """PEFT adds both tables of a vocabulary that was resized, adapted or not, and puts them into the model it loads."""
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj"])
    other = randomize(peft.get_peft_model(tiny(family).double(), config, autocast_adapter_dtype=False).eval())
    other.save_pretrained(tmp_path, save_embedding_layers=True)
    assert {f"{PREFIX}lm_head.weight", f"{PREFIX}model.embed_tokens.weight"} <= load_file(tmp_path / WEIGHTS).keys()
    model = phicore.load_adapter(tiny(family).double(), tmp_path)
    torch.testing.assert_close(logits(model), logits(other))

    edit_tensors(tmp_path, lambda tensors: {k: t + (k == f"{PREFIX}lm_head.weight") for k, t in tensors.items()})
    for spared in (tiny(family).double(), model):
        with (
            unchanged(spared),
            pytest.raises(ValueError, match=r"model\.lm_head\.weight: PEFT writes these .* resize"),
        ):
            phicore.load_adapter(spared, tmp_path)


def test_a_tied_pair_of_peft_with_its_tables(tmp_path, tiny, randomize, unchanged):
    other = theirs(tiny, randomize, "tied")
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        other.save_pretrained(tmp_path)
    assert f"{PREFIX}lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    model = phicore.load_adapter(tiny("tied llama"), tmp_path)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-6, atol=1e-6)
    assert model.lm_head.embedding_A is model.model.embed_tokens.lora_A

    edit_tensors(tmp_path, lambda tensors: {k: t + (k.endswith("lm_head.lora_B.weight")) for k, t in tensors.items()})
    for spared in (tiny("tied llama"), model):
        with (
            unchanged(spared),
            pytest.raises(ValueError, match=r"one pair for model\.embed_tokens and lm_head,"),
        ):
            phicore.load_adapter(spared, tmp_path)
    edit(tmp_path, ensure_weight_tying=False, target_modules=["embed_tokens", "lm_head", "q_proj"])
    assert type(phicore.load_adapter(tiny("tied llama"), tmp_path).lm_head) is phicore.LoRALinear


def test_a_tied_pair_of_peft_with_dora_is_two_adapters(tmp_path, tiny, randomize, unchanged):
    targets = ["embed_tokens", "q_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=targets, use_dora=True, ensure_weight_tying=True)
    other = randomize(peft.get_peft_model(tiny("tied llama"), config, autocast_adapter_dtype=False)).eval()
    other.save_pretrained(tmp_path, save_embedding_layers=False)
    model = tiny("tied llama")
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"lora_magnitude_vector: \[32\] in .*tying to false in adap"),
    ):
        phicore.load_adapter(model, tmp_path)
    edit(tmp_path, ensure_weight_tying=False)
    torch.testing.assert_close(logits(phicore.load_adapter(model, tmp_path)), logits(other), rtol=1e-6, atol=1e-6)
