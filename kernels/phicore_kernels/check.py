"""`python -m phicore_kernels.check`: compiles every kernel for every GPU, or those named, and reads the machine code.

It fails where a kernel does not compile, spills registers, needs more shared memory than the GPU has, does a product
without tensor cores, loads less than 16 bytes at once or takes small numbers for zero.
"""

import argparse
import re
import sys

from phicore_kernels.aot import SHARED_LIMIT, TARGETS, Compiled, compile_launch
from phicore_kernels.catalogue import Entry, catalogue

# What a product and a 16-byte load look like: (NVIDIA, AMD).
TENSOR_CORES = (r"^(HMMA|HGMMA|UTC\w*MMA)", r"\bv_(mfma|wmma)_")
VECTOR_LOADS = (r"^(LDG\.E.*\.128|LDGSTS\..*128)", r"\b(global|buffer)_load_(dwordx4|b128)\b")


def problems(entry: Entry, compiled: Compiled) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    amd = compiled.target.startswith("gfx")
    code = compiled.asm["amdgcn"].splitlines() if amd else list(compiled.opcodes())
    found = []
    if compiled.resources["spills"]:
        found.append(f"spills {compiled.resources['spills']}")
    if compiled.shared > SHARED_LIMIT[compiled.target]:
        found.append(f"{compiled.shared} bytes of shared memory, of {SHARED_LIMIT[compiled.target]}")
    if entry.product and not any(re.search(TENSOR_CORES[amd], line) for line in code):
        found.append("no tensor cores")
    if entry.vector and not any(re.search(VECTOR_LOADS[amd], line) for line in code):
        found.append("no 16-byte loads")
    if ".ftz." in compiled.asm.get("ptx", ""):
        found.append("takes float32's subnormal numbers for zero")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m phicore_kernels.check", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="default: all")
    failed = 0
    for target in parser.parse_args(arguments).targets:
        for entry in catalogue(target):
            compiled = compile_launch(entry.launch, target)
            found = problems(entry, compiled)
            failed += bool(found)
            registers, shared = compiled.resources["registers"], compiled.shared
            verdict = "; ".join(found) or "ok"
            print(f"{target:8} {entry.name:56} {registers:4} registers {shared:7} bytes shared  {verdict}", flush=True)
    print(f"{failed} kernels with problems" if failed else "all kernels compile as they should")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
