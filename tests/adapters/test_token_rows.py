"""Rows of an embedding that train, and what is tied to it, against a table of which only these rows have gradients."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import phicore
from phicore.adapters import activate, adapter_layers, mixed
from phicore.adapters.token_rows import TrainedRows

IDS = torch.tensor([[3, 7, 1, 7], [9, 3, 0, 40]])


@given(
    shape=st.sampled_from(((), (1,), (5,), (0,), (2, 3))),
    num=st.integers(2, 24),
    dim=st.integers(1, 20),
    data=st.data(),
    int32=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_outputs_and_gradients_equal_those_of_a_whole_table(shape, num, dim, data, int32, bias, seed):
    torch.manual_seed(seed)
    indices = data.draw(st.lists(st.integers(0, num - 1), min_size=1, unique=True))
    padding = data.draw(st.sampled_from((None, num - 1, indices[0])))
    base = nn.Embedding(num, dim, padding_idx=padding).double()
    head = nn.Linear(dim, num, bias=bias).double()
    head.weight = base.weight
    lookup = TrainedRows(base, "default", indices)
    project = TrainedRows(head, "default", indices, lookup.trained)
    with torch.no_grad():
        lookup.trained.add_(torch.randn(len(indices), dim))
    rows = lookup.trained.detach().clone().requires_grad_(True)
    table = base.weight.detach().index_copy(0, torch.tensor(indices), rows)
    often = torch.tensor([*range(num), *indices, *indices[:1] * num], dtype=torch.int32 if int32 else torch.int64)
    tokens = often[torch.randint(0, len(often), shape)]
    x = torch.randn(*shape, dim, dtype=torch.float64)
    for y, expected in (
        (lookup(tokens), functional.embedding(tokens, table, padding)),
        (project(x.requires_grad_(True)), functional.linear(x, table, head.bias)),
        (lookup.weight, table),
    ):
        torch.testing.assert_close(y, expected)
        weights = torch.randn_like(y)
        given_grad = torch.autograd.grad(y, lookup.trained, weights)
        torch.testing.assert_close(given_grad, torch.autograd.grad(expected, rows, weights, retain_graph=True))
    x_grad = torch.autograd.grad(project(x).square().sum(), x)
    torch.testing.assert_close(x_grad, torch.autograd.grad(functional.linear(x, table, head.bias).square().sum(), x))


def test_hooks_of_a_head_see_its_own_logits():
    head, seen, grads = nn.Linear(4, 9, bias=False), [], []
    layer, x = TrainedRows(head, "default", [1, 5]), torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        layer.trained.add_(1)
    expected = layer(x)
    head.register_forward_hook(lambda _module, _inputs, y: seen.append(y))
    head.register_full_backward_hook(lambda _module, inputs, _outputs: grads.extend(inputs))
    y = layer(x)
    assert torch.equal(y, expected)
    assert torch.equal(seen[0], x @ head.weight.t())
    y.sum().backward()
    assert len(grads) == 1


def adapted(tiny, randomize, family: str = "tied llama", **options) -> nn.Module:
    config = {"rank": 4, "alpha": 7, "target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 40]} | options
    return randomize(phicore.attach(tiny(family), phicore.LoRAConfig(**config)))


def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def test_only_the_rows_take_memory_and_gradients(tiny, randomize, saved_for_backward):
    model = adapted(tiny, randomize)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name: tuple(p.shape) for name, p in trained.items() if "lora" not in name} == {
        "model.embed_tokens.trained": (3, 32)
    }
    assert model.lm_head.trained is model.model.embed_tokens.trained
    table = model.model.embed_tokens.base.weight
    kept = saved_for_backward(lambda: logits(model), model)
    assert all(tensor.numel() < table.numel() for tensor in kept if tensor.is_floating_point() and tensor.dim() == 2)
    logits(model).square().sum().backward()
    assert table.grad is None
    assert all(p.grad is not None for p in trained.values())


def test_a_new_adapter_equals_its_base_and_disabled_is_it_bit_for_bit(tiny, randomize):
    base = tiny("tied llama").requires_grad_(False)
    config = phicore.LoRAConfig(rank=4, target_modules=["q_proj"], trainable_token_indices=[7, 3, 40])
    model = phicore.attach(tiny("tied llama"), config)
    torch.testing.assert_close(logits(model), logits(base))
    randomize(model)
    assert not torch.allclose(logits(model), logits(base), rtol=1e-2)
    with phicore.disabled(model):
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(activate(model, [])), logits(base))


def test_a_hook_of_the_head_keeps_what_it_saw():
    """The base's logits: the rows of these tokens are not written into them."""
    head, x = nn.Linear(6, 9), torch.randn(3, 6)
    expected, seen = head(x), []
    layer = TrainedRows(head, "default", [2, 5])
    head.register_forward_hook(lambda _module, _inputs, y: seen.append(y))
    with torch.no_grad():
        layer.trained.add_(1)
    y = layer(x)
    torch.testing.assert_close(seen[0], expected)
    assert not torch.equal(y[:, [2, 5]], expected[:, [2, 5]])


