"""What was tuned on a GPU, kept on disk: a JSON file for each GPU and Triton version, since each makes other code."""

import json
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from phicore_kernels.configs import Config


class Tuned(NamedTuple):
    """Attributes:
    crossover_rows: as `crossover.crossover`, or None where it was not tuned.
    configs: the fastest config by the key of a product (see `autotune.Product.key`).
    """

    crossover_rows: int | None
    configs: dict[str, Config]


def path(gpu: str) -> Path:
    """Where the file of a GPU stands: under XDG_CACHE_HOME, or ~/.cache."""
    import triton  # whose distribution has other names where it comes with torch for ROCm or XPU

    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # Path.home() raises without a home
    name = "".join(c if c.isalnum() else "-" for c in gpu)
    return root / "phicore" / "kernels" / f"{name}-triton-{triton.__version__}.json"


@lru_cache(maxsize=32)
def load(gpu: str) -> Tuned:
    """What was tuned on a GPU; a file that `save` did not write is left aside with a warning."""
    file = path(gpu)
    try:
        return _parse(json.loads(file.read_text()))
    except FileNotFoundError:
        return Tuned(None, {})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"{file} is not readable as tuned kernels ({error!r}): the defaults are used, and "
            "python -m phicore_kernels.tune writes it anew",
            stacklevel=2,
        )
        return Tuned(None, {})


def save(gpu: str, *, crossover_rows: int | None = None, configs: dict[str, Config] | None = None) -> Path:
    """Adds to what was tuned on a GPU, whole or not at all; a damaged file is replaced."""
    load.cache_clear()  # another process may have written since
    before = load(gpu)
    rows = before.crossover_rows if crossover_rows is None else crossover_rows
    every = {**before.configs, **(configs or {})}
    file = path(gpu)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    text = json.dumps({"crossover_rows": rows, "configs": {key: list(c) for key, c in every.items()}}, indent=1)
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
    load.cache_clear()
    return file


def _parse(content: Any) -> Tuned:
    rows, configs = content["crossover_rows"], content["configs"]
    if not (rows is None or (type(rows) is int and rows >= 0)):
        raise ValueError(f"crossover_rows is {rows!r}")
    parsed = {}
    for key, numbers in configs.items():
        if any(type(n) is not int or n < 1 for n in numbers):
            raise ValueError(f"{key} is {numbers!r}")
        parsed[key] = Config(*numbers)
    return Tuned(rows, parsed)
