"""The functions of tests/gpu on a CPU, their kernels in Triton's interpreter; and what else stands there."""

import importlib.util
import inspect
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.gpu import bodies

ON = "tests.kernels.interpreted:on_a_gpu"
FILE = Path(bodies.__file__).with_name("test_operators.py")
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
        ("compiled_layer", ("dora", "aot_eager")),
        ("same_twice", (3, FP32)),
        ("no_rows", (FP16,)),
        ("gaps", (BF16,)),
        ("far", (9, 64)),
    ],
    ids=str,
)
def test_bodies_hold_in_the_interpreter(interpreter, body, args):
    interpreter.call(ON, body, args)


@pytest.mark.parametrize(
    ("body", "args"),
    [
        ("linear", (3, (33, 77), FP16, True, "gaps")),
        ("low_rank", (3, (64, 96), 4, BF16, True)),
        ("layer", ("lora", 3, FP32)),
        ("layer", ("dora", 3, BF16)),
        ("far", (9, 64)),
        ("no_rows", (FP32,)),
    ],
    ids=str,
)
def test_bodies_hold_where_w_is_dequantised_first(interpreter, body, args):
    interpreter.call(ON, body, args, crossover=0)


def test_every_body_is_run_here_and_there():
    public = {
        name
        for name, f in inspect.getmembers(bodies, inspect.isfunction)
        if f.__module__ == bodies.__name__ and next(iter(inspect.signature(f).parameters), "") == "device"
    } - {"draw"}
    for file in (Path(__file__), FILE):
        text = file.read_text()
        assert public == {name for name in public if re.search(rf'bodies\.{name}\(|\("{name}", ', text)}, file


def test_without_a_gpu_the_file_is_skipped_with_its_reason():
    spec = importlib.util.spec_from_file_location("gpu_tests", FILE)
    with (
        mock.patch.object(torch.accelerator, "current_accelerator", return_value=None),
        pytest.raises(pytest.skip.Exception, match="no GPU that torch sees"),
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    with mock.patch.object(torch.accelerator, "current_accelerator", return_value=torch.device("cuda")):
        assert bodies.find_gpu() == torch.device("cuda", 0)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))  # it imports
