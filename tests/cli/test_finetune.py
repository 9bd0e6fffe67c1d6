"""phicore finetune on a tiny model: what it writes, that it resumes, that it takes files, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import phicore
from phicore.cli import main
from phicore.cli.report import plot_loss
from phicore.formats.huggingface import load_model, save_model
from tests.chat_tokenizers import chat_tokenizer
from tests.cli.runs import run

REQUIRED = {
    "eval_loss_before", "eval_loss_after", "span_f1_before", "span_f1_after", "exact_match_before",
    "exact_match_after", "tokens_per_second", "peak_memory_bytes", "wall_seconds", "trainable_parameters",
    "base_bytes_before", "base_bytes_after",
}  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "qdora"])
def test_result_adapter_and_table(
    method: str, tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = ["--eval-data", str(data), "--eval-limit", "6", "--answers", "3", "--max-new-tokens", "4"]
    assert run(tiny_model, data, tmp_path, "--method", method, *held_out) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result.keys() >= REQUIRED
    assert result["eval_loss_after"] < result["eval_loss_before"]
    quantized = method[0] == "q"
    assert (result["base_bytes_after"] < result["base_bytes_before"]) == quantized
    assert result["examples"] == {"train": 12, "eval": 6, "answered": 3}
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert sum(t.numel() for t in adapter.values()) == result["trainable_parameters"]
    assert any("magnitude" in key for key in adapter) == (method in ("dora", "qdora"))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3
    shown = capsys.readouterr().out
    assert f"encoding {data} ...\n" in shown  # of a large file it takes minutes
    assert "before" in shown
    assert "0 Elm St" in shown
    # The saved adapter is the trained one: over the same base, it gives the reported loss.
    model, _ = load_model(str(tiny_model), torch.float32)
    if quantized:
        phicore.quantize_(model)
    phicore.load_adapter(model, tmp_path / "adapter")
    _, tokenizer = load_model(str(tiny_model), torch.float32)
    dataset = phicore.training.data.load_dataset(data, tokenizer, 512, 6)
    trainer = phicore.Trainer(model, phicore.TrainConfig(output=str(tmp_path / "other")), dataset, dataset)
    assert trainer.evaluate() == pytest.approx(result["eval_loss_after"], abs=1e-5)


def test_loftq_codes_what_it_adapts(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    assert run(tiny_model, data, tmp_path, "--method", "qlora", "--init", "loftq", "--eval-data", str(data)) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["base_bytes_after"] < result["base_bytes_before"]
    model, tokenizer = load_model(str(tiny_model), torch.float32)
    phicore.load_adapter(phicore.quantize_(model), tmp_path / "adapter")
    dataset = phicore.training.data.load_dataset(data, tokenizer, 512)
    trainer = phicore.Trainer(model, phicore.TrainConfig(output=str(tmp_path / "other")), dataset, dataset)
    assert trainer.evaluate() == pytest.approx(result["eval_loss_after"], abs=1e-5)


def test_full_writes_a_model_that_loads(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    assert run(tiny_model, data, tmp_path, "--method", "full", "--eval-data", str(data), "--dtype", "auto") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["dtype"] == "float32"  # whatever the machine
    assert result["eval_loss_after"] < result["eval_loss_before"]
    model, _ = load_model(str(tmp_path / "model"), torch.float32)
    assert result["trainable_parameters"] == sum(p.numel() for p in model.parameters())


def test_a_picture_that_is_interrupted_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: object, file: Any, **_: object) -> None:
        (Path(file).write_bytes if isinstance(file, Path) else file.write)(b"a part")
        raise KeyboardInterrupt

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "loss.png").write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plot_loss(tmp_path)
    assert (tmp_path / "loss.png").read_bytes() == b"old"


def test_runs_without_held_out_data(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    assert run(tiny_model, data, tmp_path) == 0
    assert json.loads((tmp_path / "result.json").read_text())["eval_loss_after"] is None


def losses(output: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_a_resumed_run_is_the_run_that_was_not_stopped(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--dropout", "0.2", "--save-every", "1", "--dtype", "auto"]
    assert run(tiny_model, data, tmp_path / "whole", *options) == 0
    take_step = phicore.Trainer._train_step

    def stop_at_two(trainer: phicore.Trainer) -> dict[str, float]:
        facts = take_step(trainer)
        if trainer.step == 2:
            trainer.request_stop()
        return facts

    monkeypatch.setattr(phicore.Trainer, "_train_step", stop_at_two)
    with pytest.raises(SystemExit) as stop:
        run(tiny_model, data, tmp_path / "cut", *options)
    assert stop.value.code == 0
    monkeypatch.setattr(phicore.Trainer, "_train_step", take_step)
    assert run(tiny_model, data, tmp_path / "cut", *options, "--resume") == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    cut, whole = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("cut", "whole"))
    assert all(torch.equal(cut[key], whole[key]) for key in whole)


@pytest.mark.parametrize(("step", "kept"), [(0, "{} holds no checkpoint yet"), (3, "{}/checkpoints/step-00000002")])
def test_a_run_that_a_second_ctrl_c_ends_says_what_there_is_of_it(
    step: int, kept: str, tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    take_step = phicore.Trainer._train_step

    def interrupted(trainer: phicore.Trainer) -> dict[str, float]:
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(trainer)

    monkeypatch.setattr(phicore.Trainer, "_train_step", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without it
    try:
        assert run(tiny_model, data, tmp_path, "--save-every", "2") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("phicore finetune: interrupted; ")
    assert kept.format(tmp_path) in last
    if step:
        assert last.endswith("--resume goes on from it")


@pytest.mark.parametrize("emulated", [(), (torch.bfloat16,)])
def test_a_dtype_without_products_on_this_cpu_is_told(
    emulated: tuple[torch.dtype, ...], tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("phicore.products.EMULATED", emulated)
    assert run(tiny_model, data, tmp_path / "run", "--method", "lora", "--dtype", "bfloat16") == 0
    said = capsys.readouterr().out
    assert "computing in bfloat16 on cpu: as asked" in said
    assert ("float32's speed in it on this CPU" in " ".join(said.split())) == bool(emulated)


@pytest.mark.parametrize("suffix", ["toml", "yaml"])
def test_options_from_a_file_and_what_is_typed_wins(suffix: str, tiny_model: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / f"run.{suffix}"
    sign = "=" if suffix == "toml" else ":"
    entries = {
        "model": f'"{tiny_model}"', "data": f'"{data}"', "output": f'"{tmp_path / "run"}"', "steps": "9", "rank": "2",
        "learning_rate": "2e-3", "target_modules": '["q_proj", "down_proj"]', "rslora": "true", "dtype": '"float32"',
    }  # fmt: skip
    config.write_text("".join(f"{key} {sign} {value}\n" for key, value in entries.items()))
    assert main(["finetune", "--config", str(config), "--steps", "2"]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["steps"] == 2
    assert result["options"]["train"]["learning_rate"] == 2e-3
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert (saved["r"], saved["target_modules"], saved["use_rslora"]) == (2, ["down_proj", "q_proj"], True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-modules", "q_prj"], 'no module matches target "q_prj"; did you mean q_proj'),
        (["--rank", "0"], "rank must be a whole number above 0, got 0"),
        (["--model", "./nowhere"], 'no such file or directory: "./nowhere"'),
        (["--sequence-length", "3"], "raise the sequence length"),
    ],
)
def test_what_is_refused_is_named(
    arguments: list[str], message: str, tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = run(tiny_model, data, tmp_path / "run", *arguments)
    except SystemExit as stop:  # what the parser itself refuses
        status = stop.code
    assert status in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2: invalid JSON"),
        ("", "is empty"),
        ('{"txt": "a"}\n', "line 1: has the keys"),
    ],
)
def test_broken_data_is_named_by_line(
    text: str, message: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(text)
    assert run(tiny_model, broken, tmp_path / "run") == 1
    assert message in capsys.readouterr().err


def test_over_long_examples_are_counted(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_model, data, tmp_path, "--sequence-length", "60") == 0
    assert "12 of 12 examples are longer than 60 tokens and were cut" in capsys.readouterr().out


def test_a_deepspeed_configuration(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    content = {"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1}}}
    path.write_text(json.dumps(content | {"steps_per_print": 5}))
    assert run(tiny_model, data, tmp_path / "run", "--method", "lora", "--deepspeed", str(path)) == 0
    train = json.loads((tmp_path / "run/result.json").read_text())["options"]["train"]
    assert (train["weight_decay"], train["learning_rate"], train["batch_size"]) == (0.1, 1e-2, 2)
    assert "steps_per_print" in capsys.readouterr().out
    for more, said in (
        ({"gradient_clipping": 0.5, "train_batch_size": 4}, "batch_size 4, but it is 2 already"),
        ({"bf16": {"enabled": True}}, "asks for bfloat16, but --dtype says float32"),
    ):
        path.write_text(json.dumps(content | more))
        assert run(tiny_model, data, tmp_path / "other", "--method", "lora", "--deepspeed", str(path)) != 0
        assert said in capsys.readouterr().err


def test_two_ranks_share_the_work_and_one_speaks(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """What torchrun starts gives the figures of one process; rank 0 alone prints and writes."""
    held_out = ["--eval-data", str(data), "--eval-limit", "6", "--answers", "3", "--max-new-tokens", "4"]
    arguments = [
        "finetune", "--model", str(tiny_model), "--data", str(data), "--steps", "3", "--rank", "4", "--alpha", "6",
        "--batch-size", "3", "--learning-rate", "1e-2", "--log-every", "1", "--dtype", "float32", *held_out,
    ]  # fmt: skip
    assert main([*arguments, "--output", str(tmp_path / "alone")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "phicore"]
    several = subprocess.run(
        [*torchrun, *arguments, "--output", str(tmp_path / "ranks")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert several.returncode == 0, several.stderr
    for line in ("computing in float32 on cpu, on 2 ranks", "evaluating after training ...", "figures: "):
        assert several.stdout.count(line) == 1
    alone, ranks = (json.loads((tmp_path / run / "result.json").read_text()) for run in ("alone", "ranks"))
    assert ranks["ranks"] == 2
    for key in ("eval_loss_before", "eval_loss_after", "train_loss", "tokens", "examples", "exact_match_after"):
        assert ranks[key] == pytest.approx(alone[key], rel=1e-5), key
    assert (tmp_path / "ranks/answers.jsonl").read_text() == (tmp_path / "alone/answers.jsonl").read_text()
    one, two = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("alone", "ranks"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (
            ["--layers-to-transform", "1", "--bias", "none", "--trainable-token-indices", "9", "5"],
            {"layers_to_transform": [1], "trainable_token_indices": [9, 5]},
        ),
        (
            ["--target-modules", "embed_tokens", "q_proj", "--ensure-weight-tying"],
            {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True},
        ),
    ],
    ids=["tokens", "tied"],
)
def test_what_is_tied_stays_tied_from_training_to_the_merged_model(
    tiny_model: Path, data: Path, tmp_path: Path, options: list[str], fields: dict[str, object]
) -> None:
    assert run(tiny_model, data, tmp_path / "run", "--method", "lora", *options) == 0
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert {key: saved[key] for key in fields} == fields
    merge = ["merge", "--model", str(tiny_model), "--adapter", str(tmp_path / "run/adapter"), "--dtype", "float32"]
    assert main([*merge, "--output", str(tmp_path / "merged")]) == 0
    merged, tokenizer = load_model(str(tmp_path / "merged"), torch.float32)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    model, _ = load_model(str(tiny_model), torch.float32)
    base_table = model.lm_head.weight.detach().clone()
    phicore.load_adapter(model, tmp_path / "run/adapter")
    ids = tokenizer("0 Elm St", return_tensors="pt").input_ids
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(merged.lm_head.weight, base_table)


def test_a_model_that_is_in_nf4_already(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """qlora takes it as it is, and method full, which would train what is not coded, is refused."""
    coded = tmp_path / "nf4"
    assert main(["quantize", "--model", str(tiny_model), "--output", str(coded), "--dtype", "float32"]) == 0
    capsys.readouterr()
    assert run(coded, data, tmp_path / "qlora", "--method", "qlora") == 0
    assert "it is in NF4 already, of block_size 64 and double_quant True\n" in capsys.readouterr().out
    generate = ["generate", "--model", str(coded), "--prompt", "a", "--max-new-tokens", "1", "--quantize"]
    assert main(generate) == 0
    assert main([*generate, "--block-size", "32"]) == 1
    assert "is in NF4 already, and not as --quantize asks" in capsys.readouterr().err
    assert run(tiny_model, data, tmp_path / "same", "--method", "qlora") == 0
    assert losses(tmp_path / "qlora") == losses(tmp_path / "same")
    assert run(coded, data, tmp_path / "full", "--method", "full") == 1
    assert "is in NF4, which does not train" in capsys.readouterr().err


def test_a_run_of_another_program_is_not_gone_on_with(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load_model(str(tiny_model), torch.float32)
    phicore.attach(model, phicore.LoRAConfig(rank=2))
    dataset = phicore.training.data.load_dataset(str(data), tokenizer, 64)
    phicore.Trainer(model, phicore.TrainConfig(output=str(tmp_path), steps=1, batch_size=1), dataset).fit()
    assert (
        main(["finetune", "--model", str(tiny_model), "--data", str(data), "--output", str(tmp_path), "--resume"]) == 1
    )
    assert "is of a run that phicore finetune did not make" in capsys.readouterr().err


def test_examples_longer_than_the_model_has_positions(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = Path(shutil.copytree(tiny_model, tmp_path / "short"))
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 5}
    (short / "config.json").write_text(json.dumps(config))
    assert run(short, data, tmp_path / "run") == 1
    assert "LlamaForCausalLM 5 positions; give --sequence-length 5" in capsys.readouterr().err


SIZES = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 1, "num_attention_heads": 4}


def test_a_warm_up_that_does_not_end_is_told(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_model, data, tmp_path, "--warmup-steps", "3") == 0
    assert "warmup_steps" not in capsys.readouterr().out
    assert run(tiny_model, data, tmp_path, "--warmup-steps", "9", "--overwrite") == 0
    said = "the learning rate reaches 0.004 of 0.01: all 4 steps are within warmup_steps\n"
    assert said in capsys.readouterr().out
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(rates) == pytest.approx(0.004)


@pytest.mark.parametrize(
    ("family", "options", "seen"),
    [
        ("Bert", {}, True),
        ("Bert", {"is_decoder": True}, False),
        ("Gemma3Text", {"head_dim": 8, "use_bidirectional_attention": True}, True),
        ("GPTNeoX", {}, False),  # whose is_decoder is False too
    ],
)
def test_a_model_that_sees_what_it_shall_predict_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, options: dict[str, Any], seen: bool
) -> None:
    tokenizer = chat_tokenizer("smollm2")
    config = getattr(transformers, f"{family}Config")(**SIZES, **options, vocab_size=len(tokenizer), pad_token_id=0)
    save_model(transformers.AutoModelForCausalLM.from_config(config), tokenizer, tmp_path / "model")
    assert run(tmp_path / "model", data, tmp_path / "run", "--method", "lora") == seen
    assert ("is not causal: what it says of a token depends on those behind it" in capsys.readouterr().err) == seen


def test_mpt_names_its_positions_otherwise(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = chat_tokenizer("smollm2")
    config = transformers.MptConfig(vocab_size=len(tokenizer), d_model=32, n_heads=4, n_layers=1, max_seq_len=5)
    save_model(transformers.MptForCausalLM(config), tokenizer, tmp_path / "model")
    assert run(tmp_path / "model", data, tmp_path / "run") == 1
    assert "MptForCausalLM 5 positions; give --sequence-length 5" in capsys.readouterr().err
