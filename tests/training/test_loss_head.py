"""The loss in the head's place: taken where logits are the head's output and nowhere else, with the same result."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import phicore
from phicore.training import cross_entropy, loss
from phicore.training.data import collate
from phicore.training.loss import causal_lm_loss
from phicore.training.recompute import checkpointed_blocks
from tests.training.small_run import examples, small_model

Build = Callable[..., nn.Module]


class Head:
    """Counts how often the loss was taken in the head's place, and lets it be done for few logits too."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.used = 0
        self.patch = patch
        self.replace(True)
        patch.setattr(cross_entropy, "chunk_elements", lambda _device: 100)

        def counting(*arguments: Any) -> Tensor:
            self.used += 1
            return cross_entropy.linear_cross_entropy(*arguments)

        patch.setattr(loss, "linear_cross_entropy", counting)

    def replace(self, yes: bool) -> None:
        self.patch.setattr(loss, "chunk_elements", lambda _device: 0 if yes else 1 << 40)


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Head:
    return Head(monkeypatch)


def batch() -> dict[str, Tensor]:
    return collate(examples(5), pad_id=3)


def loss_and_gradients(model: nn.Module, context: Any = None) -> tuple[Tensor, int, dict[str, Tensor], Tensor]:
    """Loss, count, gradients, and the next random number: what a step depends on."""
    torch.manual_seed(1)
    with context or nullcontext():
        value, count = causal_lm_loss(model, batch())
    value.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return value.detach(), int(count), gradients, torch.rand(1)


def assert_same(model: nn.Module, head: Head, *, uses: int, again: int, context: Callable[[], Any] = nullcontext):
    """The same with the loss in the head's place and without; how often that was done in a first and second step."""
    head.replace(False)
    expected = loss_and_gradients(model, context())
    assert head.used == 0
    head.replace(True)
    for done in (uses, again):
        head.used = 0
        given = loss_and_gradients(model, context())
        assert head.used == done
        assert given[0].dtype == torch.float32
        torch.testing.assert_close(given[0], expected[0], rtol=1e-5, atol=0)
        assert given[1] == expected[1]
        assert given[2].keys() == expected[2].keys()
        for name, gradient in expected[2].items():
            torch.testing.assert_close(given[2][name], gradient, rtol=2e-5, atol=2e-6, msg=name)
        assert torch.equal(given[3], expected[3])


SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_models_of_transformers(tiny: Build, head: Head, family: str, tied: bool) -> None:
    assert_same(tiny(family, tied=tied, dtype=torch.float32).train(), head, uses=1, again=1)


def test_plain_modules(head: Head) -> None:
    assert_same(small_model(dropout=0.4), head, uses=1, again=1)


@pytest.mark.parametrize(
    "kind",
    [
        ("Cohere", {"logit_scale": 0.25}),
        ("Gemma2", {"final_logit_softcapping": 5.0, "head_dim": 8}),
        ("Granite", {"logits_scaling": 3.0}),
    ],
    ids=lambda kind: kind[0],
)
def test_scaled_and_capped_logits_keep_their_head(head: Head, kind: tuple[str, dict[str, Any]]) -> None:
    name, options = kind
    config = getattr(transformers, f"{name}Config")(**SIZES, **options, attention_dropout=0.3)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).train()
    assert_same(model, head, uses=1, again=0)  # one look, then never again; and the same dropout


def behind_the_head(change: Callable[[Tensor], Tensor]) -> nn.Module:
    model = small_model(dropout=0.4)
    model.forward = lambda input_ids: change(model.head(model.dropout(model.embed(input_ids))))  # type: ignore
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 0.5,
        lambda logits: logits.clone(),
        lambda logits: logits.mul_(0.5),
        lambda logits: logits[..., :12],
        lambda logits: logits.masked_fill(logits > 1, 1.0),
        lambda logits: logits + torch.eye(12)[logits.argmax(-1)],
        lambda logits: torch.add(logits, 1, out=torch.empty(logits.shape)) if not logits.requires_grad else logits * 2,
    ],
)
def test_whatever_is_done_to_logits_is_noticed(head: Head, change: Callable[[Tensor], Tensor]) -> None:
    assert_same(behind_the_head(change), head, uses=1, again=0)


def test_logits_that_are_only_looked_at_are_the_heads(head: Head) -> None:
    assert_same(behind_the_head(lambda logits: logits.float() if logits.sum() else logits), head, uses=1, again=1)


