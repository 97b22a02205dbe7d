"""Compiles kernel_triton's kernels for GPUs that need not be there and prints what they take of
one, a JSON line each.

    python -m tests.cross_compile           # without TRITON_INTERPRET

Registers and spills are ptxas' own figures; `ttir` tells whether row offsets are 64 bits
wide."""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opd import kernel_triton

NUMBERS = "i32 i32 i32 i32 i32 fp32 fp32 fp32"
TYPES = {
    "statistics": f"*bf16 *bf16 *i64 *fp32 *fp32 *fp32 *fp32 {NUMBERS}",
    "dlogits": f"*bf16 *bf16 *i64 *fp32 *fp32 *fp32 *fp32 *fp32 *bf16 {NUMBERS}",
}
# (capability, dtype, softcap): what takes the most shared memory, and the most registers
TARGETS = [(80, "fp32", False), (90, "bf16", True)]


def compiled_for(name, capability, dtype, cap):
    """The kernel as launched: pointers and D are multiples of 16."""
    kernel = getattr(kernel_triton, name)
    types = TYPES[name].replace("bf16", dtype).split()
    names = kernel.arg_names
    constants = dict(FLOAT=kernel_triton.tl.float32, CAP=cap, UP=False)
    constants |= zip(("TN", "TV", "TD"), kernel_triton.TILE)
    aligned = [i for i, t in enumerate(types) if t.startswith("*")] + [names.index("D")]
    source = ASTSource(
        kernel,
        dict(zip(names, types)) | dict.fromkeys(constants, "constexpr"),
        constants,
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": kernel_triton.WARPS, "num_stages": kernel_triton.STAGES}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def ptxas(code, capability):
    """(registers, spilled bytes) of PTX code."""
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "k.ptx").write_text(code)
        command = [program, "-v", f"--gpu-name={arch}", "k.ptx", "-o", "k.o"]
        how = dict(cwd=folder, capture_output=True, text=True, check=True)
        said = subprocess.run(command, **how).stderr
    spills = re.findall(r"(\d+) bytes spill", said)
    return int(re.search(r"Used (\d+) registers", said)[1]), sum(map(int, spills))


if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    for name in TYPES:
        for capability, dtype, cap in TARGETS:
            compiled = compiled_for(name, capability, dtype, cap)
            registers, spilled = ptxas(compiled.asm["ptx"], capability)
            row = {
                "kernel": name,
                "capability": capability,
                "registers": registers,
                "spill_bytes": spilled,
                "shared": compiled.metadata.shared,
                "ttir": compiled.asm["ttir"],
            }
            print(json.dumps(row))
