"""merge and unmerge: one plain layer for each adapted one, and the base bit for bit again."""

import copy

import pytest
import torch
from torch import nn

import phicore
from phicore.adapters import adapter_layers, mixed
from phicore.adapters.merging import merge_for_good
from tests.adapters import test_tied
from tests.adapters.toys import CONFIG, DORA, NF4, Experts, adapted, build, trainable, x_for


@NF4
@DORA
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_merged_equals_unmerged(toy, randomize, relative_error, nf4, dora, dtype, bound):
    model = build(toy, nf4).to(dtype)
    dense_keys = toy().state_dict().keys()
    adapted(model, randomize, dora=dora)
    model.train()
    x = x_for(model)
    y, state = model(x), copy.deepcopy(model.state_dict())
    errors = phicore.merge(model)
    assert not list(adapter_layers(model))
    assert relative_error(model(x), y) < bound
    assert model.state_dict().keys() == dense_keys  # over NF4 too: merging makes its layers dense
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.embed.training
    assert trainable(model) == set()

    assert phicore.unmerge(model) is model
    assert torch.equal(model(x), y)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(not layer.base.training or layer.training for _, layer in adapter_layers(model))
    assert trainable(model)
    assert set(errors) == {p for p, _ in adapter_layers(model)}


@DORA
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merge_reports_the_rounding_error(toy, randomize, relative_error, dora, dtype):
    model = adapted(build(toy, dtype=dtype), randomize, dora=dora)
    layers = dict(adapter_layers(model))
    errors = phicore.merge(model)
    eps = torch.finfo(dtype).eps
    for path, layer in layers.items():
        base, A, B = (t.detach().double() for t in (layer.base.weight, layer.lora_A, layer.lora_B))
        exact = base + 7 / 3 * B @ A
        if dora:
            exact = layer.magnitude.detach().double()[:, None] * exact / exact.norm(dim=1, keepdim=True)
        merged = model.get_submodule(path).weight
        assert merged.dtype == dtype
        assert ((merged.double() - exact).abs() <= 0.51 * eps * exact.abs() + 1e-5 * exact.abs().max() * eps**0.1).all()
        assert errors[path] <= eps / 2
        if dtype in (torch.bfloat16, torch.float16):
            assert errors[path] == pytest.approx(relative_error(merged, exact), rel=1e-2)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_requantize_keeps_nf4_and_reports_its_error(toy, randomize, relative_error, dtype, double_quant):
    model = toy(dtype=dtype)
    phicore.quantize_(model, block_size=128, double_quant=double_quant)
    before = copy.deepcopy(model)
    adapted(model, randomize)
    layers = dict(adapter_layers(model))
    x = x_for(model)
    y = model(x)
    errors = phicore.merge(model, requantize=True)
    assert model.state_dict().keys() == before.state_dict().keys()
    for path, layer in layers.items():
        merged = model.get_submodule(path)
        assert type(merged) is phicore.NF4Linear
        assert (merged.block_size, merged.double_quant, merged.dtype) == (128, double_quant, dtype)
        exact = layer.base.nf4.dequantize(torch.float64) + 7 / 3 * layer.lora_B.double() @ layer.lora_A.double()
        assert errors[path] == pytest.approx(relative_error(merged.nf4.dequantize(torch.float32), exact), rel=1e-3)
        assert 0.05 < errors[path] < 0.15
        assert torch.equal(merged.bias, layer.bias) if layer.bias is not None else merged.bias is None
    before.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(before(x), model(x))
    assert torch.equal(phicore.unmerge(model)(x), y)


def test_requantize_leaves_dense_layers_dense(toy, randomize):
    model = toy(dtype=torch.float32)
    phicore.quantize_(model, ["up_proj"])
    adapted(model, randomize)
    phicore.merge(model, requantize=True)
    assert type(model.blocks[0].up_proj) is phicore.NF4Linear
    assert type(model.blocks[0].down_proj) is nn.Linear


def test_a_merged_weight_of_zero_has_a_finite_error():
    model = nn.ModuleDict({"fc": nn.Linear(3, 3)})
    nn.init.zeros_(model["fc"].weight)
    phicore.attach(model, phicore.LoRAConfig(**CONFIG))
    assert phicore.merge(model) == {"fc": 0.0}


