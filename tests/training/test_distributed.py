"""Becoming a rank: what the environment may say, and what it may not."""

from typing import Any

import pytest
import torch

from phicore.training import distributed
from phicore.training.distributed import Place, place_in_environment

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_the_environment_gives_a_place() -> None:
    assert place_in_environment({}) is None
    assert place_in_environment({"PATH": "/bin", "RANK": ""}) is None
    assert place_in_environment(WHOLE) == Place(1, 4, None)
    assert place_in_environment({**WHOLE, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}) == Place(1, 4, 0)


@pytest.mark.parametrize("missing", WHOLE)
def test_what_is_missing_is_named(missing: str) -> None:
    with pytest.raises(ValueError, match=f"but not {missing}; set all of RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        place_in_environment({name: value for name, value in WHOLE.items() if name != missing})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "4"}, "RANK=4 and WORLD_SIZE=4 contradict each other; ranks are 0 to 3"),
        ({"RANK": "-1"}, "RANK=-1 and WORLD_SIZE=4 contradict"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is no whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2 and LOCAL_WORLD_SIZE=2 contradict"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 and WORLD_SIZE=4 contradict"),
    ],
)
def test_what_contradicts_itself_is_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_in_environment({**WHOLE, **changes})


def test_one_process_stays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**WHOLE, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    distributed.join(1.0)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gather_rows([1.0, True], torch.device("cpu")) == [[1.0, 1.0]]
    assert distributed.on_first_rank(lambda: "mine") == "mine"


def test_alone_the_very_error_is_raised() -> None:
    error = KeyError("here")

    def fail() -> Any:
        raise error

    with pytest.raises(KeyError) as told:
        distributed.together(fail)
    assert told.value is error
