"""The choice of a dtype follows its rule, whatever machine the test runs on."""

from collections.abc import Iterator

import pytest
import torch

from phicore.training import precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def clock(float32: float, bfloat16: float, first: float) -> Iterator[float]:
    """Readings that make each float32 product last that long, and each bfloat16 product; the first pair, whose end is
    not read, `first` times as long."""
    now = 0.0
    for turn in range(6):
        for duration in (float32, bfloat16):
            yield now
            now += duration * (1 if turn else first)
            if turn:
                yield now


@pytest.fixture(autouse=True)
def _small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bfloat16 is emulated, products of the true size take seconds."""
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *_shape, dtype: ones(2, 2, dtype=dtype))


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen", "words"),
    [
        (1.0, 0.25, torch.bfloat16, "4.00x"),
        (1.25, 1.0, torch.bfloat16, "1.25x"),
        (1.15, 1.0, torch.float32, "1.15x"),
        (1.0, 7.0, torch.float32, "0.14x"),
    ],
)
@pytest.mark.parametrize("first", [1.0, 100.0])
def test_a_cpu_is_timed(
    monkeypatch: pytest.MonkeyPatch, float32: float, bfloat16: float, chosen: torch.dtype, words: str, first: float
) -> None:
    readings = clock(float32, bfloat16, first)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(readings))
    dtype, reason = precision.choose_dtype(CPU)
    assert dtype == chosen
    assert words in reason
    assert next(readings, None) is None


def test_this_cpu_gets_one_of_the_two() -> None:
    dtype, reason = precision.choose_dtype(CPU)
    assert dtype in (torch.float32, torch.bfloat16)
    assert "x the speed of float32 on this CPU" in reason


@pytest.mark.parametrize(("capability", "chosen"), [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16)])
def test_a_gpu_that_knows_bfloat16_gets_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "GPU 1")
    assert precision.choose_dtype(CUDA) == (chosen, "GPU 1 has bfloat16 products")


@pytest.mark.skipif(torch.version.hip is not None, reason="the rule of compute capability is NVIDIA's")
def test_an_older_gpu_gets_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "T4")
    assert precision.choose_dtype(CUDA) == (torch.float32, "T4 lacks bfloat16 products")


def test_another_device_gets_float32() -> None:
    assert precision.choose_dtype(torch.device("meta")) == (torch.float32, "no rule for meta")


def test_names_and_dtypes_agree() -> None:
    assert {name: str(dtype) for name, dtype in precision.DTYPES.items()} == {n: f"torch.{n}" for n in precision.DTYPES}
