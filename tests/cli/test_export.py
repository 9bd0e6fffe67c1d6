"""check and export: what is printed, the exit status, and merging on request."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import phicore
from phicore.cli import main
from phicore.formats.huggingface import load_model


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, randomize) -> dict[str, str]:
    """Directories of an rsLoRA and of a DoRA adapter of the tiny model."""
    made = {}
    for kind in ("rslora", "dora"):
        model, _ = load_model(str(tiny_model), torch.float32)
        config = phicore.LoRAConfig(rank=4, alpha=6, target_modules=["q_proj", "down_proj"], **{kind: True})
        made[kind] = str(tmp_path_factory.mktemp("adapters") / kind)
        phicore.save_adapter(randomize(phicore.attach(model, config)), made[kind])
    return made


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 25).view(2, 10)).logits


def test_check_prints_what_does_not_fit_and_its_status_says_so(adapters, capsys) -> None:
    assert main(["check", adapters["rslora"], "--target", "vllm"]) == 0
    assert capsys.readouterr().out == f"{adapters['rslora']} fits vllm as it is\n"
    assert main(["check", adapters["rslora"], "--target", "llama.cpp"]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("use_rslora=True: its scaling is lora_alpha / rank whatever use_rslora says; export ")
    assert shown.err == f"phicore check: {adapters['rslora']} does not fit llama.cpp as it is\n"
    assert main(["check", adapters["dora"], "--target", "vllm"]) == 1
    assert "use_dora=True: it raises on DoRA; merge" in capsys.readouterr().out
    assert main(["check", adapters["dora"], "--target", "transformers"]) == 0


def test_export_writes_what_fits_and_says_what_it_changed(adapters, tmp_path: Path, capsys) -> None:
    arguments = ["export", adapters["rslora"], "--target", "llama.cpp", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("changed: use_rslora=True: ")
    assert shown[1:] == [f"{tmp_path / 'out'} fits llama.cpp"]
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 12, False)
    assert main(["check", str(tmp_path / "out"), "--target", "llama.cpp"]) == 0
    assert main(arguments) == 1
    assert main([*arguments, "--overwrite"]) == 0


def test_dora_is_refused_and_merged_on_request(adapters, tiny_model: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    arguments = ["export", adapters["dora"], "--target", "vllm", "--output", str(output)]
    assert main(arguments) == 1
    assert "phicore export --merge --model DIR" in capsys.readouterr().err
    assert not output.exists()
    assert main([*arguments, "--merge", "--model", str(tiny_model), "--dtype", "float32"]) == 0
    adapted, _ = load_model(str(tiny_model), torch.float32)
    phicore.load_adapter(adapted, adapters["dora"])
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-5, rtol=1e-4)
    assert "is a model, which vllm serves without an adapter" in capsys.readouterr().out


def test_merge_and_model_come_together(adapters, tmp_path: Path, capsys) -> None:
    arguments = ["export", adapters["rslora"], "--target", "kaito", "--output", str(tmp_path / "out")]
    for more in (["--merge"], ["--model", "x"]):
        assert main([*arguments, *more]) == 1
        assert "--merge needs --model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
