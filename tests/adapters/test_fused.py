"""Adapters for parts of fused layers, against the dense formula of each part in float64."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import phicore
from phicore.adapters import FusedDoRALinear, FusedLoRALinear, adapter_layers, lora_plus_groups
from phicore.adapters import base as base_layer
from phicore.adapters.fused import FusedLinear

SIZES = {"q": 9, "k": 5, "v": 4}
IN = 11
KINDS = ("linear", "nf4", "lora+linear", "dora+nf4")
DORA = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


def fused(base: nn.Module, randomize, dora: bool, **options):
    options = {"parts": SIZES, "rank": {"q": 3, "v": 2}, "alpha": 5.0, **options}
    return randomize((FusedDoRALinear if dora else FusedLoRALinear)(base, **options), seed=3)


def weight_of(layer: FusedLinear, W, leaves=None):
    """The weight [out, in] by the papers' formulas, part by part, and the leaves that it was computed from."""
    rows, leaves = [], {}
    for name, w in zip(layer.sizes, W.split(list(layer.sizes.values())), strict=True):
        if name not in layer.parts:
            rows.append(w)
            continue
        own = {n: p.detach().double().requires_grad_() for n, p in layer.parts[name].named_parameters()}
        leaves |= {f"parts.{name}.{n}": p for n, p in own.items()}
        rank = layer.ranks[name]
        s = layer.alphas[name] / (math.sqrt(rank) if layer.rslora else rank)
        w = w + s * own["lora_B"] @ own["lora_A"]
        if "magnitude" in own:
            w = (own["magnitude"] / w.detach().norm(dim=1))[:, None] * w
        rows.append(w)
    return torch.cat(rows), leaves


@given(
    kind=st.sampled_from(KINDS),
    dora=st.booleans(),
    ranks=st.dictionaries(st.sampled_from(sorted(SIZES)), st.integers(1, 5), min_size=1),
    alpha=st.sampled_from([0.5, 8, 13.0]),
    rslora=st.booleans(),
    bias=st.booleans(),
    lead=st.sampled_from([(), (3,), (0,), (2, 3)]),
)
def test_forward_and_gradients_equal_the_dense_formula(
    layer_of, randomize, kind, dora, ranks, alpha, rslora, bias, lead
):
    base, W, b = layer_of(kind, sum(SIZES.values()), IN, bias=bias)
    alphas = {name: alpha + i for i, name in enumerate(ranks)}
    layer = fused(base, randomize, dora, rank=ranks, alpha=alphas, rslora=rslora)
    x = torch.randn(*lead, IN, dtype=torch.float64, requires_grad=True)
    weight, leaves = weight_of(layer, W)
    expected = x @ weight.T if b is None else x @ weight.T + b
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    own = dict(layer.named_parameters())
    assert {n for n, p in own.items() if p.requires_grad} == leaves.keys()
    grad = torch.randn_like(y)
    given_grads = torch.autograd.grad(y, [x, *(own[n] for n in leaves)], grad)
    for g, e in zip(given_grads, torch.autograd.grad(expected, [x, *leaves.values()], grad), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.dense_weight(torch.float64), weight.detach(), rtol=1e-6, atol=1e-6)


@DORA
@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_a_new_layer_is_its_base_and_other_rows_stay_so(layer_of, randomize, kind, dora):
    base, _, _ = layer_of(kind, 18, IN, dtype=torch.float32)
    base = base.bfloat16()
    x = torch.randn(6, IN).bfloat16()
    plain = base(x)
    layer = (FusedDoRALinear if dora else FusedLoRALinear)(base, SIZES, {"q": 2, "v": 2})
    torch.testing.assert_close(layer(x), plain, rtol=2e-2, atol=2e-2)
    randomize(layer)
    without_bias = layer.project(x)
    assert torch.equal(without_bias[:, 9:14], phicore.adapters.base.project(base, x)[:, 9:14])  # k, to the last bit
    assert not torch.allclose(without_bias[:, :9], phicore.adapters.base.project(base, x)[:, :9], rtol=1e-2)
    layer.enabled = False
    assert torch.equal(layer(x), plain)


@DORA
def test_one_pass_through_the_base_and_one_decode(layer_of, randomize, dora, monkeypatch):
    class Counted(phicore.NF4Linear):
        """Whose methods can be replaced without standing in the way of others."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    base, _, _ = layer_of("nf4", 18, IN, dtype=torch.float32)
    base.__class__ = Counted
    layer = fused(base, randomize, dora)
    calls = []
    for name in ("forward", "project", "project_with_rows", "dense_weight"):
        method = getattr(Counted, name)
        monkeypatch.setattr(Counted, name, lambda *a, m=method, n=name: calls.append(n) or m(*a), raising=False)
    layer(torch.randn(3, IN)).sum().backward()
    assert calls == ["project_with_rows" if dora else "forward"]


@DORA
@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_what_is_kept_for_the_backward_pass(layer_of, randomize, saved_for_backward, kind, dora):
    """x and x A^T; with DoRA one tensor of the output's size more."""
    base, _, _ = layer_of(kind, 18, IN, dtype=torch.float32)
    layer = fused(base, randomize, dora)
    x = torch.randn(101, IN, requires_grad=True)
    kept = saved_for_backward(lambda: layer(x), layer)
    assert sorted(t.numel() for t in kept if 101 in t.shape) == [101 * 5, 101 * IN, *([101 * 18] if dora else [])]


