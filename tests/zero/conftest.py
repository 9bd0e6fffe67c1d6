"""Real ranks for the tests of this room."""

from collections.abc import Callable, Iterator

import pytest

from tests.zero.ranks import SHARED, SOCKETS, Ranks


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


@pytest.fixture(params=[(2, SHARED), (3, SHARED), (3, SOCKETS)], ids=str)
def each_world(request: pytest.FixtureRequest, ranks: Callable[[int], Ranks]) -> Iterator[Ranks]:
    """The ranks of an even and an odd world size in turn, and those with sockets in place of memory that they share."""
    world_size, wire = request.param
    group = ranks(world_size)
    group.wire = wire
    yield group
    group.wire = SHARED
