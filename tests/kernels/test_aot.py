"""Every Triton kernel compiles for GPUs that are not there: once for each of them, and in `make check` with every tile of its
tables and every choice of a launcher made in every way at least once. CLP_AOT=full compiles every combination, for hours."""

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

# Each module with aot_specs, and the kernels that it launches; other modules are parts of these.
MODULES = {
    "decode_step": {"_add_norm", "_rope_and_store", "_attend", "_add_pieces", "_gated", "_record"},
    "interpolated_linear": {"_mixed"},
    "interpolation": {"_write", "_own", "_blend", "_inner_products", "_add_up", "_sparsify"},
    "multi_lora": {"_skinny", "_linear", "_linear_described", "_rank_grad", "_group_sum", "_skinny_end", "_both",
                   "_sum_splits"},
    "sampling": {"_parts", "_count", "_kept", "_draw"},
    "token_stats": {"_product", "_product_described", "_linear_forward", "_combine", "_linear_gradient", "_linear_terms",
                    "_settle", "_direct", "_logits_forward", "_logits_gradient"},
}  # fmt: skip
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# A few registers put aside at the edges of a kernel cost nothing; an accumulator that does not fit is
# hundreds of bytes.
SPILLS = 96


def compiled(which, *modules, processes=1):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    names = [f"clp_kernels.triton_kernels.{module}" for module in modules]
    command = [sys.executable, str(Path(__file__).parent / "aot.py"), str(processes), which, *names]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def assert_fit(reports):
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
        if report["serialized"]:
            problems.append(f"{name}: waits for each wgmma before the next")
        if report["described"] and not report["tma"]:
            problems.append(f"{name}: takes tensor descriptors and does not use the copy engine")
    assert not problems, "\n".join(problems)


HEAVIEST = ("token_stats",)  # takes as long as all others


@pytest.mark.parametrize("modules", [HEAVIEST, tuple(m for m in MODULES if m not in HEAVIEST)], ids="+".join)
def test_every_kernel_compiles_for_every_generation(modules):
    reports = compiled("first", *modules)
    kernels = {kernel for module in modules for kernel in MODULES[module]}
    expected = {(kernel, target) for kernel in kernels for target in SHARED}
    expected -= {
        (k, t) for k in kernels for t in ("sm_80", "gfx942") if k.endswith("_described")
    }  # no tensor descriptors
    assert sorted((report["kernel"], report["target"]) for report in reports) == sorted(expected)
    assert_fit(reports)


def test_every_module_that_lists_its_compilations_is_among_them():
    modules = [m.name for m in pkgutil.iter_modules(clp_kernels.triton_kernels.__path__)]
    listing = {
        m for m in modules if hasattr(importlib.import_module(f"clp_kernels.triton_kernels.{m}"), "aot_specs")
    }
    assert listing == set(MODULES)


@pytest.mark.check
@pytest.mark.parametrize("module", MODULES)
def test_compiles_for_every_generation_within_its_shared_memory_and_registers(module):
    which = "full" if os.environ.get("CLP_AOT") == "full" else "covering"
    reports = compiled(which, module, processes=min(os.cpu_count() or 1, 2))
    assert {report["target"] for report in reports} == set(SHARED)
    assert {report["kernel"] for report in reports} == set(MODULES[module])
    assert_fit(reports)