@DORA
@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_compiles_to_one_graph(layer_of, randomize, kind, dora):
    base, _, _ = layer_of(kind, 18, IN, dtype=torch.float32)
    layer = fused(base, randomize, dora, dropout=0.0)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = torch.randn(5, IN)
    y, z = layer(x), compiled(x)
    torch.testing.assert_close(z, y)
    y.square().sum().backward()
    z.square().sum().backward()
    grads = dict(compiled._orig_mod.named_parameters())
    for name, p in layer.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(grads[name].grad, p.grad)


@DORA
def test_copies_and_states(randomize, dora):
    base = nn.Linear(IN, 18)
    layer = fused(copy.deepcopy(base), randomize, dora)
    x = torch.randn(4, IN)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    other = type(layer)(copy.deepcopy(base), SIZES, {"v": 2, "q": 3}, alpha=5.0)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x), layer(x))
    for cast in (layer.bfloat16(), copy.deepcopy(layer).to(torch.float16)):
        assert {p.dtype for p in cast.parameters()} == {cast.base.weight.dtype}
        assert cast(x.to(cast.base.weight.dtype)).isfinite().all()
    with torch.device("meta"):
        meta = type(layer)(nn.Linear(IN, 18), SIZES, {"q": 3, "v": 2}, alpha=5.0)
    meta = meta.to_empty(device="cpu")
    meta.load_state_dict(other.state_dict())
    assert torch.equal(meta(x), other(x))


@pytest.mark.parametrize("kind", ["linear", "nf4"])
@DORA
def test_merging_leaves_rows_without_a_pair_as_they_are(layer_of, randomize, kind, dora):
    """To the last bit."""
    base, _, _ = layer_of(kind, 18, IN, dtype=torch.float32)
    before = base_layer.dense_weight(base, torch.float32).split(list(SIZES.values()))
    model = nn.Sequential(fused(base, randomize, dora))
    phicore.merge(model)
    for name, rows, part in zip(SIZES, before, model[0].weight.split(list(SIZES.values())), strict=True):
        assert torch.equal(part, rows) != (name in ("q", "v"))


def test_lora_plus_finds_the_b_of_each_part(randomize):
    layer = fused(nn.Linear(IN, 18), randomize, False)
    slow, fast = lora_plus_groups(layer.named_parameters(), 1.0, 4.0)
    assert [len(group["params"]) for group in (slow, fast)] == [2, 2]
    assert fast["lr"] == 4.0


