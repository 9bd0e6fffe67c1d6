"""An adapter's files as they are written: the same bytes each time, whole or absent."""

import os
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import phicore
from phicore.formats.peft import CONFIG, WEIGHTS
from tests.formats.peft_files import assert_same_files, load_in_peft
from tests.killed import kills


def test_two_processes_write_the_same_bytes(tmp_path):
    code = """
import sys, torch, phicore
from torch import nn
torch.manual_seed(0)
names = ["query", "key", "value", "dense", "up", "down"]
model = nn.ModuleDict({str(i): nn.ModuleDict({n: nn.Linear(4, 4) for n in names}) for i in range(2)})
config = phicore.LoRAConfig(rank=2, target_modules=names[:5], dora=True, rank_pattern={"query": 1, "key": 3},
                            alpha_pattern={"up": 3, "0.dense": 2.5}, modules_to_save=["1.down", "0.down"])
phicore.save_adapter(phicore.attach(model, config), sys.argv[1])
"""
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], env=env, check=True)
    assert_same_files(tmp_path / "1", tmp_path / "2")
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == [CONFIG, WEIGHTS]


def test_saving_again_replaces_both_files_and_leaves_others(tmp_path, toy, randomize):
    model = phicore.attach(toy(), phicore.LoRAConfig(rank=2))
    phicore.save_adapter(model, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    first = (tmp_path / WEIGHTS).read_bytes()
    phicore.save_adapter(randomize(model), tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_saving_makes_no_copy_of_the_adapter_in_python(tmp_path):
    model = phicore.attach(nn.Sequential(nn.Linear(1024, 1024)), phicore.LoRAConfig(rank=512))  # 4 MB
    phicore.save_adapter(model, tmp_path)  # imports
    tracemalloc.start()
    try:
        phicore.save_adapter(model, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_a_full_disk_leaves_the_adapter_that_was_there(tmp_path, monkeypatch):
    model = phicore.attach(nn.Sequential(nn.Linear(4, 4)), phicore.LoRAConfig(rank=2))
    phicore.save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def save_file(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("phicore.formats.peft.save_file", save_file)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / WEIGHTS}'"):
        phicore.save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def a_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4))


def save_of(seed: int, directory: Path, **settings: object) -> nn.Module:
    model = phicore.attach(a_model(), phicore.LoRAConfig(rank=2, target_modules=["0"], **settings))
    torch.manual_seed(seed)
    nn.init.normal_(model[0].lora_B)
    phicore.save_adapter(model, directory)
    return model


@pytest.mark.parametrize("settings", [{}, {"alpha": 3}], ids=["the same settings", "other settings"])
def test_a_save_killed_anywhere_leaves_the_old_adapter_the_new_or_none(tmp_path, settings):
    x = torch.randn(3, 4)
    outputs = {
        "old": save_of(1, tmp_path / "start")(x),
        "new": save_of(2, tmp_path / "new", **settings)(x),
    }
    seen = set()
    for directory in kills(partial(save_of, 2, **settings), tmp_path / "start", tmp_path / "work"):
        try:
            y = phicore.load_adapter(a_model(), directory)(x)
        except FileNotFoundError:
            with pytest.raises(ValueError, match=f"Can't find '{CONFIG}'"):
                peft.PeftModel.from_pretrained(a_model(), directory)
            seen.add("none")
        else:
            torch.testing.assert_close(load_in_peft(a_model(), directory)(x), y)
            seen |= {which for which, exact in outputs.items() if torch.equal(exact, y)} or {"a mixture"}
    assert seen == ({"old", "new", "none"} if settings else {"old", "new"})
