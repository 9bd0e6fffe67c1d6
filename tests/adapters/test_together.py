"""Kinds of adapters and trained parts that meet in one model."""

import copy
import json
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import phicore
from phicore.adapters import FusedDoRALinear, FusedLoRALinear, LoRAExperts, activate, adapter_layers, disabled, mixed
from phicore.adapters.fused import FusedLinear
from phicore.adapters.trained import TrainedPart
from tests.adapters.any_model import Drawn

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
    """torch.compile turns a number that differs between layers into a symbol."""
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


@DORA
@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("fused_targets", ["raise", "split"])
def test_of_an_attentions_biases_that_of_out_proj_trains(randomize, tmp_path, bias, fused_targets, dora):
    """As in PEFT, whose rule is the name: in_proj_bias is not called bias."""

    def attention() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"attention": nn.MultiheadAttention(WIDTH, 2), "last": nn.Linear(WIDTH, 2)}).double()

    options = {"target_modules": ["attention", "last"], "fused_targets": fused_targets, "bias": bias, "dora": dora}
    x = torch.randn(3, 2, WIDTH, dtype=torch.float64)

    def output(model: nn.Module) -> Tensor:
        return model["last"](model["attention"](x, x, x)[0])

    with pytest.warns(UserWarning, match=r"leaves attention\.in_proj_bias frozen"):
        model = phicore.attach(attention(), phicore.LoRAConfig(rank=2, **options))
    torch.testing.assert_close(output(model), output(attention()))
    randomize(model)
    biases = ["attention.out_proj.trained_bias", "last.trained_bias"]
    assert [path for path, p in model.named_parameters() if p.requires_grad and "bias" in path] == biases
    y = output(model)
    phicore.save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="in_proj_bias frozen"):
        other = phicore.load_adapter(attention(), tmp_path)
    assert torch.equal(output(other), y)
    if not dora:
        theirs = peft.PeftModel.from_pretrained(attention(), tmp_path, is_trainable=True)
        torch.testing.assert_close(output(theirs.base_model.model), y)
        assert [n.split(".")[-3] for n, p in theirs.named_parameters() if p.requires_grad and n.endswith("bias")] == [
            "out_proj", "last"
        ]  # fmt: skip
    phicore.merge(model)
    assert type(model["attention"]) is nn.MultiheadAttention
    torch.testing.assert_close(output(model), y)
    phicore.unmerge(model)
    assert torch.equal(output(model), y)


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


EVERY = Drawn(  # an attention, parts of an NF4 layer, experts, a convolution and a tied head
    (("attention", True, False, False), ("fused nf4", True, True, False), ("experts", False, False, False),
     ("convolution 2", True, True, False)),
    True,
    True,
    {"rank": 2, "alpha": 3, "target_modules": ["mha", "q_proj", "v_proj", "conv", "embed"], "fused_targets": "split",
     "target_parameters": ["up", "down"], "ensure_weight_tying": True},
)  # fmt: skip


def every(randomize, name: str = "default", model: nn.Module | None = None, seed: int = 1, **options) -> nn.Module:
    model = EVERY.build().float() if model is None else model
    config = phicore.LoRAConfig(**EVERY.options | options)
    return randomize(phicore.attach(model, config, name), seed=seed)


def test_other_batches_and_other_adapters_are_run_without_compiling_again(randomize, tmp_path):
    torch._dynamo.reset()
    model, other = every(randomize, dora=True), every(randomize, dora=True, seed=7)
    phicore.save_adapter(other, tmp_path)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    ids = torch.randint(0, 12, (6, 5))
    for rows in (3, 4, 6):  # the first sees a number, the second that it changes
        torch.testing.assert_close(compiled(ids[:rows]), model(ids[:rows]))
    assert counter.frame_count == 2
    phicore.load_adapter(model, tmp_path)
    torch.testing.assert_close(compiled(ids), other(ids))
    assert counter.frame_count == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_activations_give_the_same_gradients(randomize, reentrant):
    model = every(randomize, dora=True)
    ids = torch.randint(0, 12, (3, 5))
    trained = [p for p in model.parameters() if p.requires_grad]

    def head(x: Tensor) -> Tensor:
        return model.head(x).square().sum()

    expected = torch.autograd.grad(model(ids).square().sum(), trained)
    x = model.embed(ids)
    for layer in model.layers:
        x = checkpoint(layer, x, use_reentrant=reentrant)
    head(x).backward()
    for parameter, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)  # sums in another order


