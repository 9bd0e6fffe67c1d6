"""A kernel launch as a value: run on a device, or compiled for a target without one."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid and all its arguments.

    Attributes:
        kernel: a `triton.jit` function.
        grid: programs along each axis.
        arguments: run-time arguments by name: tensors, numbers or None.
        constants: compile-time arguments by name.
        options: num_warps and num_stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]

    def run(self) -> None:
        """Launches the kernel on the device of its tensors.

        Raises:
            RuntimeError: tensors of several devices. The kernel would take the addresses for those of its own, and fail
                so that no later call on that GPU works.
        """
        tensors = {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}
        if len({tensor.device for tensor in tensors.values()}) > 1:
            places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
            raise RuntimeError(f"a kernel takes tensors of one device, got {places}; move them to one with .to(device)")
        with on_device(next(iter(tensors.values()))):
            # Products and sums are rounded one by one, as torch rounds them: a fused scale * nested + offset would
            # differ in its last bit, and with it some decoded weights.
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options, enable_fp_fusion=False)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's device current: Triton launches on the current one, whatever its arguments are."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return torch.accelerator.device_index(tensor.device.index)
