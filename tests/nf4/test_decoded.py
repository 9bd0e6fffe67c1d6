"""NF4Linear.weight: what code that reads a layer's weight finds."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

import phicore
from phicore.nf4 import ops


def dense(model: nn.Module) -> nn.Module:
    """The model with the decoded weights in plain layers."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, phicore.NF4Linear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight, plain.bias = nn.Parameter(layer.nf4.dequantize(), requires_grad=False), layer.bias
            phicore.modules.replace(model, name, plain)
    return model


def test_facts_cost_no_decoding_and_values_are_right():
    layer = phicore.NF4Linear.from_linear(nn.Linear(70, 5)).bfloat16()
    with mock.patch.object(ops, "dequantize", side_effect=AssertionError):
        weight = layer.weight
        assert isinstance(weight, torch.Tensor) and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
        assert weight.shape == (5, 70) and weight.ndim == 2 and weight.is_floating_point() and not weight.requires_grad
        assert weight.numel() == 350 and "DecodedWeight" in repr(weight)
    expected = layer.nf4.dequantize()
    assert type(weight.float()) is torch.Tensor and torch.equal(weight.float(), expected.float())
    assert torch.equal(weight[2:4], expected[2:4]) and torch.equal(weight.detach(), expected)
    x = torch.randn(3, 70, dtype=torch.bfloat16, requires_grad=True)
    torch.testing.assert_close(nn.functional.linear(x, weight, layer.bias), layer(x))
    (x @ weight.T).sum().backward()
    torch.testing.assert_close(x.grad, expected.sum(0).expand(3, 70), rtol=2e-2, atol=2e-2)
    compiled = torch.compile(lambda x: x @ layer.weight.T, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), x @ expected.T)


def test_nothing_else_of_a_layer_changes():
    layer = phicore.NF4Linear.from_linear(nn.Linear(70, 5))
    assert "weight" not in layer.state_dict() and "weight" not in dict(layer.named_parameters())
    with pytest.raises((AttributeError, KeyError), match="weight"):
        layer.weight = nn.Parameter(torch.zeros(5, 70))  # what tie_weights does must not pass in silence


@pytest.mark.parametrize("family", ["t5", "mamba"])
def test_models_that_read_weights(tiny, family):
    model = phicore.quantize_(tiny(family).float())
    ids = torch.arange(1, 13).view(2, 6)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if family == "t5" else {})}
    expected = dense(model)(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, expected)
    targets = ["wo"] if family == "t5" else ["in_proj"]
    adapted = phicore.attach(model, phicore.LoRAConfig(rank=2, target_modules=targets))
    torch.testing.assert_close(adapted(**inputs).logits, expected)


def test_an_encoder_of_torch_in_evaluation():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = phicore.quantize_(nn.TransformerEncoder(layer, 2)).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(model)(x))
