"""An embedding and its head with one pair, against a table computed densely; merged once, and what is refused."""

import copy
import pickle

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import phicore
from phicore.adapters import LoRAEmbedding, activate, adapter_layers, mixed
from phicore.adapters.tied import TiedDoRAEmbedding, TiedDoRAHead, TiedLoRAHead

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


DORA = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


def test_in_16_bits_rows_have_the_length_of_their_magnitude(randomize):
    """To less than half of bfloat16's spacing on average: the scale of a row is not rounded for all its elements."""
    layer = TiedDoRAEmbedding(nn.Embedding(200, 512).bfloat16(), rank=4, alpha=7, dtype=torch.float32)
    randomize(layer, std=0.1)
    y = layer(torch.arange(200)).double()
    assert (y.norm(dim=1) / layer.magnitude.double() - 1).abs().mean() < 2**-10


@DORA
@pytest.mark.parametrize("targets", [["embed", "fc"], ["head", "fc"], ["embed", "head", "fc"]])
@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_are_those_of_one_table(randomize, targets, rslora, dora):
    model = adapted(randomize, target_modules=targets, rslora=rslora, dora=dora)
    kinds = (TiedDoRAEmbedding, TiedDoRAHead, phicore.DoRALinear)
    assert (type(model.embed), type(model.head), type(model.fc)) == (
        kinds if dora else (LoRAEmbedding, TiedLoRAHead, phicore.LoRALinear)
    )
    base = build()
    names = ("lora_A", "lora_B", "magnitude") if dora else ("lora_A", "lora_B")
    own = [getattr(layer, name) for layer in (model.embed, model.fc) for name in names]
    leaves = [p.detach().clone().requires_grad_(True) for p in own]
    (A, B, *m), (C, D, *n) = leaves[: len(names)], leaves[len(names) :]
    scaling = 7 / (3**0.5 if rslora else 3)

    def weight(W: Tensor, product: Tensor, magnitude: list[Tensor]) -> Tensor:  # of rows: tokens, or features
        V = W.detach() + scaling * product
        return magnitude[0][:, None] * V / V.detach().norm(dim=1, keepdim=True) if magnitude else V

    table, inner = weight(base.embed.weight, (B @ A).T, m), weight(base.fc.weight, D @ C, n)
    x = torch.tanh(functional.linear(table[IDS], inner, base.fc.bias))
    expected = functional.linear(x, table, base.head.bias)
    y = model(IDS)
    torch.testing.assert_close(y, expected)
    exact = torch.autograd.grad(expected.square().sum(), leaves)
    y.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(own)  # the head has none of its own
    for parameter, gradient in zip(own, exact, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@DORA
def test_a_weight_that_is_read_past_its_layer_has_the_gradients_of_the_layer(randomize, dora):
    model = adapted(randomize, dora=dora)
    own = [p for p in model.embed.parameters() if p.requires_grad]
    each, target = torch.arange(11), torch.randn(11, 6, dtype=torch.float64)
    exact = torch.autograd.grad((model.embed(each) * target).sum(), own)
    for table in (model.embed.weight, model.head.weight):
        given = torch.autograd.grad((table * target).sum(), own)
        torch.testing.assert_close(given, exact)


@DORA
def test_they_are_merged_once_and_unmerged(randomize, dora):
    model = adapted(randomize, dora=dora)
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


@pytest.mark.parametrize("doras", [(False, False), (True, True), (False, True), (True, False)])
def test_stacks_are_merged_once_where_they_amount_to_one_table(randomize, doras):
    model = adapted(randomize, dora=doras[0])
    adapted(randomize, name="second", model=model, rank=2, dora=doras[1])
    y = model(IDS)
    phicore.merge(model)
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model(IDS), y)
    phicore.unmerge(model)
    torch.testing.assert_close(activate(model, "default")(IDS), adapted(randomize, dora=doras[0])(IDS))

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


