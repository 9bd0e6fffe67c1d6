"""Names on the Hugging Face hub: quantized from the cache, in its own layout; fetched file by file if need be."""

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import nn

from phicore.formats import hub
from phicore.formats.huggingface import load_model, look_into, save_model
from phicore.formats.safetensors_files import INDEX, model_tensors
from phicore.formats.streaming import quantize_directory
from tests.chat_tokenizers import chat_tokenizer
from tests.spoilt import reshard

NAME, REVISION = "someone/tiny", "0" * 40


@pytest.fixture(scope="module")
def remote(tiny: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub holds."""
    directory = tmp_path_factory.mktemp("remote") / "tiny"
    model: Any = tiny("llama", tied=False, dtype=torch.float32, vocab_size=300, hidden_size=64, intermediate_size=128)
    save_model(model, chat_tokenizer("smollm2"), directory)
    reshard(directory)
    return directory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where huggingface_hub keeps the repository of NAME."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub" / "models--someone--tiny"


def keep(remote: Path, cache: Path, patterns: tuple[str, ...] = ("*",)) -> Path:
    """Lays files into the cache as huggingface_hub does."""
    snapshot = cache / "snapshots" / REVISION
    for folder in (cache / "blobs", cache / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (cache / "refs" / "main").write_text(REVISION)
    for file in remote.iterdir():
        if any(fnmatch(file.name, pattern) for pattern in patterns) and not (snapshot / file.name).exists():
            shutil.copy(file, cache / "blobs" / f"blob-of-{file.name}")
            (snapshot / file.name).symlink_to(f"../../blobs/blob-of-{file.name}")
    return snapshot


def test_a_name_is_quantized_from_the_cache(remote: Path, cache: Path, tmp_path: Path) -> None:
    keep(remote, cache)
    quantize_directory(NAME, tmp_path / "nf4", torch.float32)
    quantize_directory(remote, tmp_path / "same", torch.float32)
    ours, expected = (model_tensors(tmp_path / name) for name in ("nf4", "same"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(file.read(key), expected[key].read(key)) for key, file in ours.items())
    assert {file.name for file in (tmp_path / "nf4").iterdir()} == {file.name for file in (tmp_path / "same").iterdir()}
    assert not any(file.is_symlink() for file in (tmp_path / "nf4").iterdir())


@pytest.mark.parametrize("there", [(), ("config.json",), ("*.json",)])
def test_what_the_cache_lacks_is_fetched_and_nothing_beside_it(
    remote: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...]
) -> None:
    """A hub that answers: a repository also holds weights of other libraries, which can be as large."""
    (remote / "consolidated.safetensors").write_bytes(b"the same weights once more")
    asked = huggingface_hub.snapshot_download

    def answering(name: str, local_files_only: bool = False, allow_patterns: Any = None) -> str:
        if local_files_only:
            return asked(name, local_files_only=True)
        return str(keep(remote, cache, tuple(allow_patterns)))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answering)
    try:
        if there:
            keep(remote, cache, there)
        found = hub.snapshot(NAME, ["config.json", "tokenizer*"], look_into)
        assert look_into(found) is None
        assert (found / INDEX).is_file()
        assert not (found / "consolidated.safetensors").exists()
    finally:
        (remote / "consolidated.safetensors").unlink()


def test_a_name_that_neither_cache_nor_hub_has(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=rf'no such directory: "{NAME}"; and as a name on the hub: \w'):
        quantize_directory(NAME, tmp_path / "nf4")
    assert not (tmp_path / "nf4").exists()


def test_a_cache_that_is_not_whole_and_a_hub_that_does_not_answer(remote: Path, cache: Path, tmp_path: Path) -> None:
    keep(remote, cache, ("*.json",))
    with pytest.raises(OSError, match=r"someone/tiny.* lacks model-00001-of-\d+\.safetensors"):
        quantize_directory(NAME, tmp_path / "nf4")


def test_a_weight_beyond_float16_is_named(remote: Path, cache: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(remote, tmp_path / "changed"))
    reshard(changed, lambda t: t["model.norm.weight"].fill_(1e6))
    keep(changed, cache)
    assert load_model(NAME, torch.bfloat16)[0].model.norm.weight.min() > 9e5
    message = f"{NAME}: model.norm.weight holds larger values, and float16 ends at 65,504; choose bfloat16 or float32"
    with pytest.raises(ValueError, match=message):
        load_model(NAME, torch.float16)
