"""Every Triton kernel compiles for GPUs that are not there: every tile of its tables for each of them, with every choice of
a launcher made in every way at least once. CLP_AOT=full compiles every combination, which takes hours."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import clp_kernels.triton_kernels  # noqa: E402

# Those without aot_specs are parts of others, which compile them.
MODULES = [
    m.name
    for m in pkgutil.iter_modules(clp_kernels.triton_kernels.__path__)
    if hasattr(importlib.import_module(f"clp_kernels.triton_kernels.{m.name}"), "aot_specs")
]
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# A few registers put aside at the edges of a kernel cost nothing; an accumulator that does not fit is
# hundreds of bytes.
SPILLS = 48


def compile_all(module):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "aot.py"), f"clp_kernels.triton_kernels.{module}"]
    processes = str(min(os.cpu_count() or 1, 2))
    process = subprocess.run([*command, processes], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_compiles_for_every_generation_within_its_shared_memory_and_registers(module):
    reports = compile_all(module)
    assert {report["target"] for report in reports} == set(SHARED)
    problems = []
    for report in reports:
        name = report["name"]
        if report["error"]:
            problems.append(f"{name}: {report['error']}")
            continue
        if report["shared"] > SHARED[report["target"]]:
            problems.append(f"{name}: {report['shared']} bytes of shared memory")
        if report["spills"] > SPILLS:
            problems.append(f"{name}: spills {report['spills']}")
        if report["matrix"] and report["target"] == "sm_90" and not report["wgmma"]:
            problems.append(f"{name}: no wgmma instructions")
        if report["described"] and not report["tma"]:
            problems.append(f"{name}: takes tensor descriptors and does not use the copy engine")
    assert not problems, "\n".join(problems)
