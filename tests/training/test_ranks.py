"""The Trainer on several ranks, as real processes: the run of one process, whatever each rank got to do."""

import math
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import phicore
from phicore.training import TrainConfig, Trainer, checkpoint, shards
from phicore.training.consolidate import consolidate
from phicore.training.loss import causal_lm_loss
from tests.training.small_run import SETTINGS, assert_same_tensors, examples, history, saved, small_model
from tests.zero.ranks import Ranks

Group = Callable[[int], Ranks]


def trainer(output: Path, dropout: float = 0.0, model: nn.Module | None = None, **settings: Any) -> Trainer:
    config = TrainConfig(output=str(output), **{**SETTINGS, **settings})
    return Trainer(model or small_model(dropout), config, examples(), examples(7))


def adapted_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return phicore.attach(small_model(0.0), phicore.LoRAConfig(rank=2, target_modules=["head"]))


def fit(output: Path, settings: dict[str, Any]) -> dict[str, Tensor]:
    run = trainer(output, model=adapted_model() if "lora_plus_ratio" in settings else None, **settings)
    run.fit()
    return {name: p.detach().clone() for name, p in run.parameters.items()}


def fit_each(runs: list[tuple[Path, dict[str, Any]]]) -> list[dict[str, Tensor]]:
    return [fit(output, settings) for output, settings in runs]


def assert_close_runs(a: Path, b: Path) -> None:
    for mine, theirs in zip(history(a), history(b), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)


# ===== A step =====


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_train_as_one_process(tmp_path: Path, ranks: Group, world: int) -> None:
    """Unequal token counts, micro-batches that differ in number, and batches smaller than the world."""
    several = (
        {"zero_stage": 2, "batch_size": 7, "accumulation": 2, "eval_every": 2},
        {"zero_stage": 1, "batch_size": 7, "accumulation": 3, "lora_plus_ratio": 4.0},
        {"zero_stage": 2, "batch_size": 4, "accumulation": 4, "max_norm": 0.0},
        {"zero_stage": 1, "batch_size": 1, "accumulation": 1, "max_norm": 0.01},
        {"zero_stage": 2, "batch_size": 2, "accumulation": 5, "group_by_length": True},
    )
    runs = [(tmp_path / str(i), {"steps": 4, **settings}) for i, settings in enumerate(several)]
    alone = [(tmp_path / f"{i}-alone", settings) for i, (_, settings) in enumerate(runs)]
    found = ranks(world)(fit_each, runs)
    for i, expected in enumerate(fit_each(alone)):
        assert_close_runs(runs[i][0], alone[i][0])
        for rank in range(world):
            for name, p in expected.items():
                assert torch.equal(found[rank][i][name], found[0][i][name])
                torch.testing.assert_close(found[rank][i][name], p, rtol=1e-5, atol=1e-6, msg=name)


def gradients_held(output: Path, stage: int) -> tuple[int, int]:
    """Elements of gradients that this rank holds before the last of three micro-batches, and reductions of a step."""
    run = trainer(output, batch_size=6, accumulation=3, zero_stage=stage, steps=1)
    held: list[int] = []
    inner = run.loss_fn
    reducer = run.optimizer._reducer
    started, start = [0], reducer._start

    def counting(bucket: Any) -> None:
        started[0] += 1
        start(bucket)

    def watching(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | int]:
        reducer.wait()
        whole = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
        held.append(whole + sum(b.grad.numel() for b in reducer.buckets if b.grad is not None))
        return inner(model, batch)

    reducer._start = counting  # type: ignore[method-assign]
    run.loss_fn = watching
    run.fit()
    return held[-1], started[0]


def test_what_accumulation_holds_and_sends(tmp_path: Path, ranks: Group) -> None:
    size = sum(p.numel() for p in small_model().parameters())
    for held, sent in ranks(2)(gradients_held, tmp_path / "1", 1):
        assert (held, sent) == (size, 1)
    for held, sent in ranks(2)(gradients_held, tmp_path / "2", 2):
        assert size / 2 <= held <= size / 2 + 32  # padding to whole shards
        assert sent == 3


