"""LoRA and DoRA over stacked parameters, against the formulas of each expert in float64."""

import copy
import math
import pickle
import warnings

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import phicore
from phicore.adapters import DoRAExperts, LoRAExperts, activate, adapter_layers, mixed
from phicore.adapters.trained import TrainedCopy

IN, HIDDEN, EXPERTS = 6, 5, 3
DORA = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
TARGETS = ["experts.up", "experts.down"]


class Experts(nn.Module):
    """All experts on all tokens, averaged: [..., in] -> [..., in]."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        up, down = torch.randn(EXPERTS, HIDDEN, IN), torch.randn(EXPERTS, IN, HIDDEN)
        self.is_transposed, self.num_experts = transposed, EXPERTS
        self.up = nn.Parameter(up.mT.contiguous() if transposed else up)
        self.down = nn.Parameter(down.mT.contiguous() if transposed else down)
        self.scale = nn.Parameter(torch.randn(IN))
        self.codes = nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        up, down = (w.mT if self.is_transposed else w for w in (self.up, self.down))
        h = torch.tanh(torch.einsum("...i,ehi->...eh", x, up))
        return gain * self.scale * torch.einsum("...eh,eih->...i", h, down)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(IN, IN))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Model(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(IN, IN)
        self.router, self.experts = Router(), Experts(transposed)

    def forward(self, x: Tensor) -> Tensor:
        assert self.experts.num_experts == EXPERTS  # as code around experts reads their attributes
        return self.experts(self.router(self.embed(x)), gain=0.5)


def model_of(transposed: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(transposed).to(dtype)


def adapted(model: nn.Module, randomize, name: str = "default", **options) -> nn.Module:
    options = {"rank": 2, "alpha": 5, "target_modules": [], "target_parameters": TARGETS, **options}
    return randomize(phicore.attach(model, phicore.LoRAConfig(**options), name), seed=len(name))


def dense_weight(W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor | None, s: float, detached: bool = True) -> Tensor:
    """Of one expert, [out, in]."""
    V = W + s * B @ A
    if magnitude is None:
        return V
    norm = (V.detach() if detached else V).norm(dim=1, keepdim=True)
    return magnitude[:, None] * V / norm


@given(
    dora=st.booleans(),
    transposed=st.booleans(),
    ranks=st.dictionaries(st.sampled_from(["up", "down"]), st.integers(1, 7), min_size=1),
    alpha=st.sampled_from([0.5, 7.0]),
    rslora=st.booleans(),
    lead=st.sampled_from([(), (4,), (0,), (2, 3)]),
)
def test_forward_and_gradients_equal_the_dense_formula(randomize, dora, transposed, ranks, alpha, rslora, lead):
    base = model_of(transposed).experts
    dense = copy.deepcopy(base)
    alphas = {name: alpha + i for i, name in enumerate(ranks)}
    layer = randomize((DoRAExperts if dora else LoRAExperts)(base, ranks, alphas, rslora=rslora))
    parts = ("lora_A", "lora_B", "magnitude") if dora else ("lora_A", "lora_B")
    leaves, own, weights = [], [], {}
    for name, rank in ranks.items():
        here = [getattr(layer.pairs[name], part) for part in parts]
        there = [p.detach().clone().requires_grad_() for p in here]  # [E, rank, in], [E, out, rank], [E, out]
        own, leaves = own + here, leaves + there
        s = alphas[name] / (math.sqrt(rank) if rslora else rank)
        A, B, m = (*there, [None] * EXPERTS)[:3]
        W = getattr(dense, name).detach()
        W = W.mT if transposed else W
        stacked = torch.stack([dense_weight(W[e], A[e], B[e], m[e], s) for e in range(EXPERTS)])
        weights[name] = stacked.mT if transposed else stacked
    x = torch.randn(*lead, IN, dtype=torch.float64, requires_grad=True)
    expected = torch.func.functional_call(dense, weights, (x,), {"gain": 2.0})
    y = layer(x, gain=2.0)
    torch.testing.assert_close(y, expected)
    assert {id(p) for p in layer.parameters() if p.requires_grad} == {id(p) for p in own}
    grad = torch.randn_like(y)
    for g, e in zip(
        torch.autograd.grad(y, [x, *own], grad), torch.autograd.grad(expected, [x, *leaves], grad), strict=True
    ):
        torch.testing.assert_close(g, e)


def test_the_norm_of_dora_has_no_gradient(randomize):
    layer = randomize(DoRAExperts(model_of().experts, {"up": 2}, 5.0))
    pair, W = layer.pairs["up"], layer.base.up.detach()
    A, B, m = (p.detach().clone().requires_grad_() for p in (pair.lora_A, pair.lora_B, pair.magnitude))
    other = torch.stack([dense_weight(W[e], A[e], B[e], m[e], 2.5, detached=False) for e in range(EXPERTS)])
    torch.testing.assert_close(layer.weights()["up"], other)
    grad = torch.randn_like(other)
    (ours,) = torch.autograd.grad(layer.weights()["up"], pair.lora_B, grad)
    (theirs,) = torch.autograd.grad(other, B, grad)
    assert not torch.allclose(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_zero_rows_of_dora_stay_finite(dtype):
    base = model_of(dtype=dtype).experts
    base.up.data[1, 2] = 0
    layer = DoRAExperts(base, {"up": 2})
    x = torch.randn(3, IN, dtype=dtype)
    y = layer(x)
    assert torch.allclose(y, base(x), rtol=1e-6 if dtype == torch.float64 else 5e-2, atol=5e-2)
    y.sum().backward()
    pair = layer.pairs["up"]
    assert all(p.grad.isfinite().all() for p in (pair.lora_A, pair.lora_B, pair.magnitude))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@DORA
def test_a_new_adapter_is_its_base(relative_error, init, dtype, dora):
    model = model_of(dtype=dtype)
    x = torch.randn(3, IN, dtype=dtype)
    y = model(x)
    config = phicore.LoRAConfig(rank=40, target_modules=["embed"], target_parameters=TARGETS, init=init, dora=dora)
    phicore.attach(model, config)
    if dora:
        bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        assert relative_error(model(x), y) < bound
    else:
        assert torch.equal(model(x), y)
    pair = model.experts.pairs["up"]
    assert (pair.lora_A.shape, pair.lora_B.shape) == ((EXPERTS, 40, IN), (EXPERTS, HIDDEN, 40))
    assert pair.lora_A.dtype == dtype
    spread = 1 / math.sqrt(3 * IN) if init == "kaiming" else 1 / 40
    assert float(pair.lora_A.detach().double().std()) == pytest.approx(spread, rel=0.1)
    assert not torch.equal(pair.lora_A[0], pair.lora_A[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@DORA
def test_two_adapters_merge_and_unmerge(randomize, relative_error, transposed, dtype, dora):
    model, x = model_of(transposed, dtype), torch.randn(4, IN, dtype=dtype)
    base = model(x)
    adapted(model, randomize, "first", target_modules=["embed"], dora=dora)
    adapted(model, randomize, "second", dora=dora, target_parameters=["experts.up", "router.weight"])
    y, state = model(x), copy.deepcopy(model.state_dict())
    assert {p for p, _ in adapter_layers(model, "second")} == {"experts", "router"}
    with phicore.disabled(model):
        assert torch.equal(model(x), base)
    errors = phicore.merge(model)
    assert errors.keys() == {"embed", "experts", "router"}
    assert (0 < errors["experts"] < 4e-3) if dtype == torch.bfloat16 else errors["experts"] == 0
    assert relative_error(model(x), y) < (5e-2 if dtype == torch.bfloat16 else 1e-12)
    assert model.state_dict().keys() == model_of().state_dict().keys()
    assert type(model.experts) is Experts
    phicore.unmerge(model)
    assert torch.equal(model(x), y)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_strengths_and_mixing(randomize):
    model, x = model_of(), torch.randn(4, IN, dtype=torch.float64)
    base = model(x)
    adapted(model, randomize, "first")
    y = model(x)
    adapted(model, randomize, "second")
    both, W = model.experts.weights(), dict(model.experts.innermost.named_parameters())
    activate(model, "first")
    torch.testing.assert_close(model(x), y)
    one = model.experts.weights()
    activate(model, "second")
    other = model.experts.weights()
    for name in ("up", "down"):
        torch.testing.assert_close(both[name] - W[name], one[name] + other[name] - 2 * W[name])
    activate(model, {"first": 1e-9, "second": 0.0})
    torch.testing.assert_close(model(x), base)
    with (
        pytest.raises(ValueError, match=r"holds .*experts adapted in its parameters, which cannot be mixed"),
        mixed(model, ["first"]),
    ):
        pass


def test_the_adapted_weights_are_formed_once(randomize, saved_for_backward):
    model = adapted(model_of(), randomize)
    x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)
    kept = saved_for_backward(lambda: model(x).sum(), model)
    assert sum(t.numel() == EXPERTS * HIDDEN * IN for t in kept) == 2


@DORA
def test_compiles_to_one_graph(randomize, check_one_graph, dora):
    check_one_graph(adapted(model_of(dtype=torch.float32), randomize, dora=dora), torch.randn(4, IN))


def test_a_strength_of_dora_goes_straight(randomize):
    model = adapted(model_of(), randomize, dora=True)
    whole, W = model.experts.weights()["up"], model.experts.base.up
    activate(model, {"default": 0.3})
    torch.testing.assert_close(model.experts.weights()["up"], W + 0.3 * (whole - W))


@pytest.mark.parametrize("transposed", [False, True])
def test_dora_is_saved_and_loaded(randomize, tmp_path, transposed):
    model = adapted(model_of(transposed), randomize, dora=True, target_modules=["embed"])
    phicore.save_adapter(model, tmp_path)
    x = torch.randn(3, IN, dtype=torch.float64)
    for other in (model_of(transposed), adapted(model_of(transposed), randomize, dora=True, target_modules=["embed"])):
        phicore.load_adapter(other, tmp_path)
        assert torch.equal(other(x), model(x))
    lora = adapted(model_of(transposed), randomize, target_modules=["embed"])
    with pytest.raises(ValueError, match="use_dora of embed: True in the file, False here"):
        phicore.load_adapter(lora, tmp_path)
    with pytest.raises(ValueError, match="use_dora=True"):  # PEFT says no, by name
        peft.PeftModel.from_pretrained(model_of(transposed), tmp_path)


def test_all_linear_tells_of_experts_that_it_leaves(tiny, tmp_path):
    """They are most of such a model, and quantize_ tells of them, too. Who names its layers knows what is left."""
    model = tiny("mixtral", dtype=torch.float32)
    stacks = [p for p in model.parameters() if p.dim() == 3]
    share = sum(p.numel() for p in stacks) / sum(p.numel() for p in model.parameters())
    told = rf"stacked parameters, {share:.0%} of the model, .* unless target_parameters names them: .*gate_up_proj and"
    with pytest.warns(UserWarning, match=told) as caught:
        phicore.attach(model, phicore.LoRAConfig(rank=2))
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=f"stacked parameters, {share:.0%} of the model, which keep"):
        coded = phicore.quantize_(tiny("mixtral", dtype=torch.float32))
    with pytest.warns(UserWarning, match=told):  # the same share, though buffers hold the rest
        phicore.attach(coded, phicore.LoRAConfig(rank=2))
    phicore.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        phicore.load_adapter(tiny("mixtral", dtype=torch.float32), tmp_path)
        phicore.attach(tiny("mixtral", dtype=torch.float32), phicore.LoRAConfig(rank=2, target_modules=["q_proj"]))
        named = phicore.LoRAConfig(rank=2, target_parameters=["experts.down_proj"])
        phicore.attach(tiny("mixtral", dtype=torch.float32), named)


def test_every_way_that_transformers_runs_experts(tiny, randomize):
    answers = {}
    for way in ("eager", "batched_mm", "grouped_mm"):
        model = tiny("mixtral", dtype=torch.float32, intermediate_size=48)
        model.set_experts_implementation(way)
        torch.manual_seed(0)
        config = phicore.LoRAConfig(target_modules=[], target_parameters=["gate_up_proj", "down_proj"])
        answers[way] = randomize(phicore.attach(model, config))(torch.arange(6)[None]).logits
    torch.testing.assert_close(answers["batched_mm"], answers["eager"])
    torch.testing.assert_close(answers["grouped_mm"], answers["eager"])


def test_autocast_keeps_the_sum_in_the_weights_dtype(randomize):
    model = adapted(model_of(dtype=torch.float32), randomize)
    with torch.autocast("cpu", torch.bfloat16):
        assert {w.dtype for w in model.experts.weights().values()} == {torch.float32}


@DORA
def test_copies_and_states(randomize, dora):
    model, x = adapted(model_of(), randomize, dora=dora), torch.randn(3, IN, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    other = adapted(model_of(), randomize, "another", dora=dora)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), model(x))
    assert model.half()(x.half()).isfinite().all()


def test_a_shared_module_has_one_adapter(randomize):
    model = model_of()
    model.again = nn.ModuleDict({"experts": model.experts})
    adapted(model, randomize)
    assert model.again.experts is model.experts
    phicore.merge(model)
    assert model.again.experts is model.experts
    phicore.unmerge(model)


def test_patterns_exclusions_and_whole_modules(randomize):
    model = model_of()
    config = {"rank_pattern": {"experts.up": 3}, "alpha_pattern": {"down": 9.0}, "modules_to_save": ["router"]}
    adapted(model, randomize, target_parameters=[*TARGETS, "router.weight"], **config)
    assert model.experts.ranks == {"up": 3, "down": 2}
    assert model.experts.alphas == {"up": 5, "down": 9.0}
    assert isinstance(model.router, TrainedCopy)
    model = adapted(model_of(), randomize, target_parameters=[*TARGETS, "weight"], exclude_modules=["embed", "experts"])
    assert {p for p, _ in adapter_layers(model)} == {"router"}
    both = {"target_modules": ["embed"], "target_parameters": [*TARGETS, "router.weight"]}
    model = adapted(model_of(), randomize, **both, exclude_modules=["experts"])
    assert {p for p, _ in adapter_layers(model)} == {"embed", "router"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ["experts.upp"]}, r'target_parameters entry "experts\.upp"; did you mean up'),
        ({"target_parameters": ["scale"]}, r"experts\.scale has shape \[6\]; .*\[experts, out, in\] or \[out, in\]"),
        (
            {"target_parameters": ["embed.weight"], "target_modules": ["embed"]},
            "embed.weight, and target_modules embed",
        ),
        ({"dropout": 0.1}, "cannot have dropout: a parameter's product has no input"),
        ({"init": "pissa"}, 'init "pissa" is for linear layers, not for parameters'),
        ({"rank_pattern": {"experts.u": 3}}, r'rank_pattern key "experts\.u"; did you mean up'),
        ({"exclude_modules": ["experts"]}, "nothing is left of target_parameters"),
        ({"exclude_modules": ["expert"]}, 'no module matches exclude_modules entry "expert"; did you mean experts'),
        ({"target_parameters": []}, "target_modules must name something"),
    ],
)
def test_what_cannot_be_adapted_is_named(unchanged, options, message):
    model = model_of()
    config = {"target_modules": [], "target_parameters": TARGETS, **options}
    with unchanged(model), pytest.raises(ValueError, match=message):
        phicore.attach(model, phicore.LoRAConfig(**config))


class Mixture(Experts):
    """With layers of its own beside its experts, as a shared expert is one."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.embed = nn.Linear(IN, IN), nn.Embedding(7, IN)


