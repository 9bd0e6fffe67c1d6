"""Adapters of nn.MultiheadAttention, against torch's own module with the dense weights, in float64."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import phicore
from phicore.adapters import adapter_layers, mixed
from phicore.adapters.attention import OpenAttention
from phicore.adapters.fused import FusedLinear

WIDTH, HEADS, N, LENGTH, SOURCE = 8, 2, 3, 4, 5
DORA = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
SPLIT = pytest.mark.parametrize("fused_targets", ["raise", "split"])


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, *args, **kwargs) -> Tensor:
        return self.head(self.attention(*args, **kwargs)[0])


def model_of(dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model(**options).to(dtype)
        for name, p in model.named_parameters():
            if "bias" in name:
                nn.init.normal_(p)
        return model


def adapted(model: nn.Module, randomize, name: str = "default", **options) -> nn.Module:
    options = {"rank": 2, "alpha": 5, "target_modules": ["attention"], **options}
    return randomize(phicore.attach(model, phicore.LoRAConfig(**options), name), seed=len(name))


def dense(layer) -> tuple[Tensor, dict[str, Tensor]]:
    """The weight of an adapted projection by the papers' formulas, and the leaves that it was computed from."""
    W = layer.base.weight.detach()
    own = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters() if p.requires_grad}
    if isinstance(layer, FusedLinear):
        blocks = [
            layer.alphas[part] / layer.ranks[part] * own[f"parts.{part}.lora_B"] @ own[f"parts.{part}.lora_A"]
            for part in layer.sizes
        ]
        V = W + torch.cat(blocks)
        m = [own[f"parts.{part}.magnitude"] for part in layer.sizes if f"parts.{part}.magnitude" in own]
        magnitude = torch.cat(m) if m else None
    else:
        V = W + layer.alpha / layer.rank * own["lora_B"] @ own["lora_A"]
        magnitude = own.get("magnitude")
    return V if magnitude is None else (magnitude / V.detach().norm(dim=1))[:, None] * V, own


@given(
    options=st.fixed_dictionaries(
        {
            "batch_first": st.booleans(),
            "bias": st.booleans(),
            "add_bias_kv": st.booleans(),
            "add_zero_attn": st.booleans(),
            "kdim": st.sampled_from([None, 6]),
            "vdim": st.sampled_from([None, 7]),
        }
    ),
    batched=st.booleans(),
    same=st.sampled_from(["all", "key and value", "none"]),
    padding=st.sampled_from([None, "bool", "float"]),
    masked=st.sampled_from([None, "bool", "float", "per head", "causal"]),
    need_weights=st.booleans(),
    average=st.booleans(),
    fused_targets=st.sampled_from(["raise", "split"]),
    dora=st.booleans(),
)
def test_forward_and_gradients_equal_those_of_torch(
    randomize, options, batched, same, padding, masked, need_weights, average, fused_targets, dora
):
    if options["kdim"] or options["vdim"]:
        same = "none"
    own, source = nn.MultiheadAttention(WIDTH, HEADS, **options), LENGTH if same == "all" else SOURCE
    model = model_of(**options)
    plain = copy.deepcopy(model.attention)
    attention = adapted(model, randomize, fused_targets=fused_targets, dora=dora).attention

    def tensor(length: int, width: int) -> Tensor:
        shape = (length, width) if not batched else (N, length, width) if options["batch_first"] else (length, N, width)
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    query = tensor(LENGTH, WIDTH)
    key = query if same == "all" else tensor(source, own.kdim)
    value = key if same != "none" else tensor(source, own.vdim)
    kwargs = {"need_weights": need_weights, "average_attn_weights": average}
    if masked is not None:
        shape = (LENGTH, source) if masked != "per head" else ((N if batched else 1) * HEADS, LENGTH, source)
        hidden = torch.rand(shape) < 0.4 if masked != "causal" else torch.ones(shape).triu(1).bool()
        hidden[..., 0] = False
        kwargs["attn_mask"] = torch.randn(shape, dtype=torch.float64) if masked == "float" else hidden
        kwargs["is_causal"] = masked == "causal"
    if padding is not None:
        hidden = torch.arange(source) >= torch.randint(1, source + 1, (N, 1) if batched else (1,))
        kwargs["key_padding_mask"] = hidden if padding == "bool" else torch.randn(hidden.shape, dtype=torch.float64)
    mixed_kinds = (padding, masked) in itertools.product(["bool"], ["float"]) or (
        padding == "float" and masked not in (None, "float")
    )
    if mixed_kinds:  # torch warns, and adds a boolean mask as one and zero
        kwargs["key_padding_mask"] = None

    weights, leaves, live = {}, [], []
    for name in ("in_proj", "q_proj", "k_proj", "v_proj", "out_proj"):
        if (layer := getattr(attention, name, None)) is not None:
            weight, own_leaves = dense(layer)
            weights["out_proj.weight" if name == "out_proj" else f"{name}_weight"] = weight
            leaves += own_leaves.values()
            live += [layer.get_parameter(n) for n in own_leaves]
    expected, expected_weights = torch.func.functional_call(plain, weights, (query, key, value), kwargs)
    y, y_weights = attention(query, key, value, **kwargs)
    torch.testing.assert_close(y, expected)
    if need_weights:
        torch.testing.assert_close(y_weights, expected_weights)
    else:
        assert y_weights is None
    inputs = list({id(x): x for x in (query, key, value)}.values())
    grad = torch.randn_like(y)
    given_grads = torch.autograd.grad(y, [*inputs, *live], grad)
    for g, e in zip(given_grads, torch.autograd.grad(expected, [*inputs, *leaves], grad), strict=True):
        torch.testing.assert_close(g, e)


