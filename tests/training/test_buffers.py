"""What training writes to beside the parameters that it trains is part of a run, however it is written."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from phicore import LoRAConfig, attach, merge, unmerge
from phicore.training import TrainConfig, Trainer
from phicore.training.buffers import SMALL, TrainedBuffers
from tests.training.small_run import SETTINGS, SmallLM, assert_same_run, examples, stop_after


def in_place(tensor: Tensor, value: Tensor) -> None:
    tensor.mul_(0.9).add_(value, alpha=0.1)


def past_the_version(tensor: Tensor, value: Tensor) -> None:
    tensor.data.mul_(0.9).add_(value, alpha=0.1)


def in_other_memory(tensor: Tensor, value: Tensor) -> None:
    tensor.data = 0.9 * tensor + 0.1 * value


WRITES = [in_place, past_the_version, in_other_memory]
each_write = pytest.mark.parametrize("write", WRITES, ids=[write.__name__ for write in WRITES])


class Taught(SmallLM):
    """With a teacher of the head's shape that follows it, and the mean of what has gone into the head."""

    def __init__(self, write: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.teacher = nn.Linear(6, 12).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(6))
        self.write = write

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        if self.training:
            with torch.no_grad():
                self.write(self.mean, x.flatten(0, -2).mean(0))
                self.write(self.teacher.weight, self.head.weight)
        return self.head(self.dropout(x - self.mean)) + 0.5 * self.teacher(x)


@each_write
def test_a_run_goes_on_with_its_teacher_and_its_means(tmp_path: Path, write: Callable[[Tensor, Tensor], None]) -> None:
    def trainer(output: str, **settings: bool) -> Trainer:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = Taught(write)
        return Trainer(model, TrainConfig(output=str(tmp_path / output), **{**SETTINGS, **settings}), examples())

    trainer("whole").fit()
    with pytest.raises(SystemExit):
        stop_after(trainer("run"), 3).fit()
    again = trainer("run", resume=True)
    again.fit()
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert sorted(again.buffers.find()) == ["mean", "teacher.weight"]  # and no bias, which nobody wrote to


def test_what_trains_now_and_did_not_then_is_told(tmp_path: Path) -> None:
    """Though the checkpoint holds it: without a state of the optimizer."""
    model = Taught(in_place)
    again = copy.deepcopy(model)
    Trainer(model, TrainConfig(output=str(tmp_path), **SETTINGS), examples()).fit()
    again.teacher.weight.requires_grad_(True)
    trainer = Trainer(again, TrainConfig(output=str(tmp_path), resume=True, **SETTINGS), examples())
    with pytest.raises(
        ValueError, match=r"teacher\.weight .of 1 names.; teacher\.weight is not trained in it and \[12, 6"
    ):
        trainer.fit()


@each_write
def test_what_is_written_is_found_in_large_tensors_too(write: Callable[[Tensor, Tensor], None]) -> None:
    model = nn.Linear(SMALL // 64 + 1, 64, bias=False).requires_grad_(False)
    model.register_buffer("sum", torch.zeros(64, SMALL // 64 + 1).t())  # its memory lies in another order
    model.register_buffer("passing", torch.zeros(3), persistent=False)
    buffers = TrainedBuffers(model)
    assert buffers.find() == {}
    for tensor, found in ((model.passing, []), (model.weight, ["weight"]), (model.sum, ["weight", "sum"])):
        write(tensor, torch.randn_like(tensor))
        assert list(buffers.find()) == found


def test_a_base_that_was_merged_and_unmerged_is_not_saved() -> None:
    model = attach(SmallLM(), LoRAConfig(rank=2, alpha=4, target_modules=["head"]))
    buffers = TrainedBuffers(model)
    with torch.no_grad():
        model.head.lora_B.normal_()
    merge(model)
    unmerge(model)
    assert buffers.find() == {}
