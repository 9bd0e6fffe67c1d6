"""Links that lead out of a directory: refused wherever a model or an adapter is read, and nothing is written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import phicore
from phicore.formats import portable
from phicore.formats.huggingface import load_model, save_model
from phicore.formats.links import check_links
from phicore.formats.streaming import quantize_directory
from tests.chat_tokenizers import chat_tokenizer


@pytest.fixture(scope="module")
def source(tiny: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "model"
    model: Any = tiny("llama", tied=False, dtype=torch.float32, vocab_size=300, hidden_size=64, intermediate_size=128)
    save_model(model, chat_tokenizer("smollm2"), directory)
    return directory


def lead_out(file: Path, to: Path) -> None:
    """Puts a link in the place of a file, which moves elsewhere; or one to a new file that holds a secret."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        file.rename(to)
    else:
        to.write_text("secret")
    file.parent.mkdir(exist_ok=True)
    file.symlink_to(to)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "LICENSE", "additional_chat_templates/x.jinja"]
)
def test_of_a_model(source: Path, tmp_path: Path, name: str) -> None:
    model = Path(shutil.copytree(source, tmp_path / "model"))
    lead_out(model / name, tmp_path / "elsewhere" / "secret")
    for read in (
        lambda: quantize_directory(model, tmp_path / "nf4"),
        lambda: load_model(str(model), torch.float32),
    ):
        with pytest.raises(ValueError, match=f"{name} is a link that leads out of its directory, to .*secret"):
            read()
    assert not (tmp_path / "nf4").exists()


def test_of_a_linked_folder_of_templates(source: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(source, tmp_path / "model"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jinja").write_text("secret")
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of its directory"):
        quantize_directory(model, tmp_path / "nf4")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_of_an_adapter(tmp_path: Path, unchanged: Any, name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    phicore.attach(model, phicore.LoRAConfig(rank=2, target_modules=["0"]))
    phicore.save_adapter(model, tmp_path / "adapter")
    lead_out(tmp_path / "adapter" / name, tmp_path / "elsewhere" / "secret")
    with unchanged(model), pytest.raises(ValueError, match=f"{name} is a link that leads out of its directory"):
        phicore.load_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="leads out of its directory"):
        portable.check(tmp_path / "adapter", "vllm")


def test_links_that_stay_inside_are_followed(source: Path, tmp_path: Path) -> None:
    """In a directory, in one that is itself reached by a link, and in the layout of the hub's cache alone."""
    model = Path(shutil.copytree(source, tmp_path / "model"))
    lead_out(model / "tokenizer.json", model / "the-tokenizer.json")
    (tmp_path / "link").symlink_to(model)
    load_model(str(tmp_path / "link"), torch.float32)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    shutil.copytree(source, snapshot)
    lead_out(snapshot / "config.json", tmp_path / "models--a--b" / "blobs" / "1")
    check_links(snapshot)
    shutil.copytree(source, snapshot / "checkpoint-500" / "model")
    lead_out(snapshot / "checkpoint-500" / "model" / "config.json", tmp_path / "models--a--b" / "blobs" / "2")
    check_links(snapshot / "checkpoint-500" / "model")
    lead_out(snapshot / "LICENSE", tmp_path / "models--a--other" / "blobs" / "1")
    with pytest.raises(ValueError, match="LICENSE is a link"):
        check_links(snapshot)


def test_links_that_lead_to_no_file_are_passed_over(source: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(source, tmp_path / "model"))
    (model / "nowhere").symlink_to(tmp_path / "absent")
    (model / "itself").symlink_to("itself")
    load_model(str(model), torch.float32)
