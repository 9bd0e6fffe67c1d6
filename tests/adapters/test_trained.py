"""Biases that train: beside adapters and without, over each kind of base, and the base model behind them."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import phicore
from phicore.adapters import activate, adapter_layers, mixed
from phicore.adapters.trained import TrainedBias

DORA = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
BIAS = pytest.mark.parametrize("bias", ["lora_only", "all"])


class Net(nn.Module):
    """Tokens [B, T] -> [B, T, 5] through each kind of layer that has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 5, bias=False)
        self.last = nn.Linear(5, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.conv(self.embed(ids).mT).mT)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.last(self.down(torch.tanh(self.up(x))))


IDS = torch.arange(12).view(2, 6)
TARGETS = ["conv", "up", "down"]
ADAPTED = {"conv", "up"}  # those of the targets that have a bias
ALL = ADAPTED | {"norm", "attention.out_proj", "last"}


def build(*, nf4: bool = False) -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    return phicore.quantize_(net, target_modules=["up"]).double() if nf4 else net.double()


def frozen(**options) -> Tensor:
    """The frozen base model's output."""
    return build(**options).requires_grad_(False)(IDS)


def adapted(randomize, *, nf4: bool = False, **options) -> nn.Module:
    config = phicore.LoRAConfig(**{"rank": 2, "alpha": 3, "target_modules": TARGETS, **options})
    return randomize(phicore.attach(build(nf4=nf4), config))


def test_biases_under_other_names_are_said_to_stay_frozen():
    with pytest.warns(UserWarning, match=r'bias="all" leaves attention.in_proj_bias frozen') as caught:
        model = phicore.attach(build(), phicore.LoRAConfig(target_modules=TARGETS, bias="all"))
    assert caught[0].filename == __file__  # the caller's line
    assert not model.attention.in_proj_bias.requires_grad


def biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """The biases that train, by the name of their layer."""
    return {
        path: layer.trained if isinstance(layer, TrainedBias) else layer.trained_bias
        for path, layer in adapter_layers(model)
        if isinstance(layer, TrainedBias) or layer.trained_bias is not None
    }


def by_hand(model: nn.Module) -> nn.Module:
    """The same adapter without trained biases over a base that has their values."""
    base = build(nf4=any(isinstance(module, phicore.NF4Linear) for module in model.modules()))
    with torch.no_grad():
        for path, bias in biases(model).items():
            base.get_submodule(path).bias.copy_(bias)
    dora = any(hasattr(layer, "magnitude") for _, layer in adapter_layers(model))
    other = phicore.attach(base, phicore.LoRAConfig(rank=2, alpha=3, target_modules=TARGETS, dora=dora))
    layers = dict(adapter_layers(other))
    with torch.no_grad():
        for path, layer in adapter_layers(model):
            for name in ("lora_A", "lora_B", "magnitude"):
                if hasattr(layer, name) and not isinstance(layer, TrainedBias):
                    getattr(layers[path], name).copy_(getattr(layer, name))
    return other.requires_grad_(True)


@DORA
@BIAS
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_outputs_and_gradients_are_those_of_a_base_with_these_biases(randomize, dora, bias, nf4):
    model = adapted(randomize, dora=dora, bias=bias, nf4=nf4)
    assert set(biases(model)) == (ADAPTED if bias == "lora_only" else ALL)
    other = by_hand(model)
    y, expected = model(IDS), other(IDS)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for path, parameter in biases(model).items():
        layer = other.get_submodule(path)
        exact = (layer.base if hasattr(layer, "base") else layer).bias.grad
        torch.testing.assert_close(parameter.grad, exact)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name.rsplit(".", 1)[-1] for name in trained} <= {
        "lora_A", "lora_B", "magnitude", "trained", "trained_bias"
    }  # fmt: skip


@DORA
@BIAS
def test_disabled_is_the_base_model_bit_for_bit(randomize, dora, bias):
    model = adapted(randomize, dora=dora, bias=bias)
    y = model(IDS)
    with phicore.disabled(model):
        assert torch.equal(model(IDS), frozen())
    assert torch.equal(model(IDS), y)
    assert torch.equal(activate(model, [])(IDS), frozen())
    assert torch.equal(activate(model, "default")(IDS), y)


@DORA
@BIAS
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_merge_and_unmerge(randomize, dora, bias, nf4):
    model = adapted(randomize, dora=dora, bias=bias, nf4=nf4)
    y, before = model(IDS), copy.deepcopy(model.state_dict())
    merging = phicore.merge(model)
    assert set(merging) == set(TARGETS) | (ALL if bias == "all" else set())
    torch.testing.assert_close(model(IDS), y)
    assert model.state_dict().keys() == build().state_dict().keys()
    assert not any(model.get_submodule(path).bias.requires_grad for path in (ALL if bias == "all" else ADAPTED))
    assert type(model.up) is nn.Linear
    assert not torch.equal(model.up.bias, build(nf4=nf4).up.bias)
    phicore.unmerge(model)
    assert torch.equal(model(IDS), y)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    with phicore.disabled(model):
        assert torch.equal(model(IDS), frozen(nf4=nf4))


@BIAS
def test_merged_into_nf4_again(randomize, bias):
    model = adapted(randomize, bias=bias, nf4=True).float()
    bias_before = model.up.bias.detach().clone()
    phicore.merge(model, requantize=True)
    assert type(model.up) is phicore.NF4Linear
    assert torch.equal(model.up.bias, bias_before)
    assert not model.up.bias.requires_grad


