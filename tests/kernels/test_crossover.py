"""The crossover: defaults, what a tuning run writes, and how it is read back."""

import types
from unittest import mock

import pytest
import torch

from phicore_kernels import crossover


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    crossover.crossover.cache_clear()
    yield
    crossover.crossover.cache_clear()


def on(major, minor):
    properties = types.SimpleNamespace(name="A GPU (80 GB)", major=major, minor=minor)
    return mock.patch.object(torch.cuda, "get_device_properties", return_value=properties)


@pytest.mark.parametrize(
    ("capability", "rows"),
    [((6, 1), 0), ((7, 5), 0), ((8, 0), 128), ((8, 9), 256), ((9, 0), 64), ((10, 0), 64), ((12, 0), 256)],
)
def test_defaults_by_capability(capability, rows):
    assert crossover.default_crossover(capability) == rows
    with on(*capability):
        assert crossover.crossover(torch.device("cuda", 0)) == rows


def test_amd_by_architecture():
    assert crossover.default_crossover((9, 4), "gfx942:sramecc+:xnack-") == 16
    assert crossover.default_crossover((11, 0), "gfx1100") == 0


def test_a_tuned_number_replaces_the_default_and_only_where_products_exist():
    file = crossover.save("A GPU (80 GB)", 48, [{"rows": 1, "fused": 1.0, "dequantized": 2.0}])
    assert [f.name for f in file.parent.iterdir()] == [file.name]
    with on(9, 0):
        assert crossover.crossover(torch.device("cuda", 0)) == 48
    with on(7, 5):
        assert crossover.crossover(torch.device("cuda", 1)) == 0
    assert crossover.load("another") is None


@pytest.mark.parametrize("text", ["", "[]", '{"crossover_rows": "many"}', '{"crossover_rows": -1}', "{}"])
def test_a_broken_file_is_named(text):
    file = crossover.path("gpu")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(ValueError, match=r"gpu-triton-.*json does not hold a crossover; remove it"):
        crossover.load("gpu")


def test_tuning_stops_at_the_first_loss():
    from phicore_kernels.tune import crossover_of

    times = [{"rows": r, "fused": f, "dequantized": 2.0} for r, f in ((1, 1.0), (16, 2.0), (32, 2.5), (64, 1.0))]
    assert crossover_of(times) == 16
    assert crossover_of(times[2:]) == 0


def test_tuning_measures_both_ways_in_both_directions(interpreter):
    times, shapes = interpreter.call("tests.kernels.interpreted:tune_small")
    assert times == [{"rows": r, "fused": 1.0, "dequantized": 1.0} for r in (1, 3)]
    assert sorted(shapes) == sorted([(r, c) for r in (1, 3) for c in (32, 64)] * 2)


def test_tuning_needs_a_gpu(capsys):
    from phicore_kernels import tune

    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        assert tune.main() == 1
    assert "no GPU" in capsys.readouterr().err
