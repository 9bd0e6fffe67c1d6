"""Every operator and layer on the GPU at hand, forward and backward, against float64."""

import pytest
import torch

from tests.gpu import bodies

DTYPES, SHAPES = bodies.DTYPES, bodies.SHAPES
# below and above every crossover, and between the sizes of tiles
ROWS = (1, 5, 16, 17, 64, 130, 1025)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 1001), (4096, 4096)])
def test_dequantize(gpu, shape, dtype, double_quant):
    bodies.dequantize(gpu, shape, dtype, double_quant)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(33, 77), (3, 5, 64), (1000, 1001), (2048, 2048)])
def test_quantize(gpu, shape, dtype, double_quant):
    bodies.quantize(gpu, shape, dtype, double_quant)


@pytest.mark.parametrize("layout", ["rows", "columns", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (512, 4096)])
@pytest.mark.parametrize("m", ROWS)
def test_linear(gpu, m, shape, dtype, layout):
    bodies.linear(gpu, m, shape, dtype, layout == "rows", layout)


@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("rank", [5, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (512, 4096)])
@pytest.mark.parametrize("m", ROWS[::3])
def test_low_rank(gpu, m, shape, rank, dtype, with_rows):
    bodies.low_rank(gpu, m, shape, rank, dtype, with_rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "shape", "rank"), [(1, (33, 24), 5), (300, (70, 24), 16), (1025, (1000, 64), 33)])
def test_dora_scale(gpu, m, shape, rank, dtype, bias):
    bodies.dora_scale(gpu, m, shape, rank, dtype, bias)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 40, 600])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_layer(gpu, kind, m, dtype, init):
    bodies.layer(gpu, kind, m, dtype, init)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 16, 64, 600])
def test_two_runs_agree_bit_for_bit(gpu, m, dtype):
    bodies.same_twice(gpu, m, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_without_rows(gpu, dtype):
    bodies.no_rows(gpu, dtype)


def test_more_than_2_to_the_31_weights(gpu):
    free = torch.cuda.mem_get_info(gpu)[0] if gpu.type == "cuda" else 0
    if free < 10 << 30:
        pytest.skip(f"needs 10 GiB of free GPU memory, there are {free >> 30}")
    bodies.far(gpu, 2**20 + 1, 2048)


def test_the_device_of_the_tensors_runs_the_kernel(gpu):
    if torch.accelerator.device_count() < 2:
        pytest.skip("one GPU only; tests/kernels/test_launch.py holds the guard to its calls")
    torch.accelerator.set_device_index(0)
    bodies.linear(torch.device(gpu.type, 1), 5, (70, 96), torch.bfloat16, True, "rows")
    assert torch.accelerator.current_device_index() == 0
