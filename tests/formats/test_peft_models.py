"""PEFT's format for models of which transformers or PEFT knows something: their embeddings, their tasks."""

import pytest
import torch
import transformers

import phicore
from tests.formats.peft_files import load_in_peft

SIZES = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 48, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def wav2vec2() -> torch.nn.Module:
    """A model without an embedding of its input, of which get_input_embeddings raises."""
    torch.manual_seed(0)
    convolutions = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    config = transformers.Wav2Vec2Config(vocab_size=20, **SIZES, **convolutions, **positions)
    return transformers.Wav2Vec2ForCTC(config).eval()


def test_a_model_without_an_embedding_of_its_input(tmp_path, randomize):
    model = randomize(phicore.attach(wav2vec2(), phicore.LoRAConfig(rank=4, target_modules=["q_proj", "v_proj"])))
    phicore.save_adapter(model, tmp_path)
    sound = torch.linspace(-1, 1, 400).unsqueeze(0)
    expected = model(sound).logits
    assert not torch.allclose(expected, wav2vec2()(sound).logits)
    torch.testing.assert_close(phicore.load_adapter(wav2vec2(), tmp_path)(sound).logits, expected)
    torch.testing.assert_close(load_in_peft(wav2vec2(), tmp_path)(sound).logits, expected)
    with pytest.raises(ValueError, match="does not say which embedding is its input's.*no embeddings"):
        phicore.attach(wav2vec2(), phicore.LoRAConfig(trainable_token_indices=[3]))