def fail_at(output: Path, broken: str, culprit: int) -> tuple[str, int, bool]:
    """What a rank raised where one computes something that is not finite in step 3; its step, and whether its weights
    are those before."""
    run = trainer(output, steps=4)
    inner = run.loss_fn
    before: list[Tensor] = []

    def breaking(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | int]:
        loss, n = inner(model, batch)
        if run.step == 2:
            before.append(next(model.parameters()).detach().clone())
            if dist.get_rank() == culprit:
                weight = next(model.parameters())
                zero = (weight - weight.detach()).abs().sum()
                return (loss * math.nan if broken == "loss" else loss + torch.sqrt(zero)), n
        return loss, n

    run.loss_fn = breaking
    with pytest.raises(FloatingPointError) as told:
        run.fit()
    return str(told.value), run.step, torch.equal(before[0], next(run.model.parameters()).detach())


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_names_its_rank_on_all(tmp_path: Path, ranks: Group, broken: str) -> None:
    for culprit in (0, 2):
        for text, step, same in ranks(3)(fail_at, tmp_path / f"{broken}{culprit}", broken, culprit):
            assert f"step 3, rank {culprit}: loss is " in text
            assert (step, same) == (2, True)


def settings_that_differ(output: Path) -> str:
    with pytest.raises(ValueError, match="rank 1") as told:
        trainer(output, seed=dist.get_rank())
    return str(told.value)


def test_ranks_with_other_settings_are_told(tmp_path: Path, ranks: Group) -> None:
    for text in ranks(2)(settings_that_differ, tmp_path):
        assert "rank 1 has seed=1 where rank 0 has seed=0" in text


def in_ddp(output: Path) -> str:
    with pytest.raises(TypeError) as raised:
        trainer(output, model=nn.parallel.DistributedDataParallel(small_model()))
    return str(raised.value)


def test_a_model_in_distributed_data_parallel_is_refused(tmp_path: Path, ranks: Group) -> None:
    for text in ranks(2)(in_ddp, tmp_path):
        assert "the Trainer reduces gradients itself, in the place of DistributedDataParallel; give it" in text


