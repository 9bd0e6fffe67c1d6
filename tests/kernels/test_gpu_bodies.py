"""The functions of tests/gpu on a CPU, their kernels in Triton's interpreter; and what else stands there."""

import os

import pytest

from tests.gpu import bodies

ON = "tests.kernels.interpreted:on_a_gpu"
FP32, BF16, FP16 = bodies.DTYPES


@pytest.mark.parametrize(
    ("body", "args"),
    [
        ("dequantize", ((33, 77), BF16, True)),
        ("dequantize", ((70, 96), FP16, False)),
        ("quantize", ((33, 77), BF16, True)),
        ("quantize", ((3, 5, 64), FP32, False)),
        ("linear", (5, (33, 77), FP16, True, "gaps")),
        ("linear", (17, (70, 96), BF16, False, "columns")),
        ("linear", (1, (160, 1), FP32, True, "rows")),
        ("low_rank", (5, (70, 96), 4, BF16, False)),
        ("low_rank", (17, (33, 77), 20, FP16, True)),
        ("low_rank", (3, (64, 128), 5, FP32, True)),
        ("dora_scale", (37, (70, 24), 5, BF16, True)),
        ("dora_scale", (3, (33, 24), 16, FP32, False)),
        ("layer", ("lora", 3, BF16)),
        ("layer", ("dora", 3, BF16)),
        ("layer", ("dora", 3, FP32, "pissa")),
        ("same_twice", (3, BF16)),
        ("no_rows", (FP16,)),
        ("far", (9, 64)),
    ],
    ids=str,
)
@pytest.mark.parametrize("crossover", [1 << 30, 0], ids=["fused", "dequantized"])
def test_bodies_hold_in_the_interpreter(interpreter, body, args, crossover):
    interpreter.call(ON, body, args, crossover)


def test_every_body_is_run_here_and_there():
    import inspect
    import re
    from pathlib import Path

    public = {
        name
        for name, f in inspect.getmembers(bodies, inspect.isfunction)
        if f.__module__ == bodies.__name__ and next(iter(inspect.signature(f).parameters)) == "device"
    } - {"draw"}
    for file in (Path(__file__), Path(bodies.__file__).with_name("test_operators.py")):
        text = file.read_text()
        assert public == {name for name in public if re.search(rf'bodies\.{name}\(|\("{name}", ', text)}, file


def test_without_a_gpu_the_folder_is_skipped_with_its_reason(pytestconfig):
    import subprocess
    import sys

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "ZE_AFFINITY_MASK": "none"}
    done = subprocess.run(command, cwd=pytestconfig.rootpath, env=hidden, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" not in done.stdout
    assert "no GPU that torch sees" in done.stdout
