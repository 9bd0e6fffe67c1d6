"""The interpreter's process, and NF4 weights of random codes with their float64 values."""

from collections.abc import Iterator

import pytest

from tests.kernels.interpreted import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    yield interpreter
    interpreter.pool.shutdown()
