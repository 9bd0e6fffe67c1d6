"""What holds while a run goes on, and is afterwards as it was before: modules' modes, and answers to signals."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from phicore.training.distributed import rank


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Within it, the model is in training or evaluation mode; afterwards each module is in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


@contextmanager
def stop_signals(ask: Callable[[int], object]) -> Iterator[None]:
    """SIGTERM and SIGUSR1 call `ask` with 0, the status to exit with, and the first SIGINT (Ctrl-C) with 130; a second
    one does what it did before. Outside the main thread they are left alone, and so is SIGINT where it is ignored, as
    in the background jobs of a shell's script."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        if rank() == 0:
            with suppress(OSError):  # print may be what was interrupted, and does not take being called again
                os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again ends at once\n")
        ask(130)  # as of a program that SIGINT ends

    for number in (signal.SIGTERM, *([signal.SIGUSR1] if os.name == "posix" else [])):
        before[number] = signal.signal(number, lambda *_: ask(0))
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        before[signal.SIGINT] = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