def test_a_head_that_runs_twice_keeps_its_logits(head: Head) -> None:
    model: Any = small_model(dropout=0)
    plain = model.forward
    model.forward = lambda input_ids: (plain(input_ids), plain(input_ids))[1]
    assert_same(model, head, uses=2, again=0)


def test_the_last_linear_layer_need_not_be_the_head(head: Head) -> None:
    """A router behind the head in the list of modules, wide enough for the targets: its input is not the head's."""
    model: Any = small_model(dropout=0)
    torch.manual_seed(0)
    model.router = nn.Linear(6, 13)
    model.forward = lambda input_ids: model.head(model.embed(input_ids) * model.router(model.embed(input_ids))[..., :1])
    assert_same(model, head, uses=1, again=0)


@pytest.mark.parametrize("where", ["lora", "nf4", "hook", "backward hook", "forward", "norm", "compiled"])
def test_heads_that_are_not_plain_are_left_alone(head: Head, where: str) -> None:
    model: Any = small_model(dropout=0)
    if where == "lora":
        phicore.attach(model, phicore.LoRAConfig(rank=2, alpha=3.0, target_modules=["head"]))
        model.get_output_embeddings = lambda: model.head
    elif where == "nf4":
        model.head = phicore.NF4Linear.from_linear(model.head)
    elif where == "hook":
        model.head.register_forward_hook(lambda _module, _inputs, output: output * 2)
    elif where == "backward hook":
        model.head.register_full_backward_hook(lambda *_: None)
    elif where == "forward":
        model.head.forward = lambda x: 2 * nn.functional.linear(x, model.head.weight)
    elif where == "norm":
        model.norm = nn.BatchNorm1d(3)
    elif where == "compiled":
        model.compile(backend="eager")
    assert_same(model, head, uses=0, again=0)
    assert ("forward" in model.head.__dict__) == (where == "forward")


def test_a_batch_without_labels_and_an_error_of_the_model(head: Head) -> None:
    model: Any = small_model(dropout=0)
    empty = {**batch(), "labels": torch.full_like(batch()["labels"], -100)}
    value, count = causal_lm_loss(model, empty)
    assert (float(value.detach()), int(count)) == (0.0, 0)
    value.backward()
    assert float(model.head.weight.grad.norm()) == 0
    model.forward = lambda input_ids: SimpleNamespace(logits=model.embed(input_ids + 99))
    with pytest.raises(IndexError):
        causal_lm_loss(model, batch())
    assert "forward" not in model.head.__dict__


def test_evaluation_keeps_no_gradients(head: Head, tiny: Build) -> None:
    model = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        value, _ = causal_lm_loss(model, batch())
        head.replace(False)
        expected, _ = causal_lm_loss(model, batch())
    assert head.used == 1
    assert not value.requires_grad
    torch.testing.assert_close(value, expected)


def test_under_gradient_checkpointing(head: Head, tiny: Build) -> None:
    model = tiny("llama", dtype=torch.float32).train()
    assert_same(model, head, uses=1, again=1, context=lambda: checkpointed_blocks(model))


@pytest.fixture
def one_rank(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("unused", [False, True])
def test_under_ddp(head: Head, tiny: Build, unused: bool) -> None:
    model = DistributedDataParallel(tiny("llama", dtype=torch.float32).train(), find_unused_parameters=unused)
    # With find_unused_parameters DDP copies what the model returns, so that the logits are no longer the head's own.
    assert_same(model, head, uses=1, again=0 if unused else 1)


def test_no_logits_of_a_llama_are_whole(
    monkeypatch: pytest.MonkeyPatch, tiny: Build, saved_for_backward: Callable[..., list[Tensor]]
) -> None:
    from tests.training.test_cross_entropy import Largest

    model: Any = tiny("llama", dtype=torch.float32, vocab_size=3000, tied=True).train()
    model.lm_head.requires_grad_(False)
    big = collate(examples(11), pad_id=3)
    rows = int((big["labels"][:, 1:] != -100).any(0).sum()) * 11
    monkeypatch.setattr(loss, "chunk_elements", lambda _device: 4 * 3000)
    monkeypatch.setattr(cross_entropy, "chunk_elements", lambda _device: 4 * 3000)
    with Largest() as largest:
        causal_lm_loss(model, big)[0].backward()
    assert largest.elements == 3000 * 32 < rows * 3000  # the head's own weight, as it is seen from its view
    assert sum(t.numel() for t in saved_for_backward(lambda: causal_lm_loss(model, big)[0], model)) < rows * 3000
