"""Real ranks for the tests of this room."""

from tests.zero.conftest import ranks  # noqa: F401
