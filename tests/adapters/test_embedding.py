"""LoRAEmbedding and DoRAEmbedding against a table computed densely in float64."""

import copy

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import phicore
from phicore.adapters.embedding import DoRAEmbedding, LoRAEmbedding

BOTH = pytest.mark.parametrize("kind", [LoRAEmbedding, DoRAEmbedding])


def table(layer, *, detach: bool = True) -> tuple[Tensor, list[Tensor]]:
    """The adapted table [num, dim] and the leaves A, B (and m) that it was computed from."""
    names = ["lora_A", "lora_B", *(["magnitude"] if isinstance(layer, DoRAEmbedding) else [])]
    leaves = [getattr(layer, name).detach().double().requires_grad_(True) for name in names]
    s = layer.alpha / layer.rank**0.5 if layer.rslora else layer.alpha / layer.rank
    base = table(layer.base)[0].detach() if isinstance(layer.base, LoRAEmbedding) else layer.base.weight.double()
    V = base + s * (leaves[1] @ leaves[0]).T
    if len(leaves) == 2:
        return V, leaves
    norm = V.square().sum(0).sqrt()  # one an embedding dimension
    return V * leaves[2] / (norm.detach() if detach else norm), leaves


def adapted(kind, randomize, num: int = 19, dim: int = 11, **options):
    base = nn.Embedding(num, dim, padding_idx=options.pop("padding_idx", None)).double()
    return randomize(kind(base, **{"rank": 4, "alpha": 7.0, **options}), seed=3)


@given(
    kind=st.sampled_from((LoRAEmbedding, DoRAEmbedding)),
    shape=st.sampled_from(((), (1,), (5,), (0,), (2, 3))),
    num=st.integers(2, 24),
    dim=st.integers(1, 20),
    rank=st.integers(1, 9),
    alpha=st.sampled_from((0.5, 8, 13.0)),
    rslora=st.booleans(),
    padding=st.booleans(),
)
def test_forward_and_gradients_equal_a_dense_table(randomize, kind, shape, num, dim, rank, alpha, rslora, padding):
    layer = adapted(
        kind, randomize, num, dim, rank=rank, alpha=alpha, rslora=rslora, padding_idx=1 if padding else None
    )
    tokens = torch.randint(0, num, shape)
    dense, leaves = table(layer)
    y, expected = layer(tokens), dense[tokens]
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(y, expected, **close)
    grad = torch.randn_like(y)
    given_grads = torch.autograd.grad(y, [p for p in layer.parameters() if p.requires_grad], grad)
    exact = list(torch.autograd.grad(expected, leaves, grad))
    if padding:  # as nn.Embedding: no gradient through the row of padding_idx, in what was looked up by row
        here = (tokens == 1).unsqueeze(-1)
        exact[0] = torch.autograd.grad(table_lookup(layer, leaves, tokens), leaves[0], grad.masked_fill(here, 0))[0]
    for g, e in zip(given_grads, exact, strict=True):
        torch.testing.assert_close(g, e, **close)


def table_lookup(layer, leaves: list[Tensor], tokens: Tensor) -> Tensor:
    V = layer.base.weight.double() + layer.scaling * (leaves[1] @ leaves[0]).T
    if len(leaves) == 3:
        V = V * leaves[2] / V.square().sum(0).sqrt().detach()
    return V[tokens]


@pytest.mark.parametrize("options", [{}, {"scale_grad_by_freq": True}, {"padding_idx": 2}])
@BOTH
def test_gradients_are_those_of_peft(kind, randomize, options):
    base = nn.Embedding(9, 4, **options).double()
    layer = randomize(kind(copy.deepcopy(base), rank=3, alpha=7.0))
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["0"], use_dora=kind is DoRAEmbedding)
    other = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    names = {"embedding_A": "lora_A", "embedding_B": "lora_B", "magnitude": "magnitude"}
    theirs = {ours: p for name, p in other.named_parameters() for key, ours in names.items() if key in name}
    assert len(theirs) == sum(p.requires_grad for p in layer.parameters())
    with torch.no_grad():
        for ours, p in theirs.items():
            p.copy_(getattr(layer, ours))
    tokens = torch.tensor([[3, 3, 2], [3, 7, 7]])
    for module in (layer, other):
        (module(tokens) * torch.arange(24).view(2, 3, 4)).sum().backward()
    for ours, p in theirs.items():
        torch.testing.assert_close(getattr(layer, ours).grad, p.grad, rtol=1e-6, atol=1e-6)


def test_the_norm_is_a_constant_in_the_backward_pass(randomize, relative_error):
    layer = adapted(DoRAEmbedding, randomize)
    tokens = torch.randint(0, 19, (6,))
    grad = torch.randn(6, 11, dtype=torch.float64)
    given_grads = torch.autograd.grad(layer(tokens), (layer.lora_A, layer.lora_B), grad)
    dense, leaves = table(layer, detach=False)
    for g, e in zip(given_grads, torch.autograd.grad(dense[tokens], leaves[:2], grad), strict=True):
        assert relative_error(g, e) > 0.02


