"""The crossover: defaults by GPU, and what was tuned in their place."""

from unittest import mock

import pytest
import torch

from phicore_kernels import cache, crossover
from phicore_kernels.device import NONE


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in (crossover.crossover, cache.load):
        function.cache_clear()
    yield
    for function in (crossover.crossover, cache.load):
        function.cache_clear()


def nvidia(major, minor):
    return NONE._replace(name="A GPU (80 GB)", kind="nvidia", capability=(major, minor))


def on(gpu):
    return mock.patch.object(crossover, "gpu_of", return_value=gpu)


@pytest.mark.parametrize(
    ("capability", "rows"),
    [((6, 1), 0), ((7, 5), 0), ((8, 0), 128), ((8, 9), 256), ((9, 0), 64), ((10, 0), 64), ((12, 0), 256)],
)
def test_defaults_by_capability(capability, rows):
    assert crossover.default_crossover(nvidia(*capability)) == rows
    with on(nvidia(*capability)):
        assert crossover.crossover(torch.device("cuda", 0)) == rows


def test_other_gpus():
    for architecture, rows in (("gfx942", 16), ("gfx1100", 0), ("gfx906", 0)):
        assert crossover.default_crossover(NONE._replace(kind="amd", architecture=architecture)) == rows
    assert crossover.default_crossover(NONE._replace(kind="xpu")) == 16
    assert crossover.default_crossover(NONE) == 0


def test_a_tuned_number_replaces_the_default_and_only_where_products_exist():
    cache.save("A GPU (80 GB)", crossover_rows=48)
    with on(nvidia(9, 0)):
        assert crossover.crossover(torch.device("cuda", 0)) == 48
    with on(nvidia(7, 5)):
        assert crossover.crossover(torch.device("cuda", 1)) == 0
