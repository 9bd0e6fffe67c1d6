"""What a run tells: lines of metrics.jsonl always, a progress bar on a terminal, plain lines elsewhere."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from phicore import atomic
from phicore.training.distributed import rank, world_size

LARGE = 256 << 20  # bytes that take a second or more to be read or written to a disk


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: by the allocator on a GPU, resident in the process on a CPU.

    What is resident includes pages of mapped files, which the system can take back: of libraries, and of weights as
    transformers maps them, also while they are read only to be converted.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # whose getrusage begins with the memory of the process that started this one
        high = Path("/proc/self/status").read_text(errors="replace").partition("VmHWM:")[2]  # its name may be cut
        if high:  # gVisor keeps none
            return int(high.split()[0]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes but for macOS


class MetricsLog:
    """Appends one JSON object a line to a file.

    Args:
        path: of the file.
        last_step: lines after this step are removed first: a resumed run writes them again.

    Attributes:
        evaluated: the last of these steps that has an evaluation; None if none has.
    """

    def __init__(self, path: str | os.PathLike[str], last_step: int) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text("utf-8", "replace").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step(line) <= last_step]
        atomic.write_text(self.path, "".join(line + "\n" for line in kept))
        steps = [values["step"] for values in map(json.loads, kept) if "eval_loss" in values]
        self.evaluated: int | None = steps[-1] if steps else None

    def write(self, **values: Any) -> None:
        """Appends a line at once.

        Raises:
            OSError: it cannot be written.
        """
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise OSError(
                f"cannot write {self.path}: {error}. Make room for it (or let it be written), then start again with "
                f"resume"
            ) from error


def _step(line: str) -> float:
    """Infinity for what is no line of a step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):  # the line that a kill cut short
        return math.inf


class Progress:
    """A bar on a terminal (with tqdm, if it is installed), a line per message elsewhere.

    Args:
        total: steps in all.
        done: steps behind a resumed run.
        shown: False for ranks that keep quiet.
    """

    def __init__(self, total: int, done: int, *, shown: bool = True, what: str = "training") -> None:
        self.total, self.shown, self.what = total, shown, what
        self.bar: Any = None
        if shown and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, initial=done, desc=what, unit="step", dynamic_ncols=True)

    def step(self, done: int, text: str = "", *, say: bool, total: int | None = None) -> None:
        """Reports that `done` steps are done (of `total`, if that is known only now); `say` marks a step whose text is
        worth a line without a bar."""
        self.total = self.total if total is None else total
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(done - self.bar.n)
        elif self.shown and say:
            print(f"{self.what} {done}/{self.total}  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the terminal to others."""
        if self.bar is not None:
            self.bar.close()


@contextmanager
def told(what: str, nbytes: int) -> Iterator[None]:
    """Says what is read or written, and how long it took, where this rank's part of it is large.

    Lines go to standard error, on rank 0, and above a bar that is drawn there.
    """
    start = time.perf_counter()
    shown = nbytes >= LARGE and rank() == 0
    if shown:
        _line(f"{what}: {nbytes / 1e9:.2f} GB{' a rank' if world_size() > 1 else ''} ...")
    yield
    if shown:
        _line(f"{what}: {time.perf_counter() - start:.1f} s")


def _line(text: str) -> None:
    tqdm = sys.modules.get("tqdm")
    write = print if tqdm is None else tqdm.tqdm.write
    write(text, file=sys.stderr)
    sys.stderr.flush()
