"""`import phicore` brings little beyond torch."""

import subprocess
import sys
from importlib import metadata

import pytest

import phicore


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return set(result.stdout.split())


@pytest.fixture(scope="module")
def added() -> set[str]:
    """The modules that phicore imports and torch, safetensors and numpy do not."""
    return modules_after("import phicore") - modules_after("import numpy, torch, safetensors.torch")


def test_import_brings_no_optional_package(added):
    heavy = {
        "transformers", "tokenizers", "peft", "bitsandbytes", "accelerate", "deepspeed", "triton", "phicore_kernels",
        "tyro", "rich", "tqdm", "yaml", "matplotlib", "onnx", "onnxruntime", "gguf", "jinja2", "datasets", "hypothesis",
    }  # fmt: skip
    assert {name.partition(".")[0] for name in added} & heavy == set()


def test_import_brings_nothing_but_itself_and_the_standard_library(added):
    foreign = {name.partition(".")[0] for name in added} - set(sys.stdlib_module_names) - {"phicore"}
    assert foreign - {"torch"} == set()
    # the compiler is imported when something is compiled
    assert {name for name in added if name.startswith(("torch._dynamo", "torch._inductor", "torch.onnx"))} == set()


def test_the_version_is_that_of_the_distribution(monkeypatch):
    try:
        installed = metadata.version("phicore")
    except metadata.PackageNotFoundError:
        installed = "0+unknown"
    assert phicore.__version__ == installed

    def of_nobody(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", of_nobody)
    assert phicore.__version__ == "0+unknown"
    with pytest.raises(AttributeError, match="module 'phicore' has no attribute 'absent'"):
        _ = phicore.absent


def test_the_public_face():
    names = {
        "DoRALinear", "LoRAConfig", "LoRALinear", "NF4Linear", "TrainConfig", "Trainer", "attach", "disabled",
        "ZeroOptimizer", "load_adapter", "merge", "nf4", "quantize_", "save_adapter", "unmerge",
    }  # fmt: skip
    assert names <= set(phicore.__all__)
    assert not hasattr(phicore, "phicore")
    assert {"NF4Linear", "NF4Tensor", "linear", "quantize", "quantize_"} <= set(phicore.nf4.__all__)
    for module in (phicore, phicore.nf4):
        assert all(hasattr(module, name) for name in module.__all__)
