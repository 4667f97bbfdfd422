"""Compiles Triton kernels for GPUs that are not there: python aot.py MODULE prints one JSON object per
compilation.

A process of its own, as a test process without a GPU has Triton's interpreter switched on, which compiles
nothing.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def compiled(spec):
    names = spec.kernel.arg_names
    signature = {
        name: spec.types[name].split(":")[0] if name in spec.types else "constexpr" for name in names
    }
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in spec.types.items()
        if kind.endswith(":16")
    }
    source = ASTSource(spec.kernel, signature, dict(spec.constants), aligned)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    return triton.compile(source, target=TARGETS[spec.target], options=options)


def spilled(kernel) -> int:
    """Bytes of local memory a thread has (CUDA), or registers spilled (ROCm)."""
    if "amdgcn" in kernel.asm:
        return sum(int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        )
    stack, local = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage.stdout).groups()
    return int(stack) + int(local)


def report(spec) -> dict:
    started = time.perf_counter()
    result = {"name": spec.name, "target": spec.target, "matrix": spec.matrix, "error": None}
    try:
        kernel = compiled(spec)
    except Exception as error:  # reported, and failed on, by the test
        return result | {"error": f"{type(error).__name__}: {error}"}
    return result | {
        "shared": kernel.metadata.shared,
        "spills": spilled(kernel),
        "wgmma": "wgmma.mma_async" in kernel.asm.get("ptx", ""),
        "tma": "cp.async.bulk.tensor" in kernel.asm.get("ptx", ""),
        "described": any(kind.startswith("tensordesc") for kind in spec.types.values()),
        "seconds": round(time.perf_counter() - started, 2),
    }


def main(module: str) -> None:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    specs = {spec.key: spec for spec in importlib.import_module(module).aot_specs()}
    for spec in specs.values():
        print(json.dumps(report(spec)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
