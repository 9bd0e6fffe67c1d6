"""Figures of a kernel from its machine code, and of an operation from the launches that it makes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phicore_kernels.aot import Compiled
from phicore_kernels.catalogue import Entry, empty, meta_weight
from phicore_kernels.configs import choose
from phicore_kernels.dequantize import dequantize_launch
from phicore_kernels.launch import Launch
from phicore_kernels.matmul import LowRank, matmul_launches
from phicore_kernels.quantize import encode_absmax_launch, encode_blocks_launch

# What issues at a quarter of the rate of arithmetic on NVIDIA, or through other pipes than the vector unit on AMD.
MEMORY_PIPE = re.compile(r"^((LD|ST|ATOM|RED|SHFL|MATCH|UBLKCP)(?!GDEPBAR)|(ds|global|buffer|flat|scratch)_)")
TENSOR_CORES = re.compile(r"^(HMMA|HGMMA|UTC\w*MMA|v_mfma|v_wmma)")
# What an instruction is for, by its first part; the rest is addresses, packing and control.
KINDS = {
    "products and roundings": re.compile(r"^(FMUL|FADD|FFMA|F2F|HFMA|HMUL|v_(pk_)?(mul|add|fma|fmac|cvt)_f)"),
    "bytes picked": re.compile(r"^(PRMT|v_perm)"),
    "masks and shifts": re.compile(r"^(LOP3|SHF(?!L)|SGXT|v_(and|or|xor|lshl|lshr|ashr|bfe|bfi|alignbit))"),
    "memory": MEMORY_PIPE,
    "tensor cores": TENSOR_CORES,
}
# CUDA C++ Programming Guide, compute capabilities: warps, and KiB of shared memory, on a multiprocessor. AMD's CDNA3
# and RDNA3 ISA guides: waves and KiB of LDS on a compute unit of 4 SIMDs, and on a work-group processor of 4.
MULTIPROCESSOR = {
    "sm_75": (32, 64), "sm_80": (64, 164), "sm_86": (48, 100), "sm_89": (48, 100), "sm_90": (64, 228),
    "sm_100": (64, 228), "sm_120": (48, 100), "gfx942": (32, 64), "gfx1100": (64, 128),
}  # fmt: skip
# AMD: registers of a lane on a SIMD, and how many are given at a time.
LANE_REGISTERS = {"gfx942": (512, 8), "gfx1100": (1536, 24)}
# 4 bits, 8 bits a block of 64, 32 bits a nested block of 256 blocks: what any kernel must read for a weight.
MINIMUM_BYTES = 0.5 + 1 / 64 + 4 / 16384
CODES = ("packed", "absmax", "nested_absmax")


def row(entry: Entry, compiled: Compiled, aim: float | None = None) -> dict[str, Any]:
    """The figures of one of this package's kernels on one target; None where they make no sense."""
    read = None
    if "packed" in entry.launch.arguments and entry.weights and not entry.name.startswith("encode"):
        parts = [entry.launch.arguments[name] for name in CODES]
        numbers = 2 * parts[0].numel()
        read = round(sum(part.nbytes for part in parts if part is not None) / numbers, 4)
    elif entry.name.startswith("encode_blocks"):
        read = float(entry.launch.arguments["x"].itemsize)
    return figures(entry.name, compiled, entry.weights) | {"bytes_read_a_weight": read, "aim": aim}


def figures(name: str, compiled: Compiled, weights: int) -> dict[str, Any]:
    """Figures of a compiled kernel of which a program treats `weights` in its hottest loop (0: not counted)."""
    loop = compiled.hot_loop()
    opcodes = compiled.opcodes(loop)
    warps = occupancy(compiled)
    a_thread = weights / compiled.threads if weights else None
    memory = sum(n for opcode, n in opcodes.items() if MEMORY_PIPE.match(opcode))
    return {
        "target": compiled.target,
        "kernel": name,
        **compiled.resources,
        "shared_bytes": compiled.shared,
        "warps_a_multiprocessor": warps,
        "occupancy": round(warps / MULTIPROCESSOR[compiled.target][0], 3),
        "tensor_core_instructions": sum(n for opcode, n in opcodes.items() if TENSOR_CORES.match(opcode)),
        "instructions_a_weight": a_thread and round(len(loop) / a_thread, 2),
        "memory_instructions_a_weight": a_thread and round(memory / a_thread, 2),
        "instructions_a_weight_by_kind": a_thread and by_kind(opcodes, a_thread),
    }


