"""Several adapters in one model: switched, weighed, mixed within a batch, exchanged without compiling again."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

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


DORA, BIAS = {"dora": True}, {"bias": "lora_only"}
TARGETS = ["embed", "conv", "up", "down"]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


OUTPUTS = {"embed": 24 * 8, "conv": 24 * 8, "up": 24 * 12, "down": 24 * 5}  # elements, for all of IDS
PRODUCTS = ("mm", "addmm", "bmm", "convolution", "embedding", "nf4_linear", "nf4_project_with_rows")


class BasePasses(TorchDispatchMode):
    """Notes each operator that takes all of IDS through the weight of a base, and each that decodes one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.paths = {
            tensor.untyped_storage().data_ptr(): path
            for path, layer in adapter_layers(model)
            for tensor in (layer.innermost.packed if hasattr(layer.innermost, "packed") else layer.innermost.weight,)
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) else result
        for tensor in (t for t in args if isinstance(t, Tensor)):
            path = self.paths.get(tensor.untyped_storage().data_ptr())
            product = func._opname in PRODUCTS and first.numel() == OUTPUTS.get(path or "")
            if path and (product or func._opname == "nf4_dequantize"):
                self.seen.append(path)
        return result


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


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_a_strength_of_dora_goes_straight_from_without_it_to_all_of_it(net, randomize, names):
    model = with_adapters(net, randomize, a=DORA, b=DORA | {"rank": 4})
    path, last = "up", names[-1]
    weights = {}
    for strength in (0.0, 0.3, 1.0, -0.5):
        activate(model, dict.fromkeys(names[:-1], 1.0) | {last: strength})
        y = model(IDS)
        phicore.merge(model)
        torch.testing.assert_close(model(IDS), y)
        weights[strength] = model.get_submodule(path).weight
        phicore.unmerge(model)
    under = activate(model, names[:-1])(IDS)
    torch.testing.assert_close(activate(model, dict.fromkeys(names[:-1], 1.0) | {last: 0.0})(IDS), under)
    way = weights[1.0] - weights[0.0]
    for strength in (0.3, -0.5):
        torch.testing.assert_close(weights[strength], weights[0.0] + strength * way)


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


@pytest.mark.parametrize("load", [False, True], ids=["activate", "load_adapter"])
def test_dora_over_parts_of_a_fused_layer_follows_what_is_under_both(randomize, tmp_path, load):
    """The rows of the parts that have no pair have the base's norms for magnitudes: a norm that another is made of."""
    model = nn.ModuleDict({"attention": nn.Module()}).double()
    model.attention.qkv_proj, model.attention.head_dim, model.attention.num_key_value_heads = nn.Linear(8, 16), 4, 1
    of_q = {"dora": True, "target_modules": ["q_proj"], "fused_targets": "split"}
    whole = {"target_modules": ["qkv_proj"]}
    with_adapters(model.double(), randomize, a=whole, b=of_q, c=whole | DORA)
    layer = activate(model, ["a", "b", "c"]).attention.qkv_proj
    if load:
        phicore.save_adapter(model, tmp_path, "a")
        randomize(layer.base.base, seed=9)
        phicore.load_adapter(activate(model, ["a", "b", "c"]), tmp_path, "a")
    else:
        activate(model, ["b", "c"])
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ layer.merged_weight().T + layer.bias)
    norms = layer.base_norm_squared
    layer.refresh_base_norm()
    torch.testing.assert_close(norms, layer.base_norm_squared)


@pytest.mark.parametrize(
    "kinds",
    [
        {"a": {}, "b": {"rank": 4, "target_modules": ["up", "conv"]}},
        {"a": DORA, "b": {"rank": 4, "target_modules": ["up", "conv"]}},
        {"a": {}, "b": DORA},
        {"a": DORA, "b": DORA | {"rank": 4}},
        {"c": DORA, "b": {}, "a": DORA | {"target_modules": ["up", "embed"]}, "d": DORA},
        {"a": BIAS, "b": BIAS | {"target_modules": ["up", "conv"]}},
        {"a": BIAS, "b": DORA | BIAS, "c": {}},
    ],
    ids=lambda kinds: "+".join(
        " ".join([name, *(o for o in ("dora", "bias") if o in options)]) for name, options in kinds.items()
    ),
)
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_a_batch_of_mixed_names_is_each_row_alone_with_one_base_pass(net, randomize, kinds, nf4):
    if nf4:
        net = phicore.quantize_(net.float(), target_modules=["up", "down"]).double()
    model = with_adapters(net, randomize, **kinds)
    names = ["b", None, "a", "b"]
    expected = []
    for row, name in enumerate(names):
        activate(model, [] if name is None else name)
        expected.append(model(IDS[row : row + 1]))
    activate(model, list(kinds))
    before = model(IDS)
    with mixed(model, names), BasePasses(model) as passes:
        y = model(IDS)
    assert sorted(passes.seen) == sorted(TARGETS)
    torch.testing.assert_close(y, torch.cat(expected))
    assert torch.equal(model(IDS), before)  # afterwards as it was


