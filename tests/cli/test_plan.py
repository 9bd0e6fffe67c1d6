"""phicore plan: the same options as finetune, and what a run of them will take."""

import shutil
from pathlib import Path

import pytest

from phicore.cli import main


def test_a_run_is_planned_from_its_configuration_alone(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tiny_model / "config.json", tmp_path)  # no weights, no tokenizer
    run = ["plan", "--model", str(tmp_path), "--method", "qdora", "--sequence-length", "16", "--batch-size", "4"]
    assert main([*run, "--ranks", "2", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    for part in ("frozen weights", "gradients", "ZeRO-2", "1/2 of it", "2 x 16 tokens", "together", "each rank sends"):
        assert part in printed
    assert not (tmp_path / "runs").exists()


def test_a_config_file_of_finetune_is_taken_as_it_is(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'model = "{tiny_model}"\ndata = "absent.jsonl"\nmethod = "lora"\nrank = 3\ndtype = "float32"\n')
    assert main(["plan", "--config", str(file)]) == 0
    assert "optimizer state" in capsys.readouterr().out


def test_what_finetune_refuses_is_refused(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(tmp_path / "absent")]) == 1
    assert "no such file or directory" in capsys.readouterr().err
    plan = ["plan", "--model", str(tiny_model), "--dtype", "float32"]
    assert main([*plan, "--method", "lora", "--target-modules", "absent_proj"]) == 1
    assert "absent_proj" in capsys.readouterr().err
    assert main(["quantize", "--model", str(tiny_model), "--output", str(tmp_path / "nf4")]) == 0
    assert main(["plan", "--model", str(tmp_path / "nf4")]) == 1
    assert "full-precision original" in capsys.readouterr().err