OF_EXPERTS = {"target_parameters": TARGETS, "target_modules": []}
OF_SHARED = {"target_modules": ["shared"]}
SAVED = {"target_modules": ["router"], "modules_to_save": ["shared"]}
ROWS = {"target_modules": ["router"], "trainable_token_indices": {"embed": [1, 3]}}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (OF_SHARED, OF_EXPERTS, r"experts\.up, and experts\.shared, in the same module, has an adapter already"),
        (SAVED, OF_EXPERTS, r"experts\.up, and experts\.shared, in the same module, has an adapter already"),
        (ROWS, OF_EXPERTS, r"experts\.up, and experts\.embed, in the same module, has an adapter already"),
        (OF_EXPERTS, OF_SHARED, "matches experts.base.shared, which is a Linear and cannot be adapted"),
        (OF_EXPERTS, SAVED, "matches experts.base.shared, which stands in experts, where an adapter is"),
        (OF_EXPERTS, ROWS, "rows of experts.base.embed, which is adapted, .* or stands in a module that is"),
        (None, OF_EXPERTS | SAVED, r"experts\.up, and modules_to_save experts\.shared"),
    ],
)
def test_what_stands_in_a_module_of_adapted_parameters_is_refused(unchanged, first, second, message):
    """The one adapter would not be called, or be saved by a name that the model does not have."""
    model = nn.ModuleDict({"router": nn.Linear(IN, IN), "experts": Mixture()})
    if first is not None:
        phicore.attach(model, phicore.LoRAConfig(rank=2, **first), "first")
    with unchanged(model), pytest.raises(ValueError, match=message):
        phicore.attach(model, phicore.LoRAConfig(rank=2, **second), "second")


def test_integer_parameters_and_single_names(unchanged):
    model = model_of()
    with unchanged(model), pytest.raises(TypeError, match=r"experts\.codes has torch\.int8 weights"):
        phicore.attach(model, phicore.LoRAConfig(target_modules=[], target_parameters=["codes"]))
    with pytest.raises(ValueError, match="target_parameters must be a list of names"):
        phicore.LoRAConfig(target_parameters="experts.up")
    for ranks, alpha, message in (
        ({"up": 2, "left": 2}, 1.0, r"Experts\.left is no parameter; Experts has \['up', 'down'"),
        ({}, 1.0, "rank must name parameters"),
        ({"up": 2}, {"down": 2.0}, "and alpha the same"),
        ({"up": 0}, 1.0, "rank must be a whole number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LoRAExperts(model.experts, ranks, alpha)
