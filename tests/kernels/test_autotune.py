"""Which config a product runs with; the device and the timer are stand-ins."""

from unittest import mock

import pytest
import torch

from phicore_kernels import autotune, cache
from phicore_kernels.autotune import Product, candidates, config_of, fastest
from phicore_kernels.configs import CONFIGS, choose, shared_bytes
from phicore_kernels.device import NONE, gpu_of

CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16
H100 = NONE._replace(name="H100", kind="nvidia", capability=(9, 0), processors=132, shared_limit=227 << 10)
PRODUCT = Product(False, 5, 4096, 14336, "permute", BF16)


@pytest.fixture(autouse=True)
def _as_on_an_h100(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PHICORE_AUTOTUNE", raising=False)
    cache.load.cache_clear()
    autotune._tuned_here.clear()
    with (
        mock.patch.object(autotune, "gpu_of", return_value=H100),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
    ):
        yield
    cache.load.cache_clear()


def never(_):
    raise AssertionError("nothing should be timed")


def test_products_of_a_bucket_share_a_key_and_others_do_not():
    buckets = {m: PRODUCT._replace(m=m).bucket for m in (1, 16, 17, 32, 33, 1000, 8192, 10**6)}
    assert buckets == {1: 16, 16: 16, 17: 32, 32: 32, 33: 64, 1000: 1024, 8192: 8192, 10**6: 8192}
    assert PRODUCT.key == "forward bfloat16 permute M16 4096x14336"
    other = [
        PRODUCT._replace(**change)
        for change in (
            {"backward": True}, {"m": 17}, {"columns": 4097}, {"summed": 14337}, {"mode": "any"},
            {"dtype": torch.float16},
        )
    ]  # fmt: skip
    assert len({p.key for p in [PRODUCT, *other]}) == 7


@pytest.mark.parametrize(
    ("mode", "dtype"), [("permute", BF16), ("table", BF16), ("table", torch.float32), ("any", BF16)]
)
@pytest.mark.parametrize("m", [1, 40, 5000])
@pytest.mark.parametrize("limit", [227 << 10, 64 << 10, 40 << 10])
def test_candidates_fit_the_gpu_and_the_product(mode, dtype, m, limit):
    product = PRODUCT._replace(m=m, mode=mode, dtype=dtype)
    found = candidates(product, H100._replace(shared_limit=limit))
    assert len(set(found)) == len(found) >= 1
    for config in found:
        assert shared_bytes(config, mode, dtype.itemsize) <= limit or len(found) == 1
        assert config.block_m <= product.bucket
        assert config.split == 1 or config.split * 2 * config.block_sum <= 14336 + config.block_sum
    if limit == 227 << 10:
        assert choose(m, 4096, 14336, mode, dtype, 132) in found
        if mode == "permute":
            assert 5 <= len(found) <= 60


def test_the_fastest_candidate_wins_and_what_the_gpu_refuses_is_passed_over():
    from triton.runtime.errors import OutOfResources

    every = candidates(PRODUCT, H100)
    ran = []

    def trial(config):
        ran.append(config)
        if config == every[2]:
            raise OutOfResources(1, 2, "shared memory")

    def bench(call):
        call()
        return {1: 2.0, 2: 0.0, 3: 1.0}.get(every.index(ran[-1]), 3.0)

    assert fastest(PRODUCT, H100, trial, bench) == every[3]
    assert ran == every

    def refused(_):
        raise OutOfResources(1, 2, "shared memory")

    with pytest.raises(RuntimeError, match="H100 runs none of the configs for forward bfloat16 permute M16"):
        fastest(PRODUCT, H100, refused, lambda call: call())


def test_nothing_is_timed_unless_asked():
    table = choose(5, 4096, 14336, "permute", BF16, 132)
    assert config_of(PRODUCT, CUDA, never) == table
    tuned = table._replace(split=7)
    cache.save("H100", configs={PRODUCT.key: tuned})
    assert config_of(PRODUCT, CUDA, never) == tuned
    assert config_of(PRODUCT._replace(m=1), CUDA, never) == tuned  # the same bucket
    assert config_of(PRODUCT._replace(m=17), CUDA, never).split != 7


def test_the_variable_tunes_a_product_once(monkeypatch):
    monkeypatch.setenv("PHICORE_AUTOTUNE", "1")
    slow = choose(5, 4096, 14336, "permute", BF16, 132)
    timed = []
    with mock.patch.object(
        autotune, "bench_on_device", side_effect=lambda call, _: timed.append(call()) or -len(timed)
    ):
        first = config_of(PRODUCT, CUDA, lambda config: None)
        assert len(timed) == len(candidates(PRODUCT, H100))
        assert first == candidates(PRODUCT, H100)[-1] != slow
        cache.load.cache_clear()  # as another process would find it
        autotune._tuned_here.clear()
        assert config_of(PRODUCT, CUDA, never) == first
        timed.clear()
        assert config_of(PRODUCT._replace(m=100), torch.device("cpu"), never) is not None
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True):
        assert config_of(PRODUCT._replace(m=100), CUDA, never).split >= 1


