"""Every operator and layer on the GPU at hand, forward and backward, against float64."""

import pytest
import torch

import phicore
from phicore.nf4 import kernels
from phicore_kernels.weight import level_table
from tests.gpu import bodies

if bodies.find_gpu() is None:
    pytest.skip(bodies.NO_GPU, allow_module_level=True)

DTYPES, SHAPES = bodies.DTYPES, bodies.SHAPES
# below and above every crossover, and between the sizes of tiles
ROWS = (1, 5, 16, 17, 64, 130, 1025)


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    return bodies.find_gpu()


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gaps_in_memory(gpu, dtype):
    bodies.gaps(gpu, dtype)


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


def test_tuning_finds_configs_that_work(gpu, tmp_path, monkeypatch):
    from phicore_kernels import cache, tune
    from phicore_kernels.crossover import crossover, default_crossover
    from phicore_kernels.device import gpu_of

    if default_crossover(gpu_of(gpu)) == 0:
        pytest.skip("products are always dequantised first on this GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in (cache.load, crossover):
        function.cache_clear()
    try:
        assert tune.main(["--shapes", "64,128", "--rows", "1", "40"]) == 0
        assert len(cache.load(gpu_of(gpu).name).configs) == 4
        for m in (1, 40):
            bodies.linear(gpu, m, (64, 128), torch.bfloat16, True, "rows")
    finally:
        monkeypatch.undo()
        for function in (cache.load, crossover):
            function.cache_clear()


def test_times_of_a_small_layer(gpu, tmp_path):
    from benchmarks import kernel_times

    layers = {"small q": (256, 512)}
    assert kernel_times.main(tmp_path, None, quick=True, device=gpu, layers=layers, rows=(1, 20)) == 0
    assert (tmp_path / "times.json").exists()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_compiled_layers_equal_eager(gpu, kind):
    bodies.compiled_layer(gpu, kind, "inductor")


def test_a_first_call_may_warm_a_cuda_graph_up(gpu):
    for table in (kernels._code_map, level_table):
        table.cache_clear()
    torch._dynamo.reset()
    layer = phicore.NF4Linear.from_linear(torch.nn.Linear(96, 70)).to(gpu)
    compiled, x = torch.compile(layer, mode="reduce-overhead"), torch.randn(5, 96, device=gpu)
    with torch.no_grad():
        runs = [compiled(x).clone() for _ in range(3)]  # warmed up, recorded, replayed
        assert all(torch.equal(y, layer(x)) for y in runs)