@pytest.mark.parametrize("dora", [False, True])
def test_mixed_rows_train_their_own_adapter_only(net, randomize, dora):
    model = with_adapters(net, randomize, a={"dora": dora} | BIAS, b={"dora": dora} | BIAS)
    own = ("lora_A", "lora_B", "magnitude", "trained_bias") if dora else ("lora_A", "lora_B", "trained_bias")
    of_a = [getattr(layer.requires_grad_(True), name) for _, layer in adapter_layers(model, "a") for name in own]
    of_a = [parameter for parameter in of_a if parameter is not None]
    for _, layer in adapter_layers(model):
        layer.innermost.requires_grad_(False)
    activate(model, "a")
    expected = torch.autograd.grad(model(IDS[:2]).square().sum(), of_a)
    with mixed(model, ["a", "a", None, None]):
        model(IDS)[:2].square().sum().backward()
    for parameter, exact in zip(of_a, expected, strict=True):
        torch.testing.assert_close(parameter.grad, exact)
    assert all(p.grad is None for _, layer in adapter_layers(model, "b") for p in layer.parameters(recurse=False))


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
        with (
            pytest.raises(ValueError, match=r'"b" is more than .* down trained whole'),
            mixed(model, ["a", "b", None, None]),
        ):
            pass
        with mixed(model, ["a", None]), pytest.raises(ValueError, match=r"each of 2 rows, .* input has shape \[4, 6\]"):
            model(IDS)
        assert all(getattr(layer, "rows", None) is None for _, layer in adapter_layers(model))
    phicore.merge(model)
    with pytest.raises(ValueError, match="unmerge it first"):
        activate(model, "a")


def test_names_of_rows_may_come_from_an_iterator(net, randomize):
    model = with_adapters(net, randomize, a={}, b={})
    names = ["a", "b", None, "b"]
    with mixed(model, names):
        expected = model(IDS)
    with mixed(model, iter(names)):
        assert torch.equal(model(IDS), expected)


def test_a_mixed_batch_leaves_the_adapters_whole(net, randomize, tmp_path):
    model = with_adapters(net, randomize, a=BIAS, b=BIAS)
    phicore.save_adapter(model, tmp_path / "before", "a")
    with mixed(model, ["a", "b", None, "a"]):
        phicore.save_adapter(model, tmp_path / "within", "a")
    files = [(tmp_path / when / "adapter_model.safetensors").read_bytes() for when in ("before", "within")]
    assert files[0] == files[1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_run_again_behind_a_mixed_batch_are_refused(net, randomize, reentrant):
    """By torch's own checkpoint, of which no model tells: reentrant, it would give other gradients without a word."""
    model = with_adapters(net, randomize, a={}, b={"target_modules": ["embed", "up"]})
    up = model.up
    model.up = nn.Identity()
    model.up.forward = lambda x: checkpoint(up, x, use_reentrant=reentrant)
    model.up.layer = up
    names = ["a", "b", None, "a"]
    with mixed(model, names):
        loss = model(IDS).square().sum()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"call backward\(\) within the `with` block"):
            loss.backward(retain_graph=True)
    model.zero_grad()
    with mixed(model, names):
        model(IDS).square().sum().backward()
    assert up.lora_B.grad.any()
    model(IDS).sum().backward()  # nothing of it is left


# ===== disabled and mixed, one in another and side by side =====


