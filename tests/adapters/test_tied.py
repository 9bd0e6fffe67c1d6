"""An embedding and its head with one pair, against a table computed densely; merged once, and what is refused."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import phicore
from phicore.adapters import LoRAEmbedding, activate, adapter_layers, mixed
from phicore.adapters.tied import TiedHead

IDS = torch.tensor([[3, 7, 1, 7], [9, 3, 0, 2]])


class Net(nn.Module):
    """Tokens [B, T] -> logits [B, T, 11], with a head that reads the embedding's table."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(6, 11, bias=bias)  # before the embedding, whose pair it takes
        self.embed = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 6)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(self.embed(ids))))


def build(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return Net(bias).double()


def adapted(randomize, *, name: str = "default", model: nn.Module | None = None, **options) -> nn.Module:
    config = {"rank": 3, "alpha": 7, "target_modules": ["embed", "fc"], "ensure_weight_tying": True} | options
    return randomize(phicore.attach(model or build(), phicore.LoRAConfig(**config), name))


@pytest.mark.parametrize("targets", [["embed", "fc"], ["head", "fc"], ["embed", "head", "fc"]])
@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_are_those_of_one_table(randomize, targets, rslora):
    model = adapted(randomize, target_modules=targets, rslora=rslora)
    assert (type(model.embed), type(model.head), type(model.fc)) == (LoRAEmbedding, TiedHead, phicore.LoRALinear)
    base = build()
    A, B, C, D = (
        p.detach().clone().requires_grad_(True)
        for p in (model.embed.lora_A, model.embed.lora_B, model.fc.lora_A, model.fc.lora_B)
    )
    scaling = 7 / (3**0.5 if rslora else 3)
    table = base.embed.weight.detach() + scaling * (B @ A).T
    inner = base.fc.weight.detach() + scaling * D @ C
    x = torch.tanh(functional.linear(table[IDS], inner, base.fc.bias))
    expected = functional.linear(x, table, base.head.bias)
    y = model(IDS)
    torch.testing.assert_close(y, expected)
    exact = torch.autograd.grad(expected.square().sum(), (A, B, C, D))
    y.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4  # the head has none of its own
    for parameter, gradient in zip(
        (model.embed.lora_A, model.embed.lora_B, model.fc.lora_A, model.fc.lora_B), exact, strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient)


def test_they_are_merged_once_and_unmerged(randomize):
    model = adapted(randomize)
    y, table, before = model(IDS), model.embed.base.weight, copy.deepcopy(model.state_dict())
    merged = phicore.merge(model)
    assert set(merged) == {"embed", "head", "fc"}
    assert model.head.weight is model.embed.weight
    assert model.head.weight is not table
    assert (type(model.head), type(model.embed)) == (nn.Linear, nn.Embedding)
    torch.testing.assert_close(model(IDS), y)
    assert model.state_dict().keys() == build().state_dict().keys()
    phicore.unmerge(model)
    assert torch.equal(model(IDS), y)
    assert model.head.base.weight is model.embed.base.weight is table
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    with phicore.disabled(model):
        assert torch.equal(model(IDS), build().requires_grad_(False)(IDS))


def test_stacks_are_merged_once_where_they_amount_to_one_table(randomize):
    model = adapted(randomize)
    adapted(randomize, name="second", model=model, rank=2)
    y = model(IDS)
    phicore.merge(model)
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model(IDS), y)
    phicore.unmerge(model)
    torch.testing.assert_close(activate(model, "default")(IDS), adapted(randomize)(IDS))

    adapted(randomize, name="alone", model=model, ensure_weight_tying=False, target_modules=["embed"])
    y = activate(model, ["default", "alone"])(IDS)
    phicore.merge(model)
    assert model.head.weight is not model.embed.weight
    torch.testing.assert_close(model(IDS), y)


