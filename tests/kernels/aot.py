"""Compiles Triton kernels for GPUs that are not there: python aot.py PROCESSES WHICH MODULE... prints one JSON object per
compilation.

The modules list every configuration that a launcher can ask for. WHICH of them: `first` is each kernel once for each target;
`covering` every tile and every choice; `full` all of them (hours). A process of its own, as a test process without a GPU has
Triton's interpreter switched on, which compiles nothing.
"""

import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from unittest import mock

import triton
from clp_kernels.triton_kernels.aot import recorded
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


def dumped(kernel, what: str) -> str:
    """What cuobjdump says of a kernel's code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        return subprocess.run([tool, what, file.name], check=True, capture_output=True, text=True).stdout


def spilled(kernel) -> int:
    """Bytes of local memory a thread has (CUDA), or vector registers spilled (ROCm; scalar ones spill into those)."""
    if "amdgcn" in kernel.asm:
        return sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"]))
    stack, local = re.search(r"STACK:(\d+).*LOCAL:(\d+)", dumped(kernel, "--dump-resource-usage")).groups()
    return int(stack) + int(local)


def serialized(kernel) -> bool:
    """Whether ptxas waits for each wgmma before it issues the next one (its warning C7510), of several in a group.

    It does where something else touches accumulators while products are in flight. A group's last instruction alone has gsb0.
    """
    ptx = kernel.asm.get("ptx", "")
    if ptx.count("wgmma.mma_async") <= ptx.count("wgmma.commit_group"):
        return False
    return all("gsb0" in line for line in dumped(kernel, "-sass").splitlines() if "HGMMA" in line)


def covering(specs):
    """For each kernel and target: each tile, for 16 and for 32 bits, once with all it can be asked for, which needs the most
    registers and shared memory, and further ones until every choice (an argument that is None, a type, whether a size is
    divisible by 16, a flag) has been made in every way that the launchers make it."""
    families = {}
    for spec in specs:
        families.setdefault((spec.kernel.__name__, spec.target), []).append(spec)
    for family in families.values():
        largest = {}
        for spec in family:
            largest[_tile(spec)] = max(largest.get(_tile(spec), spec), spec, key=_demands)
        chosen = list(largest.values())
        missing = set().union(*map(_choices, family)) - set().union(*map(_choices, chosen))
        while missing:
            chosen.append(max(family, key=lambda spec: len(_choices(spec) & missing)))
            missing -= _choices(chosen[-1])
        yield from chosen


def first(module, beginning=40, every=13):
    """For each kernel and target the most demanding of some configurations: a module lists its kinds first, then multitudes."""
    calls = itertools.count()

    def some(*arguments):
        call = next(calls)
        return recorded(*arguments) if call < beginning or call % every == 0 else iter(())

    largest = {}
    with mock.patch.object(module, "recorded", some):
        for spec in module.aot_specs():
            of = spec.kernel.__name__, spec.target
            largest[of] = max(largest.get(of, spec), spec, key=_demands)
    return largest.values()


def _tile(spec) -> tuple:
    blocks = tuple(
        value for name, value in spec.constants.items() if name.startswith("BLOCK") and value is not None
    )
    pointer = next(kind for kind in spec.types.values() if kind.startswith(("*", "tensordesc")))
    return blocks, spec.num_warps, spec.num_stages, "32" in pointer


def _demands(spec) -> int:
    return len(spec.types) + sum(value is True for value in spec.constants.values())


def _choices(spec) -> frozenset:
    flags = ((name, repr(value)) for name, value in spec.constants.items() if not name.startswith("BLOCK"))
    return frozenset((*spec.types.items(), *flags))


def report(spec) -> dict:
    started = time.perf_counter()
    result = {
        "name": spec.name,
        "kernel": spec.kernel.__name__,
        "target": spec.target,
        "matrix": spec.matrix,
        "error": None,
    }
    try:
        kernel = compiled(spec)
    except Exception as error:  # reported, and failed on, by the test
        return result | {"error": f"{type(error).__name__}: {error}"}
    return result | {
        "shared": kernel.metadata.shared,
        "spills": spilled(kernel),
        "wgmma": "wgmma.mma_async" in kernel.asm.get("ptx", ""),
        "serialized": serialized(kernel),
        "tma": "cp.async.bulk.tensor" in kernel.asm.get("ptx", ""),
        "described": any(kind.startswith("tensordesc") for kind in spec.types.values()),
        "seconds": round(time.perf_counter() - started, 2),
    }


_SPECS = []  # inherited by the processes: a kernel cannot be pickled


def _report_at(place: int) -> dict:
    return report(_SPECS[place])


def main(processes: str, which: str, *modules: str) -> None:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    for module in map(importlib.import_module, modules):
        if which == "first":
            _SPECS.extend(first(module))
            continue
        specs = {spec.key: spec for spec in module.aot_specs()}.values()
        _SPECS.extend(specs if which == "full" else covering(specs))
    with multiprocessing.get_context("fork").Pool(int(processes)) as pool:
        for result in pool.imap(_report_at, range(len(_SPECS))):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
