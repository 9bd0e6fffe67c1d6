"""What was tuned, on disk: kept by GPU, written whole, and left aside when damaged."""

import importlib.metadata
import json
import os
import warnings
from unittest import mock

import pytest

from phicore_kernels import cache
from phicore_kernels.configs import Config

CONFIG = Config(16, 64, 128, 4, 3, 2)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache.load.cache_clear()
    yield
    cache.load.cache_clear()


def test_what_is_saved_is_added_and_read_back():
    assert cache.load("a GPU") == cache.Tuned(None, {})
    file = cache.save("a GPU", configs={"one": CONFIG})
    assert cache.load("a GPU") == cache.Tuned(None, {"one": CONFIG})
    assert cache.save("a GPU", crossover_rows=48, configs={"two": CONFIG._replace(split=1)}) == file
    assert cache.load("a GPU") == cache.Tuned(48, {"one": CONFIG, "two": CONFIG._replace(split=1)})
    assert cache.load("another") == cache.Tuned(None, {})
    assert [f.name for f in file.parent.iterdir()] == [file.name]  # no temporary is left


def test_a_user_without_a_home_has_the_defaults(monkeypatch):
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)
    with mock.patch("pwd.getpwuid", side_effect=KeyError):  # a container's user id of its own
        assert cache.load("a GPU") == cache.Tuned(None, {})


def test_another_triton_has_a_file_of_its_own():
    cache.save("a GPU", crossover_rows=48)
    with mock.patch("triton.__version__", "99.0"):
        cache.load.cache_clear()
        assert cache.load("a GPU").crossover_rows is None


def test_triton_may_be_installed_under_another_name():
    missing = importlib.metadata.PackageNotFoundError("triton")  # it is triton-rocm or pytorch-triton-xpu there
    with mock.patch("importlib.metadata.version", side_effect=missing):
        assert cache.load("a GPU") == cache.Tuned(None, {})


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "null", '{"crossover_rows": 48', '{"crossover_rows": "many", "configs": {}}',
        '{"crossover_rows": -1, "configs": {}}', '{"crossover_rows": true, "configs": {}}',
        '{"crossover_rows": 1, "configs": []}', '{"crossover_rows": 1, "configs": {"one": [16, 64]}}',
        '{"crossover_rows": 1, "configs": {"one": [16, 64, 128, 4, 3, 0]}}',
        '{"crossover_rows": 1, "configs": {"one": ["16", 64, 128, 4, 3, 1]}}',
        '{"crossover_rows": 1, "configs": {"one": 5}}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_left_aside_with_a_warning_and_replaced(text):
    file = cache.path("gpu")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.warns(UserWarning, match=r"gpu-triton-.*json is not readable.*phicore_kernels.tune writes it anew"):
        assert cache.load("gpu") == cache.Tuned(None, {})
    with pytest.warns(UserWarning, match="not readable"):
        cache.save("gpu", crossover_rows=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.load("gpu").crossover_rows == 3
    json.loads(file.read_text())


def test_a_file_of_bytes_that_are_no_text():
    file = cache.path("gpu")
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="not readable"):
        assert cache.load("gpu") == cache.Tuned(None, {})


def test_a_save_that_dies_leaves_the_file_as_it_was():
    cache.save("gpu", crossover_rows=3)
    with mock.patch.object(os, "replace", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        cache.save("gpu", crossover_rows=4)
    cache.load.cache_clear()
    assert cache.load("gpu").crossover_rows == 3
