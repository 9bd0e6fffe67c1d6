"""LoRA over stacked parameters, against W + s B A of each expert in float64."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import phicore
from phicore.adapters import LoRAExperts, activate, adapter_layers, mixed
from phicore.adapters.attach import TrainedCopy

IN, HIDDEN, EXPERTS = 6, 5, 3
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


@given(
    transposed=st.booleans(),
    ranks=st.dictionaries(st.sampled_from(["up", "down"]), st.integers(1, 7), min_size=1),
    alpha=st.sampled_from([0.5, 7.0]),
    rslora=st.booleans(),
    lead=st.sampled_from([(), (4,), (0,), (2, 3)]),
)
def test_forward_and_gradients_equal_the_dense_formula(randomize, transposed, ranks, alpha, rslora, lead):
    base = model_of(transposed).experts
    dense = copy.deepcopy(base)
    alphas = {name: alpha + i for i, name in enumerate(ranks)}
    layer = randomize(LoRAExperts(base, ranks, alphas, rslora=rslora))
    leaves, weights = [], {}
    for name, rank in ranks.items():
        A, B = (
            getattr(layer.pairs[name], f"lora_{which}").detach().clone().requires_grad_() for which in "AB"
        )  # [E, rank, in], [E, out, rank]
        leaves += [A, B]
        s = alphas[name] / (math.sqrt(rank) if rslora else rank)
        delta = torch.stack([s * B[e] @ A[e] for e in range(EXPERTS)])
        weights[name] = getattr(dense, name).detach() + (delta.mT if transposed else delta)
    x = torch.randn(*lead, IN, dtype=torch.float64, requires_grad=True)
    expected = torch.func.functional_call(dense, weights, (x,), {"gain": 2.0})
    y = layer(x, gain=2.0)
    torch.testing.assert_close(y, expected)
    own = [p for name in ranks for p in (layer.pairs[name].lora_A, layer.pairs[name].lora_B)]
    assert {id(p) for p in layer.parameters() if p.requires_grad} == {id(p) for p in own}
    grad = torch.randn_like(y)
    for g, e in zip(
        torch.autograd.grad(y, [x, *own], grad), torch.autograd.grad(expected, [x, *leaves], grad), strict=True
    ):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_new_adapter_is_its_base(init, dtype):
    model = model_of(dtype=dtype)
    x = torch.randn(3, IN, dtype=dtype)
    y = model(x)
    config = phicore.LoRAConfig(rank=40, target_modules=["embed"], target_parameters=TARGETS, init=init)
    phicore.attach(model, config)
    assert torch.equal(model(x), y)
    pair = model.experts.pairs["up"]
    assert (pair.lora_A.shape, pair.lora_B.shape) == ((EXPERTS, 40, IN), (EXPERTS, HIDDEN, 40))
    assert pair.lora_A.dtype == dtype
    spread = 1 / math.sqrt(3 * IN) if init == "kaiming" else 1 / 40
    assert float(pair.lora_A.detach().double().std()) == pytest.approx(spread, rel=0.1)
    assert not torch.equal(pair.lora_A[0], pair.lora_A[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_two_adapters_merge_and_unmerge(randomize, relative_error, transposed, dtype):
    model, x = model_of(transposed, dtype), torch.randn(4, IN, dtype=dtype)
    base = model(x)
    adapted(model, randomize, "first", target_modules=["embed"])
    adapted(model, randomize, "second", target_parameters=["experts.up", "router.weight"])
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


def test_compiles_to_one_graph(randomize, check_one_graph):
    check_one_graph(adapted(model_of(dtype=torch.float32), randomize), torch.randn(4, IN))


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


def test_copies_and_states(randomize):
    model, x = adapted(model_of(), randomize), torch.randn(3, IN, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    other = adapted(model_of(), randomize, "another")
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
        ({"dora": True}, "cannot have dora=True: PEFT's format has no magnitudes"),
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
