"""Several adapters in one model: switched, weighed, mixed within a batch, exchanged without compiling again."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import phicore
from phicore.adapters import activate, adapter_layers, mixed

IDS = torch.arange(1, 25).view(4, 6)


class Net(nn.Module):
    """Tokens [B, T] -> [B, T', 5] through an embedding, a convolution and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.conv(self.embed(ids).mT)).mT
        return self.down(torch.tanh(self.up(x)))


TARGETS = ["embed", "conv", "up", "down"]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def with_adapters(model: nn.Module, randomize, **names: dict) -> nn.Module:
    for seed, (name, options) in enumerate(names.items()):
        torch.manual_seed(seed)
        config = phicore.LoRAConfig(**{"rank": 2, "alpha": 3, "target_modules": TARGETS, **options})
        randomize(phicore.attach(model, config, name), seed=seed)
    return model


def alone(net: nn.Module, model: nn.Module, name: str, strength: float = 1.0) -> dict[str, Tensor]:
    """What one adapter adds to each weight, computed apart."""
    return {path: strength * layer.product() for path, layer in adapter_layers(model, name)}


def test_one_name_answers_as_if_it_were_alone(net, randomize):
    both = with_adapters(copy.deepcopy(net), randomize, a={}, b={"rank": 4, "target_modules": ["up", "conv"]})
    only_a = with_adapters(copy.deepcopy(net), randomize, a={})
    torch.testing.assert_close(activate(both, "a")(IDS), only_a(IDS))
    trained = {name for name, p in both.named_parameters() if p.requires_grad}
    activate(both, ["b"])
    assert not torch.allclose(both(IDS), only_a(IDS))
    activate(both, [])
    torch.testing.assert_close(both(IDS), net(IDS))
    assert {name for name, p in both.named_parameters() if p.requires_grad} == trained


def test_strengths_weigh_the_products(net, randomize):
    model = with_adapters(copy.deepcopy(net), randomize, a={}, b={"rslora": True}, c={})
    parts = [alone(net, model, "a", 0.25), alone(net, model, "b", -1.5)]
    activate(model, {"a": 0.25, "b": -1.5})
    y = model(IDS)
    expected = copy.deepcopy(net)
    phicore.merge(model)
    for path in ("up", "down"):
        weight = expected.get_submodule(path).weight.data
        weight += parts[0][path] + parts[1][path]
        torch.testing.assert_close(model.get_submodule(path).weight, expected.get_submodule(path).weight)
    torch.testing.assert_close(model(IDS), y)
    phicore.unmerge(model)
    torch.testing.assert_close(activate(model, {"a": 0.25, "b": -1.5})(IDS), y)


def test_dora_over_lora_follows_what_is_under_it(net, randomize):
    model = with_adapters(copy.deepcopy(net), randomize, a={}, b={"dora": True})
    only_b = copy.deepcopy(net)
    phicore.attach(only_b, phicore.LoRAConfig(rank=2, alpha=3, dora=True, target_modules=TARGETS), "b")
    activate(model, "b")
    with torch.no_grad():
        for (_, theirs), (_, ours) in zip(adapter_layers(model, "b"), adapter_layers(only_b, "b"), strict=True):
            for name in ("lora_A", "lora_B", "magnitude"):
                getattr(ours, name).copy_(getattr(theirs, name))
    torch.testing.assert_close(model(IDS), only_b(IDS))
    both = activate(model, ["a", "b"])(IDS)
    assert not torch.allclose(both, only_b(IDS))
    phicore.merge(model)
    torch.testing.assert_close(model(IDS), both)


def test_a_batch_of_mixed_names_is_each_row_alone_with_one_base_pass(net, randomize):
    model = with_adapters(net, randomize, a={}, b={"rank": 4, "target_modules": ["up", "conv"]})
    names = ["b", None, "a", "b"]
    expected = []
    for row, name in enumerate(names):
        activate(model, [] if name is None else name)
        expected.append(model(IDS[row : row + 1]))
    activate(model, "a")
    calls = []
    for path, layer in adapter_layers(model, "a"):
        layer.base.register_forward_hook(lambda *_, path=path: calls.append(path))
    before = model(IDS)
    calls.clear()
    with mixed(model, names):
        y = model(IDS)
    assert sorted(calls) == sorted(TARGETS)
    torch.testing.assert_close(y, torch.cat(expected))
    assert torch.equal(model(IDS), before)  # afterwards as it was


def test_mixed_rows_train_their_own_adapter_only(net, randomize):
    model = with_adapters(net, randomize, a={}, b={})
    for _, layer in adapter_layers(model, "a"):
        layer.lora_B.requires_grad_(True)
    with mixed(model, ["a", "a", None, None]):
        model(IDS).sum().backward()
    assert all(layer.lora_B.grad is not None for _, layer in adapter_layers(model, "a"))
    assert all(layer.lora_B.grad is None for _, layer in adapter_layers(model, "b"))


def test_what_is_refused(net, randomize, unchanged):
    dora = {"dora": True, "target_modules": ["up"], "modules_to_save": ["down"]}
    model = with_adapters(net, randomize, a={"target_modules": ["embed", "up"]}, b=dora)
    with unchanged(model):
        with pytest.raises(ValueError, match=r"no adapter named 'c'; the model has \['a', 'b'\]"):
            activate(model, ["a", "c"])
        with pytest.raises(
            ValueError, match=r'"b" holds down trained whole, which has no strength; give it 1, not 0\.5'
        ):
            activate(model, {"a": 2.0, "b": 0.5})
        assert all(layer.enabled for _, layer in adapter_layers(model))
        with pytest.raises(ValueError, match='"b" is'), mixed(model, ["a", "b", None, None]):
            pass
        with mixed(model, ["a", None]), pytest.raises(ValueError, match=r"each of 2 rows, .* input has shape \[4, 6\]"):
            model(IDS)
        assert all(getattr(layer, "rows", None) is None for _, layer in adapter_layers(model))
    phicore.merge(model)
    with pytest.raises(ValueError, match="unmerge it first"):
        activate(model, "a")


def test_another_adapter_is_loaded_without_compiling_again(net, randomize, tmp_path):
    torch._dynamo.reset()
    model = with_adapters(net, randomize, a={"target_modules": ["up", "down"]})
    phicore.save_adapter(model, tmp_path, "a")
    first = model(IDS)
    randomize(model, seed=9)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert not torch.allclose(compiled(IDS), first)
    phicore.load_adapter(model, tmp_path, "a")
    torch.testing.assert_close(compiled(IDS), first)
    assert counter.frame_count == 1