@pytest.mark.parametrize("reentrant", [False, True])
def test_mixed_rows_with_gradient_checkpointing_need_backward_within(tiny, randomize, reentrant):
    model, ids = tiny("llama"), torch.arange(1, 13).view(2, 6)
    for name in ("first", "second"):
        randomize(phicore.attach(model, phicore.LoRAConfig(rank=2, target_modules=["q_proj", "down_proj"]), name))
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients() -> list[Tensor]:
        gradients = [p.grad for p in trained]
        model.zero_grad()
        return gradients

    with mixed(model.train(), ["first", "second"]):
        loss = model(ids).logits.square().sum()
    loss.backward()  # behind it, which is right as long as nothing is computed again
    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with mixed(model, ["first", "second"]):
        model(ids).logits.square().sum().backward()
    for gradient, exact in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(gradient, exact)
    with mixed(model, ["first", "second"]):
        loss = model(ids).logits.square().sum()
    with pytest.raises(RuntimeError, match=r"call backward\(\) within the `with` block"):
        loss.backward()
    model(ids).logits.square().sum().backward()  # without mixed rows nothing is watched
    with mixed(model.eval(), ["first", "second"]):
        loss = model(ids).logits.square().sum()
    loss.backward()


def test_several_adapters_of_every_kind(randomize, tmp_path):
    """Over NF4 with parts of a fused layer: DoRA under LoRA with tokens, each alone as if it were alone, and merged."""
    ids = torch.randint(0, 12, (3, 5))
    tokens = {"target_modules": ["q_proj", "k_proj", "mha"], "trainable_token_indices": {"embed": [3, 7]}}
    second = {"ensure_weight_tying": False, "target_parameters": ["up"], "rslora": True, **tokens}
    first = {"dora": True, "ensure_weight_tying": False, "target_modules": ["q_proj", "v_proj", "conv", "mha"]}
    model = every(randomize, "second", every(randomize, "first", **first), seed=2, **second)
    alone = {"first": every(randomize, "first", **first), "second": every(randomize, "second", seed=2, **second)}
    both = model(ids)
    for name in ("second", "first"):
        phicore.save_adapter(model, tmp_path / name, name)
        phicore.load_adapter(alone[name], tmp_path / name, name)
        torch.testing.assert_close(activate(model, name)(ids), alone[name](ids))
    activate(model, ["first", "second"])
    phicore.merge(model)
    torch.testing.assert_close(model(ids), both)
    phicore.unmerge(model)
    assert torch.equal(model(ids), both)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kind_in_16_bits_and_under_autocast(randomize, relative_error, tmp_path, dtype):
    model, ids = every(randomize, dora=True), torch.randint(0, 12, (3, 5))
    y = model(ids)
    for low in (copy.deepcopy(model).to(dtype), pickle.loads(pickle.dumps(copy.deepcopy(model).to(dtype)))):
        assert low(ids).dtype == dtype
        assert relative_error(low(ids), y) < 0.1
    assert {p.dtype for p in low.parameters()} == {dtype}
    phicore.save_adapter(low, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {dtype}
    with torch.autocast("cpu", dtype):
        z = model(ids)
    assert relative_error(z, y) < 0.1
    z.float().square().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_model_made_on_the_meta_device_takes_a_state_strictly(randomize):
    case = Drawn((*EVERY.kinds[:1], *EVERY.kinds[2:]), True, True, EVERY.options | {"target_modules": ["mha", "embed"]})
    with torch.device("meta"):
        empty = case.build()
    model = randomize(phicore.attach(case.build(), case.config()))
    phicore.attach(empty, case.config())
    empty.load_state_dict(model.state_dict(), strict=True, assign=True)
    ids = torch.randint(0, 12, (3, 5))
    torch.testing.assert_close(empty(ids), model(ids))


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "1"])
def test_a_strength_that_is_no_number_is_named(toy, unchanged, strength):
    model = phicore.attach(toy(), phicore.LoRAConfig(rank=2))
    with unchanged(model), pytest.raises(ValueError, match='strength of "default" must be a finite number'):
        phicore.adapters.activate(model, {"default": strength})
