"""Up to how many rows of x a product that decodes W beats dequantising W first, as data.

No product of this package has been timed yet. The defaults lie where bitsandbytes' fused kernels stop to win on the
same GPUs; `python -m phicore_kernels.tune` times both ways on the GPU at hand and writes what it finds for it.
"""

import json
import os
from functools import lru_cache
from pathlib import Path

import torch

# Compute capability -> rows; the highest that is not above the GPU's holds. Below sm_80 Triton has no tensor cores.
NVIDIA: tuple[tuple[tuple[int, int], int], ...] = (
    ((0, 0), 0),
    ((8, 0), 128),
    ((8, 6), 256),
    ((9, 0), 64),
    ((12, 0), 256),
)
# Architecture of an AMD GPU -> rows. The kernels are not checked on others, nor products on gfx1100.
AMD: dict[str, int] = {"gfx942": 16, "gfx1100": 0}


def default_crossover(capability: tuple[int, int], amd: str | None = None) -> int:
    """The rows of the tables above for a GPU, 0 where W is always dequantised first."""
    if amd is not None:
        return AMD.get(amd.partition(":")[0], 0)
    return next(rows for least, rows in reversed(NVIDIA) if capability >= least)


@lru_cache(maxsize=32)
def crossover(device: torch.device) -> int:
    """The most rows for which products on a GPU decode W themselves: as tuned there, or the default."""
    properties = torch.cuda.get_device_properties(device)
    amd = getattr(properties, "gcnArchName", None) if torch.version.hip is not None else None
    default = default_crossover((properties.major, properties.minor), amd)
    if default == 0:
        return 0
    tuned = load(properties.name)
    return default if tuned is None else tuned


def path(gpu: str) -> Path:
    """Where the tuned number of a GPU stands: each Triton version makes other code, and has its own file."""
    from importlib.metadata import version

    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = "".join(c if c.isalnum() else "-" for c in gpu)
    return root / "phicore" / "kernels" / f"{name}-triton-{version('triton')}.json"


def load(gpu: str) -> int | None:
    """The tuned number of a GPU, or None.

    Raises:
        ValueError: the file is there and is not what `save` writes.
    """
    file = path(gpu)
    if not file.is_file():
        return None
    try:
        rows = json.loads(file.read_text())["crossover_rows"]
    except (json.JSONDecodeError, TypeError, KeyError):
        rows = None
    if not isinstance(rows, int) or rows < 0:
        raise ValueError(f"{file} does not hold a crossover; remove it, or run python -m phicore_kernels.tune again")
    return rows


def save(gpu: str, rows: int, seconds: list[dict[str, float]]) -> Path:
    """Writes a tuned number and the times that it came from, whole or not at all."""
    file = path(gpu)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"crossover_rows": rows, "seconds": seconds}, indent=1))
    os.replace(temporary, file)
    return file
