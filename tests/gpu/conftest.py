"""Everything here needs a GPU. Without one the folder is skipped, and pytest's summary says why."""

from pathlib import Path

import pytest
import torch

from phicore.nf4 import kernels


def device() -> torch.device | None:
    """The current GPU, of a kind that kernels run on."""
    gpu = torch.accelerator.current_accelerator(check_available=True)
    return None if gpu is None or gpu.type not in kernels.DEVICE_TYPES else torch.device(gpu.type, 0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if device() is None:
        skip = pytest.mark.skip(reason="no GPU that torch sees; the same bodies ran in Triton's interpreter")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    found = device()
    assert found is not None
    return found
