"""Products with W decoded inside the kernel, forward and backward, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phicore_kernels.configs import CONFIGS, Config, choose
from phicore_kernels.weight import naive_decode
from tests.kernels.weights import exact, random_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The kernel's W is the rounded one bit for bit, so what remains is one rounding of the result: at most half a unit in
# the last place of each element, and less than that in the mean. float32 sums a few hundred products.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}
LINEAR, LINEAR_DX = "phicore_kernels.matmul:linear", "phicore_kernels.matmul:linear_dx"
SMALL = Config(16, 32, 32, 4, 1)


def draw(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def low_rank_of(m, columns, rank, dtype):
    """(left, right, scaling): right is a transposed view, as B^T is."""
    return draw((m, rank), dtype, 11), draw((columns, rank), dtype, 12).T, 0.7


def expected(x, dense, bias=None, low_rank=None):
    y = x.double() @ dense.double()
    if bias is not None:
        y = y + bias.double()
    if low_rank is not None:
        left, right, scaling = low_rank
        y = y + scaling * (left.double() @ right.double())
    return y


@settings(max_examples=30)
@given(
    m=st.integers(0, 20),
    n=st.integers(1, 50),
    k=st.one_of(st.integers(1, 90), st.sampled_from((32, 64, 96))),
    block_size=st.sampled_from((32, 64, 128)),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(("rows", "columns", "slice", "repeat")),
    bias=st.booleans(),
    rank=st.sampled_from((None, 3, 16, 20)),
    split=st.sampled_from((1, 3)),
    permute=st.booleans(),
    backward=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_dtype_and_stride(
    interpreter, relative_error, m, n, k, block_size, double_quant, dtype, layout, bias, rank, split, permute,
    backward, seed,
):  # fmt: skip
    weight = random_weight(n, k, block_size, double_quant, seed)
    summed, columns = (n, k) if backward else (k, n)
    x = {
        "rows": lambda: draw((m, summed), dtype, seed),
        "columns": lambda: draw((summed, m), dtype, seed).T,
        "slice": lambda: draw((m, 3 * summed + 1), dtype, seed)[:, 1::3],
        "repeat": lambda: draw((1, summed), dtype, seed).expand(m, summed),
    }[layout]()
    low_rank = None if rank is None else low_rank_of(m, columns, rank, dtype)
    options = {"config": SMALL._replace(split=split), "permute": permute, "low_rank": low_rank}
    dense = naive_decode(weight, dtype)
    if backward:
        given = interpreter.call(LINEAR_DX, x, weight, **options)
        exact_y = expected(x, dense, low_rank=low_rank)
    else:
        b = draw((n,), dtype, seed + 1) if bias else None
        given = interpreter.call(LINEAR, x, weight, b, **options)
        exact_y = expected(x, dense.T, b, low_rank)
    assert given.dtype == dtype
    assert given.is_contiguous()
    assert relative_error(given, exact_y) <= BOUND[dtype]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 17, 70])
def test_the_configs_that_models_use(interpreter, relative_error, m, dtype, backward):
    # 96 and 160 are no multiples of most tiles; a sum of 160 is split in no part, see the splits above
    n, k = 96, 160
    weight = random_weight(n, k)
    x = draw((m, n if backward else k), dtype, 3)
    given = interpreter.call(LINEAR_DX if backward else LINEAR, x, weight)
    dense = naive_decode(weight, dtype)
    assert relative_error(given, expected(x, dense if backward else dense.T)) <= BOUND[dtype]
    # and against the weight that was never rounded, whose rounding adds about as much as that of the result
    w = exact(weight)
    assert relative_error(given, expected(x, w if backward else w.T)) <= 1.5 * BOUND[dtype]


def test_more_tiles_of_rows_than_a_band(interpreter, relative_error):
    weight, x = random_weight(70, 64), draw((300, 64), torch.float16, 5)  # 19 tiles of rows: bands of 8, 8 and 3
    given = interpreter.call(LINEAR, x, weight, config=Config(16, 64, 64, 4, 1), permute=False)
    assert relative_error(given, expected(x, naive_decode(weight, torch.float16).T)) <= BOUND[torch.float16]


def test_a_split_sum_is_the_same_in_every_run(interpreter):
    weight, x = random_weight(64, 640), draw((3, 640), torch.float32, 5)
    config = Config(16, 64, 64, 4, 1, split=4)
    first = interpreter.call(LINEAR, x, weight, config=config)
    assert torch.equal(first, interpreter.call(LINEAR, x, weight, config=config))
    assert not torch.equal(first, interpreter.call(LINEAR, x, weight, config=config._replace(split=1)))


@pytest.mark.parametrize("shape", [(0, 64, 32), (3, 0, 32), (3, 64, 0)])
def test_empty_products(interpreter, shape):
    m, k, n = shape
    weight = random_weight(n, k)
    y = interpreter.call(LINEAR, torch.ones(m, k), weight, torch.full((n,), 2.0))
    assert torch.equal(y, torch.full((m, n), 2.0 if m and n else 0.0) + torch.zeros(m, n))
    dx = interpreter.call(LINEAR_DX, torch.ones(m, n), weight)
    assert torch.equal(dx, torch.zeros(m, k))


@pytest.mark.parametrize("columns", [64, 66])  # whole groups, and weights one by one
def test_more_than_2_to_the_31_elements(interpreter, columns):
    rows = 2**25 + 64  # 2^31 + 4096 weights at least
    given = interpreter.call("tests.kernels.interpreted:linear_far", rows, columns)
    expected = torch.tensor([[2.0], [4.0], [6.0]], dtype=torch.float16) * columns
    assert torch.equal(given, expected.expand(3, 32))


@pytest.mark.parametrize("columns", [2**25 + 64, 2**25 + 2])
def test_more_than_2_to_the_31_elements_backward(interpreter, columns):
    given = interpreter.call("tests.kernels.interpreted:linear_dx_far", columns)
    # one row of the weight is not zero at the end, and the low-rank term adds 10 * (2 * 0.5)
    expected = torch.tensor([[2.0], [4.0], [6.0]], dtype=torch.float16) + 10
    assert torch.equal(given[:, -2:], expected.expand(3, 2))


def test_parts_of_a_sum_beyond_2_to_the_31(interpreter):
    given = interpreter.call("tests.kernels.interpreted:parts_far", 2**25 + 64)  # 66 * 2^25 numbers
    assert torch.equal(given, torch.full((32,), 64.0))
    given = interpreter.call("tests.kernels.interpreted:add_parts_far", 2**30 + 2**10)
    assert torch.equal(given, torch.full((4,), 3.0, dtype=torch.float16))


@pytest.mark.parametrize(("mode", "size"), CONFIGS)
def test_each_m_has_a_config_that_fills_the_gpu_and_no_more(mode, size):
    dtype = torch.bfloat16 if size == 2 else torch.float32
    rows = [config._replace(split=1) for _, config in CONFIGS[mode, size]]
    for m in (1, 16, 17, 64, 65, 10**6):
        assert choose(m, 4096, 4096, mode, dtype, 108)._replace(split=1) in rows
    tiles = 4096 // rows[0].block_out
    assert choose(1, 4096, 4096, mode, dtype, 108).split == 2 * 108 // tiles  # of the 108 processors of an A100
    assert choose(1, 4096, 4 * rows[0].block_sum, mode, dtype, 108).split == 1  # nothing to split
    assert choose(1, 10**6, 4096, mode, dtype, 108).split == 1  # enough tiles without
    assert choose(8192, 4096, 4096, mode, dtype, 108).split == 1
