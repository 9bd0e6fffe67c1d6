"""Kinds of adapters and trained parts that meet in one model."""

import copy
import json

import peft
import pytest
import torch
from torch import Tensor, nn

import phicore
from phicore.adapters import FusedDoRALinear, FusedLoRALinear, LoRAExperts, activate, adapter_layers, disabled, mixed
from phicore.adapters.fused import FusedLinear
from phicore.adapters.trained import TrainedPart

DORA = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
WIDTH, PARTS = 8, {"q_proj": 8, "k_proj": 4, "v_proj": 4}


class Attention(nn.Module):
    """q, k and v in one layer, as Phi-3 has them: [B, T, 8] -> [B, T, 8]."""

    head_dim, num_key_value_heads = 4, 1

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).split(list(PARTS.values()), -1)
        return torch.tanh(q) * torch.cat([k, v], -1)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("...i,eoi->...o", x, self.up))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.experts = Attention(), nn.LayerNorm(WIDTH), Experts()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(self.norm(self.attention(x)))


class Net(nn.Module):
    """Tokens [B, T] -> [B, T, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.inner = nn.Module()
        self.inner.layers = nn.ModuleList([Block() for _ in range(3)])
        self.last = nn.Linear(WIDTH, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.inner.layers:
            x = block(x)
        return self.last(x)


IDS = torch.arange(12).view(3, 4)


def build() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().double()


def adapted(model: nn.Module, randomize, name: str = "default", **options) -> nn.Module:
    phicore.attach(model, phicore.LoRAConfig(**{"rank": 2, "alpha": 3, **options}), name)
    for seed, (_, layer) in enumerate(adapter_layers(model, name)):
        randomize(layer, seed=seed + len(name))
    return model


def assert_merges_and_comes_back(model: nn.Module, base: Tensor) -> None:
    y = model(IDS)
    assert not torch.allclose(y, base)
    with disabled(model):
        assert torch.equal(model(IDS), base)
    phicore.merge(model)
    assert not any(isinstance(m, (FusedLinear, LoRAExperts, TrainedPart)) for m in model.modules())
    torch.testing.assert_close(model(IDS), y)
    phicore.unmerge(model)
    assert torch.equal(model(IDS), y)


@DORA
def test_parts_of_fused_layers_in_some_blocks_with_trained_biases(randomize, tmp_path, dora):
    """fused_targets="split" with layers_to_transform and bias="lora_only": forward, gradients, merging and files."""
    options = {"target_modules": ["q_proj", "v_proj"], "fused_targets": "split", "layers_to_transform": [0, 2]}
    model = adapted(build(), randomize, dora=dora, bias="lora_only", **options)
    layers = dict(adapter_layers(model))
    assert list(layers) == [f"inner.layers.{i}.attention.qkv_proj" for i in (0, 2)]
    assert all(list(layer.parts) == ["q_proj", "v_proj"] for layer in layers.values())
    layer = layers["inner.layers.0.attention.qkv_proj"]
    assert not torch.equal(layer.trained_bias, layer.base.bias)
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ layer.merged_weight().T + layer.trained_bias)
    model(IDS).square().sum().backward()
    assert all(p.grad is not None for layer in layers.values() for p in layer.parameters() if p.requires_grad)
    assert_merges_and_comes_back(model, build()(IDS))
    phicore.save_adapter(model, tmp_path)
    for other in (build(), adapted(build(), randomize, dora=dora, bias="lora_only", **options)):
        phicore.load_adapter(other, tmp_path)
        assert isinstance(other.inner.layers[0].attention.qkv_proj, FusedLinear)
        torch.testing.assert_close(other(IDS), model(IDS), rtol=1e-12, atol=1e-12)


def test_pairs_parameters_copies_and_rows_in_one_model(randomize, tmp_path):
    options = {
        "target_modules": ["q_proj", "k_proj"],
        "fused_targets": "split",
        "target_parameters": ["experts.up"],
        "modules_to_save": ["last"],
        "trainable_token_indices": {"embed": [3, 7]},
    }
    model = adapted(build(), randomize, **options)
    kinds = {type(layer).__name__ for _, layer in adapter_layers(model)}
    assert kinds == {"FusedLoRALinear", "LoRAExperts", "TrainedCopy", "TrainedRows"}
    assert_merges_and_comes_back(model, build()(IDS))
    assert torch.equal(copy.deepcopy(model)(IDS), model(IDS))
    phicore.save_adapter(model, tmp_path)
    other = phicore.load_adapter(build(), tmp_path)
    torch.testing.assert_close(other(IDS), model(IDS), rtol=1e-12, atol=1e-12)
    activate(model, {"default": 1.0})
    with pytest.raises(ValueError, match="has no strength"):
        activate(model, {"default": 0.5})


def test_a_file_says_the_blocks_of_layers_beside_parameters_of_all_blocks(randomize, tmp_path):
    """As PEFT has it: layers_to_transform is about target_modules alone."""
    options = {"target_modules": r"inner\.layers\.[02]\..*qkv_proj", "target_parameters": ["experts.up"]}
    model = adapted(build(), randomize, **options)
    phicore.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["target_modules"], config["layers_to_transform"]) == (["qkv_proj"], [0, 2])
    assert config["target_parameters"] == ["experts.up"]
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(theirs(IDS), model(IDS))
    other = phicore.load_adapter(build(), tmp_path)
    torch.testing.assert_close(other(IDS), model(IDS))


@DORA
def test_rows_of_a_batch_by_parts_of_fused_layers(randomize, dora):
    """Each row is what its adapter alone makes of it; "second" stands over "first", whose rows pass by it."""
    options = {"fused_targets": "split", "dora": dora}
    model = adapted(build(), randomize, "first", target_modules=["q_proj", "v_proj"], **options)
    adapted(model, randomize, "second", target_modules=["k_proj"], **options)
    with mixed(model, ["first", None, "second"]):
        y = model(IDS)
    for row, names in enumerate((["first"], [], ["second"])):
        activate(model, names)
        torch.testing.assert_close(y[row : row + 1], model(IDS[row : row + 1]))


@DORA
def test_the_strength_of_a_fused_layer(randomize, dora):
    model = adapted(build(), randomize, target_modules=["q_proj", "v_proj"], fused_targets="split", dora=dora)
    layer = model.inner.layers[1].attention.qkv_proj
    W, whole = layer.dense_base(), layer.merged_weight()
    activate(model, {"default": 0.25})
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ (W + 0.25 * (whole - W)).T + layer.bias)
    activate(model, {"default": 0.0})
    torch.testing.assert_close(model(IDS), build()(IDS))


def test_an_operator_of_the_base_leaves_a_trained_bias_its_place(randomize, monkeypatch):
    """LoRA's fused operator adds the base's own bias, so it is not called where another one trains."""
    layer = randomize(FusedLoRALinear(nn.Linear(WIDTH, 16).double(), PARTS, rank=2, alpha=3))
    monkeypatch.setattr(FusedLoRALinear, "fuses", lambda *_: True)
    layer.trained_bias = nn.Parameter(torch.randn(16, dtype=torch.float64))
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ layer.merged_weight().T + layer.trained_bias)


def test_layers_of_different_scalings_compile_to_one_graph_each(randomize):
    """torch.compile turns a number that differs between layers into a symbol, which torch.cond does not take."""
    x = torch.randn(3, WIDTH)
    for alpha in (3, 5, 7):
        layer = randomize(
            FusedDoRALinear(nn.Linear(WIDTH, 16), PARTS, rank={"q_proj": 2, "v_proj": alpha}, alpha=alpha)
        )
        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))


def _refused(model: nn.Module, message: str, **options) -> None:
    before = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        phicore.attach(model, phicore.LoRAConfig(**options))
    assert {path: type(module) for path, module in model.named_modules()} == before


def test_what_has_no_meaning_together_is_refused():
    _refused(
        build(), "layers_to_transform=.1. chooses among target_modules", target_modules=["qkv_proj"],
        layers_to_transform=[1], target_parameters=["experts.up"],
    )  # fmt: skip
    model = build()
    _refused(
        model, "bias of last cannot be trained, since target_parameters means parameters of last",
        target_modules=["qkv_proj"], target_parameters=["last.weight"], bias="all",
    )  # fmt: skip
    _refused(
        model, "rows of embed, which is adapted",
        target_modules=["qkv_proj"], target_parameters=["embed.weight"], trainable_token_indices={"embed": [1]},
    )  # fmt: skip
    phicore.attach(model, phicore.LoRAConfig(rank=2, target_modules=[], target_parameters=["experts.up"]))
    with pytest.raises(ValueError, match=r"which has an adapter already; use bias=.lora_only"):
        phicore.attach(model, phicore.LoRAConfig(target_modules=["qkv_proj"], bias="all"), "other")


@pytest.mark.parametrize("fused_targets", ["raise", "split"])
def test_all_biases_beside_an_attention_with_pairs_are_refused(fused_targets):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(WIDTH, 2), "last": nn.Linear(WIDTH, 2)})
    options = {"target_modules": ["attention", "last"], "fused_targets": fused_targets}
    _refused(model, r"the bias of attention\.in_proj, a projection of nn\.MultiheadAttention", bias="all", **options)
    free = nn.ModuleDict({"attention": nn.MultiheadAttention(WIDTH, 2, bias=False), "last": nn.Linear(WIDTH, 2)})
    phicore.attach(free, phicore.LoRAConfig(bias="all", **options))
    assert [path for path, p in free.named_parameters() if p.requires_grad and "bias" in path] == ["last.trained_bias"]


def test_a_fused_path_of_torch_passes_no_trained_copy_by():
    """nn.TransformerEncoderLayer reads the weights of the layers in it where its fused path is open."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
        model = nn.ModuleDict({"block": block, "last": nn.Linear(WIDTH, 2)}).eval()
    x = torch.randn(2, 3, WIDTH)
    with torch.no_grad():
        expected = block(x)
        phicore.attach(model, phicore.LoRAConfig(target_modules=["last"], modules_to_save=["linear1"]))
        block.linear1.trained.weight.mul_(2)
        assert not torch.allclose(block(x), expected)
        activate(model, {})
        torch.testing.assert_close(block(x), expected)
