"""The tuning command, with the interpreter for a GPU and a timer that goes by the config."""

from unittest import mock

import torch

from phicore_kernels import cache, tune
from phicore_kernels.device import NONE

TUNE = "tests.kernels.interpreted:tune_small"
GPU = NONE._replace(name="a GPU", kind="nvidia", capability=(9, 0), processors=2)


def test_tuning_stops_at_the_first_loss():
    times = [{"rows": r, "fused": f, "dequantized": 2.0} for r, f in ((1, 1.0), (16, 2.0), (32, 2.5), (64, 1.0))]
    assert tune.crossover_of(times) == 16
    assert tune.crossover_of(times[2:]) == 0


def test_the_command_writes_what_is_fastest(interpreter, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["--shapes", "64,96", "--rows", "20", "1", "--dtype", "float32"]
    status, printed, calls = interpreter.call(TUNE, GPU, arguments, str(tmp_path), slow=64)
    assert status == 0
    # candidates of two buckets in both directions, then both ways of each
    assert set(calls) == {(16, 64), (16, 96), (32, 64), (32, 96), (1, 64), (1, 96), (20, 64), (20, 96)}
    assert "decode in the product up to 20 rows" in printed
    cache.load.cache_clear()
    tuned = cache.load("a GPU")
    assert tuned.crossover_rows == 20
    assert sorted(tuned.configs) == sorted(
        f"{d} float32 table M{m} {s}" for d, s in (("forward", "64x96"), ("backward", "96x64")) for m in (16, 32)
    )
    assert {config.block_out for config in tuned.configs.values()} == {64}
    cache.load.cache_clear()


def test_tuning_needs_a_gpu_with_products(capsys):
    with mock.patch.object(torch.accelerator, "current_accelerator", return_value=None):
        assert tune.main([]) == 1
    assert "no GPU" in capsys.readouterr().err
    with (
        mock.patch.object(torch.accelerator, "current_accelerator", return_value=torch.device("cuda", 0)),
        mock.patch.object(tune, "gpu_of", return_value=GPU._replace(capability=(7, 5))),
    ):
        assert tune.main([]) == 1
    assert "a GPU: no products are checked for it" in capsys.readouterr().err
