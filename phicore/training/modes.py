"""What holds while a run goes on, and is afterwards as it was before: modules' modes, and answers to signals."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


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
def stop_signals(ask: Callable[[], object]) -> Iterator[None]:
    """SIGTERM and SIGUSR1 call `ask`. Outside the main thread they are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [signal.SIGTERM, *([signal.SIGUSR1] if os.name == "posix" else [])]
    before = {number: signal.signal(number, lambda *_: ask()) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