@pytest.mark.filterwarnings("ignore:.* is not readable as tuned kernels")
def test_what_cannot_be_written_is_kept_for_the_process_with_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("PHICORE_AUTOTUNE", "1")
    (tmp_path / "phicore").write_text("a file where a directory should be")  # as good as read-only, for root too
    products, trial = [PRODUCT, PRODUCT._replace(m=17)], mock.Mock()
    with (
        mock.patch.object(autotune, "bench_on_device", side_effect=lambda call, _: call() and 1.0),
        pytest.warns(UserWarning, match="kept for this process only, since it cannot be written: .*phicore"),
    ):
        first = [config_of(product, CUDA, trial) for product in products]
    assert [config_of(product, CUDA, never) for product in products] == first


def test_what_another_process_overwrites_is_not_tuned_again(monkeypatch):
    monkeypatch.setenv("PHICORE_AUTOTUNE", "1")
    with mock.patch.object(autotune, "bench_on_device", side_effect=lambda call, _: call() and 1.0):
        first = config_of(PRODUCT, CUDA, mock.Mock())
    cache.path("H100").unlink()
    cache.load.cache_clear()
    assert config_of(PRODUCT, CUDA, never) == first


def test_a_call_is_timed_on_its_own_device():
    inside = mock.MagicMock()
    with (
        mock.patch.object(torch.accelerator, "device_index", return_value=inside) as index,
        mock.patch("triton.testing.do_bench", side_effect=lambda call, return_mode: call()),
    ):
        assert autotune.bench_on_device(lambda: 2.0 * inside.__enter__.called, torch.device("cuda", 1)) == 2e-3
    index.assert_called_once_with(1)


def test_every_tuned_config_is_one_that_the_checks_compile():
    from phicore_kernels.catalogue import catalogue

    sizes = ("BLOCK_M", "BLOCK_OUT", "BLOCK_SUM", "num_warps", "num_stages")
    compiled = {
        tuple({**e.launch.constants, **e.launch.options}[size] for size in sizes)
        for target in ("sm_90", "gfx942")
        for e in catalogue(target)
        if e.product
    }
    for mode, size in CONFIGS:
        dtype = BF16 if size == 2 else torch.float32
        for m in (1, 20, 40, 100, 5000):
            for config in candidates(PRODUCT._replace(m=m, mode=mode, dtype=dtype), H100):
                assert config[:5] in compiled


def test_the_estimate_of_shared_memory_is_not_below_what_is_compiled():
    from phicore_kernels.aot import compile_launch
    from phicore_kernels.catalogue import catalogue

    chosen = {
        ("sm_90", "matmul forward bfloat16 16x64x128 split 8 for tuning"): BF16,
        ("sm_90", "matmul forward bfloat16 128x128x64"): BF16,
        ("sm_90", "matmul forward float32 16x64x64 split 16"): torch.float32,
        ("gfx942", "matmul forward bfloat16 16x64x128 split 16"): BF16,
    }
    for (target, name), dtype in chosen.items():
        entry = next(e for e in catalogue(target) if e.name == name)
        constants, options = entry.launch.constants, entry.launch.options
        config = CONFIGS["any", 2][0][1]._replace(
            block_m=constants["BLOCK_M"], block_out=constants["BLOCK_OUT"], block_sum=constants["BLOCK_SUM"],
            num_stages=options["num_stages"],
        )  # fmt: skip
        shared = compile_launch(entry.launch, target).shared
        estimate = shared_bytes(config, constants["MODE"], dtype.itemsize)
        assert shared <= estimate <= 2 * shared + 2048, name


def test_a_gpu_is_described_by_torch_and_triton():
    assert gpu_of(torch.device("cpu")) == gpu_of(torch.device("meta")) == NONE
    properties = mock.Mock(major=9, minor=0, gcnArchName="gfx942:sramecc+:xnack-")
    properties.name = "the name"
    driver = mock.Mock()
    driver.active.utils.get_device_properties.return_value = {"multiprocessor_count": 132, "max_shared_mem": 232448}
    for kind, hip in (("nvidia", None), ("amd", "7.0")):
        gpu_of.cache_clear()
        with (
            mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
            mock.patch.object(torch.version, "hip", hip),
            mock.patch("triton.runtime.driver", driver),
        ):
            gpu = gpu_of(CUDA)
        assert gpu[:2] == ("the name", kind)
        assert gpu[2:4] == (((9, 0), "") if kind == "nvidia" else ((0, 0), "gfx942"))
        assert gpu[4:] == (132, 232448)
    gpu_of.cache_clear()