def test_dropout_and_init(randomize):
    layer = fused(nn.Linear(IN, 18), randomize, False, dropout=0.5, init="gaussian")
    x = torch.randn(50, IN)
    assert not torch.allclose(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": {"q": 9, "k": 5}}, r"share out the 18 rows .* got \{'q': 9, 'k': 5\}"),
        ({"parts": {"q": 18, "k": 0}}, "share out the 18 rows"),
        ({"rank": {"o": 2}}, r"some of the parts \['q', 'k', 'v'\]"),
        ({"rank": {}}, "some of the parts"),
        ({"alpha": {"q": 2.0}}, "alpha those that rank names"),
        ({"rank": {"q": 0}}, "rank must be a whole number above 0"),
        ({"rank": 2, "alpha": -1}, "alpha must be a number above 0"),
        ({"init": "pissa"}, 'init "pissa" decomposes a whole weight'),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        FusedLoRALinear(nn.Linear(IN, 18), **{"parts": SIZES, **options})


def test_an_embedding_is_no_base():
    with pytest.raises(TypeError, match=r"FusedLoRALinear adapts nn\.Linear"):
        FusedLoRALinear(nn.Embedding(18, IN), SIZES)


# ===== in a model =====

PARTS = ["q_proj", "v_proj", "up_proj", "o_proj"]
CONFIG = {"rank": 4, "alpha": 7, "fused_targets": "split"}


def split_model(tiny, randomize, dora: bool, **options) -> nn.Module:
    config = phicore.LoRAConfig(**{"target_modules": PARTS, "dora": dora, **CONFIG, **options})
    return randomize(phicore.attach(tiny("phi3"), config))


@DORA
def test_only_the_parts_named_get_an_adapter(tiny, randomize, dora, recwarn):
    model = split_model(
        tiny, randomize, dora, rank_pattern={"q_proj": 2, "1.mlp.gate_up_proj": 5}, alpha_pattern={"0.*up_proj": 3}
    )
    assert not [w for w in recwarn if "fuses" in str(w.message)]
    layers = {path.removeprefix("model.layers."): layer for path, layer in adapter_layers(model)}
    assert {p: layer.ranks for p, layer in layers.items() if isinstance(layer, FusedLinear)} == {
        "0.self_attn.qkv_proj": {"q_proj": 2, "v_proj": 4},
        "1.self_attn.qkv_proj": {"q_proj": 2, "v_proj": 4},
        "0.mlp.gate_up_proj": {"up_proj": 4},
        "1.mlp.gate_up_proj": {"up_proj": 5},
    }
    assert layers["0.self_attn.qkv_proj"].sizes == {"q_proj": 32, "k_proj": 16, "v_proj": 16}
    assert layers["0.mlp.gate_up_proj"].alphas == {"up_proj": 3}
    assert {p.rsplit(".")[-1] for p, layer in layers.items() if not isinstance(layer, FusedLinear)} == {"o_proj"}


@DORA
def test_merge_and_unmerge(tiny, randomize, relative_error, dora):
    model, ids = split_model(tiny, randomize, dora), torch.arange(12).view(2, 6)
    y, state = model(ids).logits, copy.deepcopy(model.state_dict())
    phicore.merge(model)
    assert relative_error(model(ids).logits, y) < 1e-6
    assert model.state_dict().keys() == tiny("phi3").state_dict().keys()
    phicore.unmerge(model)
    assert torch.equal(model(ids).logits, y)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_splitting_is_what_adapters_of_separate_layers_are(tiny, randomize):
    """Phi-3 with an adapter a part against Llama with an adapter a layer, the weights being the same."""
    llama, phi = tiny("llama", rms_norm_eps=1e-5), tiny("phi3", rms_norm_eps=1e-5)
    state = phi.state_dict()
    for key, value in llama.state_dict().items():
        if key in state:
            state[key] = value
    for i in range(2):
        for whole, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            owner = llama.get_submodule(f"model.layers.{i}.{whole.split('.')[0]}")
            state[f"model.layers.{i}.{whole}.weight"] = torch.cat(
                [getattr(owner, f"{part}_proj").weight.detach() for part in parts]
            )
    phi.load_state_dict(state)
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(phi(ids).logits, llama(ids).logits)
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    for model in (llama, phi):
        phicore.attach(model, phicore.LoRAConfig(target_modules=targets, dora=True, **CONFIG))
    randomize(llama)
    own = dict(llama.named_parameters())
    with torch.no_grad():
        for path, layer in adapter_layers(phi):
            for part, pair in layer.parts.items():
                for name, parameter in pair.named_parameters():
                    parameter.copy_(own[f"{path.rpartition('.')[0]}.{part}.{name}"])
    torch.testing.assert_close(phi(ids).logits, llama(ids).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "qkv_proj"]}, "qkv_proj whole and its parts"),
        ({"init": "pissa"}, 'init "pissa" decomposes a whole weight and cannot start the parts of .*qkv_proj'),
        ({"rank_pattern": {"k_proj": 3}}, 'rank_pattern key "k_proj"'),
        ({"target_modules": ["layers.7.q_proj"]}, 'use "qkv_proj"'),
    ],
)
def test_what_cannot_be_split_is_named(tiny, unchanged, options, message):
    model = tiny("phi3")
    config = phicore.LoRAConfig(**{"target_modules": PARTS, **CONFIG, **options})
    with unchanged(model), pytest.raises(ValueError, match=message):
        phicore.attach(model, config)


def test_a_layer_laid_out_in_another_way_is_not_split(unchanged):
    model = nn.ModuleDict({"attention": nn.ModuleDict({"qkv_proj": nn.Linear(8, 24)})})  # CodeGen's, say
    config = phicore.LoRAConfig(target_modules=["q_proj"], **CONFIG)
    with unchanged(model), pytest.raises(ValueError, match=r"cannot tell which rows of attention\.qkv_proj"):
        phicore.attach(model, config)


def test_a_gate_that_lies_behind(randomize):
    class Phi4MultimodalAudioMLP(nn.Module):  # as transformers has it: up, gate = gate_up_proj(x).chunk(2)
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Linear(6, 8)

    model = nn.ModuleDict({"mlp": Phi4MultimodalAudioMLP()})
    randomize(phicore.attach(model, phicore.LoRAConfig(target_modules=["up_proj"], **CONFIG)))
    changed = (model["mlp"].gate_up_proj.product() != 0).any(1)
    assert changed.tolist() == [True] * 4 + [False] * 4


def test_all_linear_takes_fused_layers_whole(tiny):
    model = phicore.attach(tiny("phi3"), phicore.LoRAConfig(**CONFIG))
    assert not any(isinstance(layer, FusedLinear) for _, layer in adapter_layers(model))