@DORA
def test_copies_pickles_and_state_dicts(randomize, dora):
    model = adapted(randomize, dora=dora)
    y = model(IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS), y)
        assert other.head.embedding_A is other.embed.lora_A
    fresh = adapted(randomize, dora=dora)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(IDS), y)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(IDS).dtype == torch.bfloat16
    assert half.head.embedding_A is half.embed.lora_A


@DORA
def test_assigning_a_state_dict_unties_nothing(randomize, dora):
    model = randomize(adapted(randomize, dora=dora))
    fresh = copy.deepcopy(adapted(randomize, dora=dora))
    fresh.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    assert torch.equal(fresh(IDS), model(IDS))
    assert fresh.state_dict().keys() == model.state_dict().keys()
    assert [name for name, _ in fresh.named_parameters()] == [name for name, _ in model.named_parameters()]
    part = {"embed.lora_A": torch.ones_like(model.embed.lora_A)}
    fresh.load_state_dict(part, strict=False, assign=True)
    assert fresh.head.embedding_A is fresh.embed.lora_A
    assert torch.equal(fresh.head.embedding_A, part["embed.lora_A"])


def test_dropout_is_the_heads_alone(randomize):
    model = adapted(randomize, dropout=0.5).train()
    x = torch.randn(64, 6, dtype=torch.float64)
    assert torch.equal(model.embed(IDS), model.eval().embed(IDS))
    kept = model.head(x)
    dropped = torch.stack([model.train().head(x) for _ in range(200)])
    assert not torch.allclose(dropped[0], kept)
    torch.testing.assert_close(dropped.mean(0), kept, rtol=0.3, atol=0.5)


@DORA
def test_rows_of_a_batch(randomize, dora):
    model = adapted(randomize, dora=dora)
    adapted(randomize, name="second", model=model, rank=2, dora=dora)
    expected = torch.cat([activate(model, name)(IDS[i : i + 1]) for i, name in enumerate(("second", "default"))])
    with mixed(model, ["second", "default"]):
        torch.testing.assert_close(model(IDS), expected)


@DORA
def test_embeddings_of_one_table_share_the_pair(randomize, tmp_path, dora):
    def two() -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({"shared": nn.Embedding(9, 4), "decoder": nn.Embedding(9, 4), "fc": nn.Linear(4, 4)})
        model["decoder"].weight = model["shared"].weight
        return model

    model, tokens = two(), torch.arange(9)
    config = phicore.LoRAConfig(rank=2, target_modules=["decoder", "fc"], ensure_weight_tying=True, dora=dora)
    randomize(phicore.attach(model, config))
    phicore.save_adapter(model, tmp_path)
    for one in (model, phicore.load_adapter(two(), tmp_path)):
        assert one["decoder"].lora_A is one["shared"].lora_A
        assert one["decoder"](tokens).equal(model["shared"](tokens))
        assert one["shared"](tokens).equal(model["shared"](tokens))
    phicore.merge(model)
    assert model["decoder"].weight is model["shared"].weight


@DORA
def test_one_graph(randomize, dora):
    torch._dynamo.reset()
    model = adapted(randomize, dora=dora)
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
    assert type(other.head) is TiedLoRAHead


def test_dora_is_saved_and_loaded_and_peft_refuses_it(randomize, tmp_path):
    model = adapted(randomize, dora=True)
    phicore.save_adapter(model, tmp_path)
    for other in (build(), adapted(randomize, dora=True)):
        phicore.load_adapter(other, tmp_path)
        assert torch.equal(other(IDS), model(IDS))
        assert other.head.embedding_magnitude is other.embed.magnitude
    with pytest.raises(RuntimeError, match=r"embed\.lora_magnitude_vector.* size mismatch|size mismatch for .*embed"):
        peft.PeftModel.from_pretrained(build(), tmp_path)


