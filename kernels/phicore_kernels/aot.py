"""Compiles launches for GPUs that are not there, and reads the machine code.

The tools (ptxas, cuobjdump) are those that the triton wheel carries; nothing here needs a device.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from phicore_kernels.launch import Launch

TARGETS: dict[str, GPUTarget] = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}

# Bytes of shared memory that one program may use (CUDA C++ Programming Guide, table of compute capabilities; the AMD
# ISA guides): what a launch above it would fail with is "out of resource".
SHARED_LIMIT = {
    "sm_75": 64 << 10,
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
    "gfx1100": 64 << 10,
}

_DTYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


def _signature(name: str, value: Any) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it is known to be divisible by 16, as the JIT would specialise it."""
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr", False
    if isinstance(value, Tensor):
        return "*" + _DTYPES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    raise TypeError(f"argument {name} is {type(value).__name__}; a kernel takes tensors, int, float or None")


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one target."""

    target: str
    asm: dict[str, Any]
    shared: int
    threads: int

    @cached_property
    def code(self) -> list[tuple[int, str]]:
        """(address, instruction) of the machine code; of AMD's the number of an instruction stands for its address."""
        if self.target.startswith("gfx"):
            return amd_code(self.asm["amdgcn"])
        return nvidia_code(self._cuobjdump("-sass"))

    @cached_property
    def resources(self) -> dict[str, int]:
        """Registers a thread and bytes spilled to memory."""
        if self.target.startswith("gfx"):
            text = self.asm["amdgcn"]
            registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
            spills = sum(int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", text))
            return {"registers": registers, "spills": spills}
        match = re.search(r"REG:(\d+) STACK:(\d+)", self._cuobjdump("--dump-resource-usage"))
        assert match is not None
        return {"registers": int(match[1]), "spills": int(match[2])}

    def opcodes(self, code: list[str] | None = None) -> Counter[str]:
        """How often each operation stands in the code (default: the whole kernel), with its modifiers."""
        if code is None:
            code = [text for _, text in self.code]
        return Counter(re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in code)

    def body(self) -> list[str]:
        """The instructions up to the last end of the program, without the padding after it."""
        last = max(i for i, (_, text) in enumerate(self.code) if re.search(r"\bEXIT\b|\bs_endpgm\b", text))
        return [text for _, text in self.code[: last + 1]]

    def hot_loop(self) -> list[str]:
        """The instructions of the longest innermost loop; of the whole body if nothing loops."""
        loops = []
        for address, text in self.code:
            branch = re.search(r"(?:\bBRA\b|\bs_c?branch).*?0x([0-9a-f]+)", text)
            if branch and int(branch[1], 16) < address:
                loops.append((int(branch[1], 16), address))
        inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        if not inner:
            return self.body()
        start, end = max(inner, key=lambda loop: loop[1] - loop[0])
        return [text for address, text in self.code if start <= address <= end]

    def _cuobjdump(self, option: str) -> str:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.asm["cubin"])
            file.flush()
            return subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout


def nvidia_code(sass: str) -> list[tuple[int, str]]:
    """(address, instruction) of one function in what cuobjdump -sass prints."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass)
    return [(int(address, 16), instruction) for address, instruction in found]


def amd_code(assembly: str) -> list[tuple[int, str]]:
    """(number, instruction) of a kernel in AMD's assembly; a label that a branch names becomes 0x and the number."""
    instructions: list[str] = []
    labels: dict[str, str] = {}
    for line in assembly.splitlines():
        line = line.split(";")[0].rstrip()
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = hex(len(instructions))
        elif re.match(r"\s+(v|s|ds|global|buffer|flat|scratch)_\w+", line):
            instructions.append(line.strip())
    return [
        (i, re.sub(r"\.LBB\w+", lambda label: labels.get(label[0], label[0]), text))
        for i, text in enumerate(instructions)
    ]


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compiles a launch for a target of TARGETS as the JIT would on that device; tensors may be on "meta"."""
    names = launch.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        if name in launch.constants:
            signature[name] = "constexpr"
            constants[(i,)] = launch.constants[name]
            continue
        value = launch.arguments[name]
        signature[name], divisible = _signature(name, value)
        if signature[name] == "constexpr":
            constants[(i,)] = value
        elif divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    options = {"enable_fp_fusion": False, **launch.options}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    threads = launch.options["num_warps"] * TARGETS[target].warp_size
    return Compiled(target, compiled.asm, compiled.metadata.shared, threads)
