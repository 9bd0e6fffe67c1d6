"""The Trainer: its steps equal AdamW written out, its evaluations change nothing, and what goes wrong is said."""

import copy
import math
import random
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn

from phicore.adapters import LoRAConfig, attach, mixed
from phicore.training import TrainConfig, Trainer
from phicore.training.batches import make_batch, to_device
from phicore.training.data import collate
from phicore.training.loss import causal_lm_loss
from tests.training.regression import Batch, regression, regression_data, squares, visits, weights, weights_of
from tests.training.small_run import (
    SETTINGS,
    Slow,
    SmallLM,
    assert_same_tensors,
    examples,
    history,
    metrics,
    saved,
    small_model,
    small_trainer,
)

Build = Callable[..., nn.Module]
SIZED = examples(5)

# ===== A step =====


@pytest.mark.parametrize("max_norm", [0.0, 0.3, 100.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_steps_equal_adamw_written_out(tmp_path: Path, max_norm: float, weight_decay: float) -> None:
    """Mean over the step's items, clipping, warm-up and cosine, AdamW (Loshchilov & Hutter 2019, algorithm 2)."""
    peak, low, warmup, steps = 0.07, 0.01, 2, 7
    settings = {"max_norm": max_norm, "weight_decay": weight_decay, "min_learning_rate": low, "seed": 3}
    trainer = regression(
        tmp_path, learning_rate=peak, warmup_steps=warmup, steps=steps, beta1=0.8, beta2=0.95, **settings
    )
    model, data = copy.deepcopy(trainer.model), regression_data()
    parameters = list(model.parameters())
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    expected = []
    for t, indices in enumerate(visits(len(data), 3, steps, 4)):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for i in indices:
            x, y, mask = data[i]
            total = total + (mask * (model(x) - y) ** 2).sum()
            count += int(mask.sum())
        gradients = torch.autograd.grad(total / count, parameters)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        factor = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
        rate = peak * (t + 1) / 3 if t < 2 else low + (peak - low) * (1 + math.cos(math.pi * (t - 2) / 4)) / 2
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                p *= 1 - rate * weight_decay
                m += (1 - 0.8) * (factor * g - m)
                v += (1 - 0.95) * ((factor * g) ** 2 - v)
                p -= rate * (m / (1 - 0.8 ** (t + 1))) / ((v / (1 - 0.95 ** (t + 1))).sqrt() + 1e-8)
        expected.append((total.item() / count, norm, rate))
    trainer.fit()
    found = [(line["loss"], line["grad_norm"], line["learning_rate"]) for line in metrics(tmp_path)]
    for given, exact in zip(found, expected, strict=True):
        assert given == pytest.approx(exact, rel=1e-9)
    assert all(norm > 0.3 for _, norm, _ in expected)  # so that 0.3 clips, and the norm told is the one before
    for p, (name, given_p) in zip(parameters, trainer.parameters.items(), strict=True):
        torch.testing.assert_close(given_p, p, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("accumulation", [2, 3, 5, 7])
def test_cutting_a_step_changes_nothing(tmp_path: Path, accumulation: int) -> None:
    """The micro-batches hold unequal numbers of items; the last cut asks for more parts than there are examples."""
    whole = regression(tmp_path / "1", batch_size=5, accumulation=1)
    cut = regression(tmp_path / "n", batch_size=5, accumulation=accumulation)
    whole.fit()
    cut.fit()
    for name, p in whole.parameters.items():
        torch.testing.assert_close(cut.parameters[name], p, rtol=1e-9, atol=1e-12, msg=name)
    for a, b in zip(history(tmp_path / "1"), history(tmp_path / "n"), strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def test_cutting_a_step_of_a_language_model_changes_nothing(tmp_path: Path, tiny: Build) -> None:
    """Padding differs between the cuts, and some micro-batches carry no loss at all."""
    data = examples(vocabulary=48)
    data[1]["labels"] = torch.full_like(data[1]["labels"], -100)
    runs = []
    for accumulation in (1, 4):
        config = TrainConfig(output=str(tmp_path / str(accumulation)), **{**SETTINGS, "accumulation": accumulation})
        runs.append(Trainer(tiny("llama"), config, data))
        runs[-1].fit()
    for name, p in runs[0].parameters.items():
        torch.testing.assert_close(runs[1].parameters[name], p, rtol=1e-6, atol=1e-6, msg=name)


def test_examples_come_in_the_order_of_the_seed(tmp_path: Path) -> None:
    class Watched(Slow):
        def __init__(self) -> None:
            super().__init__(0.0)
            self.seen: list[int] = []

        def __getitem__(self, i: Any) -> Any:
            self.seen.append(i)
            return super().__getitem__(i)

    runs = []
    for seed in (0, 0, 1):
        data = Watched()
        config = TrainConfig(output=str(tmp_path), **{**SETTINGS, "seed": seed}, overwrite=True)
        Trainer(small_model(), config, data).fit()
        runs.append(data.seen)
        assert data.seen == [i for step in visits(len(data), seed, 8, 4) for i in step]
    assert runs[0] == runs[1] != runs[2]


def test_tokens_are_counted_without_padding(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, steps=2, batch_size=11)
    result = trainer.fit()
    tokens = sum(len(example["input_ids"]) for example in examples())
    assert [line["tokens"] for line in metrics(tmp_path)] == [tokens, 2 * tokens]
    assert result.tokens == trainer.tokens == 2 * tokens
    assert result.steps == trainer.step == 2
    assert result.loss == metrics(tmp_path)[-1]["loss"]
    assert result.seconds > 0
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    # Other data has items.
    items = regression(tmp_path / "items", steps=1, batch_size=13).fit().tokens
    assert items == sum(int(mask.sum()) for _, _, mask in regression_data())


def test_a_mask_of_pairs_of_tokens_counts_none(tmp_path: Path) -> None:
    """As of packed examples, of what is added to scores: it holds minus infinity."""

    def pairs(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = torch.stack([row["input_ids"] for row in rows])  # [2, 4]
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.full((2, 1, 4, 4), -math.inf).triu(1)}

    rows = [{"input_ids": torch.arange(4)}] * 4
    config = TrainConfig(output=str(tmp_path), **{**SETTINGS, "steps": 3, "batch_size": 2, "accumulation": 1})
    assert Trainer(small_model(), config, rows, collate_fn=pairs).fit().tokens == 3 * 2 * 3  # those that carry loss


def test_every_line_tells_the_same_facts(tmp_path: Path) -> None:
    small_trainer(tmp_path, steps=7, log_every=3).fit()
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 3, 6, 7]
    facts = {"step", "loss", "grad_norm", "learning_rate", "tokens"}
    clock = {"tokens_per_second", "peak_memory_bytes", "data_wait_percent"}
    assert all(line.keys() == facts | clock for line in lines)
    assert all(0 <= line["data_wait_percent"] <= 100 for line in lines)


def test_waiting_for_data_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands but for three seconds an example and four a micro-batch."""
    clock = [0.0]
    monkeypatch.setattr("phicore.training.trainer.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def collate(rows: list[Any]) -> Any:
        clock[0] += 3.0 * len(rows)
        return make_batch(rows)

    def loss(model: nn.Module, batch: Any) -> Any:
        clock[0] += 4.0
        return causal_lm_loss(model, batch)

    config = TrainConfig(output=str(tmp_path), **{**SETTINGS, "steps": 2})
    Trainer(small_model(), config, examples(), loss_fn=loss, collate_fn=collate).fit()
    assert [line["data_wait_percent"] for line in metrics(tmp_path)] == [60.0, 60.0]  # 12 of 20 seconds


def test_gradients_left_from_outside_do_not_count(tmp_path: Path) -> None:
    clean, used = regression(tmp_path / "a"), regression(tmp_path / "b")
    squares(used.model, [torch.stack(column) for column in zip(*regression_data(), strict=True)])[0].backward()
    clean.fit()
    used.fit()
    assert_same_tensors(weights(clean), weights(used))


def test_only_parameters_that_require_gradients_change(tmp_path: Path) -> None:
    model = small_model()
    model.embed.requires_grad_(False)
    before = model.embed.weight.clone()
    trainer = Trainer(model, TrainConfig(output=str(tmp_path), **SETTINGS), examples())
    trainer.fit()
    assert set(trainer.parameters) == {"head.weight", "head.bias"}
    assert torch.equal(model.embed.weight, before)
    assert model.embed.weight.grad is None


def test_a_collate_function_of_the_users(tmp_path: Path) -> None:
    sizes: list[int] = []

    def gather(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        sizes.append(len(items))
        return collate(items, pad_id=7)

    config = TrainConfig(output=str(tmp_path), **{**SETTINGS, "steps": 2, "batch_size": 5})
    Trainer(small_model(), config, examples(), collate_fn=gather).fit()
    assert sizes == [2, 3, 2, 3]


def test_a_mask_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    """Examples that are padded already, with a mask, are stacked as they are."""
    row = {"input_ids": torch.tensor([1, 2, 0]), "labels": torch.tensor([1, 2, -100])}
    padded = [{**row, "attention_mask": torch.tensor([1, 1, 0])}] * 3
    seen: list[Tensor] = []

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        seen.append(batch["attention_mask"])
        return causal_lm_loss(model, batch)

    config = TrainConfig(output=str(tmp_path), steps=1, batch_size=3)
    Trainer(small_model(), config, padded, loss_fn=loss_fn).fit()
    assert seen[0].tolist() == [[1, 1, 0]] * 3


def test_the_default_device_is_no_matter(tmp_path: Path) -> None:
    order = {"group_by_length": True, "seed": 77}  # of no other test, since permutations are kept
    found, expected = (small_trainer(tmp_path / name, **order) for name in ("found", "expected"))
    with torch.device("meta"):  # in a GPU's place, under torch.set_default_device
        found.fit()
        tensors = saved(tmp_path / "found")
    expected.fit()
    assert history(tmp_path / "found") == history(tmp_path / "expected")
    assert_same_tensors(tensors, saved(tmp_path / "expected"))


# ===== Evaluation =====


def test_evaluation_is_a_mean_over_all_tokens_with_dropout_off(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, eval_batch_size=3)
    quiet = small_model(dropout=0)
    total, count = 0.0, 0
    for example in examples(7):
        loss, n = causal_lm_loss(quiet, collate([example], 0))
        total, count = total + loss.item(), count + int(n)
    assert trainer.evaluate(examples(7)) == pytest.approx(total / count, rel=1e-5)


def test_evaluation_leaves_everything_as_it_was(tmp_path: Path, unchanged: Callable[..., Any]) -> None:
    trainer = small_trainer(tmp_path)
    for frozen in (True, False):
        trainer.model.train()
        if frozen:
            trainer.model.get_submodule("dropout").eval()  # one module in another mode than the rest
        with unchanged(trainer.model):
            trainer.evaluate(examples(7))
        assert all(p.grad is None for p in trainer.model.parameters())


def test_evaluating_during_a_run_does_not_change_it(tmp_path: Path) -> None:
    def noisy(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        x, y, mask = batch
        return squares(model, [x + torch.randn_like(x) + random.random() + numpy.random.rand(), y, mask])

    finals = []
    for eval_every in (0, 2):
        eval_data = regression_data(5) if eval_every else None
        trainer = regression(tmp_path / str(eval_every), eval_data=eval_data, eval_every=eval_every)
        trainer.loss_fn = noisy
        trainer.fit()
        finals.append(weights(trainer))
    assert_same_tensors(*finals)
    lines = metrics(tmp_path / "2")
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))


def test_a_run_leaves_the_models_modes_as_they_were(tmp_path: Path) -> None:
    modes: list[bool] = []
    for training in (False, True):
        trainer = small_trainer(tmp_path, steps=2, overwrite=True)
        trainer.model.train(training)
        trainer.model.get_submodule("embed").eval()
        before = [module.training for module in trainer.model.modules()]
        trainer.model.register_forward_hook(lambda module, _i, _o: modes.append(module.training))
        trainer.fit()
        assert [module.training for module in trainer.model.modules()] == before
    assert all(modes)


def test_nothing_to_evaluate_is_told(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    for data in (None, []):
        with pytest.raises(ValueError, match="nothing to evaluate on: give the Trainer eval_data"):
            trainer.evaluate(data)
    with pytest.raises(ValueError, match="evaluation: no token carries loss"):
        trainer.evaluate([{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([-100, -100])}])


# ===== What goes wrong =====


@pytest.mark.parametrize("broken", ["loss", "gradient", "overflow"])
def test_a_step_that_is_not_finite_is_not_taken(tmp_path: Path, broken: str) -> None:
    trainer = regression(tmp_path, save_every=2)
    at_step: list[dict[str, Tensor]] = []

    def breaking(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, n = squares(model, batch)
        if trainer.step == 4:
            at_step.append(weights(trainer))
            if broken == "loss":
                return loss * math.nan, n
            weight = next(model.parameters())
            zero = (weight - weight.detach()).abs().sum()
            # Both are finite; the gradient of the square root at 0 is not, and that of the product is too large.
            return loss + (torch.sqrt(zero) if broken == "gradient" else zero * 1e300 * 1e10), n
        return loss, n

    trainer.loss_fn = breaking
    what = "loss is nan, gradient norm is nan" if broken == "loss" else "gradient norm is (nan|inf)"
    with pytest.raises(FloatingPointError, match=rf"step 5, rank 0: .*{what}; the step was not taken.*\[\d+, ") as told:
        trainer.fit()
    visited = visits(13, 0, 5, 4)[4]
    assert str(visited) in str(told.value)
    assert trainer.step == 4
    assert_same_tensors(weights(trainer), at_step[0])
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
    fresh = regression(tmp_path, resume=True)
    assert fresh.fit().steps == 8
    regression(tmp_path / "whole").fit()
    assert_same_tensors(weights(fresh), weights_of(tmp_path / "whole"))


def test_a_step_without_a_labelled_token_is_told(tmp_path: Path) -> None:
    data = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, -100, -100])}]
    trainer = Trainer(small_model(), TrainConfig(output=str(tmp_path), steps=1, batch_size=2), data)
    before = weights(trainer)
    with pytest.raises(ValueError, match="step 1: no token carries loss"):
        trainer.fit()
    assert_same_tensors(weights(trainer), before)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            [{"input_ids": e["input_ids"]} for e in SIZED],
            "like dict with input_ids cannot be .*Only dicts of",
        ),
        ([{**e, "id": 3} for e in SIZED], "like dict with input_ids, labels, id cannot be stacked"),
        ([{"input_ids": torch.ones(3, dtype=torch.int64)}], "input_ids and labels, got dict with input_ids; give"),
        ([{"text": "a"}], "input_ids and labels, got dict with text; give"),
        ([torch.ones(3, dtype=torch.int64)], "input_ids and labels, got Tensor; give examples both"),
    ],
)
def test_examples_without_labels_are_told(tmp_path: Path, given: Any, told: str) -> None:
    trainer = Trainer(small_model(), TrainConfig(output=str(tmp_path), **SETTINGS), given)
    with pytest.raises(ValueError, match=told):
        trainer.fit()


@pytest.mark.parametrize("kind", [tuple, dict, type(None)])
def test_a_model_that_returns_no_logits_is_told(tmp_path: Path, kind: type) -> None:
    class Other(SmallLM):
        def forward(self, input_ids: Tensor) -> Any:
            logits = super().forward(input_ids)
            return {tuple: (logits,), dict: {"logits": logits}}.get(kind)

    trainer = Trainer(Other(), TrainConfig(output=str(tmp_path), **SETTINGS), examples())
    with pytest.raises(TypeError, match=f"Other returns {kind.__name__}.*logits as a tensor or .* or give the Trainer"):
        trainer.fit()


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (lambda loss: loss, "a Tensor"),
        (lambda loss: {"loss": loss, "logits": loss}, "a dict with loss, logits"),
        (lambda loss: (loss, 1, 2), "a tuple of Tensor, int, int"),
        (lambda loss: (loss, {"logits": loss}), "a tuple of Tensor, dict with logits"),
        (lambda loss: (loss.expand(2), 1), "a tuple of Tensor, int"),
        (lambda loss: (float(loss), 1), "a tuple of float, int"),
    ],
)
@pytest.mark.parametrize("evaluate", [False, True])
def test_a_loss_function_that_returns_no_sum_and_count_is_told(
    tmp_path: Path, returned: Any, told: str, evaluate: bool
) -> None:
    """As that of transformers' Trainer, which returns the mean alone."""

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        return returned(model(batch["input_ids"]).mean())

    trainer = Trainer(
        small_model(), TrainConfig(output=str(tmp_path), **SETTINGS), examples(), examples(), loss_fn=loss_fn
    )
    with pytest.raises(TypeError, match=f"loss_fn returned {told}; it must return two values: the loss summed"):
        trainer.evaluate() if evaluate else trainer.fit()


@pytest.mark.parametrize("count", [-1, math.nan, math.inf, torch.tensor(-2)])
@pytest.mark.parametrize("evaluate", [False, True])
def test_a_count_that_is_none_is_told(tmp_path: Path, count: Any, evaluate: bool) -> None:
    """A negative one would turn the gradient around."""
    trainer = regression(tmp_path, eval_data=regression_data())
    trainer.loss_fn = lambda *given: (squares(*given)[0], count)
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"loss_fn counted .* tokens .or items.; a count is finite and at least 0"):
        trainer.evaluate() if evaluate else trainer.fit()
    assert_same_tensors(weights(trainer), before)


def test_a_loss_that_does_not_come_from_the_model_is_told(tmp_path: Path) -> None:
    """It would train nothing, with a loss and a norm of zero in the log."""

    def loss_fn(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        loss, n = squares(model, batch)
        return torch.tensor(float(loss.detach()), requires_grad=True), int(n)

    trainer = regression(tmp_path)
    trainer.loss_fn = loss_fn
    with pytest.raises(ValueError, match="step 1: no parameter that trains got a gradient; compute the loss from"):
        trainer.fit()


def test_an_error_of_the_users_code_leaves_the_model_as_it_was(tmp_path: Path, tiny: Build) -> None:
    model = tiny("llama").eval()
    config = TrainConfig(output=str(tmp_path), gradient_checkpointing=True, **SETTINGS)

    def failing(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        raise RuntimeError("out of memory")

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="out of memory"):
        Trainer(model, config, examples(vocabulary=48), loss_fn=failing).fit()
    assert not any(module.training or "forward" in module.__dict__ for module in model.modules())
    assert signal.getsignal(signal.SIGTERM) == handler


# ===== What a run refuses to pass over =====


def test_rows_of_other_adapters_are_refused(tmp_path: Path, tiny: Build) -> None:
    """Which example is which row is the Trainer's choice, so a row would be another adapter's."""
    model = attach(tiny("llama"), LoRAConfig(rank=2, alpha=3.0), name="a")
    trainer = Trainer(model, TrainConfig(output=str(tmp_path), steps=1, batch_size=2), examples(4), examples(2))
    with mixed(model, ["a", None]):
        with pytest.raises(ValueError, match=r"within mixed\(\) .* fit chooses which example is which row"):
            trainer.fit()
        with pytest.raises(ValueError, match=r"within mixed\(\) .* evaluate chooses which example is which row"):
            trainer.evaluate()
    assert trainer.fit().steps == 1


def test_metrics_of_a_run_without_a_checkpoint_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(FileExistsError, match="of a run that has no checkpoint"):
        small_trainer(tmp_path).fit()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'
    small_trainer(tmp_path, overwrite=True).fit()
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, SETTINGS["steps"] + 1))


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def test_a_batch_may_be_a_namedtuple(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Pair) -> tuple[Tensor, int]:
        return (model(batch.x) - batch.y).square().sum(), batch.y.numel()

    data = [Pair(torch.randn(3), torch.randn(2)) for _ in range(4)]
    trainer = Trainer(nn.Linear(3, 2), TrainConfig(output=str(tmp_path), steps=2, batch_size=2), data, loss_fn=loss)
    assert trainer.fit().steps == 2


def test_a_batch_may_be_a_packed_sequence(tmp_path: Path) -> None:
    """One of its parts stays on the CPU, whatever the device."""
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    assert to_device([packed], torch.device("meta"))[0].data.is_meta
    (same,) = to_device([packed], torch.device("cpu"))
    assert torch.equal(same.data, packed.data)
    assert torch.equal(same.batch_sizes, packed.batch_sizes)


def test_buffers_that_share_memory_are_saved_and_loaded(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2).double()
            self.register_buffer("seen", torch.zeros(4))
            self.register_buffer("recent", self.seen[1:3])

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return self.linear(x)

    def trainer(**settings: Any) -> Trainer:
        config = TrainConfig(output=str(tmp_path), steps=3, batch_size=2, **settings)
        return Trainer(Counting(), config, regression_data(), loss_fn=squares)

    trainer().fit()
    again = trainer(resume=True)
    again.fit()
    assert torch.equal(again.model.seen, torch.full((4,), 3.0))
    assert torch.equal(again.model.recent, torch.full((2,), 3.0))


def test_group_by_length_puts_examples_of_like_length_into_a_step(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 9, (int(n),), generator=generator) for n in torch.randint(2, 30, (64,))]
    data = [{"input_ids": row, "labels": row} for row in rows]
    shapes = []

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        shapes.append(tuple(batch["input_ids"].shape))
        return model.weight.sum(), 1

    for grouped in (False, True):
        config = TrainConfig(
            output=str(tmp_path / str(grouped)), steps=16, batch_size=4, group_by_length=grouped, save_every=0
        )
        Trainer(nn.Linear(1, 1), config, data, loss_fn=loss).fit()
    assert [rows for rows, _ in shapes] == [4] * 32
    lengths = sorted(map(len, rows))
    assert sorted(longest for _, longest in shapes[16:]) == lengths[3::4]  # of one sorted window
    assert sum(longest for _, longest in shapes[16:]) < sum(longest for _, longest in shapes[:16])
