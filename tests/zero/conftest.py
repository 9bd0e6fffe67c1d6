"""Real ranks for the tests of this room."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.zero.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """Processes of one gloo group by world size, started once: ranks(4)(check, *arguments) -> each rank's result."""
    started: dict[int, Ranks] = {}

    def get(world_size: int) -> Ranks:
        if world_size not in started or started[world_size].broken:
            started[world_size] = Ranks(world_size, tmp_path_factory.mktemp("rendezvous"))
        return started[world_size]

    yield get
    for group in started.values():
        group.stop()


@pytest.fixture(params=[2, 3])
def each_world(request: pytest.FixtureRequest, ranks: Callable[[int], Ranks]) -> Any:
    """The ranks of an even and an odd world size in turn."""
    return ranks(request.param)
