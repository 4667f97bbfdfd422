"""Every Triton kernel compiles for GPUs that are not there: every tile of its tables for each of them, with every choice of
a launcher made in every way at least once. CLP_AOT=full compiles every combination, which takes hours."""

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import clp_kernels.triton_kernels  # noqa: E402

MODULES = [m.name for m in pkgutil.iter_modules(clp_kernels.triton_kernels.__path__) if m.name != "aot"]
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# A few registers put aside at the edges of a kernel cost nothing; an accumulator that does not fit is
# hundreds of bytes.
SPILLS = 32
# Tiles that are too large for what they can be asked for at most: to be made smaller. Bytes (registers on gfx942).
_ALL = "entropy,kl,logprob,lse,ref_logprob,reverse_kl,top1"
KNOWN_SPILLS = {
    f"_linear_forward sm_80 float16 {_ALL} lora": 56,
    f"_linear_forward sm_80 bfloat16 {_ALL} apart lora": 232,
    f"_linear_forward sm_90 float32 {_ALL} apart lora": 72,
    f"_linear_forward sm_100 float16 {_ALL} lora": 56,
    f"_linear_forward gfx942 float32 {_ALL} lora": 34,
    f"_linear_forward gfx942 bfloat16 {_ALL} apart lora": 48,
    f"_linear_forward gfx942 float32 {_ALL} apart lora": 55,
}


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
        if report["spills"] > KNOWN_SPILLS.get(name, SPILLS):
            problems.append(f"{name}: spills {report['spills']}")
        if report["matrix"] and report["target"] == "sm_90" and not report["wgmma"]:
            problems.append(f"{name}: no wgmma instructions")
    assert not problems, "\n".join(problems)