@DORA
@SPLIT
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"kdim": 5, "vdim": 6}, {"bias": False}])
def test_merge_unmerge_and_disabled(randomize, relative_error, dora, fused_targets, options):
    model = model_of(**options).eval().requires_grad_(False)  # torch takes other products where gradients are due
    shapes = ((LENGTH, N, WIDTH), (LENGTH, N, options.get("kdim", WIDTH)), (LENGTH, N, options.get("vdim", WIDTH)))
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    base, keys = model(*inputs), list(model.state_dict())
    adapted(model, randomize, "first", dora=dora, fused_targets=fused_targets)
    adapted(model, randomize, "second", fused_targets=fused_targets)
    y, state = model(*inputs), copy.deepcopy(model.state_dict())
    assert not torch.allclose(y, base, rtol=1e-2)
    with phicore.disabled(model):
        assert torch.equal(model(*inputs), base)
    errors = phicore.merge(model)
    assert {path.split(".")[-1] for path in errors} >= {"out_proj"}
    assert type(model.attention) is nn.MultiheadAttention
    assert sorted(model.state_dict()) == sorted(keys)
    assert relative_error(model(*inputs), y) < 1e-6
    phicore.unmerge(model)
    assert type(model.attention) is OpenAttention
    assert torch.equal(model(*inputs), y)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert errors.keys() == {path for path, _ in adapter_layers(model)}