class Normed(nn.Module):
    """Batch norm over what each rank sees."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(12, 6), nn.BatchNorm1d(6), nn.Linear(6, 12)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(input_ids).mT).mT)


def means(output: Path) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3 + dist.get_rank())  # other weights on each rank: rank 0's count
    run = trainer(output, model=Normed(), steps=2)
    run.fit()
    run.evaluate()
    return run.model.norm.running_mean, run.model.head.weight.detach()  # type: ignore[union-attr, return-value]


def test_buffers_are_rank_0s(tmp_path: Path, ranks: Group) -> None:
    (mean, weight), *others = ranks(3)(means, tmp_path)
    assert all(torch.equal(m, mean) and torch.equal(w, weight) for m, w in others)
    tensors, _ = consolidate(tmp_path / "checkpoints/step-00000002")
    assert torch.equal(tensors["norm.running_mean"], mean)


# ===== Checkpoints =====


def fit_until_stopped(run: Trainer, loss_fn: Any) -> None:
    run.loss_fn = loss_fn
    with pytest.raises(SystemExit) as stopped:
        run.fit()
    assert stopped.value.code == 0


def cut_off(output: Path, step: int, settings: dict[str, Any]) -> None:
    """Trains until a step and stops there as SIGTERM does, sent to the last rank."""
    run = trainer(output, **settings)
    inner = run.loss_fn

    def signalled(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | int]:
        if run.step == step - 1 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(model, batch)

    fit_until_stopped(run, signalled)
    assert run.step == step


def stop_in_evaluation(output: Path, settings: dict[str, Any]) -> int:
    """SIGTERM to the last rank in its second batch of the evaluation after step 3; how many this rank evaluated."""
    run = trainer(output, **settings)
    inner, batches = run.loss_fn, []

    def signalled(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | int]:
        if not model.training:
            batches.append(run.step)
            if len(batches) == 2 and dist.get_rank() == dist.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return inner(model, batch)

    fit_until_stopped(run, signalled)
    assert set(batches) == {run.step} == {3}
    return len(batches)


def test_an_evaluation_stops_on_all_ranks_at_once(tmp_path: Path, ranks: Group) -> None:
    """Of 7 examples the ranks have 3, 2 and 2, one a batch; the run that goes on evaluates, as the whole one."""
    settings = {"resume": True, "eval_every": 3, "eval_batch_size": 1}
    ranks(3)(fit, tmp_path / "whole", settings)
    assert ranks(3)(stop_in_evaluation, tmp_path / "cut", settings) == [2, 2, 2]
    assert "eval_loss" not in history(tmp_path / "cut")[-1]
    ranks(3)(fit, tmp_path / "cut", settings)
    assert history(tmp_path / "cut") == history(tmp_path / "whole")


def test_any_number_of_ranks_goes_on_from_any_other(tmp_path: Path, ranks: Group) -> None:
    """SIGTERM to one rank stops all after the step; what was saved then goes on as one process would, on any number."""
    settings = {"resume": True, "steps": 5}
    fit(tmp_path / "whole", settings)
    for saved_by in (1, 2, 3, 4):
        ranks(saved_by)(cut_off, tmp_path / str(saved_by), 3, settings)
        names = sorted(path.name for path in (tmp_path / str(saved_by) / "checkpoints/step-00000003").iterdir())
        assert names == [*(f"rank-{r}.safetensors" for r in range(saved_by)), "state.json"]
    for resumed_by in (1, 2, 3, 4):
        outputs = [tmp_path / f"{saved_by}-{resumed_by}" for saved_by in (1, 2, 3, 4)]
        for saved_by, output in enumerate(outputs, 1):
            shutil.copytree(tmp_path / str(saved_by), output)
        ranks(resumed_by)(fit_each, [(output, settings) for output in outputs])
        for output in outputs:
            for mine, exact in zip(history(output), history(tmp_path / "whole"), strict=True):
                assert mine["loss"] == pytest.approx(exact["loss"], rel=1e-6), output.name


def test_the_same_ranks_go_on_bit_for_bit(tmp_path: Path, ranks: Group) -> None:
    """With dropout: each rank has its own random states, and gets them back."""
    settings = {"dropout": 0.3, "resume": True}
    ranks(3)(fit, tmp_path / "whole", settings)
    ranks(3)(cut_off, tmp_path / "cut", 4, settings)
    ranks(3)(fit, tmp_path / "cut", settings)
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert_same_tensors(saved(tmp_path / "cut"), saved(tmp_path / "whole"))
    states = []
    for rank in range(3):
        with shards.open_shard(tmp_path / "cut/checkpoints/step-00000008", rank) as shard:
            states.append(shard.read(f"rng/rank-{rank}/cpu"))
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2])


def test_a_checkpoint_of_ranks_is_plain_torchs(tmp_path: Path, ranks: Group) -> None:
    """torch.distributed.checkpoint reads it, and a plain AdamW goes on with it; and the other way round."""
    ranks(3)(cut_off, tmp_path, 4, {})
    tensors, state = consolidate(tmp_path / "checkpoints/step-00000004")
    wanted = {
        key: torch.full((tensors[name].numel(),), math.nan)
        for name in tensors
        for key in (f"parameter/{name}", f"exp_avg/{name}")
    }
    dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(tmp_path / "checkpoints/step-00000004")))
    names = state["param_groups"][0]["param_names"]
    for i, name in enumerate(names):
        assert torch.equal(wanted[f"parameter/{name}"], tensors[name].flatten())
        assert torch.equal(wanted[f"exp_avg/{name}"], state["state"][i]["exp_avg"].flatten())

    model = small_model(0.0)
    plain = torch.optim.AdamW(model.parameters())
    model.load_state_dict(tensors)
    plain.load_state_dict(state)
    run = trainer(tmp_path / "run")
    with torch.no_grad():
        for name, p in run.parameters.items():
            p.copy_(tensors[name])
    run.optimizer.load_state_dict(plain.state_dict())
    for step in range(3):
        for one, optimizer in ((model, plain), (run.model, run.optimizer)):
            optimizer.zero_grad()
            batch = {key: row[None] for key, row in examples()[2 + step].items()}
            causal_lm_loss(one, batch)[0].backward()
            optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(run.parameters[name], p, rtol=1e-6, atol=1e-7, msg=name)


def disk_full(output: Path, culprit: int) -> str:
    run = trainer(output, steps=2)
    run.fit()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if dist.get_rank() == culprit:
        shards.save_file, kept = full, shards.save_file  # type: ignore[assignment]
    run.step = 3
    try:
        with pytest.raises(OSError, match="No space left") as told:
            run.save()
    finally:
        if dist.get_rank() == culprit:
            shards.save_file = kept
    return str(told.value)


@pytest.mark.parametrize("culprit", [0, 1])
def test_one_ranks_full_disk_fails_all_and_loses_nothing(tmp_path: Path, ranks: Group, culprit: int) -> None:
    for text in ranks(2)(disk_full, tmp_path, culprit):
        assert (
            f"rank {culprit}: cannot write {tmp_path}/checkpoints/step-00000003/rank-{culprit}.safetensors: [Er" in text
        )
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000002"]
    consolidate(tmp_path / "checkpoints/step-00000002")
    assert checkpoint.latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-00000002"


# ===== Saving in the background =====


def slow_save(output: Path, settings: dict[str, Any]) -> list[tuple[int, str]]:
    """Each write of a file waits until the parameters have changed; what `latest` named at each step's start."""
    run = trainer(output, async_save=True, **settings)
    changed = threading.Event()
    inner, kept = run.loss_fn, shards.save_file
    seen: list[tuple[int, str]] = []

    def loss_fn(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | int]:
        newest = checkpoint.latest_checkpoint(output / "checkpoints")
        seen.append((run.step, "" if newest is None else newest.name))
        if newest is not None and dist_rank() == 0:
            consolidate(newest)
        if run.step % settings["save_every"]:  # a step after the save
            changed.set()
        return inner(model, batch)

    def save_file(*arguments: Any) -> None:
        if run.step < run.config.steps:
            assert changed.wait(20)
        kept(*arguments)

    def save() -> Path:
        run._writer.join()  # a writer that starts late still waits for what was set for it
        changed.clear()
        return type(run).save(run)

    run.loss_fn, run.save, shards.save_file = loss_fn, save, save_file  # type: ignore[method-assign, assignment]
    try:
        run.fit()
    finally:
        shards.save_file = kept
    return seen


