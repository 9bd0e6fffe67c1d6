"""A launch makes the device of its tensors current, and takes no tensors of two."""

from unittest import mock

import pytest
import torch

from phicore_kernels.launch import Launch


def test_tensors_of_several_devices_are_named():
    arguments = {"x": torch.ones(1), "bias": None, "packed": torch.ones(1, device="meta"), "n": 1}
    kernel = mock.MagicMock()
    with pytest.raises(RuntimeError, match=r"one device, got x on cpu, packed on meta; move them"):
        Launch(kernel, (1,), arguments, {}, {}).run()
    assert not kernel.mock_calls


def test_the_device_of_the_tensors_is_current_during_the_launch(interpreter):
    assert interpreter.call("tests.kernels.interpreted:device_of_run") == ((1,), ["in", "launch", "out"])
