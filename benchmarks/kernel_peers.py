"""The same figures for bitsandbytes, read from what its wheel installs: its CUDA library and its Triton kernels.

The library's machine code is taken apart with the tools of Triton's wheel. How many weights a thread treats in a turn
of a loop is not written there; it follows from what the loop does, as said beside each kernel.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.kernel_code import Operation, figures
from phicore_kernels.aot import Compiled, compile_launch, nvidia_code
from phicore_kernels.catalogue import empty
from phicore_kernels.launch import Launch

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Shipped:
    """A kernel of the library.

    Attributes:
        name: in words.
        symbol: the start of its mangled name.
        weights_a_thread: in a turn of its hottest loop, from the loop's opcodes by count.
        bytes_read_a_weight: of codes and scales, by the format that it takes.
    """

    name: str
    symbol: str
    weights_a_thread: Callable[[dict[str, int]], float]
    bytes_read_a_weight: float


def _simt(opcodes: dict[str, int]) -> float:
    return 32.0 * opcodes["LDG.E.EF.128"]  # each streaming load brings 16 bytes of codes


def _mma(m: int, n: int, k: int) -> Callable[[dict[str, int]], float]:
    """A program multiplies m x n x k a turn and an HMMA of a warp 16 x 8 x 16, so the warps are known."""

    def weights(opcodes: dict[str, int]) -> float:
        multiplications = sum(count for opcode, count in opcodes.items() if opcode.startswith("HMMA.16816"))
        warps = m * n * k / (2048 * multiplications) if multiplications else float("inf")
        return n * k / (32 * warps)

    return weights


NESTED, PLAIN = 0.5 + 1 / 64 + 4 / 16384, 0.5 + 4 / 64
BF16 = "13__nv_bfloat16"
SHIPPED = (
    # template arguments: bytes of codes a program 512, threads 64, bytes a thread 8, NF4
    Shipped("dequantise", f"_Z20kDequantizeBlockwiseI{BF16}Li512ELi64ELi8ELi2EE", lambda _: 16.0, PLAIN),
    Shipped("quantise", f"_Z23kQuantizeBlockwiseSmallI{BF16}Li64ELi2EE", lambda _: 2.0, 2.0),  # a byte a thread
    *(Shipped(f"product, {m} rows", f"_Z14gemm_4bit_simtI{BF16}Li{m}EE", _simt, NESTED) for m in (1, 4, 8)),
    *(
        Shipped(f"product {m}x{n}x{k}", f"_Z23gemm_4bit_sm80_m16n8k16I{BF16}Li{m}ELi{n}ELi{k}EE", _mma(m, n, k), NESTED)
        for m, n, k in ((32, 64, 128), (64, 64, 64), (128, 64, 64), (128, 128, 64))
    ),
)


def library() -> Path | None:
    """The newest CUDA library of the bitsandbytes that is installed, or None."""
    spec = find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        return None
    return max(Path(spec.origin).parent.glob("libbitsandbytes_cuda*.so"), default=None)


def rows(target: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Figures of bitsandbytes' kernels on a target, and in words what could not be read."""
    if find_spec("bitsandbytes") is None:
        return [], ["bitsandbytes is not installed: pip install 'phicore[interop]' to see it beside"]
    found, notes = [], []
    if target.startswith("sm"):
        file = library()
        if file is None:
            notes.append("the installed bitsandbytes has no CUDA library")
        else:
            found += list(_shipped(file, target, notes))
    found += [
        figures(name, compile_launch(launch, target), weights) | {"bytes_read_a_weight": read, "aim": None}
        for name, launch, weights, read in _triton_kernels()
    ]
    return found, notes


def _shipped(file: Path, target: str, notes: list[str]) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        _tool("-xelf", target, str(file), cwd=directory)
        cubins = sorted(Path(directory).glob(f"*.{target}.cubin"))
        if not cubins:
            notes.append(f"{file.name} holds no code for {target}")
            return
        cubin = str(cubins[0])
        usage = _tool("--dump-resource-usage", cubin)
        resources = {
            name: {"registers": int(registers), "spills": int(stack), "shared": int(shared)}
            for name, registers, stack, shared in re.findall(
                r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage
            )
        }
        threads = _threads(_tool("-elf", cubin))
        wanted = [n for n in resources if n.startswith(tuple(s.symbol for s in SHIPPED))]
        sass = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\t\tFunction : |\Z)",
                               _tool("-sass", "-fun", ",".join(wanted), cubin), re.DOTALL))  # fmt: skip
        for shipped in SHIPPED:
            name = next((name for name in resources if name.startswith(shipped.symbol)), None)
            if name is None:
                notes.append(f"{file.name} has no {shipped.symbol} for {target}: another version than 0.50?")
                continue
            code = nvidia_code(sass[name])
            known = resources[name]
            compiled = Compiled(target, {}, known.pop("shared"), threads.get(name, 32))
            compiled.__dict__.update(code=code, resources=known)  # what the cached properties would read
            weights = shipped.weights_a_thread(compiled.opcodes(compiled.hot_loop())) * compiled.threads
            found = figures(f"bitsandbytes: {shipped.name}", compiled, weights)
            if name not in threads:  # the library does not say how many threads it starts
                found |= {"warps_a_multiprocessor": None, "occupancy": None}
            yield found | {"bytes_read_a_weight": round(shipped.bytes_read_a_weight, 4), "aim": None}