def dist_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_saved_in_the_background_is_the_moment_of_saving(tmp_path: Path, ranks: Group, world: int) -> None:
    settings = {"steps": 6, "save_every": 2, "keep_checkpoints": 9, "dropout": 0.2}
    ranks(world)(fit, tmp_path / "now", settings)
    for seen in ranks(world)(slow_save, tmp_path / "later", settings):
        assert {(2, ""), (3, "")} <= set(seen)  # steps went on before the first was written
        assert {name for step, name in seen if step == 5} <= {"step-00000002", "step-00000004"}
    for step in (2, 4, 6):
        name = f"checkpoints/step-0000000{step}"
        for rank in range(world):
            with (
                shards.open_shard(tmp_path / "now" / name, rank) as now,
                shards.open_shard(tmp_path / "later" / name, rank) as later,
            ):
                assert (now.starts, now.random) == (later.starts, later.random)
                assert_same_tensors(*({key: shard.read(key) for key in now.starts} for shard in (now, later)))


def full_in_the_background(output: Path, culprit: int) -> tuple[str, int]:
    run = trainer(output, steps=50, save_every=2, async_save=True)

    def full(tensors: Any, path: Path, *more: Any) -> None:
        if "step-00000002" not in str(path) and dist.get_rank() == culprit:  # that one may be on its way at step 4 yet
            raise OSError(28, "No space left on device")
        kept(tensors, path, *more)

    shards.save_file, kept = full, shards.save_file  # type: ignore[assignment]
    try:
        with pytest.raises(OSError, match="No space left") as told:
            run.fit()
    finally:
        shards.save_file = kept
    return str(told.value), run.step


def test_a_disk_that_is_full_in_the_background_stops_all_ranks(tmp_path: Path, ranks: Group) -> None:
    answers = ranks(3)(full_in_the_background, tmp_path, 1)
    assert len(set(answers)) == 1
    text, step = answers[0]
    assert re.match(r"rank 1: cannot write .*/step-0000000\d/rank-1.safetensors: \[Errno 28\] No space left on", text)
    assert 4 <= step <= 6  # at the latest by the next save
    assert checkpoint.latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-00000002"
    consolidate(tmp_path / "checkpoints/step-00000002")
