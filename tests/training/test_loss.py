"""The loss of a language model: it and its gradient equal the definition, summed position by position in float64."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from phicore.training.batches import make_batch
from phicore.training.data import collate
from phicore.training.loss import causal_lm_loss, masked_mean
from tests.training.small_run import examples, small_model

Measure = Callable[[Tensor, Tensor], float]


def naive(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """-log softmax(logits at t)[label at t + 1], summed over the labelled positions; how many there are."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            label = int(labels[row, t + 1])
            if label != -100:
                p = logits[row, t].double()
                total = total + torch.log(torch.exp(p - p.max()).sum()) + p.max() - p[label]
                count += 1
    return total, count


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])


@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4), seed=st.integers(0, 99), labelled=st.floats(0, 1))
def test_equals_the_definition_on_a_plain_module(
    lengths: list[int], seed: int, labelled: float, relative_error: Measure
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n in lengths:
        ids = torch.randint(12, (n,), generator=generator)
        hidden = torch.rand(n, generator=generator) > labelled
        rows.append({"input_ids": ids, "labels": ids.masked_fill(hidden, -100)})
    batch = collate(rows, pad_id=0)
    model = small_model(dropout=0, dtype=torch.float64)
    loss, count = causal_lm_loss(model, batch)
    exact, exact_count = naive(model(batch["input_ids"]), batch["labels"])
    assert loss.dtype == torch.float32
    assert int(count) == exact_count
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    if exact_count:
        assert relative_error(gradient(model, loss), gradient(model, exact)) < 1e-6
    else:
        assert gradient(model, loss).count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_equals_the_definition_on_a_llama(
    tiny: Callable[..., nn.Module], relative_error: Measure, dtype: torch.dtype
) -> None:
    model = tiny("llama", dtype=dtype)
    batch = collate(examples(5, vocabulary=48), pad_id=3)
    loss, count = causal_lm_loss(model, batch)
    # Each row alone, without padding, mask or a choice of positions.
    exact, exact_count = torch.zeros((), dtype=torch.float64), 0
    for example in examples(5, vocabulary=48):
        total, n = naive(model(example["input_ids"][None]).logits, example["labels"][None])
        exact, exact_count = exact + total, exact_count + n
    assert int(count) == exact_count
    tolerance = 1e-6 if dtype == torch.float64 else 3e-2
    assert loss.item() == pytest.approx(exact.item(), rel=tolerance)
    assert relative_error(gradient(model, loss), gradient(model, exact)) < tolerance


def test_the_head_runs_where_a_row_has_a_label_and_nowhere_else(tiny: Callable[..., nn.Module]) -> None:
    model: Any = tiny("llama")
    shapes = []
    model.lm_head.register_forward_hook(lambda _m, _i, output: shapes.append(tuple(output.shape)))
    labels = torch.full((2, 6), -100)
    labels[0, 3] = labels[1, 3] = labels[1, 5] = labels[0, 0] = 1  # the first token is predicted from nothing
    _, count = causal_lm_loss(model, {"input_ids": torch.ones(2, 6, dtype=torch.int64), "labels": labels})
    assert int(count) == 3
    assert shapes == [(2, 2, 48)]


def test_gives_a_model_what_its_forward_takes() -> None:
    """A mask only where there is one; no key that it does not know; tokens by position if it names them otherwise."""
    batch = {
        "input_ids": torch.tensor([[1, 2]]),
        "labels": torch.tensor([[1, 2]]),
        "attention_mask": torch.tensor([[1, 1]]),
    }
    without_mask = {key: batch[key] for key in ("input_ids", "labels")}
    calls: list[set[str]] = []

    class Plain(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            calls.append({"tokens"})
            return torch.zeros(*tokens.shape, 3)

    class Full(nn.Module):
        def forward(
            self, input_ids: Tensor, attention_mask: Any = None, use_cache: bool = True, other: Any = None
        ) -> Any:
            given = {"mask": attention_mask is not None, "cache": use_cache, "other": other is not None}
            calls.append({key for key, value in given.items() if value})
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 3))

    for model, data in ((Plain(), batch), (Full(), batch), (Full(), without_mask)):
        loss, count = causal_lm_loss(model, data)
        assert loss.item() == pytest.approx(torch.tensor(3.0).log().item())
        assert int(count) == 1
    assert calls == [{"tokens"}, {"mask"}, set()]


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), checkpoint_wrapper])
def test_a_wrapped_model_is_given_what_the_model_takes(tiny: Callable[..., nn.Module], wrap: Any) -> None:
    """A wrapper's own forward names nothing; without the mask, examples attend to padding on their left."""
    torch._dynamo.reset()
    model = tiny("llama")
    ids = torch.randint(3, 48, (2, 6))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    batch = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
    torch.testing.assert_close(causal_lm_loss(wrap(model), batch), causal_lm_loss(model, batch))
    with pytest.raises(ValueError, match="the batch has position_ids, which LlamaForCausalLM takes"):
        causal_lm_loss(wrap(model), {**batch, "position_ids": ids})


def test_a_mean_of_nothing_is_refused() -> None:
    assert masked_mean(6.0, 4.0, "step 1") == 1.5
    with pytest.raises(ValueError, match=r"step 7: no token carries loss; .* Raise the sequence length"):
        masked_mean(0.0, 0.0, "step 7")


class Placed(nn.Module):
    """Takes places of tokens, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return self.inner(input_ids)


def test_what_the_model_takes_is_not_passed_over() -> None:
    """Places of packed examples, say: without them each would attend to the one before."""
    ids = torch.arange(8).view(2, 4)
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 0, 1]] * 2), "source": [1, 2]}
    with pytest.raises(ValueError, match="the batch has position_ids, which Placed takes and causal_lm_loss does not"):
        causal_lm_loss(Placed(), batch)
    loss, count = causal_lm_loss(small_model(), batch)  # takes no places
    assert (loss.item() > 0, int(count)) == (True, 6)


def test_lists_that_were_stacked_are_told() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "token_type_ids": [0, 0, 0]}] * 2
    with pytest.raises(TypeError, match=r"input_ids of the batch is a list.* take other keys .*here token_type_ids"):
        causal_lm_loss(small_model(), make_batch(rows))


@pytest.mark.parametrize("padded", [True, False])
def test_the_balancing_loss_of_experts_is_added_as_transformers_adds_it(relative_error: Measure, padded: bool) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, router_aux_loss_coef=0.5, output_router_logits=True,
        )
    )  # fmt: skip
    lengths = (5, 9) if padded else (7, 7)
    batch = make_batch([{"input_ids": torch.randint(40, (n,)), "labels": torch.arange(n)} for n in lengths])
    theirs = model(**batch).loss
    for _ in range(2):  # the second time it is known that the padding is to stay
        loss, count = causal_lm_loss(model, batch)
        assert loss.item() / count.item() == pytest.approx(theirs.item(), rel=1e-5)
        ours = gradient(model, loss / count)
        assert relative_error(ours, gradient(model, model(**batch).loss)) < 1e-5
    model.config.output_router_logits = False
    without, count = causal_lm_loss(model, batch)
    assert without.item() / count.item() < theirs.item() - 0.1


def test_a_balancing_loss_without_a_factor_is_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 8)

        def forward(self, input_ids: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.table(input_ids), aux_loss=torch.ones(()))

    ids = torch.randint(8, (2, 5))
    with pytest.raises(ValueError, match="Experts returns an aux_loss, and neither it nor its config"):
        causal_lm_loss(Experts(), {"input_ids": ids, "labels": ids})