@pytest.mark.parametrize("tied", [False, True])
def test_merge_and_unmerge(tiny, randomize, tied):
    model = adapted(tiny, randomize, "tied llama" if tied else "llama")
    y, before = logits(model), copy.deepcopy(model.state_dict())
    head = model.lm_head.base.weight if tied else model.lm_head.weight
    merged = phicore.merge(model)
    assert ("lm_head" in merged) == tied
    torch.testing.assert_close(logits(model), y)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied  # made once
    assert (model.lm_head.weight is head) != tied
    phicore.unmerge(model)
    assert torch.equal(logits(model), y)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert model.lm_head.trained is model.model.embed_tokens.trained if tied else True


def test_copies_pickles_and_state_dicts(tiny, randomize):
    model = adapted(tiny, randomize)
    y = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), y)
        assert other.lm_head.trained is other.model.embed_tokens.trained
    fresh = adapted(tiny, randomize, rank=4)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(fresh), y)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16
    assert half.lm_head.trained is half.model.embed_tokens.trained


def test_rows_in_another_dtype_than_the_table(tiny, randomize):
    config = phicore.LoRAConfig(
        rank=4, target_modules=["q_proj"], trainable_token_indices=[7], adapter_dtype=torch.float32
    )
    model = phicore.attach(tiny("tied llama", dtype=torch.bfloat16), config)
    y = logits(model)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert model.lm_head.trained.dtype == model.lm_head.trained.grad.dtype == torch.float32


class ScaledEmbedding(nn.Embedding):
    """What Gemma does: the output times a constant."""

    embed_scale = 5.5

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.embed_scale


def test_a_scale_of_the_base_counts_for_the_rows_too():
    layer = TrainedRows(ScaledEmbedding(9, 4), "default", [2, 5])
    with torch.no_grad():
        layer.trained.add_(1)
    torch.testing.assert_close(layer(torch.arange(9)), 5.5 * layer.weight)


def test_tied_encoder_and_decoder_share_the_rows():
    model = nn.ModuleDict({"shared": nn.Embedding(9, 4), "decoder": nn.Embedding(9, 4), "fc": nn.Linear(4, 4)})
    model["decoder"].weight = model["shared"].weight
    config = phicore.LoRAConfig(rank=2, target_modules=["fc"], trainable_token_indices={"shared": [1, 2]})
    phicore.attach(model, config)
    assert model["decoder"].trained is model["shared"].trained
    assert [layer.owner for _, layer in adapter_layers(model) if isinstance(layer, TrainedRows)] == [True, False]


