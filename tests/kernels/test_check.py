"""Machine code for GPUs that are not here. `make kernels-check` compiles all kernels for all targets; this, a part."""

import dataclasses
from unittest import mock

import pytest

from benchmarks.kernels import AIMS
from phicore_kernels import catalogue
from phicore_kernels.aot import TARGETS, Compiled, compile_launch
from phicore_kernels.check import main, problems

OTHERS = (
    ("sm_90", "matmul forward float32 16x64x64 split 16"),
    ("sm_90", "matmul backward bfloat16 16x32x32 split 16 columns 4095"),
    ("sm_90", "matmul forward bfloat16 16x32x32 split 16 low-rank columns 1 M 1"),
    ("sm_90", "encode_absmax"),
    ("sm_90", "add_parts bfloat16"),
    ("sm_90", "dora bfloat16"),
    ("sm_80", "matmul forward bfloat16 128x128x64 low-rank"),
    ("sm_100", "matmul forward bfloat16 128x128x64"),
    ("gfx942", "dequantize bfloat16"),
    ("gfx942", "matmul forward bfloat16 16x64x128 split 16"),
    ("gfx942", "matmul backward bfloat16 128x128x64"),
)


def compiled(target: str, name: str) -> tuple[catalogue.Entry, Compiled]:
    entry = next(entry for entry in catalogue.catalogue(target) if entry.name == name)
    return entry, compile_launch(entry.launch, target)


@pytest.mark.parametrize(("target", "name"), OTHERS)
def test_kernels_compile_without_spills_onto_tensor_cores(target, name):
    assert problems(*compiled(target, name)) == []


def test_the_command_names_the_targets_that_there_are(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--targets", "sm_70"])
    assert stop.value.code == 2
    assert "'sm_70'" in (told := capsys.readouterr().err)
    assert "gfx1100" in told


@pytest.mark.parametrize("name", AIMS)
def test_few_instructions_decode_a_weight(name):
    # in the hottest loop, or in the whole kernel where nothing loops; bitsandbytes' take 8.1 to 36.8, 24 and 50
    entry, kernel = compiled("sm_90", name)
    assert problems(entry, kernel) == []
    instructions = len(kernel.hot_loop()) / (entry.weights / kernel.threads)
    assert instructions <= AIMS[name]
    if " 128x128x64" in name:
        assert kernel.opcodes(kernel.hot_loop())["HGMMA.64x128x16.F32.BF16"] >= 4


def test_names_are_unique_and_every_target_has_entries():
    for target in TARGETS:
        names = [entry.name for entry in catalogue.catalogue(target)]
        assert len(set(names)) == len(names) > 10


def test_problems_are_found():
    entry, kernel = compiled("sm_90", "encode_absmax")
    assert problems(entry, kernel) == []
    entry = entry._replace(product=True, vector=True)
    with mock.patch.object(Compiled, "resources", {"registers": 255, "spills": 8}):
        found = problems(entry, dataclasses.replace(kernel, shared=228 << 10))
    assert found == [
        "spills 8", "233472 bytes of shared memory, of 232448", "no tensor cores", "no 16-byte loads"
    ]  # fmt: skip
