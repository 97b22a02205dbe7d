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

TYPES = {
    "statistics": (
        "*bf16 *bf16 *i64 *fp32 *fp32 *fp32 *fp32",
        "i32 i32 i32 i32 i32 fp32 fp32 fp32",
    ),
    "dlogits": (
        "*bf16 *bf16 *i64 *fp32 *fp32 *fp32 *fp32 *fp32 *bf16",
        "i32 i32 i32 i32 i32 fp32 fp32 fp32",
    ),
}


def compile_for(name, capability, dtype="bf16", cap=False):
    """{"registers", "spill_bytes", "shared", "ttir"} of one kernel as launched: pointers and D
    are multiples of 16."""
    kernel = getattr(kernel_triton, name)
    types = " ".join(TYPES[name]).replace("bf16", dtype).split()
    names = kernel.arg_names
    constants = dict(
        FLOAT=kernel_triton.tl.float32,
        CAP=cap,
        UP=False,
        TN=kernel_triton.TILE[0],
        TV=kernel_triton.TILE[1],
        TD=kernel_triton.TILE[2],
    )
    aligned = [i for i, t in enumerate(types) if t.startswith("*")] + [names.index("D")]
    source = ASTSource(
        kernel,
        dict(zip(names, types)) | {c: "constexpr" for c in constants},
        constants,
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": kernel_triton.WARPS, "num_stages": kernel_triton.STAGES},
    )
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "k.ptx").write_text(compiled.asm["ptx"])
        ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        done = subprocess.run(
            [ptxas, "-v", f"--gpu-name={arch}", "k.ptx", "-o", "k.o"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    stores, loads = map(
        int,
        re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr).groups(),
    )
    return {
        "kernel": name,
        "capability": capability,
        "dtype": dtype,
        "softcap": cap,
        "registers": int(re.search(r"Used (\d+) registers", done.stderr)[1]),
        "spill_bytes": stores + loads,
        "shared": compiled.metadata.shared,
        "ttir": compiled.asm["ttir"],
    }


if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    for name in TYPES:
        for capability in (80, 90):
            for dtype, cap in (("bf16", False), ("bf16", True), ("fp32", False)):
                print(json.dumps(compile_for(name, capability, dtype, cap)))
