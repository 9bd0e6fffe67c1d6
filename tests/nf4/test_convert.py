"""phicore.quantize_: which layers become NF4 and that a failure changes nothing."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import GPT2Config, GPT2LMHeadModel

import phicore
from phicore.nf4 import convert


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def test_all_linear_leaves_the_head(toy):
    model = toy(dtype=torch.float32)
    before = kinds(model)
    assert phicore.quantize_(model) is model
    changed = {name for name, kind in kinds(model).items() if kind is not before[name]}
    linears = {name for name, kind in before.items() if kind is nn.Linear}
    assert changed == linears - {"head"}
    assert all(kinds(model)[name] is phicore.NF4Linear for name in changed)


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tiny, tied, relative_error):
    model = tiny("llama", tied=tied, dtype=torch.float32)
    ids = torch.arange(12).view(2, 6)
    dense = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    phicore.quantize_(model)
    assert type(model.lm_head) is nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    layers = {name: m for name, m in model.named_modules() if isinstance(m, phicore.NF4Linear)}
    assert set(layers) == set(dense) - {"lm_head"}
    assert len(layers) == 2 * 7
    logits = model(ids).logits
    with torch.no_grad():  # the same model with the decoded weights computes the same
        reference = tiny("llama", tied=tied, dtype=torch.float32)
        for name, layer in layers.items():
            reference.get_submodule(name).weight.copy_(layer.nf4.dequantize())
            assert relative_error(layer.nf4.dequantize(), dense[name]) < 0.12
    torch.testing.assert_close(logits, reference(ids).logits)


def test_a_head_tied_by_weight_alone_is_left(toy):
    model = nn.Sequential(nn.Embedding(10, 20), nn.Linear(20, 20), nn.Linear(20, 10, bias=False))
    model[2].weight = model[0].weight
    phicore.quantize_(model)
    assert [type(m) for m in model] == [nn.Embedding, phicore.NF4Linear, nn.Linear]


def test_shared_layers_stay_shared(toy):
    model = toy(shared=True, dtype=torch.float32)
    phicore.quantize_(model)
    assert model.blocks[2] is model.blocks[0]
    assert isinstance(model.blocks[0].up_proj, phicore.NF4Linear)

    twice = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": twice, "b": nn.Linear(8, 8), "c": twice})
    phicore.quantize_(model)
    assert model["a"] is model["c"]
    assert model["a"] is not model["b"]
    assert isinstance(model["a"], phicore.NF4Linear)


def test_targets_and_exclusions(toy):
    model = phicore.quantize_(toy(dtype=torch.float32), ["up_proj", "head"], ["blocks.1.up_proj"])
    assert {n for n, k in kinds(model).items() if k is phicore.NF4Linear} == {"blocks.0.up_proj", "head"}
    model = phicore.quantize_(toy(dtype=torch.float32), r"blocks\.\d\.\w+", ["down_proj"])
    assert {n for n, k in kinds(model).items() if k is phicore.NF4Linear} == {"blocks.0.up_proj", "blocks.1.up_proj"}


def test_options_and_progress(toy):
    names = []
    model = phicore.quantize_(
        toy(dtype=torch.bfloat16).eval(), block_size=128, double_quant=False, progress=names.append
    )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, phicore.NF4Linear)}
    assert names == list(layers)
    for layer in layers.values():
        assert (layer.block_size, layer.double_quant, layer.dtype) == (128, False, torch.bfloat16)
        assert not layer.training
    assert model(torch.randn(3, 10).bfloat16()).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_weight_in_the_last_layer_changes_nothing_and_is_named(toy, unchanged, bad):
    model = toy(dtype=torch.float32)
    with torch.no_grad():
        model.blocks[1].down_proj.weight[-1, -1] = bad
    names = []
    with unchanged(model), pytest.raises(ValueError, match=r"blocks\.1\.down_proj\.weight holds NaN or Inf"):
        phicore.quantize_(model, progress=names.append)
    assert names == []


def test_a_weight_too_large_for_double_quant_changes_nothing_and_is_named(toy, unchanged):
    model = toy(dtype=torch.float32)
    last = model.blocks[1].down_proj.weight.detach()
    last.view(-1)[0] = 3e38
    phicore.quantize_(copy.deepcopy(model), block_size=32)  # one block of them has a mean
    last.fill_(3e38)
    with unchanged(model), pytest.raises(ValueError, match=r"blocks\.1\.down_proj: .* use double_quant=False"):
        phicore.quantize_(model, block_size=32)
    phicore.quantize_(model, block_size=32, double_quant=False)


def test_a_bad_weight_in_the_head_does_not_matter(toy):
    model = toy(dtype=torch.float32)
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    phicore.quantize_(model)
    assert isinstance(model.embed, phicore.NF4Linear)


def test_errors_change_nothing(toy, unchanged):
    model = toy(dtype=torch.float32)
    with unchanged(model):
        with pytest.raises(ValueError, match="block_size must be one of"):
            phicore.quantize_(model, block_size=48)
        with pytest.raises(ValueError, match='no module matches target "up_prj"; did you mean up_proj'):
            phicore.quantize_(model, ["embed", "up_prj"])
        with pytest.raises(ValueError, match='exclude_modules entry "lm_head"'):
            phicore.quantize_(model, exclude_modules=["lm_head"])
        with pytest.raises(ValueError, match="leaves no module of Toy"):
            phicore.quantize_(model, ["head"], ["head"])
    model.blocks[1].down_proj.double()
    with unchanged(model), pytest.raises(TypeError, match=r"blocks\.1\.down_proj\.weight is torch\.float64"):
        phicore.quantize_(model)


def test_a_model_that_holds_its_weights_otherwise_is_told_what_is_taken():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
    with pytest.raises(ValueError, match=r"of the layers that can be chosen here \(Linear\) it has lm_head$"):
        phicore.quantize_(model)  # all but the head are Conv1D


def test_twice_says_that_nothing_is_left(toy, unchanged):
    model = phicore.quantize_(toy(dtype=torch.float32))
    with unchanged(model), pytest.raises(ValueError, match=r"leaves no module .*; [0-9]+ layers are in NF4 already$"):
        phicore.quantize_(model)


def test_meta_models_can_be_planned(toy):
    model = phicore.quantize_(toy(dtype=torch.float32).to("meta"))
    full = phicore.quantize_(toy(dtype=torch.float32))
    model.load_state_dict(full.state_dict(), strict=True, assign=True)
    x = torch.randn(2, 10)
    assert torch.equal(model(x), full(x))


@pytest.mark.parametrize("dora", [False, True])
def test_a_model_with_adapters_is_refused(toy, unchanged, dora):
    # DoRA holds norms of its base; a trained copy is an nn.Linear that must stay one
    model = phicore.attach(toy(dtype=torch.float32), phicore.LoRAConfig(dora=dora, modules_to_save=["head"]))
    with unchanged(model), pytest.raises(ValueError, match="embed is an adapter; quantize a model before"):
        phicore.quantize_(model)
    phicore.merge(model)
    phicore.quantize_(model)


def test_dense_weights_are_gone_when_their_memory_is_given_back(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []
    monkeypatch.setattr(convert, "give_back_freed_memory", lambda: alive.extend(w() is not None for w in weights))
    phicore.quantize_(model)
    assert alive == [False, False]


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_all_linear_leaves_layers_with_their_own_forward():
    model = nn.Sequential(Doubled(64, 64), nn.Linear(64, 64))
    with pytest.warns(UserWarning, match=r"leaves out layers with a forward of their own \(Doubled\): 0$"):
        phicore.quantize_(model)
    assert [type(layer) for layer in model] == [Doubled, phicore.NF4Linear]


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_all_linear_tells_of_experts_that_it_leaves(tiny, name: str):
    model = tiny(name, dtype=torch.float32)
    stacks = [name for name, p in model.named_parameters() if "experts." in name and p.dim() == 3]
    share = sum(model.get_parameter(name).numel() for name in stacks) / sum(p.numel() for p in model.parameters())
    told = rf"stacked parameters, {share:.0%} of the model, .*: {stacks[0]} and {len(stacks) - 1} more$"
    with pytest.warns(UserWarning, match=told) as caught:
        phicore.quantize_(model)
    assert caught[0].filename == __file__
    assert {*stacks} <= {name for name, p in model.named_parameters() if p.dtype == torch.float32}


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 4, 64))


def test_what_is_asked_for_by_name_and_small_stacks_are_no_news(tiny, recwarn: pytest.WarningsRecorder):
    phicore.quantize_(tiny("mixtral", dtype=torch.float32), ["q_proj"])
    phicore.quantize_(nn.Sequential(nn.Linear(64, 64), nn.LazyConv2d(8, 3), Positions()))
    assert not [warning for warning in recwarn if "all-linear" in str(warning.message)]


def weight_norm(model: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(model[0])


def pruned(model: nn.Module) -> None:
    prune.random_unstructured(model[0], "weight", 0.5)


def doubled(model: nn.Module) -> None:
    model[0] = Doubled(64, 64)


def offloaded(model: nn.Module) -> None:
    model[0].to("meta")


def hooked(model: nn.Module) -> None:
    model[0].forward = lambda x: x


def lazy(model: nn.Module) -> None:
    model[0] = nn.LazyLinear(64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (weight_norm, "0 computes its weight"),
        (pruned, "0 computes its weight"),
        (doubled, "0 is a Doubled whose forward is not nn.Linear's"),
        (hooked, "0 is a Linear whose forward was replaced, as accelerate does"),
        (offloaded, "0.weight is on meta and other weights are not: it is offloaded"),
        (lazy, "0 has no shape yet"),
    ],
)
def test_layers_that_are_more_or_less_than_their_weight_are_refused(change, message):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    change(model)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        phicore.quantize_(model, ["0", "1"])
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    "kind",
    ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook", "backward_hook"],
)
def test_hooks_stay(kind):
    model, seen = nn.Sequential(nn.Linear(64, 64)), []
    handle = getattr(model[0], f"register_{kind}")(lambda module, *_: seen.append(type(module)))
    phicore.quantize_(model)
    x = torch.randn(2, 64, requires_grad=True)
    model(x).sum().backward()
    handle.remove()
    model(x).sum().backward()
    assert seen == [phicore.NF4Linear]
