"""convert-deepspeed: what the real DeepSpeed saved loads as weights, and trains on in the Trainer as it did there."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from phicore.cli import main
from phicore.formats.deepspeed import read_checkpoint
from phicore.training import TrainConfig, Trainer, checkpoint
from phicore.training.adopt import adopt
from phicore.training.data import step_indices
from tests.formats.deepspeed_runs import ROWS, WORLD_SIZE, Net, batch
from tests.training.small_run import metrics

SIZE = ROWS * WORLD_SIZE  # examples a step
STEPS = 6


def convert(*arguments: object) -> int:
    return main(["convert-deepspeed", *map(str, arguments)])


def examples() -> list[Tensor]:
    """Those of DeepSpeed's batches, so that the Trainer's order, whatever it is, deals them out to the same steps."""
    rows = [torch.empty(0)] * (STEPS * SIZE)
    for step in range(STEPS):
        places = step_indices(len(rows), 0, step, SIZE, None)
        for place, row in zip(places, [row for rank in range(WORLD_SIZE) for row in batch(step, rank)], strict=True):
            rows[place] = row
    return rows


def loss(model: nn.Module, rows: Tensor) -> tuple[Tensor, int]:
    out = model(rows).float()
    # DeepSpeed updates, and so decays, what no batch reached; torch leaves it alone
    return out.square().sum() + 0 * sum(p.sum() for p in model.get_submodule("unused").parameters()), out.numel()


def resumed(output: Path, base: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Trainer:
    """Over the frozen weights that DeepSpeed had; the others begin elsewhere."""
    model = Net()
    model.load_state_dict(read_checkpoint(base).model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()  # what was converted counts
    config = TrainConfig(
        output=str(output), steps=STEPS, batch_size=SIZE, learning_rate=0.01, min_learning_rate=0.01, warmup_steps=0,
        weight_decay=0.1, log_every=1, resume=True, **settings,
    )  # fmt: skip
    return Trainer(model.to(dtype), config, examples(), loss_fn=loss)


def test_a_run_goes_on_as_in_deepspeed(deepspeed_runs: Path, tmp_path: Path, capsys) -> None:
    assert convert(deepspeed_runs / "stage 1", "--output", tmp_path / "run", "--to", "run") == 0
    shown = capsys.readouterr()
    assert "3 steps, saved by 2 ranks" in shown.out
    assert "10 parameters with lr 0.01, betas (0.9, 0.999), eps 1e-08, weight_decay 0.1" in shown.out
    assert "parameter 10/10" in shown.err
    trainer = resumed(tmp_path / "run", deepspeed_runs / "stage 1")
    trainer.fit()
    assert "is of DeepSpeed: its weights and optimizer state go on from step 3" in capsys.readouterr().err
    facts = torch.load(deepspeed_runs / "stage 1/facts.pt", weights_only=True)
    told = {line["step"]: line["loss"] for line in metrics(tmp_path / "run")}
    assert told == {step: pytest.approx(facts["losses"][step - 1], rel=2e-6) for step in (4, 5, 6)}
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, facts["weights"][name], rtol=0, atol=1e-6, msg=name)


def test_masters_go_on_and_a_run_is_not_written_over(deepspeed_runs: Path, tmp_path: Path, capsys) -> None:
    arguments = [deepspeed_runs / "bfloat16/three", "--output", tmp_path / "run", "--to", "run"]
    assert convert(*arguments) == 0
    trainer = resumed(tmp_path / "run", deepspeed_runs / "bfloat16", torch.bfloat16)
    trainer._start()
    assert convert(*arguments) == 1
    assert "holds a run (step-00000003)" in capsys.readouterr().err
    assert convert(*arguments, "--dtype", "float32", "--overwrite") == 0
    exact = resumed(tmp_path / "run", deepspeed_runs / "bfloat16")
    exact._start()
    masters = trainer.optimizer.full_state_dict()["masters"]
    assert masters.keys() == exact.parameters.keys()
    for name, parameter in exact.parameters.items():
        assert torch.equal(masters[name], parameter), name
        assert torch.equal(trainer.parameters[name], parameter.bfloat16()), name


@pytest.mark.parametrize("fault", ["state", "disk"])
def test_a_run_is_kept_where_what_should_replace_it_cannot_be(deepspeed_runs: Path, tmp_path: Path, fault: str) -> None:
    assert convert(deepspeed_runs / "stage 1", "--output", tmp_path, "--to", "run") == 0
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    tensors, optimizer = {"a": torch.ones(2)}, {"param_groups": [{"params": [0], "param_names": ["a"]}], "state": {}}
    if fault == "state":
        optimizer["state"] = {0: {"momentum_buffer": torch.ones(2)}}
    failing = mock.patch.object(checkpoint, "write_shard", side_effect=OSError(28, "No space left on device"))
    with failing if fault == "disk" else nullcontext(), pytest.raises((ValueError, OSError)):
        adopt(tensors, optimizer, 1, tmp_path, origin="DeepSpeed", overwrite=True)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", "float32"), ("float16", "float32"), ("stage 2", "auto")])
def test_weights_are_those_that_deepspeed_makes_of_it(
    deepspeed_runs: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    assert convert(deepspeed_runs / name, "--output", tmp_path / "out", "--dtype", dtype) == 0
    found = load_file(tmp_path / "out/model.safetensors")
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(deepspeed_runs / name))
    for key, tensor in theirs.items():
        assert torch.equal(found[key].to(tensor.dtype), tensor), key
    Net().load_state_dict(found)  # strictly: tied weights and buffers are there too
    assert torch.equal(found["last.weight"], found["middle.weight"])


def test_16_bit_weights_are_the_models_own(deepspeed_runs: Path, tmp_path: Path) -> None:
    kept = torch.load(deepspeed_runs / "bfloat16/three/mp_rank_00_model_states.pt", weights_only=True)["module"]
    for dtype in ("auto", "bfloat16"):
        assert convert(deepspeed_runs / "bfloat16", "--output", tmp_path / dtype, "--dtype", dtype) == 0
        found = load_file(tmp_path / dtype / "model.safetensors")
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in kept.items())
        assert found["count"].dtype == torch.int64


def refuse(run: Path) -> None:
    (run / "three/mp_rank_00_model_states.pt").rename(run / "three/zero_pp_rank_0_mp_rank_00_model_states.pt")


def spoil(run: Path) -> None:
    path = run / "three/mp_rank_00_model_states.pt"
    torch.save({**torch.load(path, weights_only=True), "client": print}, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            shutil.rmtree,
            "holds no mp_rank_00_model_states.pt: it is no checkpoint of DeepSpeed; give the directory that",
        ),
        (refuse, "which ZeRO-1 and ZeRO-2 do not write; checkpoints of ZeRO-3"),
        (spoil, "names builtins.print, which is not unpickled here, since doing so could run code"),
        (lambda run: (run / "three/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(), "that of rank 1 is missing"),
    ],
    ids=["none", "stage 3", "pickled code", "a rank missing"],
)
def test_what_is_refused_is_told_in_a_line_and_nothing_is_written(
    deepspeed_runs: Path, tmp_path: Path, capsys, change: Callable[[Path], object], said: str
) -> None:
    run = Path(shutil.copytree(deepspeed_runs / "stage 2", tmp_path / "run"))
    change(run)
    for to in ("weights", "run"):
        assert convert(run, "--output", tmp_path / "out", "--to", to) == 1
        shown = capsys.readouterr().err.splitlines()
        assert said in shown[-1]
        assert not (tmp_path / "out").exists()


def test_a_state_that_is_not_adams_is_refused(tmp_path: Path) -> None:
    from phicore.training.adopt import adopt

    group = {"params": [0], "param_names": ["w"]}
    state = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [group]}
    with pytest.raises(ValueError, match="the optimizer keeps momentum_buffer of w, and the Trainer's AdamW keeps"):
        adopt({"w": torch.zeros(3)}, state, 4, tmp_path / "out", origin="another")
    with pytest.raises(ValueError, match="the optimizer trains w, of which there is no tensor"):
        adopt({}, {"state": {}, "param_groups": [group]}, 4, tmp_path / "out", origin="another")
    assert not (tmp_path / "out").exists()