def test_a_head_that_was_turned_off_is_merged_alone(randomize):
    model = adapted(randomize)
    model.head.enabled = False
    y = model(IDS)
    phicore.merge(model)
    torch.testing.assert_close(model(IDS), y)


def test_copies_pickles_and_state_dicts(randomize):
    model = adapted(randomize)
    y = model(IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS), y)
        assert other.head.embedding_A is other.embed.lora_A
    fresh = adapted(randomize)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(IDS), y)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(IDS).dtype == torch.bfloat16
    assert half.head.embedding_A is half.embed.lora_A


def test_dropout_is_the_heads_alone(randomize):
    model = adapted(randomize, dropout=0.5).train()
    x = torch.randn(64, 6, dtype=torch.float64)
    assert torch.equal(model.embed(IDS), model.eval().embed(IDS))
    kept = model.head(x)
    dropped = torch.stack([model.train().head(x) for _ in range(200)])
    assert not torch.allclose(dropped[0], kept)
    torch.testing.assert_close(dropped.mean(0), kept, rtol=0.3, atol=0.5)


def test_rows_of_a_batch(randomize):
    model = adapted(randomize)
    adapted(randomize, name="second", model=model, rank=2)
    expected = torch.cat([activate(model, name)(IDS[i : i + 1]) for i, name in enumerate(("second", "default"))])
    with mixed(model, ["second", "default"]):
        torch.testing.assert_close(model(IDS), expected)


def test_embeddings_of_one_table_share_the_pair(randomize):
    model = nn.ModuleDict({"shared": nn.Embedding(9, 4), "decoder": nn.Embedding(9, 4), "fc": nn.Linear(4, 4)})
    model["decoder"].weight = model["shared"].weight
    config = phicore.LoRAConfig(rank=2, target_modules=["decoder", "fc"], ensure_weight_tying=True)
    randomize(phicore.attach(model, config))
    assert model["decoder"].lora_A is model["shared"].lora_A
    tokens = torch.arange(9)
    torch.testing.assert_close(model["decoder"](tokens), model["shared"](tokens))
    phicore.merge(model)
    assert model["decoder"].weight is model["shared"].weight


def test_one_graph(randomize):
    torch._dynamo.reset()
    model = adapted(randomize)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), model(IDS))
    exact = torch.autograd.grad(model(IDS).square().sum(), model.embed.lora_A)
    torch.testing.assert_close(torch.autograd.grad(compiled(IDS).square().sum(), model.embed.lora_A), exact)


def test_a_pattern_of_the_embedding_holds_for_the_head(randomize, tmp_path):
    model = adapted(randomize, rank_pattern={"embed": 2}, alpha_pattern={"embed": 5})
    assert {path: (layer.rank, layer.alpha) for path, layer in adapter_layers(model)} == {
        "head": (2, 5), "embed": (2, 5), "fc": (3, 7)
    }  # fmt: skip
    phicore.save_adapter(model, tmp_path)
    other = phicore.load_adapter(build(), tmp_path)
    assert torch.equal(other(IDS), model(IDS))
    assert type(other.head) is TiedHead


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["fc"]}, "no embedding and no head that are tied; tied are embed, head"),
        ({"dora": True}, "ensure_weight_tying with dora: .* use dora=False"),
        ({"exclude_modules": ["head"]}, "head is tied to a target, but is excluded"),
        ({"modules_to_save": ["head"]}, r"head is tied to a target, but is trained whole"),
    ],
)
def test_what_is_refused(unchanged, options, message):
    model = build()
    config = {"rank": 3, "target_modules": ["embed"], "ensure_weight_tying": True} | options
    with unchanged(model), pytest.raises(ValueError, match=message):
        phicore.attach(model, phicore.LoRAConfig(**config))


def test_a_model_that_ties_nothing_is_named(toy, unchanged):
    model = toy()
    with unchanged(model), pytest.raises(ValueError, match="no head that are tied; Toy ties none"):
        phicore.attach(model, phicore.LoRAConfig(ensure_weight_tying=True))