def test_one_graph(tiny, randomize):
    torch._dynamo.reset()
    lookup = TrainedRows(nn.Embedding(9, 4), "default", [5, 2])
    head = nn.Linear(4, 9, bias=False)
    head.weight = lookup.base.weight
    model = nn.Sequential(lookup, TrainedRows(head, "default", [5, 2], lookup.trained))
    with torch.no_grad():
        lookup.trained.add_(1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = torch.arange(9)
    torch.testing.assert_close(compiled(tokens), model(tokens))
    exact = torch.autograd.grad(model(tokens).square().sum(), lookup.trained)
    torch.testing.assert_close(torch.autograd.grad(compiled(tokens).square().sum(), lookup.trained), exact)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable_token_indices": [48]}, "token index 48 is beyond the 48 rows of the table"),
        ({"trainable_token_indices": {"embd_tokens": [1]}}, r'entry "embd_tokens"; did you mean embed_tokens'),
        ({"trainable_token_indices": {"norm": [1]}}, r"rows of model\.norm, whose table is a LlamaRMSNorm's"),
        ({"target_modules": ["embed_tokens"]}, r"rows of model\.embed_tokens, which is adapted"),
        ({"target_modules": ["q_proj", "lm_head"]}, "rows of lm_head, which is adapted"),
        ({"modules_to_save": ["lm_head"]}, "rows of lm_head, which is adapted, trained whole"),
        (
            {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
            "lm_head shares its table with another, which has other tokens",
        ),
    ],
)
def test_what_is_refused(tiny, unchanged, options, message):
    model = tiny("tied llama")
    config = {"target_modules": ["q_proj"], "trainable_token_indices": [3]} | options
    with unchanged(model), pytest.raises(ValueError, match=message):
        phicore.attach(model, phicore.LoRAConfig(rank=4, **config))


def test_rows_of_a_batch_have_the_tokens_of_their_adapter(tiny, randomize):
    model = adapted(tiny, randomize)
    other = phicore.LoRAConfig(rank=2, target_modules=["v_proj"])
    randomize(phicore.attach(model, other, "other"))
    names = ["other", "default", None, "default"]
    batch = torch.cat([IDS, IDS])
    expected = []
    for row, name in enumerate(names):
        activate(model, [] if name is None else name)
        expected.append(model(batch[row : row + 1]).logits)
    with mixed(model, names):
        y = model(batch).logits
        torch.testing.assert_close(y, torch.cat(expected))
        with pytest.raises(ValueError, match=r"each of 4 rows, .* input has shape \[2, 4\]"):
            model(IDS)
    activate(model, "default")
    torch.testing.assert_close(model(batch).logits[1], expected[1][0])  # afterwards as it was


def test_what_is_refused_beside_an_adapter(tiny, randomize, unchanged):
    model = adapted(tiny, randomize)
    with unchanged(model):
        with pytest.raises(ValueError, match=r"embed_tokens trained in some rows, which has no strength"):
            activate(model, {"default": 2.0})
        second = phicore.LoRAConfig(rank=4, target_modules=["v_proj"], trainable_token_indices=[5])
        with pytest.raises(ValueError, match=r"rows of model\.embed_tokens, which has an adapter already"):
            phicore.attach(model, second, "second")


def test_a_list_needs_a_model_that_names_its_embedding(unchanged):
    model = nn.ModuleDict({"a": nn.Embedding(9, 4), "b": nn.Embedding(9, 4), "fc": nn.Linear(4, 4)})
    config = phicore.LoRAConfig(rank=2, target_modules=["fc"], trainable_token_indices=[1])
    with unchanged(model), pytest.raises(ValueError, match=r"as a dictionary from a name to tokens; there are: a, b"):
        phicore.attach(model, config)
    del model["b"]
    phicore.attach(model, config)
    assert isinstance(model["a"], TrainedRows)


def test_what_rows_alone_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"max_norm=1\.0 rewrites its own table"):
        TrainedRows(nn.Embedding(9, 4, max_norm=1.0), "default", [1])
    with pytest.raises(ValueError, match="scale_grad_by_freq=True divides the gradient of a row"):
        TrainedRows(nn.Embedding(9, 4, scale_grad_by_freq=True), "default", [1])


def test_a_head_with_a_forward_of_its_own_is_refused(unchanged):
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "head": Scaled(4, 9)})
    config = phicore.LoRAConfig(rank=2, target_modules=["fc"], trainable_token_indices={"head": [1]})
    with unchanged(model), pytest.raises(ValueError, match="rows of head, whose table is a Scaled's"):
        phicore.attach(model, config)