@pytest.mark.parametrize("merging", [phicore.merge, merge_for_good])
@pytest.mark.parametrize(
    ("value", "message"), [(300.0, r"reaches 4\.2e\+05, and torch.float16 ends at 6\.55e\+04"), (torch.nan, "NaN")]
)
@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_a_weight_that_overflows_or_is_not_finite_is_not_merged(unchanged, kind, value, message, merging):
    layer, options = nn.Linear(8, 8), {"target_modules": ["fc"]}
    if kind == "experts":
        layer, options = Experts(), {"target_modules": [], "target_parameters": ["fc.up"]}
    model = phicore.attach(nn.ModuleDict({"fc": layer}).half(), phicore.LoRAConfig(rank=2, alpha=14 / 3, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value if parameter.requires_grad else 0)
    with unchanged(model), pytest.raises(ValueError, match=f"fc: the merged weight .*{message}"):
        merging(model)


def test_unmerge_follows_the_mode_of_the_merged_model(toy, randomize):
    model = adapted(toy(), randomize, dropout=0.5).train()
    phicore.merge(model)
    phicore.unmerge(model.eval())
    assert not any(module.training for module in model.modules())


@DORA
def test_unmerge_follows_a_cast_of_the_merged_model(randomize, dora):
    """As if the model had been cast with its adapters in it."""
    model = nn.ModuleDict({"fc": nn.Linear(64, 6), "coded": nn.Linear(64, 6, bias=False), "conv": nn.Conv1d(2, 3, 2)})
    model.update({"attention": nn.MultiheadAttention(6, 2, kdim=4), "whole": nn.Linear(6, 6), "experts": Experts()})
    model.update({"embed": nn.Embedding(9, 6), "rows": nn.Embedding(9, 6), "head": nn.Linear(6, 9)})
    model["head"].weight = model["embed"].weight
    phicore.quantize_(model, ["coded"])
    options = {"modules_to_save": ["whole"], "trainable_token_indices": {"rows": [2]}}
    options |= {"target_modules": ["fc", "coded", "conv", "attention", "embed"], "target_parameters": ["experts.up"]}
    adapted(model, randomize, dora=dora, adapter_dtype=torch.float32, ensure_weight_tying=True, **options)
    expected = copy.deepcopy(model).bfloat16()
    for requantize in (False, True):
        other = copy.deepcopy(model)
        phicore.merge(other, requantize=requantize)
        phicore.unmerge(other.bfloat16())
        assert other.state_dict().keys() == expected.state_dict().keys()
        for (key, value), e in zip(other.state_dict().items(), expected.state_dict().values(), strict=True):
            assert torch.equal(value, e), key
            assert value.dtype == e.dtype, key
        x = torch.randn(3, 64, dtype=torch.bfloat16)
        assert torch.equal(other["fc"](x) + other["coded"](x), expected["fc"](x) + expected["coded"](x))


@DORA
def test_unmerge_leaves_an_adapter_its_own_dtype(randomize, dora):
    model = nn.ModuleDict({"fc": nn.Linear(8, 6), "experts": Experts(), "rows": nn.Embedding(9, 6)}).bfloat16()
    options = {"target_parameters": ["experts.up"], "trainable_token_indices": {"rows": [2]}}
    adapted(model, randomize, target_modules=["fc"], dora=dora, adapter_dtype=torch.float32, **options)
    before = {key: value.dtype for key, value in model.state_dict().items()}
    phicore.merge(model)
    assert {key: value.dtype for key, value in phicore.unmerge(model).state_dict().items()} == before
    assert set(before.values()) >= {torch.bfloat16, torch.float32}


def test_a_merged_model_saves_and_copies_like_a_plain_one(toy, randomize):
    model = adapted(toy(), randomize)
    x = x_for(model)
    phicore.merge(model)
    plain = toy(seed=8)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain(x), model(x))
    other = copy.deepcopy(model)
    phicore.unmerge(other)
    assert not list(adapter_layers(model))
    torch.testing.assert_close(other(x), model(x))


@NF4
@DORA
def test_merging_for_good_gives_the_same_layers(randomize, nf4, dora):
    model = nn.ModuleDict({"tied": test_tied.Net(), "attention": nn.MultiheadAttention(6, 2), "up": nn.Linear(6, 6)})
    model.update({"whole": nn.Linear(6, 6), "up_again": model["up"]})
    if nf4:
        phicore.quantize_(model, ["fc", "up", "up_again"])
    options = {
        "target_modules": ["embed", "fc", "attention", "up", "up_again"],
        "modules_to_save": ["whole"],
        "bias": "lora_only",
    }
    adapted(model, randomize, ensure_weight_tying=True, dora=dora, **options)
    adapted(model, randomize, "second", target_modules=["fc"])
    other = copy.deepcopy(model)
    errors = phicore.merge(model)
    assert merge_for_good(other) == errors
    assert other.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert other["up"] is other["up_again"]
    assert other["tied"].head.weight is other["tied"].embed.weight
    with pytest.raises(ValueError, match="is not merged"):
        phicore.unmerge(other)


@DORA
def test_merging_for_good_holds_one_model(randomize, most_held, dora):
    def build_and_merge(merging) -> None:
        model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(32)])
        merging(adapted(model, randomize, dora=dora))

    layer = 4 * 64 * 64  # bytes
    assert most_held(lambda: build_and_merge(merge_for_good)) < 44 * layer
    assert most_held(lambda: build_and_merge(phicore.merge)) > 64 * layer  # so that unmerge can give the base back