def test_dora_of_rows_that_are_zero_padded_and_scaled(randomize):
    """padding_idx gets no gradient from the embedding, a scale on its output (Gemma's) is kept, zero rows stay zero."""

    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) * self.embed_scale

    model = nn.ModuleDict({"embed": Scaled(9, 4, padding_idx=0), "head": nn.Linear(4, 9, bias=False)}).double()
    model["head"].weight = model["embed"].weight
    with torch.no_grad():
        model["embed"].weight[5] = 0
    tokens, before = torch.arange(9), model["embed"](torch.arange(9))
    config = phicore.LoRAConfig(rank=2, target_modules=["embed"], ensure_weight_tying=True, dora=True)
    phicore.attach(model, config)
    torch.testing.assert_close(model["embed"](tokens), before)
    randomize(model)
    torch.testing.assert_close(model["embed"](tokens), 3.0 * model["head"].merged_weight())
    model["embed"](tokens).sum().backward()
    layer = model["embed"]
    assert not layer.lora_A.grad[:, 0].any()
    assert layer.magnitude.grad[0] == 0
    assert layer.magnitude.grad[1:].all()
    y = model["embed"](tokens)
    phicore.merge(model)
    torch.testing.assert_close(model["embed"](tokens), y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["fc"]}, "no embedding and no head that are tied; tied are embed, head"),
        ({"exclude_modules": ["head"]}, "head is tied to a target, but is excluded"),
        ({"modules_to_save": ["head"]}, r"head is tied to a target, but is trained whole"),
        (
            {"rank_pattern": {"head": 4}},
            "head takes the pair of embed, and rank_pattern says 4 of it, where that has 3",
        ),
        ({"alpha_pattern": {"head": 5.0, "embed": 6.0}}, "alpha_pattern says 5.0 of it, where that has 6.0"),
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


@pytest.mark.parametrize(("option", "said"), [("exclude_modules", "excluded"), ("modules_to_save", "trained whole")])
def test_what_is_tied_in_a_container_that_is_left_out_is_refused(unchanged, option, said):
    model = nn.ModuleDict({"body": nn.ModuleDict({"embed": nn.Embedding(7, 4)}), "head": nn.Linear(4, 7, bias=False)})
    model.head.weight = model.body.embed.weight
    config = {"rank": 3, "target_modules": ["head"], "ensure_weight_tying": True, option: ["body"]}
    with unchanged(model), pytest.raises(ValueError, match=rf"body\.embed is tied to a target, but is {said}"):
        phicore.attach(model, phicore.LoRAConfig(**config))


def test_a_pattern_may_say_the_same_of_all_that_is_tied():
    config = {"rank": 3, "target_modules": ["embed"], "ensure_weight_tying": True}
    for pattern in ({"head": 3}, {"head": 4, "embed": 4}, {"embed|head": 4}):
        model = phicore.attach(build(), phicore.LoRAConfig(**config, rank_pattern=pattern))
        assert model.head.rank == model.embed.rank == pattern.get("head", 4)


@pytest.mark.parametrize(
    ("options", "alone"),
    [
        ({"target_modules": ["embed"]}, "embed"),
        ({"target_modules": ["fc", "head"]}, "head"),
        ({"target_modules": ["embed", "head"]}, "head, embed"),
        ({"target_modules": ["fc"], "modules_to_save": ["head"]}, "head"),
        ({"target_modules": ["fc"], "ensure_weight_tying": False, "trainable_token_indices": [2]}, None),
        ({"target_modules": ["embed"], "ensure_weight_tying": True}, None),
        ({"target_modules": "all-linear"}, None),
    ],
)
def test_what_is_tied_no_more_is_said_once_where_it_is_chosen(tmp_path, recwarn, options, alone):
    """As T5's shared, which nothing calls: an adapter of it alone has no effect."""
    model = phicore.attach(build(), phicore.LoRAConfig(rank=3, **options))
    told = [warning for warning in recwarn if "have one weight" in str(warning.message)]
    assert [str(warning.message).partition(" will not")[0] for warning in told] == (
        [] if alone is None else [f"head, embed have one weight, and {alone}"]
    )
    assert all(warning.filename == __file__ for warning in told)
    phicore.save_adapter(model, tmp_path)
    recwarn.clear()
    phicore.load_adapter(build(), tmp_path)  # which is what was trained
    assert not [warning for warning in recwarn if "have one weight" in str(warning.message)]
