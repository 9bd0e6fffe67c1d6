"""A run that was stopped goes on as if it had not been, or says why it cannot."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import phicore
from phicore import LoRAConfig, attach
from phicore.training import TrainConfig, Trainer, checkpoint
from phicore.training.consolidate import consolidate
from tests.training.regression import Batch, regression, squares, weights
from tests.training.small_run import (
    SETTINGS,
    assert_same_run,
    assert_same_tensors,
    examples,
    history,
    metrics,
    saved,
    small_model,
    small_trainer,
    stop_after,
)

Build = Callable[..., nn.Module]


def fit_and_stop(trainer: Trainer, step: int) -> None:
    with pytest.raises(SystemExit) as stopped:
        stop_after(trainer, step).fit()
    assert stopped.value.code == 0
    assert trainer.step == step


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    small_trainer(tmp_path / "whole").fit()
    for step in (1, 3, 8):
        output = tmp_path / str(step)
        fit_and_stop(small_trainer(output, resume=True), step)
        assert len(metrics(output)) == step
        torch.manual_seed(99)  # another process, another random state
        random.seed(99)
        result = small_trainer(output, resume=True).fit()
        assert_same_run(output, tmp_path / "whole")
        assert result.steps == 8
        assert result.tokens == metrics(output)[-1]["tokens"]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_stopped_qlora_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, tiny: Build, randomize: Build, dora: bool, recompute: bool
) -> None:
    def build(output: Path, seed: int = 1, recompute: bool = recompute) -> Trainer:
        torch.manual_seed(seed)
        model = phicore.quantize_(tiny("llama", dtype=torch.float32))
        config = phicore.LoRAConfig(rank=3, alpha=7.0, dora=dora, dropout=0.2)
        randomize(phicore.attach(model, config))
        settings = {**SETTINGS, "steps": 5, "save_every": 2, "gradient_checkpointing": recompute}
        return Trainer(model, TrainConfig(output=str(output), resume=True, **settings), examples(vocabulary=48))

    build(tmp_path / "whole").fit()
    fit_and_stop(build(tmp_path / "stopped"), 3)
    # The adapter that goes on started elsewhere, and the activations that were kept are recomputed, or the reverse.
    build(tmp_path / "stopped", seed=2, recompute=not recompute).fit()
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def whole_compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def parts_compiled(model: nn.Module) -> nn.Module:
    for name, part in model.named_children():
        setattr(model, name, torch.compile(part, backend="eager"))
    return model


@pytest.mark.parametrize("wrap", [whole_compiled, parts_compiled])
@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_run_goes_on_whether_its_model_is_compiled_or_not(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module], compiled_first: bool
) -> None:
    torch._dynamo.reset()
    kinds = (wrap, nn.Identity()) if compiled_first else (nn.Identity(), wrap)

    def build(output: Path, kind: Callable[[nn.Module], nn.Module]) -> Trainer:
        torch.manual_seed(1)
        return regression(output, kind(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).double()), resume=True)

    build(tmp_path / "whole", nn.Identity()).fit()
    fit_and_stop(build(tmp_path / "stopped", kinds[0]), 4)
    build(tmp_path / "stopped", kinds[1]).fit()
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert {"0.running_mean", "1.weight"} <= saved(tmp_path / "stopped").keys()


def test_random_numbers_of_python_and_numpy_go_on_too(tmp_path: Path) -> None:
    def noisy(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        x, y, mask = batch
        return squares(model, [x + random.random() + numpy.random.rand(), y, mask])

    def build(output: Path) -> Trainer:
        trainer = regression(output, resume=True)
        trainer.loss_fn = noisy
        return trainer

    build(tmp_path / "whole").fit()
    fit_and_stop(build(tmp_path / "stopped"), 4)
    random.seed(1)
    numpy.random.seed(1)
    build(tmp_path / "stopped").fit()
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_lines_after_the_checkpoint_are_written_anew(tmp_path: Path) -> None:
    """As after a kill between checkpoints: the lines reach step 7, the checkpoint step 6, or by hand step 3."""
    small_trainer(tmp_path / "whole").fit()
    output = tmp_path / "killed"
    trainer = small_trainer(output, save_every=3, resume=True)
    steps: list[int] = []
    inner = trainer.loss_fn

    def dying(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | int]:
        steps.append(trainer.step)
        if trainer.step == 7:
            raise KeyboardInterrupt
        return inner(model, batch)

    trainer.loss_fn = dying
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert [line["step"] for line in history(output)] == list(range(1, 8))
    assert checkpoint.latest_checkpoint(output / "checkpoints") == output / "checkpoints" / "step-00000006"
    for step in (6, 3):
        (output / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
        small_trainer(output, save_every=3, keep_checkpoints=9, resume=True).fit()
        assert_same_run(output, tmp_path / "whole")


def test_buffers_that_training_writes_are_resumed(tmp_path: Path) -> None:
    """In place past torch's version counter (batch norm), in place, and by putting another tensor there."""

    class Means(nn.Module):
        in_place: Tensor
        replaced: Tensor
        constant: Tensor

        def __init__(self) -> None:
            super().__init__()
            for name in ("in_place", "replaced", "constant"):
                self.register_buffer(name, torch.ones(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.in_place += x.mean(0)
                self.replaced = 0.9 * self.replaced + x.mean(0)
            return x * self.replaced + self.in_place * self.constant

    def build(output: Path) -> Trainer:
        torch.manual_seed(1)
        model = nn.Sequential(nn.BatchNorm1d(3), Means(), nn.Linear(3, 2)).double()
        model[0].requires_grad_(False)  # its running statistics are written all the same
        return regression(output, model, resume=True)

    build(tmp_path / "whole").fit()
    fit_and_stop(build(tmp_path / "stopped"), 4)
    build(tmp_path / "stopped").fit()
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    written = {"0.running_mean", "0.running_var", "0.num_batches_tracked", "1.in_place", "1.replaced"}
    assert written <= saved(tmp_path / "whole").keys()
    assert "1.constant" not in saved(tmp_path / "whole")


def test_only_what_trains_is_saved(tmp_path: Path, tiny: Build) -> None:
    model = phicore.quantize_(tiny("llama", dtype=torch.float32))
    phicore.attach(model, phicore.LoRAConfig(rank=2, alpha=4.0, target_modules=["q_proj", "v_proj"], dora=True))
    trainer = Trainer(model, TrainConfig(output=str(tmp_path), steps=2), examples(vocabulary=48))
    trainer.fit()
    path = trainer.save()
    tensors, _ = consolidate(path)
    assert_same_tensors(tensors, {n: p for n, p in model.named_parameters() if p.requires_grad})
    adapter = sum(t.nbytes for t in tensors.values())
    size = (path / "rank-0.safetensors").stat().st_size
    names = 1000 * len(tensors)  # in the header: each with two moments and a step count
    rng = 5056 + 20_000  # torch's state, and Python's and NumPy's as text
    assert 3 * adapter < size < 3 * adapter + names + rng


@pytest.mark.parametrize("async_save", [False, True])
def test_a_checkpoint_before_the_first_step_changes_nothing(tmp_path: Path, async_save: bool) -> None:
    small_trainer(tmp_path / "whole").fit()
    first = small_trainer(tmp_path / "first", async_save=async_save)
    torch.rand(3)  # whatever state it was made in, the run begins in its seed's
    assert first.save() == tmp_path / "first/checkpoints/step-00000000"
    torch.rand(3)
    first.fit()
    assert_same_run(tmp_path / "first", tmp_path / "whole")
    small_trainer(tmp_path / "stopped").save()
    small_trainer(tmp_path / "stopped", resume=True).fit()
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_saving_before_the_first_step_loses_no_run_that_is_there(tmp_path: Path) -> None:
    fit_and_stop(small_trainer(tmp_path), 3)
    before = saved(tmp_path)
    with pytest.raises(FileExistsError, match=r"holds a run \(step-00000003\); set resume, overwrite, or another"):
        small_trainer(tmp_path).save()
    with pytest.raises(ValueError, match="written with other settings; seed"):
        small_trainer(tmp_path, resume=True, seed=7).save()
    assert small_trainer(tmp_path, resume=True).save() == tmp_path / "checkpoints/step-00000003"
    assert_same_tensors(saved(tmp_path), before)


def test_a_finished_run_resumes_to_nothing(tmp_path: Path) -> None:
    first = small_trainer(tmp_path).fit()
    before = history(tmp_path)
    result = small_trainer(tmp_path, resume=True).fit()
    assert (result.steps, result.seconds, result.tokens_per_second) == (8, 0.0, 0.0)
    assert (result.loss, result.tokens) == (first.loss, first.tokens)
    assert history(tmp_path) == before


def test_resume_without_a_run_starts_one(tmp_path: Path) -> None:
    small_trainer(tmp_path / "a", resume=True).fit()
    small_trainer(tmp_path / "b").fit()
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_what_changes_no_weight_may_change(tmp_path: Path) -> None:
    small_trainer(tmp_path / "whole").fit()
    fit_and_stop(small_trainer(tmp_path / "old"), 3)
    (tmp_path / "old").rename(tmp_path / "new")
    small_trainer(tmp_path / "new", resume=True, save_every=2, keep_checkpoints=1, eval_batch_size=3).fit()
    assert_same_run(tmp_path / "new", tmp_path / "whole")


def test_what_would_change_the_run_is_listed(tmp_path: Path) -> None:
    config = TrainConfig(output=str(tmp_path), **SETTINGS)
    identity = {"model": "a", "targets": ("q", "v"), "gone": 1}
    fit_and_stop(Trainer(small_model(), config, examples(), identity=identity), 2)
    changed = {**SETTINGS, "seed": 5, "learning_rate": 0.1}
    other = TrainConfig(output=str(tmp_path), resume=True, **changed)
    trainer = Trainer(small_model(), other, examples(9), identity={"model": "b", "targets": ("q", "v")})
    before = weights(trainer)
    with pytest.raises(ValueError, match="step-00000002 was written with other settings") as raised:
        trainer.fit()
    told = str(raised.value).partition("settings; ")[2].split("; ")
    assert told == [
        "examples: 11 then, 9 now",
        "gone: 1 then, None now",
        "learning_rate: 0.05 then, 0.1 now",
        "model: 'a' then, 'b' now",
        "seed: 0 then, 5 now",
        "set them back to go on, or give another output for another run",
    ]
    assert_same_tensors(weights(trainer), before)
    same = TrainConfig(output=str(tmp_path), resume=True, **SETTINGS)
    assert Trainer(small_model(), same, examples(), identity=identity).fit().steps == 8


def test_an_identity_that_cannot_be_saved_is_refused_at_once(tmp_path: Path) -> None:
    config = TrainConfig(output=str(tmp_path))
    with pytest.raises(TypeError, match="dtype is not JSON"):
        Trainer(small_model(), config, examples(), identity={"dtype": torch.float32})


def test_a_model_that_does_not_fit_is_told(tmp_path: Path) -> None:
    fit_and_stop(small_trainer(tmp_path), 2)
    narrow, other_names, half = small_model(), small_model(), small_model().bfloat16()
    narrow.head = nn.Linear(6, 11)
    other_names.tail = nn.Linear(6, 6)
    frozen = small_model()
    frozen.embed.requires_grad_(False)
    config = TrainConfig(output=str(tmp_path), resume=True, **SETTINGS)
    for model, named in (
        (
            narrow,
            r"head\.bias, head\.weight \(of 2 names\); head\.bias is \[12\] float32 in it and \[11\] float32 here",
        ),
        (other_names, r"tail\.bias, tail\.weight \(of 2 names\)"),
        (frozen, r"embed\.weight \(of 1 names\)"),
        (half, r"embed\.weight, head\.bias, head\.weight \(of 3 names\)"),
    ):
        trainer = Trainer(model, config, examples())
        before = weights(trainer)
        with pytest.raises(ValueError, match=rf"step-00000002 does not fit the model: {named}"):
            trainer.fit()
        assert_same_tensors(weights(trainer), before)


def test_an_output_that_holds_a_run_is_not_touched(tmp_path: Path) -> None:
    small_trainer(tmp_path).fit()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=r"holds a run .step-00000008.; set resume, overwrite, or another output"):
        small_trainer(tmp_path).fit()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_overwrite_starts_anew(tmp_path: Path) -> None:
    small_trainer(tmp_path / "old", seed=3, steps=9).fit()
    (tmp_path / "old" / "checkpoints" / "latest").write_text("")  # damage does not stand in the way
    small_trainer(tmp_path / "old", overwrite=True).fit()
    small_trainer(tmp_path / "new").fit()
    assert_same_run(tmp_path / "old", tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "old" / "checkpoints").iterdir()) == ["latest", "step-00000008"]


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_stay(tmp_path: Path, keep: int) -> None:
    small_trainer(tmp_path, save_every=3, keep_checkpoints=keep).fit()
    kept = ["step-00000003", "step-00000006", "step-00000008"][-keep:]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", *kept]