@pytest.mark.parametrize(("nf4", "requantize"), [(False, False), (True, False), (True, True)])
def test_hooks_of_a_base_stay(randomize, nf4, requantize):
    model, seen = nn.Sequential(nn.Linear(64, 8)), []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    handle = model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    adapted(phicore.quantize_(model, ["0"]) if nf4 else model, randomize, target_modules=["0"])
    phicore.merge(model, requantize=requantize)
    x = torch.randn(2, 64, requires_grad=True)
    model(x).sum().backward()
    assert seen == ["forward", "backward"]
    handle.remove()
    model(x).sum().backward()
    assert seen == ["forward", "backward", "forward"]


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("bias", ["none", "lora_only"])
@NF4
def test_what_is_loaded_into_a_merged_model_leaves_the_adapted_layers_as_they_were(
    randomize, unchanged, nf4, bias, requantize
):
    model = nn.Sequential(nn.Linear(64, 8), nn.MultiheadAttention(8, 2))
    adapted(phicore.quantize_(model, ["0"]) if nf4 else model, randomize, target_modules=["0", "1"], bias=bias)
    with unchanged(model[0]), unchanged(model[1].out_proj):
        phicore.merge(model, requantize=requantize)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        phicore.unmerge(model.requires_grad_(True))


def test_hooks_of_an_adapter_stay(randomize, unchanged):
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "experts": Experts(), "whole": nn.Linear(8, 8)})
    options = {"target_parameters": ["experts.up"], "modules_to_save": ["whole"]}
    adapted(model, randomize, target_modules=["fc"], **options)
    x = torch.randn(2, 8)
    handles = [layer.register_forward_hook(lambda _module, _inputs, y: y + 1) for layer in model.values()]
    before = [layer(x) for layer in model.values()]
    phicore.merge(model)
    for layer, y, handle in zip(model.values(), before, handles, strict=True):
        torch.testing.assert_close(layer(x), y)
        handle.remove()
        torch.testing.assert_close(layer(x), y - 1)
    phicore.unmerge(model)
    assert not any(layer._forward_hooks for layer in model.values())
    model["fc"].base.register_forward_hook(lambda *_: None)
    model["fc"].register_forward_hook(lambda *_: None)
    with unchanged(model), pytest.raises(ValueError, match="fc: the LoRALinear and the layer under it both have hooks"):
        phicore.merge(model)


@pytest.mark.parametrize("kind", ["linear", "experts", "whole"])
def test_an_adapter_whose_forward_was_replaced_is_not_merged(randomize, unchanged, kind):
    model = nn.ModuleDict({"linear": nn.Linear(8, 8), "experts": Experts(), "whole": nn.Linear(8, 8)})
    options = {"target_parameters": ["experts.up"], "modules_to_save": ["whole"]}
    adapted(model, randomize, target_modules=["linear"], **options)
    model[kind].forward = model[kind].forward
    with unchanged(model), pytest.raises(ValueError, match=rf"^{kind}: the forward of a .* was replaced"):
        phicore.merge(model)


def test_rows_with_adapters_of_their_own_are_not_merged(unchanged, randomize):
    model = adapted(nn.Sequential(nn.Linear(8, 8)), randomize, target_modules=["0"])
    adapted(model, randomize, "over it", target_modules=["0"])
    with mixed(model, ["default", None]), unchanged(model), pytest.raises(ValueError, match="a weight of its own"):
        phicore.merge(model)


def test_a_bare_adapter_layer_is_not_merged(unchanged):
    layer = phicore.LoRALinear(nn.Linear(4, 3), rank=2)
    with unchanged(layer), pytest.raises(ValueError, match=r"the model itself is a LoRALinear, .* another module"):
        phicore.merge(layer)


@pytest.mark.parametrize("kind", ["linear", "nf4", "experts", "bias"])
def test_a_layer_whose_forward_was_replaced_is_not_merged(unchanged, randomize, kind):
    """accelerate binds a layer's forward to that layer, and a merged copy would answer with the weights of before."""
    layer, options = nn.Linear(8, 8), {"target_modules": ["0"]}
    if kind == "experts":
        layer, options = Experts(), {"target_modules": [], "target_parameters": ["0.up"]}
    if kind == "nf4":
        layer = phicore.NF4Linear.from_linear(layer)
    if kind == "bias":
        options = {"target_modules": ["1"], "bias": "all"}
    layer.forward = layer.forward
    model = adapted(nn.Sequential(layer, nn.Linear(5 if kind == "experts" else 8, 2)), randomize, **options)
    with unchanged(model), pytest.raises(ValueError, match=r"^0: the forward of a .* was replaced, as accelerate does"):
        phicore.merge(model)
