"""generate, merge and quantize on a tiny model with a trained adapter, and the command line itself."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

import phicore
from phicore.cli import COMMANDS, PACKAGES, main, version_of
from phicore.cli.finetune import FinetuneOptions
from phicore.cli.generate import GenerateOptions, answers
from phicore.cli.options import parse
from phicore.formats.huggingface import load_model


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DoRA adapter whose effect is large."""
    output = tmp_path_factory.mktemp("run")
    arguments = [
        "finetune", "--model", str(tiny_model), "--data", str(data), "--output", str(output), "--method", "dora",
        "--steps", "8", "--learning-rate", "5e-2", "--warmup-steps", "0", "--dtype", "float32",
    ]  # fmt: skip
    assert main(arguments) == 0
    return output / "adapter"


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        return model(ids).logits


def test_merged_directory_is_loaded_by_transformers_and_equals_the_adapted_model(
    tiny_model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge = ["merge", "--model", str(tiny_model), "--adapter", str(adapter), "--dtype", "float32"]
    assert main([*merge, "--output", str(tmp_path / "merged")]) == 0
    adapted, _ = load_model(str(tiny_model), torch.float32)
    base = logits(adapted)
    phicore.load_adapter(adapted, adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-5, rtol=1e-4)
    assert (logits(merged) - base).abs().max() > 1e-2
    assert main([*merge, "--output", str(tmp_path / "merged")]) == 1
    assert "not an empty directory" in capsys.readouterr().err


def test_quantized_directory_holds_the_quantized_model(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "nf4"
    assert main(["quantize", "--model", str(tiny_model), "--output", str(output), "--dtype", "float32"]) == 0
    expected, _ = load_model(str(tiny_model), torch.float32)
    phicore.quantize_(expected)
    read, _ = load_model(str(output), torch.float32)
    assert sum(isinstance(module, phicore.NF4Linear) for module in read.modules()) == 14
    assert torch.equal(logits(read), logits(expected))
    size = (output / "model.safetensors").stat().st_size
    assert size < 0.5 * (tiny_model / "model.safetensors").stat().st_size


def test_generate_answers_each_prompt_with_and_without_adapter(
    tiny_model: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = GenerateOptions(model=str(tiny_model), prompt=("1 Elm St", "2 Oak"), max_new_tokens=5, dtype="float32")
    plain = answers(asked)
    asked.adapter = str(adapter)
    adapted = answers(asked)
    assert len(plain) == len(adapted) == 2
    assert plain != adapted
    arguments = ["--model", str(tiny_model), "--adapter", str(adapter), "--prompt", "1 Elm St", "2 Oak"]
    capsys.readouterr()
    assert main(["generate", *arguments, "--max-new-tokens", "5", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == "".join(answer + "\n" for answer in adapted)


def test_a_chat_that_the_template_refuses_is_told_in_a_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ raise_exception('no system here') }}")
    assert main(["generate", "--model", str(model), "--system", "Tag.", "--prompt", "1 Elm St"]) == 1
    told = capsys.readouterr().err
    assert f"the chat template of {model} refuses messages with the roles system, user: no system here" in told


def test_an_end_that_is_no_token_is_named(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": "end"}')
    assert main(["generate", "--model", str(model), "--prompt", "1 Elm St"]) == 1
    assert "eos_token_id (generation_config.json) must be a token's number or several, got 'end'" in (
        capsys.readouterr().err
    )


CODING = ["--block-size", "32", "--no-double-quant"]


@pytest.fixture(scope="module")
def over_nf4(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A QDoRA adapter of some layers, over NF4 that is not the default."""
    output = tmp_path_factory.mktemp("over_nf4")
    arguments = [
        "finetune", "--model", str(tiny_model), "--data", str(data), "--output", str(output), "--method", "qdora",
        "--steps", "8", "--learning-rate", "5e-2", "--warmup-steps", "0", "--dtype", "float32", *CODING,
        "--target-modules", "q_proj", "down_proj",
    ]  # fmt: skip
    assert main(arguments) == 0
    return output / "adapter"


def trained_model(tiny_model: Path, over_nf4: Path) -> torch.nn.Module:
    model, _ = load_model(str(tiny_model), torch.float32)
    phicore.quantize_(model, block_size=32, double_quant=False)
    phicore.load_adapter(model, over_nf4)
    return model


def test_generate_answers_over_the_nf4_that_was_trained(
    tiny_model: Path, over_nf4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.nn.Module] = []

    def keep(model: torch.nn.Module, _: object, prompts: list[str], *__: object, **___: object) -> list[str]:
        made.append(model)
        return prompts

    monkeypatch.setattr("phicore.training.generation.generate", keep)
    generate = ["generate", "--model", str(tiny_model), "--prompt", "1 Elm St", "--dtype", "float32", "--quantize"]
    assert main([*generate, "--adapter", str(over_nf4), *CODING]) == 0
    assert main([*generate, "--adapter", str(over_nf4)]) == 0
    expected = logits(trained_model(tiny_model, over_nf4))
    torch.testing.assert_close(logits(made[0]), expected, atol=1e-5, rtol=1e-4)
    assert (logits(made[1]) - expected).abs().max() > 1e-3


def test_merging_into_the_quantized_base_gives_what_was_trained(
    tiny_model: Path, over_nf4: Path, tmp_path: Path
) -> None:
    quantize = ["quantize", "--model", str(tiny_model), "--output", str(tmp_path / "nf4"), "--dtype", "float32"]
    assert main([*quantize, *CODING]) == 0
    expected = logits(trained_model(tiny_model, over_nf4))
    for base, equal in ((tmp_path / "nf4", True), (tiny_model, False)):
        output = tmp_path / f"merged into {base.name}"
        merge = ["merge", "--model", str(base), "--adapter", str(over_nf4), "--dtype", "float32"]
        assert main([*merge, "--output", str(output)]) == 0
        merged, _ = load_model(str(output), torch.float32)
        assert sum(isinstance(module, phicore.NF4Linear) for module in merged.modules()) == (10 if equal else 0)
        assert torch.allclose(logits(merged), expected, atol=1e-5, rtol=1e-4) == equal


def test_an_adapter_that_does_not_fit_is_refused(
    tiny_model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    wrong = {
        key.replace("base_model.", ""): tensor
        for key, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    save_file(wrong, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    merge = ["merge", "--model", str(tiny_model), "--adapter", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(merge) == 1
    message = capsys.readouterr().err
    assert "missing keys" in message
    assert "unexpected keys" in message
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_or_read_is_told_before_a_model_is_loaded(
    tiny_model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    model, taken, out = ["--model", str(tiny_model)], str(tmp_path / "taken"), str(tmp_path / "out")
    for arguments, message in (
        (["merge", "--adapter", str(adapter), "--output", taken], "taken exists and is not an empty directory"),
        (["merge", "--adapter", taken, "--output", out], "taken holds no adapter_config.json"),
        (["generate", "--adapter", taken, "--prompt", "x"], "taken holds no adapter_config.json"),
        (["generate", "--adapter", "you/adapter", "--prompt", "x"], "you/adapter is no directory on this machine"),
    ):
        with mock.patch("phicore.formats.huggingface.load_model", side_effect=AssertionError("loaded in vain")):
            assert main([*arguments, *model]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_tells_of_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert {"check": "ADAPTER", "convert-deepspeed": "CHECKPOINT"}.get(command, "--model") in text
    assert "--config FILE" in " ".join(text.split())
    assert "--help, which" not in text  # a docstring that sends its reader here


def test_usage_and_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "phicore --version" in capsys.readouterr().out
    assert main(["finetun"]) == 2
    assert 'no command "finetun"' in capsys.readouterr().err
    (tmp_path / "c.toml").write_text("learning_rat = 1\n")
    for arguments in (["--config", str(tmp_path / "c.toml")], ["--config", "none.toml"], ["--stepz", "3"]):
        with pytest.raises(SystemExit) as stop:
            main(["finetune", "--model", "m", "--data", "d", *arguments])
        assert stop.value.code == 2
    message = capsys.readouterr()
    assert "learning-rat" in message.err + message.out
    assert "none.toml" in message.err


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("c.yaml", "steps: 3\n# warm\nseed: 1\nsteps: 4\n", '"steps" stands on line 1 and again on line 4'),
        ("c.yml", "rank_pattern:\n  q: 1\n  k: 2\n  q: 3\n", '"q" stands on line 2 and again on line 4'),
        ("c.yaml", "rank_pattern: {q: 1, q: 3}\n", '"q" stands on line 1 and again on line 1'),
        ("c.yaml", "learning_rate: 1\nlearning-rate: 2\n", "learning_rate and learning-rate are the same option"),
        ("c.toml", "learning_rate = 1\nlearning-rate = 2\n", "learning_rate and learning-rate are the same option"),
    ],
)
def test_an_option_that_a_file_gives_twice_is_refused(
    name: str, text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--config", str(file)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"phicore finetune: {file}: {told}; keep one of them\n"


IN_VAIN = {
    "finetune --model m --data d --method full --rank 8 --init=pissa --lora_plus_ratio 4": (
        "--rank, --init, --lora_plus_ratio: no effect with --method full, which has no adapter"
    ),
    "finetune --model m --data d --method lora --no-double-quant": (
        "--no-double-quant: no effect with --method lora, which has no NF4"
    ),
    "plan --model m --method full --block-size 64": "--block-size: no effect with --method full, which has no NF4",
    "finetune --model m --data d --fused-targets map": (
        "--fused-targets: no effect with all-linear, which takes fused layers whole"
    ),
    "finetune --model m --data d --eval-limit 3 --eval-batch-size 4 --max-new-tokens 5": (
        "--eval-limit, --eval-batch-size: no effect without --eval-data; --max-new-tokens: no effect without --answers"
    ),
    "generate --model m --prompt p --block-size 32": "--block-size: no effect without --quantize",
    "export a --target vllm --output o --dtype float32": "--dtype: no effect without --merge",
    "export a --target vllm --output o --merge --model m --max-rank 8": (
        "--max-rank: no effect with --merge, which writes no adapter"
    ),
}


@pytest.mark.parametrize("line", IN_VAIN)
def test_what_is_typed_without_effect_is_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = line.split()
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"phicore {command[0]}: {IN_VAIN[line]}; leave out what has none\n"


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("generate --model m --prompt a --prompt=b", "--prompt"),
        ("finetune --model m --data d --target-modules q --target_modules k v", "--target_modules"),
        ("finetune --model m --data d --rank-pattern q 2 --rank-pattern v 3", "--rank-pattern"),
    ],
)
def test_an_option_of_several_values_is_typed_once(typed: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(typed.split())
    assert stop.value.code == 2
    assert f": {named}: typed more than once, of which the last would replace" in capsys.readouterr().err


def test_what_is_typed_replaces_what_a_file_says(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('model = "m"\nprompt = ["a", "b"]\nmax_new_tokens = 3\n')
    words = ["--config", str(file), "--prompt", "c", "--max-new-tokens", "4", "--max-new-tokens", "5"]
    options = parse(GenerateOptions, words, "generate", "")
    assert (options.prompt, options.max_new_tokens) == (("c",), 5)


def test_no_prompt_is_refused_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", "absent", "--prompt"]) == 1
    assert "--prompt is empty; give at least one" in capsys.readouterr().err


def test_a_file_may_be_for_several_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.toml"
    file.write_text("rank = 3\ndropout = 0.1\nblock_size = 32\nmax_new_tokens = 5\neval_limit = 4\n")
    absent = ["finetune", "--config", str(file), "--model", "m", "--data", str(tmp_path / "absent"), "--method", "full"]
    assert main(absent) == 1
    assert "--data: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*absent, "--rank", "3"])
    assert capsys.readouterr().err.startswith("phicore finetune: --rank: no effect with --method full")


def test_a_files_values_are_taken_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "c.toml"
    file.write_text(
        'model = "-m"\ndata = "~/my data.jsonl"\noutput = "~"\nseed = -1\nthreads = 2\ndouble_quant = false\n'
        'target_modules = "q_proj"\ntrainable_token_indices = [1, 2]\n[rank_pattern]\nq_proj = 2\n'
    )
    options = parse(FinetuneOptions, ["--config", str(file), "--threads", "3"], "finetune", "")
    assert (options.model, options.data) == ("-m", f"{tmp_path}/my data.jsonl")
    assert (options.train.output, options.train.seed, options.threads) == (str(tmp_path), -1, 3)
    adapter = options.adapter
    assert (options.double_quant, adapter.target_modules, adapter.trainable_token_indices) == (
        False,
        ("q_proj",),
        (1, 2),
    )
    assert adapter.rank_pattern == {"q_proj": 2}


def test_a_home_directory_behind_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.toml").write_text('data = "d"\n')
    options = parse(FinetuneOptions, ["--config=~/c.toml", "--model=~/m", "--output=~/runs/a=~"], "finetune", "")
    assert (options.model, options.data) == (f"{tmp_path}/m", "d")
    assert options.train.output == f"{tmp_path}/runs/a=~"


def test_what_is_wrong_with_a_file_is_told_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.toml"
    for content, told in (
        (
            b'target_modules = ["q_proj", "--resume"]\n',
            f'{file}: "--resume" in target_modules would be taken for an opt',
        ),
        (b'target_modules = ["-h"]\n', f'{file}: "-h" in target_modules would be taken for an option'),
        (b'output = "caf\xe9"\n', f"phicore finetune: {file}: 'utf-8' codec can't decode"),
        (b'overwrite = "yes"\n', f"{file} and what was typed: --overwrite=yes --steps 3\n"),
    ):
        file.write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            main(["finetune", "--config", str(file), "--steps", "3"])
        assert stop.value.code == 2
        assert told in capsys.readouterr().err


def test_runs_as_a_module() -> None:
    run = subprocess.run([sys.executable, "-m", "phicore", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.strip()


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, FloatingPointError, ImportError, NotImplementedError])
def test_what_a_user_can_mend_is_told_in_a_line(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: object) -> None:
        raise kind("this is not\n    taken")

    monkeypatch.setattr("phicore.cli.check.main", refuse)
    assert main(["check"]) == 1
    assert capsys.readouterr().err == "phicore check: this is not taken\n"
    monkeypatch.setenv("PHICORE_TRACEBACK", "1")
    with pytest.raises(kind):
        main(["check"])


def test_ctrl_c_ends_a_command_in_a_line() -> None:
    program = (
        "import signal, sys, time, phicore.cli.check as command; from phicore.cli import main;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # a shell's background jobs start without it
        "command.main = lambda _: (print('at work', flush=True), time.sleep(60));"
        "sys.exit(main(['check']))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], text=True, **pipes) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "at work\n"
        run.send_signal(signal.SIGINT)
        _, told = run.communicate(timeout=60)
    assert told == "phicore check: interrupted; nothing is left half written\n"
    assert run.returncode == 130


def test_a_mistake_of_phicores_own_has_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phicore.cli.check.main", lambda _: {}["absent"])
    with pytest.raises(KeyError):
        main(["check"])


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["check", "--help"]], ids=" ".join)
def test_output_that_nobody_reads_ends_quietly(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "phicore", *arguments]
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (run.returncode, run.stderr) == (141, "")


PROGRAM = "import sys; from phicore.cli import check, console, main; check.main = {}; sys.exit(main(['check']))"
PRINTS = PROGRAM.format("lambda _: console.table('a title', ['a', 'b'], [['Stré', '\u4f60']])")


def shell(line: str, program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a shell's line does with this program of Python's, as $0 -c "$1"."""
    arguments = ["bash", "-c", f"set -o pipefail; {line}", sys.executable, program]
    return subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, **environment})


def test_a_table_that_nobody_reads_ends_quietly() -> None:
    run = shell('"$0" -c "$1" | true', "import time; time.sleep(1);" + PRINTS)
    assert (run.returncode, run.stderr) == (141, "")


def test_standard_output_may_be_closed() -> None:
    assert shell('"$0" -c "$1" >&-', PRINTS).returncode == 0
    assert shell('"$0" -c "$1" >&- 2>&-', PRINTS).returncode == 0
    # or a file that is opened would get its number, and what other libraries print
    numbers = PROGRAM.format("lambda _: print(open('/dev/null').fileno(), file=sys.stderr)")
    run = shell('"$0" -c "$1" >&-', numbers)
    assert run.returncode == 0
    assert int(run.stderr) > 2


def test_what_standard_output_cannot_spell_is_escaped() -> None:
    run = shell('"$0" -c "$1"', PRINTS, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert run.returncode == 0
    assert r"Str\xe9" in run.stdout
    assert r"\u4f60" in run.stdout


@pytest.mark.parametrize(
    ("does", "unbuffered", "who"),
    [
        ("console.say('a line')", "", "phicore check"),
        ("console.say('a line')", "1", "phicore check"),
        ("print('a line')", "", "phicore"),  # it fails once the command is done
    ],
)
def test_a_full_disk_under_standard_output_is_told_as_that(does: str, unbuffered: str, who: str) -> None:
    run = shell('"$0" -c "$1" >/dev/full', PROGRAM.format(f"lambda _: {does}"), PYTHONUNBUFFERED=unbuffered)
    assert run.returncode == 1
    assert run.stderr == f"{who}: [Errno 28] No space left on device: 'standard output'\n"


@pytest.mark.parametrize("package", ["tyro", "yaml"])
def test_a_missing_extra_is_named_with_what_installs_it(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    if package == "tyro":  # imported with the command
        monkeypatch.delitem(sys.modules, "phicore.cli.check", raising=False)
    (tmp_path / "c.yaml").write_text("target: vllm\n")
    assert main(["check", "--config", str(tmp_path / "c.yaml")]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"phicore check: the commands need {package}, which is not installed; ")
    assert "pip install -e '.[cli]'" in message


def test_what_the_extra_brings_is_what_is_looked_for() -> None:
    extras = re.search(r"^cli = \[(.*)\]$", (Path(__file__).parents[2] / "pyproject.toml").read_text(), re.MULTILINE)
    assert extras is not None
    names = {re.match(r"\w+", given)[0] for given in re.findall(r'"(.+?)"', extras[1])}  # type: ignore[index]
    assert {name.replace("pyyaml", "yaml") for name in names} == set(PACKAGES)


def test_a_checkout_that_is_not_installed_has_no_version_and_runs() -> None:
    assert version_of("phicore-of-nobody") == "not installed"


def test_an_output_that_is_or_holds_what_it_is_made_from_is_refused(
    tiny_model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--overwrite would take the model, the adapter and all beside them away."""
    work = tmp_path / "work"
    base, pair = shutil.copytree(tiny_model, work / "base"), shutil.copytree(adapter, work / "adapter")
    before = sorted(work.rglob("*"))
    for arguments in (
        ["merge", "--model", str(base), "--adapter", str(pair)],
        ["quantize", "--model", str(base)],
        ["export", str(pair), "--target", "transformers"],
        ["convert-deepspeed", str(base)],
    ):
        for output, told in ((work, "holds"), (pair if arguments[0] == "export" else base, "is")):
            assert main([*arguments, "--output", str(output), "--overwrite"]) == 1
            assert f"{output} {told} {work}/" in capsys.readouterr().err
            assert sorted(work.rglob("*")) == before


def test_the_directory_of_a_gguf_file_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    command = ["quantize", "--model", str(tmp_path / "model.gguf"), "--output", str(tmp_path), "--overwrite"]
    assert main(command) == 1
    assert "would be replaced with all that is in it" in capsys.readouterr().err