def test_a_start_that_came_out_otherwise_is_resumed_as_it_was(tmp_path: Path) -> None:
    """Another machine may decompose W otherwise: here its start is off by a sign."""

    def trainer(flip: bool, **settings: Any) -> Trainer:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        config = LoRAConfig(rank=2, alpha=3, init="pissa", dora=True, target_modules=["0", "2"])
        attach(model, config)
        if flip:
            with torch.no_grad():
                for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                    if name.endswith("start_B"):
                        tensor.neg_()
        return regression(tmp_path, model=model, **settings)

    first = trainer(flip=False)
    with pytest.raises(SystemExit):
        stop_after(first, 3).fit()
    resumed = trainer(flip=True, resume=True)
    resumed.fit()
    first.fit()
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(resumed).values(), strict=True))
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(first.model(x), resumed.model(x))


def test_a_cache_that_is_made_in_the_forward_pass_does_not_stop_a_resumption(tmp_path: Path) -> None:
    class Cached(nn.Module):
        cache: Tensor | None

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", None, persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.cache is None or len(self.cache) < len(x):
                self.cache = torch.ones(len(x), 1, dtype=x.dtype)
            return x * self.cache[: len(x)]

    def build(output: Path) -> Trainer:
        torch.manual_seed(1)
        return regression(output, nn.Sequential(Cached(), nn.Linear(3, 2)).double(), resume=True)

    build(tmp_path / "whole").fit()
    fit_and_stop(build(tmp_path / "stopped"), 4)
    build(tmp_path / "stopped").fit()
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert "0.cache" not in saved(tmp_path / "whole")
