"""Every code block of the documents runs: Python as it stands, shell commands by what they name."""

import doctest
import importlib
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import phicore
from phicore.cli import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "docs/architecture.md", "docs/kernels.md", "examples/addresses/README.md"]


def blocks(language: str) -> list[tuple[str, str]]:
    """(document and line, code) of each fenced block in a language."""
    found = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            found.append((f"{name}:{text[: match.start()].count(chr(10)) + 1}", match[1]))
    return found


def commands() -> list[str]:
    return [line for _, code in blocks("sh") for line in code.splitlines() if line.strip()]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like the repository to what is run in it, so that runs/ is not the user's."""
    place = tmp_path_factory.mktemp("repository")
    model = ROOT / ".cache/addresses/SmolLM2-135M-Instruct"
    assert model.is_dir(), "the documents use the demo's model; run `make demo-data` first (make test does)"
    for name in (".cache", "examples"):
        (place / name).symlink_to(ROOT / name)
    return place


@pytest.fixture(scope="session")
def demo_run(workplace: Path) -> Path:
    """`make finetune` at reduced size: the same recipe and path, a few steps and answers."""
    small = "--steps 3 --eval-limit 4 --answers 3 --max-new-tokens 8 --threads 1"
    output = workplace / "runs/addresses"
    command = ["make", "-C", str(ROOT), "finetune", f"ARGS={small} --output {output}", f"VENV={sys.prefix}"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    return output


def docstring_examples() -> list[doctest.DocTest]:
    names = [info.name for info in pkgutil.walk_packages(phicore.__path__, "phicore.") if "__main__" not in info.name]
    modules = [importlib.import_module(name) for name in names]
    found = [test for module in modules for test in doctest.DocTestFinder().find(module) if test.examples]
    return sorted(found, key=lambda test: test.name)


@pytest.mark.parametrize("test", docstring_examples(), ids=lambda test: test.name)
def test_docstring_examples_run(test: doctest.DocTest, tmp_path: Path) -> None:
    """A reader has imported torch, nn and phicore's names."""
    names = {name: getattr(phicore, name) for name in phicore.__all__}
    test.globs = {"torch": torch, "nn": torch.nn, "directory": str(tmp_path), **names, **test.globs}
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0


@pytest.mark.parametrize(("where", "code"), blocks("python"), ids=[where for where, _ in blocks("python")])
def test_python_blocks_run(where: str, code: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    exec(compile(code, where, "exec"), {"__name__": "__main__"})


def test_make_finetune_writes_what_it_promises(demo_run: Path) -> None:
    result = json.loads((demo_run / "result.json").read_text())
    assert result["steps"] == 3
    assert result["examples"] == {"train": 1360, "eval": 4, "answered": 3}
    # the embedding, which is not coded, is a fifth of the weights: in 16 bits 0.414 of them are left, else 0.31
    assert result["base_bytes_after"] < 0.45 * result["base_bytes_before"]
    assert (demo_run / "adapter/adapter_model.safetensors").is_file()
    assert (demo_run / "loss.png").is_file()


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("phicore ")])
def test_shell_commands_run(line: str, workplace: Path, demo_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    _, *arguments = shlex.split(line)
    if arguments[0] == "finetune":
        arguments += ["--steps", "1", "--eval-limit", "2", "--answers", "1", "--max-new-tokens", "4"]
    if arguments[0] == "generate":
        arguments += ["--max-new-tokens", "4"]
    assert main(arguments) == 0


def test_other_shell_lines_are_make_targets() -> None:
    others = [line for line in commands() if not line.startswith("phicore ")]
    assert others
    makefile = (ROOT / "Makefile").read_text()
    for line in others:
        program, target = line.split()
        assert program == "make"
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
