"""Figures of the held-out examples from before training, over resumed runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from phicore.formats.huggingface import load_model, save_model
from tests.cli.runs import HELD_OUT, run


def figures(output: Path, when: str) -> dict[str, float]:
    result = json.loads((output / "result.json").read_text())
    return {name: result[f"{name}_{when}"] for name in ("eval_loss", "span_f1", "exact_match")}


def test_a_resumed_run_has_the_figures_from_before_the_first(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", "lora", "--eval-data", str(data), *HELD_OUT]
    assert run(tiny_model, data, tmp_path, *options) == 0
    first, kept = figures(tmp_path, "before"), (tmp_path / "before.json").read_bytes()
    assert first["eval_loss"] != figures(tmp_path, "after")["eval_loss"]
    assert run(tiny_model, data, tmp_path, *options, "--resume") == 0
    assert figures(tmp_path, "before") == first
    # what is kept is read, not made again
    (tmp_path / "before.json").write_bytes(kept.replace(b'"span_f1": 0.0', b'"span_f1": 0.25'))
    assert run(tiny_model, data, tmp_path, *options, "--resume") == 0
    assert figures(tmp_path, "before") == first | {"span_f1": 0.25}
    for damaged in (kept[:-9], b"[]"):
        (tmp_path / "before.json").write_bytes(damaged)
        assert run(tiny_model, data, tmp_path, *options, "--resume") == 0
        assert "before.json is damaged, and is made anew\n" in capsys.readouterr().out
        assert figures(tmp_path, "before") == first


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--answers", "5"], "answers: 3 then, 5 now"),
        (["--eval-limit", "4"], "eval_limit: 6 then, 4 now"),
        (["--max-new-tokens", "7"], "max_new_tokens: 4 then, 7 now"),
        (["--eval-data", "another"], "eval_data_sha256: "),
    ],
    ids=lambda more: more[0] if isinstance(more, list) else "",
)
def test_a_run_resumed_with_other_held_out_settings_compares_like_with_like(
    more: list[str], said: str, tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    another = tmp_path / "another.jsonl"
    another.write_text("".join(line + "\n" for line in data.read_text("utf-8-sig").splitlines()[:2:-1]))
    more = [str(another) if word == "another" else word for word in more]
    # pissa changes the base: what is made anew is of the same changed base, not of the one that was loaded
    options = ["--method", "qlora", "--init", "pissa", "--eval-data", str(data), *HELD_OUT]
    assert run(tiny_model, data, tmp_path / "run", *options) == 0
    assert run(tiny_model, data, tmp_path / "run", *options, *more, "--resume") == 0
    assert said in capsys.readouterr().out
    assert run(tiny_model, data, tmp_path / "from the start", *options, *more) == 0
    assert figures(tmp_path / "run", "before") == figures(tmp_path / "from the start", "before")
    answers = [(tmp_path / run / "answers.jsonl").read_text() for run in ("run", "from the start")]
    assert answers[0] == answers[1]


def test_a_run_is_not_gone_on_with_over_another_base(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a file is called tells nothing of what is in it."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    assert run(base, data, tmp_path / "run", "--method", "qlora") == 0
    assert run(base, data, tmp_path / "run", "--method", "qlora", "--resume") == 0
    capsys.readouterr()
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text(template.replace("<|im_end|>", "<|im_end|> "))
    assert run(base, data, tmp_path / "run", "--method", "qlora", "--resume") == 0
    assert "becomes other tokens than when the run began" in capsys.readouterr().out
    model, tokenizer = load_model(str(tiny_model), torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, -1] += 1
    save_model(model, tokenizer, base, overwrite=True)
    (tmp_path / "run" / "before.json").unlink()
    assert run(base, data, tmp_path / "run", "--method", "qlora", "--resume") == 1
    assert not (tmp_path / "run" / "before.json").exists()  # of the other base
    said = capsys.readouterr().err
    assert "another base: model.layers.1.mlp.up_proj.base.packed (of 2 tensors)" in said
    assert "another output" in said
