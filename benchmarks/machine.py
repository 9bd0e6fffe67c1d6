"""Where and with what figures were measured, without names or paths of the machine."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "phicore", "torch", "triton", "numpy", "safetensors", "transformers", "peft", "bitsandbytes", "torchao",
    "deepspeed",
)  # fmt: skip
# What decides how fast products of 16 and 32 bits run on a CPU.
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")


def versions() -> dict[str, str | None]:
    """Of each package; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """CPU model, flags that matter, cores and memory; GPUs by name."""
    import torch

    lines = _lines("/proc/cpuinfo")
    flags = _value(lines, "flags").split() or _value(lines, "Features").split()
    memory = _value(_lines("/proc/meminfo"), "MemTotal").split()
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": _value(lines, "model name") or platform.processor(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(int(memory[0]) / 2**20, 1) if memory else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def status(field: str) -> int:
    """Bytes that Linux gives for a field of this process: VmRSS, what is resident, VmHWM, the most there was of it,
    RssAnon, what is its own."""
    return int(_value(_lines("/proc/self/status"), field).split()[0]) * 1024


def reset_peak() -> None:
    """Has VmHWM start again from what is resident."""
    Path("/proc/self/clear_refs").write_text("5")


def compile_formulas() -> str:
    """Has phicore's formulas compiled for this CPU, as they are in time where a process works for long; says and
    returns what runs them."""
    from phicore.adapters import scaled_rows
    from phicore.nf4 import compiled

    decoding = (compiled.BFLOAT16, compiled.FLOAT32, compiled.NESTED_BFLOAT16, compiled.NESTED_FLOAT32)
    scaling = (scaled_rows.SCALE, scaled_rows.GRADIENTS)
    done = [formula.compile() for formula in (*decoding, *scaling)]
    code = "machine code" if all(done) else "torch's operators"
    print(f"NF4's decoding and DoRA's scaling run as {code}", flush=True)
    return code


def commit() -> str | None:
    """The commit of the working tree, with a plus sign where tracked files differ from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return run.stdout.strip()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _value(lines: list[str], key: str) -> str:
    return next(
        (value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == key), ""
    )