@pytest.mark.parametrize("targets", [["self_attn"], ["linear1"], ["linear2", "self_attn"]])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_fused_paths_of_torch_do_not_pass_by_an_adapter(randomize, targets, norm_first):
    """nn.TransformerEncoder in eval mode reads weights, past the layers; with padding it nests its input too."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2).double().eval()
    x, padding = (
        torch.randn(N, LENGTH, WIDTH, dtype=torch.float64),
        torch.arange(LENGTH) >= torch.tensor([[4], [2], [3]]),
    )
    randomize(phicore.attach(model, phicore.LoRAConfig(rank=2, target_modules=targets)))

    def answer() -> Tensor:
        return model(x, src_key_padding_mask=padding).masked_fill(padding[:, :, None], 0)

    with_gradients = answer()  # which keep torch off these paths
    assert with_gradients.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(answer(), with_gradients)
        phicore.merge(model)
        assert {m.activation_relu_or_gelu for m in model.layers} == {1}
        torch.testing.assert_close(answer(), with_gradients)
        phicore.unmerge(model)
        torch.testing.assert_close(answer(), with_gradients)


def test_self_attention_projects_once(randomize, monkeypatch):
    model = adapted(model_of(), randomize)
    calls = []
    monkeypatch.setattr(
        model.attention.in_proj, "forward", lambda x, f=model.attention.in_proj.forward: calls.append(1) or f(x)
    )
    x, other = torch.randn(2, LENGTH, N, WIDTH, dtype=torch.float64)
    for args, count in (((x, x, x), 1), ((x, other, other), 2), ((x, other, x + 1), 3)):
        calls.clear()
        model(*args)
        assert len(calls) == count


@pytest.mark.parametrize(("dora", "fused_targets", "need_weights"), [(False, "raise", True), (True, "split", False)])
def test_compiles_to_one_graph(randomize, check_one_graph, dora, fused_targets, need_weights):
    model = adapted(model_of(torch.float32, batch_first=True), randomize, dora=dora, fused_targets=fused_targets)
    x = torch.randn(N, LENGTH, WIDTH)
    check_one_graph(model, x, x, x, need_weights=need_weights)


@DORA
@SPLIT
@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 6}])
def test_copies_and_states(randomize, dora, fused_targets, options):
    model = adapted(model_of(**options), randomize, dora=dora, fused_targets=fused_targets)
    shapes = ((LENGTH, N, WIDTH), (LENGTH, N, options.get("kdim", WIDTH)), (LENGTH, N, options.get("vdim", WIDTH)))
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    assert torch.equal(copy.deepcopy(model)(*inputs), model(*inputs))
    assert torch.equal(pickle.loads(pickle.dumps(model))(*inputs), model(*inputs))
    other = adapted(model_of(**options), randomize, "another", dora=dora, fused_targets=fused_targets)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(*inputs), model(*inputs))
    half = model.to(torch.bfloat16)
    assert half(*(x.bfloat16() for x in inputs)).isfinite().all()


def test_rows_of_a_batch_have_their_own_adapters(randomize):
    model = adapted(adapted(model_of(), randomize, "first"), randomize, "second")
    x = torch.randn(LENGTH, 3, WIDTH, dtype=torch.float64)  # the batch is the second dimension
    with mixed(model, ["first", None, "second"]):
        y = model(x, x, x)
    for row, names in enumerate((["first"], [], ["second"])):
        phicore.adapters.activate(model, names)
        one = x[:, row : row + 1]
        torch.testing.assert_close(y[:, row : row + 1], model(one, one, one))


def test_dropout_of_attention_is_that_of_training(randomize):
    model = adapted(model_of(dropout=0.5), randomize)
    x = torch.randn(LENGTH, N, WIDTH, dtype=torch.float64)
    for need_weights in (False, True):
        assert not torch.equal(model(x, x, x, need_weights=need_weights), model(x, x, x, need_weights=need_weights))
    model.eval()
    torch.testing.assert_close(model(x, x, x), model(x, x, x, need_weights=False))


def test_patterns_and_shared_modules(randomize):
    model = model_of()
    model.again = nn.ModuleDict({"attention": model.attention})
    adapted(model, randomize, rank_pattern={"attention": 3, "attention.out_proj": 4}, alpha_pattern={"in_proj": 9.0})
    assert model.again.attention is model.attention
    layers = dict(adapter_layers(model))
    assert {p: (layer.rank, layer.alpha) for p, layer in layers.items()} == {
        "attention.in_proj": (3, 9.0), "attention.out_proj": (4, 5)
    }  # fmt: skip
    phicore.merge(model)
    assert model.again.attention is model.attention
    phicore.unmerge(model)
    assert model.again.attention is model.attention
    model = adapted(model_of(), randomize, fused_targets="split", rank_pattern={"attention.k_proj": 3})
    assert model.attention.in_proj.ranks == {"q_proj": 2, "k_proj": 3, "v_proj": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["out_proj"]}, r"attention\.out_proj, which is a .* outside nn\.MultiheadAttention"),
        (
            {"modules_to_save": ["out_proj"]},
            r"means attention\.out_proj, as a projection .*and so does modules_to_save",
        ),
        ({"rank_pattern": {"attention.q_proj": 3}}, "rank_pattern key"),
        ({"init": "pissa", "fused_targets": "split"}, 'init "pissa" decomposes a whole weight'),
    ],
)
def test_what_cannot_be_adapted_is_named(unchanged, options, message):
    model = model_of()
    with unchanged(model), pytest.raises(ValueError, match=message):
        phicore.attach(model, phicore.LoRAConfig(**{"target_modules": ["attention"], **options}))
    with (
        unchanged(model),
        pytest.raises(TypeError, match="NF4 encodes float32"),
    ):  # when the attention is opened already
        phicore.attach(model, phicore.LoRAConfig(target_modules=["attention"], init="loftq"))
    attention = model.attention
    with unchanged(attention), pytest.raises(ValueError, match="the model itself is of type MultiheadAttention"):
        phicore.attach(attention, phicore.LoRAConfig(target_modules=["out_proj"]))


def test_a_subclass_is_refused_and_hooks_stay(randomize, unchanged):
    class Other(nn.MultiheadAttention):
        pass

    model = model_of()
    model.attention = Other(WIDTH, HEADS)
    with unchanged(model), pytest.raises(ValueError, match="attention is a Other, a subclass"):
        phicore.attach(model, phicore.LoRAConfig(target_modules=["attention"]))

    model = model_of()
    model.attention.forward = model.attention.forward  # bound to this very module, as accelerate does
    with unchanged(model), pytest.raises(ValueError, match="the forward of attention was replaced"):
        phicore.attach(model, phicore.LoRAConfig(target_modules=["attention"]))

    model, calls, x = model_of(), [], torch.randn(LENGTH, N, WIDTH, dtype=torch.float64)
    handle = model.attention.register_forward_hook(lambda *_: calls.append(1))
    adapted(model, randomize)
    model(x, x, x)
    with phicore.disabled(model):
        model(x, x, x)
    phicore.merge(model)
    model(x, x, x)
    assert len(calls) == 3
    handle.remove()
    phicore.unmerge(model)(x, x, x)
    assert len(calls) == 3


def test_masks_of_another_shape_are_refused(randomize):
    model = adapted(model_of(), randomize)
    x = torch.randn(LENGTH, N, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"attn_mask must have shape \[4, 4\] or \[6, 4, 4\], got \[4, 5\]"):
        model(x, x, x, attn_mask=torch.zeros(LENGTH, SOURCE))
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \[3, 4\], got \[4, 3\]"):
        model(x, x, x, key_padding_mask=torch.zeros(LENGTH, N))
    with pytest.raises(ValueError, match="is_causal is a hint about attn_mask"):
        model(x, x, x, is_causal=True)
    for name, mask in (("attn_mask", torch.ones(LENGTH, LENGTH)), ("key_padding_mask", torch.ones(N, LENGTH))):
        with pytest.raises(TypeError, match=rf"{name} is torch\.int64; give a boolean one"):
            model(x, x, x, **{name: mask.long()})


def test_all_linear_leaves_it_out(randomize):
    model = model_of()
    with pytest.warns(UserWarning, match=r"leaves out nn\.MultiheadAttention.*: attention"):
        phicore.attach(model, phicore.LoRAConfig())
    assert {path for path, _ in adapter_layers(model)} == {"head"}


@pytest.mark.parametrize("masked", [False, True])
def test_other_batches_and_masks_are_run_without_compiling_again(randomize, masked):
    torch._dynamo.reset()
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)})
    attention = randomize(phicore.attach(model, phicore.LoRAConfig(rank=2, target_modules=["attention"])))["attention"]
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    for rows in (3, 4, 5, 7):
        x = torch.randn(rows, LENGTH, WIDTH)
        masks = {"attn_mask": torch.randn(LENGTH, LENGTH), "key_padding_mask": torch.randn(rows, LENGTH)}
        masks = masks if masked else {}
        torch.testing.assert_close(compiled(x, x, x, **masks)[0], attention(x, x, x, **masks)[0])
    assert counter.frame_count == 2  # the first sees a number, the second that it changes


def test_one_that_was_compiled_in_place_does_not_pass_adapters_by(randomize):
    model, x = model_of(), torch.randn(LENGTH, N, WIDTH, dtype=torch.float64)
    model.attention.compile(backend="eager")
    plain = adapted(model_of(), randomize)
    adapted(model, randomize).load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(x, x, x)[0], plain(x, x, x)[0])


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_a_new_adapter_equals_its_base_where_torch_hides_an_appended_key(option):
    """With the hint is_causal and no weights asked for, torch drops the mask, and its kernel hides that key too."""
    model = model_of(**{option: True})
    x, causal = torch.randn(4, 3, WIDTH, dtype=torch.float64), torch.ones(4, 4).triu(1).bool()
    arguments = {"attn_mask": causal, "is_causal": True, "need_weights": False}
    expected = model.attention(x, x, x, **arguments)[0]
    phicore.attach(model, phicore.LoRAConfig(rank=2, target_modules=["attention"]))
    torch.testing.assert_close(model.attention(x, x, x, **arguments)[0], expected)