def _threads(elf: str) -> dict[str, int]:
    """The most threads that each function is compiled for, out of what cuobjdump -elf prints."""
    found, name, attribute = {}, "", ""
    for line in elf.splitlines():
        if section := re.match(r"\.nv\.info\.(\w+)", line):
            name = section[1]
        elif line.lstrip().startswith("Attribute:"):
            attribute = line.split()[-1]
        elif attribute == "EIATTR_MAX_THREADS" and (value := re.match(r"\s*Value:\s+(0x[0-9a-f]+)", line)):
            found[name] = int(value[1], 16)
    return found


def _tool(*arguments: str, cwd: str | None = None) -> str:
    command = [str(TOOLS / "cuobjdump"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def _triton_kernels() -> Iterator[tuple[str, Launch, int, float]]:
    """bitsandbytes' Triton kernels as it launches them on XPU, weights of a program and bytes read a weight."""
    from bitsandbytes.backends.triton import kernels_4bit

    n = 4096 * 4096
    defaults = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    bf16, packed = empty(n, dtype=torch.bfloat16), empty(n // 2, dtype=torch.uint8)
    arguments = {
        "a_ptr": packed, "c_ptr": bf16, "absmax_ptr": empty(n // 64),
        "num_paired_elements": n // 2, "num_output_elements": n,
    }  # fmt: skip
    kernel, constants = kernels_4bit.dequant_nf4_kernel, {"QUANT_BLOCK": 64, "SPLIT_SIZE": 256}
    yield "bitsandbytes Triton: dequantise", Launch(kernel, (1,), arguments, constants, defaults), 512, PLAIN
    arguments = {
        "A_ptr": bf16, "absmax_ptr": empty(n // 64), "out_ptr": packed, "n_elements": n, "absmax_elements": n // 64,
    }  # fmt: skip
    kernel, constants = kernels_4bit.quantize_nf4_blockwise_kernel, {"BLOCK_SIZE": 64, "SPLIT_NUM_BLOCKS": 4}
    yield "bitsandbytes Triton: quantise", Launch(kernel, (1,), arguments, constants, defaults), 512, 2.0


# ===== operations =====


def operations() -> Iterator[Operation]:
    """What bitsandbytes' own Python does for a call, counted while it runs on the CPU at a small size: on a GPU each
    operator of its library is one launch, as is each of torch's. Its fused forward product is one launch alone."""
    import bitsandbytes as bnb
    from bitsandbytes import functional

    n, k = 256, 512
    weight = torch.randn(n, k).bfloat16()
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    x = torch.randn(3, k).bfloat16().requires_grad_()
    scale = (4096 / n) * (4096 / k)  # temporaries grow with the weight
    y = bnb.matmul_4bit(x, packed.t(), state)
    grad = torch.ones_like(y)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("bitsandbytes: dequantise", lambda: functional.dequantize_4bit(packed, state)),
        ("bitsandbytes: dx = g W", lambda: torch.autograd.grad(y, x, grad, retain_graph=True)),
        (
            "bitsandbytes: quantise",
            lambda: functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True),
        ),
    ]
    for name, call in calls:
        launches, temporary, read = count(call)
        yield Operation(name, launches, int(temporary * scale), round(read / (n * k), 4))


def count(call: Callable[[], Any]) -> tuple[int, int, int]:
    """(launches, bytes of results beside those returned, bytes of large inputs) of the operators that a call makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    call()  # tables that are made once are there then
    written: dict[int, int] = {}
    launches = read = 0

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal launches, read
            result = function(*args, **(kwargs or {}))
            if function.is_view or function.name().startswith(("aten::empty", "aten::lift_fresh")):
                return result
            launches += 1
            inputs = _tensors((args, kwargs))
            read += sum(t.nbytes for t in inputs if t.numel() > 256)
            known = {t.data_ptr() for t in inputs}
            written.update({t.data_ptr(): t.nbytes for t in _tensors(result) if t.data_ptr() not in known})
            held.append(result)  # so that no storage is used twice
            return result

    held: list[Any] = []
    with Mode():
        returned = call()
    kept = {t.data_ptr() for t in _tensors(returned)}
    return launches, sum(size for pointer, size in written.items() if pointer not in kept), read


def _tensors(values: Any) -> list[torch.Tensor]:
    """The tensors in nested containers and, of bitsandbytes' quantisation states, among their attributes."""
    found = []
    for value in torch.utils._pytree.tree_leaves(values):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif hasattr(value, "absmax"):
            found += _tensors(list(vars(value).values()))
    return found
