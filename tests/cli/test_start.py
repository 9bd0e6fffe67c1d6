"""What phicore finetune refuses before it loads a model, and what it leaves of an output that holds a run."""

import shutil
from pathlib import Path

import pytest
import torch

import phicore
from phicore.formats.huggingface import load_model
from tests.cli.runs import HELD_OUT, run


def no_model(*_: object) -> None:
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "holds a run"),
        (["--resume", "--alpha", "7", "--seed", "3"], "alpha: 6.0 then, 7.0 now; seed: 0 then, 3 now"),
        (["--resume", "--steps", "9", "--answers", "5"], "steps: 4 then, 9 now"),
        (["--resume", "--data", "shorter"], "examples: 12 then, 3 now"),
    ],
    ids=["new", "settings", "held out", "data"],
)
def test_a_refused_run_changes_nothing_and_loads_no_model(
    more: list[str], message: str, tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join(data.read_text("utf-8-sig").splitlines(keepends=True)[:3]))
    more = [str(shorter) if word == "shorter" else word for word in more]
    output, options = tmp_path / "run", ["--method", "lora", "--eval-data", str(data), *HELD_OUT]
    assert run(tiny_model, data, output, *options) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    monkeypatch.setattr("phicore.formats.huggingface.load_model", no_model)
    assert run(tiny_model, data, output, *options, *more) == 1
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_an_output_is_one_runs_from_before_its_model_is_loaded(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[int] = []

    def meanwhile(*of: object) -> object:
        if not tried:
            tried.append(run(tiny_model, data, tmp_path, "--overwrite"))
        return load_model(*of)  # type: ignore[arg-type]

    monkeypatch.setattr("phicore.formats.huggingface.load_model", meanwhile)
    assert run(tiny_model, data, tmp_path) == 0
    assert tried == [1]
    assert "another run is at work in" in capsys.readouterr().err


def test_overwriting_leaves_the_old_run_until_there_is_a_new_one(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tiny_model, data, tmp_path) == 0
    assert run(tiny_model, data, tmp_path, "--overwrite", "--target-modules", "q_prj") == 1
    assert run(tiny_model, data, tmp_path, "--resume") == 0
    assert run(tiny_model, data, tmp_path, "--overwrite") == 0


def test_overwriting_with_another_method_leaves_nothing_of_the_old_run(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tiny_model, data, tmp_path, "--method", "lora") == 0
    (tmp_path / "notes").write_text("mine")
    take_step = phicore.Trainer._train_step

    def fail(trainer: phicore.Trainer) -> dict[str, float]:
        raise OSError("no more")

    monkeypatch.setattr(phicore.Trainer, "_train_step", fail)
    assert run(tiny_model, data, tmp_path, "--method", "full", "--overwrite") == 1
    names = {"answers.jsonl", "loss.png", "result.json"}
    assert not {path.name for path in tmp_path.iterdir()} & {"adapter", "model", *names}
    monkeypatch.setattr(phicore.Trainer, "_train_step", take_step)
    for method, there in (("full", "model"), ("lora", "adapter")):
        assert run(tiny_model, data, tmp_path, "--method", method, "--overwrite") == 0
        assert {path.name for path in tmp_path.iterdir()} & {"adapter", "model", "notes", *names} == {
            there, "notes", *names,
        }  # fmt: skip


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]], ids=str)
def test_a_run_does_not_replace_its_own_base(
    more: list[str], tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    assert run(model, data, tmp_path, "--method", "full", *more) == 1
    assert f"model is {model}, and would be replaced" in capsys.readouterr().err
    assert load_model(str(model), torch.float32)
    if not more:  # beside it, an adapter is welcome
        assert run(model, data, tmp_path, "--method", "lora") == 0
        assert run(model, data, tmp_path, "--method", "lora", "--overwrite") == 0
        assert load_model(str(model), torch.float32)


@pytest.mark.parametrize(("method", "name"), [("lora", "adapter"), ("full", "model")])
def test_what_no_run_made_is_not_written_over(
    method: str, name: str, tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / name).mkdir()
    (tmp_path / name / "adapter_config.json").write_text("mine")
    monkeypatch.setattr("phicore.formats.huggingface.load_model", no_model)
    assert run(tiny_model, data, tmp_path, "--method", method) == 1
    assert f"{tmp_path / name} exists and is not an empty directory" in capsys.readouterr().err
    assert (tmp_path / name / "adapter_config.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "./nowhere.jsonl"], '--data: no such file: "./nowhere.jsonl"'),
        (["--data", "."], '--data: not a plain file: "."'),
        (["--eval-data", "./nowhere.jsonl"], '--eval-data: no such file: "./nowhere.jsonl"'),
        (["--eval-data", "broken"], "broken.jsonl, line 1: invalid JSON"),
        (["--eval-data", "text", "--answers", "2"], 'text.jsonl, line 1, holds "text", which has no prompt to answer'),
        (["--eval-every", "2"], "--eval-every is 2, but there is no --eval-data"),
        (["--answers", "2"], "--answers is 2, but there is no --eval-data for it; give one, or --answers 0"),
        (["--eval-data", "text", "--eval-limit", "0"], "--eval-limit must be at least 1, got 0"),
        (["--answers", "-1"], "--answers must be at least 0, got -1"),
        (["--answers", "1", "--samples", "-1"], "--samples must be at least 0, got -1"),
        (["--sequence-length", "0"], "--sequence-length must be at least 1, got 0"),
        (["--block-size", "48"], "block_size must be one of"),
        (["--init", "loftq", "--method", "lora"], "--init loftq codes the base to NF4"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_needs_no_model_is_refused_before_it_is_loaded(
    arguments: list[str], message: str, tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    files = {"broken": "{", "text": '{"text": "a b"}'}
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    arguments = [str(tmp_path / f"{word}.jsonl") if word in files else word for word in arguments]
    monkeypatch.setattr("phicore.formats.huggingface.load_model", no_model)
    assert run(tiny_model, data, tmp_path / "run", *arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_used_at_the_end_is_looked_for_at_the_start(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("phicore.cli.start.LAST", ("rich", "phicore_of_nobody"))
    assert run(tiny_model, data, tmp_path / "run") == 1
    assert "the commands need phicore_of_nobody, which is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
