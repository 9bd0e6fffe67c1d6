"""What holds while a run goes on, and is afterwards as it was before: modules' modes, and answers to signals."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist
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
    before: dict[int, Any] = {signal.SIGINT: signal.getsignal(signal.SIGINT)}

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        if rank() == 0:
            with suppress(OSError):  # print may be what was interrupted, and does not take being called again
                # torchrun answers another one with SIGTERM to its processes
                again = "" if dist.is_torchelastic_launched() else "; Ctrl-C again ends at once"
                os.write(2, f"\nstopping, with a checkpoint{again}\n".encode())
        ask(130)  # as of a program that SIGINT ends

    answers: dict[int, Callable[..., object]] = {signal.SIGTERM: lambda *_: ask(0)}
    if os.name == "posix":
        answers[signal.SIGUSR1] = answers[signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        answers[signal.SIGINT] = interrupt
    before |= {number: signal.signal(number, answer) for number, answer in answers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
