"""What code that reads a layer's weight finds in NF4Linear and in adapters."""

import copy
from unittest import mock

import pytest
import torch
import transformers
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
        assert isinstance(weight, torch.Tensor)
        assert (weight.dtype, weight.device.type, weight.shape) == (torch.bfloat16, "cpu", (5, 70))
        assert (weight.ndim, weight.numel(), weight.is_floating_point()) == (2, 350, True)
        assert not weight.requires_grad
        assert "LazyWeight" in repr(weight)
    expected = layer.nf4.dequantize()
    for found, e in ((weight.float(), expected.float()), (weight[2:4], expected[2:4]), (weight.detach(), expected)):
        assert type(found) is torch.Tensor
        assert torch.equal(found, e)
    x = torch.randn(3, 70, dtype=torch.bfloat16, requires_grad=True)
    torch.testing.assert_close(nn.functional.linear(x, weight, layer.bias), layer(x), rtol=2e-2, atol=2e-2)
    (x @ weight.T).sum().backward()
    torch.testing.assert_close(x.grad, expected.sum(0).expand(3, 70), rtol=2e-2, atol=2e-2)
    compiled = torch.compile(lambda x: x @ layer.weight.T, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), x @ expected.T)


def test_nothing_else_of_a_layer_changes():
    layer = phicore.NF4Linear.from_linear(nn.Linear(70, 5))
    assert {"weight"} & {*layer.state_dict(), *dict(layer.named_parameters())} == set()
    with pytest.raises(AttributeError, match="weight of an NF4Linear is coded, and no other can be set"):
        layer.weight = nn.Parameter(torch.zeros(5, 70))  # what tie_weights does must not pass in silence


WRITERS = {
    "normal_": nn.init.normal_,
    "uniform_": nn.init.xavier_uniform_,
    "add_": lambda weight: weight.add_(1),
    "copy_": lambda weight: weight.copy_(torch.zeros(5, 70)),
    "__setitem__": lambda weight: weight.__setitem__(0, 1.0),
    "add": lambda weight: torch.add(torch.zeros(5, 70), 1, out=weight),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(("nf4", "adapted"), [(True, False), (False, True), (True, True)])
def test_a_write_that_would_be_lost_is_told(name, nf4, adapted):
    layer = nn.Linear(70, 5)
    layer = phicore.NF4Linear.from_linear(layer) if nf4 else layer
    layer = phicore.LoRALinear(layer, rank=2, alpha=4) if adapted else layer
    before = layer.weight.clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"^{name} writes to the weight of a layer that is adapted"):
        WRITERS[name](layer.weight)
    assert torch.equal(layer.weight, before)
    if adapted and not nf4:  # and the base's own weight, which a disabled adapter answers with, may be written to
        layer.enabled = False
        with torch.no_grad():
            WRITERS[name](layer.weight)
        assert not torch.equal(layer.base.weight, before)
    elif adapted:
        layer.enabled = False
        with torch.no_grad(), pytest.raises(RuntimeError, match=f"^{name} writes to the weight"):
            WRITERS[name](layer.weight)


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


class ReadsWeights(nn.Module):
    """Computes with its layers' weights and biases, as WavLM's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.conv1d = nn.Linear(10, 6), transformers.pytorch_utils.Conv1D(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.plain.weight, self.plain.bias)
        return y @ self.conv1d.weight + self.conv1d.bias


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_is_not_read_past(randomize, dora):
    """The same numbers and gradients as of code that calls the layers; merged, unmerged and disabled."""
    torch.manual_seed(0)
    base = ReadsWeights().double()
    config = phicore.LoRAConfig(rank=2, alpha=5, target_modules=["plain", "conv1d"], dora=dora, bias="all")
    model = randomize(phicore.attach(copy.deepcopy(base), config))
    x = torch.randn(3, 10, dtype=torch.float64)
    y = model(x)
    expected = model.conv1d(model.plain(x))
    torch.testing.assert_close(y, expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    found, known = (torch.autograd.grad(z.square().sum(), trained) for z in (y, expected))
    torch.testing.assert_close(found, known)
    phicore.merge(model)
    torch.testing.assert_close(model(x), y)
    phicore.unmerge(model)
    with phicore.disabled(model):
        torch.testing.assert_close(model(x), base(x))
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), y)


class ReadsTables(nn.Module):
    """Computes its logits with its embedding's table, as Whisper does, and with a convolution's kernels."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(11, 8), nn.Conv1d(8, 8, 3, padding=1, groups=groups)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        conv = self.conv
        x = nn.functional.conv1d(self.embed(tokens).mT, conv.weight, conv.bias, padding=1, groups=conv.base.groups)
        return x.mT @ self.embed.weight.T


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_nor_is_that_of_an_embedding_and_a_convolution(randomize, dora):
    model, config = ReadsTables(), phicore.LoRAConfig(rank=2, target_modules=["embed", "conv"], dora=dora)
    randomize(phicore.attach(model.double(), config))
    tokens = torch.randint(11, (2, 5))
    y = model(tokens)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(y, model.conv(model.embed(tokens).mT).mT @ model.embed(torch.arange(11)).T)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(tokens), y)
    embed, conv = model.embed.base, model.conv.base
    with phicore.disabled(model):
        torch.testing.assert_close(model(tokens), conv(embed(tokens).mT).mT @ embed.weight.T)


def test_the_kernels_of_groups_hold_no_adapter(randomize):
    model = randomize(phicore.attach(ReadsTables(2), phicore.LoRAConfig(rank=2, target_modules=["conv"])))
    tokens = torch.randint(11, (2, 5))
    assert model.conv.weight.shape == (8, 4, 3)
    with pytest.raises(ValueError, match=r"groups=2 is read past its forward, .* leave the layer out"):
        model(tokens)
    with phicore.disabled(model):
        model(tokens)


def test_a_trained_copy_is_read_only_where_it_answers(randomize):
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "embed": nn.Embedding(5, 4)})
    config = phicore.LoRAConfig(rank=2, target_modules=["fc"], modules_to_save=["embed"])
    embed = randomize(phicore.attach(model, config))["embed"]
    assert embed.weight is embed.trained.weight
    with phicore.disabled(model):
        assert embed.weight is embed.base.weight


def test_rows_of_a_batch_have_no_one_weight(randomize):
    model = phicore.attach(ReadsWeights(), phicore.LoRAConfig(rank=2, target_modules=["plain"]))
    with phicore.adapters.mixed(model, ["default", None]), pytest.raises(ValueError, match="mix adapters in a batch"):
        model(torch.randn(2, 10))