@BOTH
def test_a_new_adapter_equals_its_base(kind):
    base = nn.Embedding(19, 11).double()
    layer = kind(base, rank=4, alpha=7)
    torch.testing.assert_close(layer(torch.arange(19)), base.weight)


@BOTH
def test_adapters_stack(kind, randomize):
    lower = adapted(LoRAEmbedding, randomize)
    layer = randomize(kind(lower, rank=3, alpha=5.0), seed=9)
    torch.testing.assert_close(layer(torch.arange(19)), table(layer)[0])
    assert not any(p.requires_grad for p in lower.parameters())


class ScaledEmbedding(nn.Embedding):
    """What Gemma does: the output times a constant."""

    def __init__(self, num: int, dim: int) -> None:
        super().__init__(num, dim)
        self.register_buffer("embed_scale", torch.tensor(5.5), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.embed_scale


@BOTH
def test_a_scale_of_the_base_counts_for_the_adapter_too(kind, randomize):
    layer = randomize(kind(ScaledEmbedding(19, 11).double(), rank=4, alpha=7.0), seed=3)
    torch.testing.assert_close(layer(torch.arange(19)), 5.5 * table(layer)[0])
    model = nn.Sequential(layer)
    x = torch.arange(19)
    y = model(x)
    phicore.merge(model)
    assert type(model[0]) is ScaledEmbedding
    torch.testing.assert_close(model(x), y)


@BOTH
def test_merge_and_unmerge(kind, randomize):
    layer = adapted(kind, randomize, padding_idx=2)
    model = nn.Sequential(layer, nn.Linear(11, 3).double())
    before = copy.deepcopy(model.state_dict())
    x = torch.randint(0, 19, (4, 5))
    y = model(x)
    errors = phicore.merge(model)
    assert list(errors) == ["0"]
    assert type(model[0]) is nn.Embedding
    assert model[0].padding_idx == 2
    assert set(model.state_dict()) == {"0.weight", "1.weight", "1.bias"}
    torch.testing.assert_close(model(x), y)
    phicore.unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@BOTH
def test_dtypes(kind, dtype, randomize, relative_error):
    layer = randomize(kind(nn.Embedding(50, 32).to(dtype), rank=4, alpha=7.0), seed=3)
    y = layer(torch.arange(50))
    assert (y.dtype, layer.lora_A.dtype) == (dtype, dtype)
    assert relative_error(y, table(layer)[0]) < 20 * torch.finfo(dtype).eps


@BOTH
def test_one_graph(kind, randomize):
    layer = adapted(kind, randomize)
    tokens = torch.randint(0, 19, (6,))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(tokens)
    torch.testing.assert_close(y, layer(tokens))
    y.sum().backward()
    assert layer.lora_B.grad is not None


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"max_norm=1\.0 rewrites its own table"):
        LoRAEmbedding(nn.Embedding(9, 4, max_norm=1.0))
    with pytest.raises(TypeError, match=r"adapts nn\.Embedding or another adapter of one, got Linear"):
        DoRAEmbedding(nn.Linear(3, 3))


def test_all_linear_leaves_embeddings_alone_and_names_reach_them():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    phicore.attach(copy.deepcopy(model), phicore.LoRAConfig())
    alone = phicore.attach(copy.deepcopy(model), phicore.LoRAConfig())
    assert type(alone[0]) is nn.Embedding
    both = phicore.attach(model, phicore.LoRAConfig(target_modules=["0", "1"]))
    assert (type(both[0]), type(both[1])) == (LoRAEmbedding, phicore.LoRALinear)


def test_a_tied_head_keeps_the_base_and_merging_unties_it(tiny, randomize):
    """PEFT's meaning of an adapter on the embedding alone: the head reads the table without it."""
    model = tiny("llama", tied=True)
    head = model.lm_head.weight
    randomize(phicore.attach(model, phicore.LoRAConfig(rank=4, alpha=7, target_modules=["embed_tokens"])))
    ids = torch.arange(1, 13).view(2, 6)
    y, table_before = model(ids).logits, head.detach().clone()
    phicore.merge(model)
    torch.testing.assert_close(model(ids).logits, y)
    assert model.lm_head.weight is head
    assert torch.equal(head, table_before)
    phicore.unmerge(model)
    assert model.model.embed_tokens.base.weight is head


class Normalised(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return functional.normalize(super().forward(tokens), dim=-1)


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["0"]}, {"target_modules": ["0"], "dora": True}, {"trainable_token_indices": {"0": [2]}}],
)
def test_an_embedding_with_a_forward_of_its_own_is_refused(unchanged, options):
    model = nn.Sequential(Normalised(9, 4), nn.Linear(4, 4))
    with unchanged(model), pytest.raises(ValueError, match="Normalised has a forward of its own"):
        phicore.attach(model, phicore.LoRAConfig(**{"target_modules": ["1"], **options}))
    phicore.attach(model, phicore.LoRAConfig(target_modules=["1"], modules_to_save=["0"]))