def test_it_is_settled_within_mixed_and_disabled_who_answers(net, randomize, tmp_path):
    """What is done there would be lost behind them, have the rows of one batch answered for another, or be made of a
    base that is another then: norms of DoRA."""
    plain = net(IDS)
    model = with_adapters(net, randomize, a={}, b=BIAS)
    phicore.save_adapter(model, tmp_path, "a")
    before = model(IDS)
    names = ["a", "b", None, "a"]
    actions = (
        lambda: activate(model, "a"),
        lambda: mixed(model, names).__enter__(),
        lambda: phicore.attach(model, phicore.LoRAConfig(rank=2, dora=True), "c"),
        lambda: phicore.load_adapter(model, tmp_path, "a"),
        lambda: phicore.load_adapter(model, tmp_path, "c"),
    )
    with mixed(model, names):
        rows = model(IDS)
        for action in actions:
            with pytest.raises(ValueError, match=r"within mixed\(\) it is settled which adapters answer"):
                action()
        with pytest.raises(ValueError, match=r"within mixed\(\) each row has a weight of its own"):
            phicore.merge(model)
        with phicore.disabled(model):
            torch.testing.assert_close(model(IDS), plain)
        assert torch.equal(model(IDS), rows)
    with phicore.disabled(model):
        for action in actions:
            with pytest.raises(ValueError, match=r"within disabled\(\) it is settled which adapters answer"):
                action()
        torch.testing.assert_close(model(IDS), plain)
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("action", [lambda m: m.float().double(), lambda m: m.load_state_dict(m.state_dict())])
def test_norms_are_those_of_the_adapters_again_behind_disabled(net, randomize, action):
    model = with_adapters(net, randomize, a={}, b=DORA, c=DORA)
    model.float().double()  # its weights are rounded
    activate(model, ["a", "b", "c"])
    before = model(IDS)
    with phicore.disabled(model), phicore.disabled(model):
        action(model)
    torch.testing.assert_close(model(IDS), before)


def test_disabled_may_end_in_any_order(net, randomize):
    """As they do in threads, and in generators that take turns."""
    base = net(IDS)
    model = with_adapters(net, randomize, a={}, b={"target_modules": ["up"]})
    activate(model, "b")
    y = model(IDS)
    first, second, third = (phicore.disabled(model) for _ in range(3))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    torch.testing.assert_close(model(IDS), base)
    third.__enter__()
    second.__exit__(None, None, None)
    torch.testing.assert_close(model(IDS), base)
    third.__exit__(None, None, None)
    assert torch.equal(model(IDS), y)


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


# ===== models that torch.compile has wrapped, whole or layer by layer =====


def each_compiled(model: nn.Module) -> nn.Module:
    """With each part of a model in a wrapper of torch.compile's own."""
    for name, part in model.named_children():
        setattr(model, name, torch.compile(part, backend="eager"))
    return model


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), each_compiled])
@pytest.mark.parametrize("dora", [False, True])
def test_compiled_layers_get_adapters_by_their_names_and_answer_with_them(net, randomize, wrap, dora):
    """A wrapper goes on to call what it was made for, whatever stands in its place within it."""
    torch._dynamo.reset()
    plain, wrapped = net, wrap(copy.deepcopy(net))
    torch.testing.assert_close(wrapped(IDS), plain(IDS))
    options = {"target_modules": "(embed|conv|up|down)", "rank_pattern": {"^up": 3}, "dora": dora}
    for model in (plain, wrapped):
        torch.manual_seed(0)
        phicore.attach(model, phicore.LoRAConfig(rank=2, **options))
        randomize(model)
    torch.testing.assert_close(wrapped(IDS), plain(IDS))
    assert phicore.merge(wrapped).keys() == phicore.merge(plain).keys() == {*TARGETS}
    torch.testing.assert_close(wrapped(IDS), plain(IDS))
    for model in (plain, wrapped):
        phicore.unmerge(model)
        randomize(model, seed=5)
    torch.testing.assert_close(wrapped(IDS), plain(IDS))


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), each_compiled])
def test_compiled_layers_are_quantized_by_their_names(net, wrap):
    torch._dynamo.reset()
    plain, wrapped = net.float(), wrap(copy.deepcopy(net))
    wrapped(IDS)
    for model in (plain, wrapped):
        phicore.quantize_(model, target_modules="(up|down)")
    torch.testing.assert_close(wrapped(IDS), plain(IDS))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), checkpoint_wrapper])
def test_a_base_may_be_wrapped(layer_of, randomize, dora, wrap):
    """A square one too, whose weight and its transpose have one shape."""
    layer = (phicore.DoRALinear if dora else phicore.LoRALinear)(layer_of("linear", 8, 8)[0], rank=2)
    x, weight = torch.randn(3, 8, dtype=torch.float64), randomize(layer).merged_weight()
    y = layer(x)
    layer.base = wrap(layer.base)
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(layer.merged_weight(), weight)