def by_kind(opcodes: dict[str, int], weights: float) -> dict[str, float]:
    """Instructions for a weight of each of KINDS, and of "the rest"."""
    counts = dict.fromkeys([*KINDS, "the rest"], 0)
    for opcode, count in opcodes.items():
        counts[next((kind for kind, pattern in KINDS.items() if pattern.match(opcode)), "the rest")] += count
    return {kind: round(count / weights, 2) for kind, count in counts.items()}


def occupancy(compiled: Compiled) -> int:
    """Warps (AMD: waves) that fit on a multiprocessor, bounded by registers, shared memory and the hardware's limit.

    NVIDIA has 65,536 registers, given in eights a thread, and takes 1 KiB of shared memory for itself a program.
    """
    limit, shared = MULTIPROCESSOR[compiled.target]
    registers = compiled.resources["registers"]
    if compiled.target.startswith("gfx"):
        lanes = 64 if compiled.target == "gfx942" else 32
        warps = compiled.threads // lanes
        total, step = LANE_REGISTERS[compiled.target]
        by_registers = 4 * (total // (-(-registers // step) * step))
        programs = min(min(by_registers, limit) // warps, (shared << 10) // max(compiled.shared, 1))
        return programs * warps
    warps = compiled.threads // 32
    granted = -(-registers // 8) * 8 * compiled.threads
    programs = min(65536 // granted, limit // warps, (shared << 10) // (compiled.shared + 1024))
    return programs * warps


# ===== operations =====


@dataclass(frozen=True)
class Operation:
    """What one call of an operator costs beside its time, for a layer of 4096 x 4096 in bfloat16.

    Attributes:
        name: what is computed.
        launches: kernels started.
        temporary_bytes: memory taken and given back beside inputs and results.
        bytes_read_a_weight: of the coded weight and what is made of it on the way.
    """

    name: str
    launches: int
    temporary_bytes: int
    bytes_read_a_weight: float


N = K = 4096
ROWS = (1, 16, 64, 512)
PROCESSORS, FUSED_ROWS = 132, 64  # of an H100, and its default crossover


def operations() -> Iterator[Operation]:
    """This package's operations, as on an H100."""
    weight = meta_weight(N, K)
    coded = sum(part.nbytes for part in (weight.packed, weight.absmax, weight.nested_absmax) if part is not None)
    dense = empty(N, K, dtype=torch.bfloat16)
    launch = dequantize_launch(weight, dense, True)
    yield _operation("dequantise", [launch], [], coded)
    for backward in (False, True):
        for m in ROWS:
            for low_rank in (False, True):
                own = low_rank * (2 if backward else 1)  # x A^T; or g B and its scaling
                name = f"{'dx = g W' if backward else 'y = x W^T'}{' with LoRA' if low_rank else ''}, {m} rows"
                if m > FUSED_ROWS:  # dequantised first; torch multiplies, and adds the low-rank term to the result
                    launches, temporary = 2 + own + low_rank, dense.nbytes + low_rank * m * 16 * 2
                    yield Operation(name, launches, temporary, (coded + dense.nbytes) / (N * K))
                    continue
                x, out = empty(m, K, dtype=torch.bfloat16), empty(m, N, dtype=torch.bfloat16)
                left = LowRank(empty(m, 16, dtype=torch.bfloat16), empty(16, N, dtype=torch.bfloat16), 2.0)
                config = choose(m, N, K, "permute", torch.bfloat16, PROCESSORS)
                made = matmul_launches(
                    x, weight, out, backward=backward, low_rank=left if low_rank else None, config=config, permute=True
                )
                parts = [value for value in (made[0].arguments["out"],) if value is not out]
                yield _operation(name, made, [*parts, *([left.left] if low_rank else [])], coded, own)
    flat, packed = empty(N * K, dtype=torch.bfloat16), weight.packed
    scales = empty(N * K // 64)
    blocks = encode_blocks_launch(flat, packed, scales, 64)
    nested = encode_absmax_launch(scales, empty(), empty(255), weight.absmax, weight.nested_absmax)
    # and between the two the mean of the scales, and the bounds of the map (a sum and a division)
    yield _operation("quantise", [blocks, nested], [scales], flat.nbytes + 2 * scales.nbytes, 3)


def _operation(name: str, launches: list[Launch], temporary: list[Tensor], read: int, extra: int = 0) -> Operation:
    """extra: torch's own kernels beside the launches (x A^T of the low-rank term, say)."""
    return Operation(name, len(launches) + extra, sum(t.nbytes for t in temporary), read / (N * K))