@BIAS
def test_copies_pickles_and_state_dicts(randomize, bias):
    model = adapted(randomize, bias=bias)
    y = model(IDS)
    assert torch.equal(copy.deepcopy(model)(IDS), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS), y)
    fresh = phicore.attach(build(), phicore.LoRAConfig(rank=2, alpha=3, target_modules=TARGETS, bias=bias))
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(IDS), y)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(IDS).dtype == torch.bfloat16


@BIAS
@DORA
def test_biases_in_another_dtype_than_the_base(randomize, bias, dora):
    config = phicore.LoRAConfig(rank=2, target_modules=TARGETS, bias=bias, dora=dora, adapter_dtype=torch.float32)
    model = phicore.attach(build().to(torch.bfloat16), config)
    base = build().to(torch.bfloat16)
    assert torch.allclose(model(IDS), base(IDS), rtol=0.05, atol=0.05)
    assert model(IDS).dtype == torch.bfloat16
    model(IDS).sum().backward()
    assert all(bias.dtype == bias.grad.dtype == torch.float32 for bias in biases(model).values())


def test_a_stack_adds_the_bias_of_the_last_that_is_active(randomize):
    model = adapted(randomize, bias="lora_only")
    first = copy.deepcopy(model)(IDS)
    config = phicore.LoRAConfig(rank=2, target_modules=["up"], bias="lora_only")
    phicore.attach(model, config, "second")
    assert set(biases(model)) == {"conv", "up"}
    assert model.up.trained_bias.requires_grad
    assert not model.up.base.trained_bias.requires_grad
    torch.testing.assert_close(model(IDS), first)
    with torch.no_grad():
        model.up.trained_bias.add_(1)
    both = model(IDS)
    assert not torch.allclose(both, first)
    phicore.merge(model)
    torch.testing.assert_close(model(IDS), both)
    phicore.unmerge(model)
    torch.testing.assert_close(activate(model, "default")(IDS), first)
    second = activate(model, "second")(IDS)
    alone = phicore.attach(build(), config)
    with torch.no_grad():
        alone.up.trained_bias.copy_(model.up.trained_bias)
    torch.testing.assert_close(second, alone(IDS))


@DORA
def test_an_adapter_over_one_that_is_off_adds_the_bias_of_the_base(randomize, dora):
    model = adapted(randomize, bias="lora_only")
    config = phicore.LoRAConfig(rank=2, target_modules=["conv", "up"], dora=dora)
    randomize(phicore.attach(model, config, "second"))
    alone = phicore.attach(build(), config)
    layers = dict(adapter_layers(alone))
    with torch.no_grad():
        for path, layer in adapter_layers(model, "second"):
            for name, value in layer.named_parameters(recurse=False):
                getattr(layers[path], name).copy_(value)
    torch.testing.assert_close(activate(model, "second")(IDS), alone(IDS))


@pytest.mark.parametrize(("bias", "dora"), [("lora_only", True), ("all", False)])
def test_one_graph(randomize, bias, dora):
    torch._dynamo.reset()
    model = adapted(randomize, bias=bias, dora=dora)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(IDS), model(IDS))
    compiled(IDS).sum().backward()
    assert all(bias.grad is not None for bias in biases(model).values())
    assert counter.frame_count == 1


def test_biases_of_all_modules_are_not_mixed(randomize, unchanged):
    model = adapted(randomize, bias="all")
    with (
        unchanged(model),
        pytest.raises(ValueError, match="holds norm trained in its bias, which cannot be mixed"),
        mixed(model, ["default", None]),
    ):
        pass


def test_what_is_refused(randomize, unchanged, toy):
    model = adapted(randomize, bias="lora_only")
    with unchanged(model):
        with pytest.raises(ValueError, match=r"holds conv trained in its bias, which has no strength; .* not 0\.5"):
            activate(model, {"default": 0.5})
        with pytest.raises(ValueError, match=r'bias="all" .* which has an adapter already; use bias="lora_only"'):
            phicore.attach(model, phicore.LoRAConfig(target_modules=["last"], bias="all"), "second")
    model = build()
    with unchanged(model), pytest.raises(ValueError, match=r'bias="lora_only": no adapted layer has a bias'):
        phicore.attach(model, phicore.LoRAConfig(target_modules=["down"], bias="lora_only"))
    model.register_parameter("bias", nn.Parameter(torch.zeros(5)))
    with unchanged(model), pytest.raises(ValueError, match=r'bias="all": the model itself \(Net\) has a bias of its'):
        phicore.attach(model, phicore.LoRAConfig(target_modules=["down"], bias="all"))


@pytest.mark.filterwarnings("ignore:all-linear leaves out")
def test_nothing_is_left_out_beside_biases_that_all_train(randomize, unchanged):
    model = adapted(randomize, bias="all")
    with unchanged(model), pytest.raises(ValueError, match="matches last, which is a TrainedBias and cannot be"):
        phicore.attach(model, phicore.LoRAConfig(target_modules=["last"]), "second")
    for targets in ("all-linear", ["up"]):
        with unchanged(model), pytest.raises(ValueError, match='"default" trains all biases'):
            phicore.attach(model, phicore.LoRAConfig(target_modules=targets), "second")
