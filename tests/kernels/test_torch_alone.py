"""clp_kernels needs torch and nothing else: in these processes there is nothing but torch and what it requires."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALONE = """
import sys

finders = list(sys.meta_path)

class Alone:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in allowed or top.startswith("_sysconfigdata"):
            found = (finder.find_spec(name, path, target) for finder in finders)
            return next((spec for spec in found if spec is not None), None)

sys.meta_path[:] = [Alone()]
for name in ("numpy", "transformers", "clp_engine", "triton"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} was imported")
"""


def requirements(package):
    """Import names of what a package requires, and what that does, without extras."""
    found, waiting = set(), [package]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [re.match(r"[\w.-]+", line).group() for line in lines if "extra ==" not in line]
    return {name.lower().replace("-", "_").replace(".", "_") for name in found}


def run(script):
    own = {"clp_kernels", "bench"} | {name for name in sys.modules if name.startswith("_editable_")}
    allowed = (
        set(sys.stdlib_module_names)
        | (requirements("torch") - {"triton", "numpy"})
        | own
        | {"torchgen", "functorch"}
    )
    text = f"allowed = {sorted(allowed)!r}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n{ALONE}\n{script}"
    command = [sys.executable, "-W", "ignore", "-c", text]
    process = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_every_op_runs_with_its_gradients_where_torch_is_all_there_is():
    run("""
import clp_kernels
from bench.calls.small import ALL, outputs_and_gradients

for backend in ("auto", "reference"):
    with clp_kernels.use_backend(backend):
        for case in ALL:
            outputs, gradients = outputs_and_gradients(case.call, case.tensors())
            assert all(output.isfinite().all() for output in (*outputs, *gradients.values())), case.name
            assert set(gradients) == set(case.trained)
assert not clp_kernels.backends()["triton"].available
assert not {"numpy", "transformers"} & sys.modules.keys()
""")


@pytest.mark.check
def test_the_integrations_import_without_the_libraries_and_their_functions_run():
    run("""
import torch
from clp_kernels.integrations import liger, openrlhf, trl, verl

hidden, weight, targets = torch.randn(6, 8), torch.randn(20, 8), torch.arange(6)
logits = hidden @ weight.T
trl.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 16)
trl.ChunkedDivergenceFunction.apply(hidden, weight, None, hidden, weight, None, 1.0)
trl.selective_log_softmax_and_entropy(logits, targets)
verl.linear_cross_entropy(hidden, weight, targets)
verl.logprobs_from_logits(logits, targets)
openrlhf.compute_entropy(logits)
mask = torch.ones(2, 3)
liger.liger_fused_linear_grpo(
    hidden.view(2, 3, 8), weight, targets.view(2, 3), mask, torch.ones(2), use_ref_model=False
)
assert not {"trl", "verl", "openrlhf", "liger_kernel", "transformers"} & sys.modules.keys()
""")


@pytest.mark.parametrize("name", ["trl", "verl", "openrlhf", "liger"])
def test_patching_a_library_that_is_not_there_says_so(name, monkeypatch):
    from clp_kernels import integrations

    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    patch = getattr(integrations, f"patch_{name}")
    with (
        pytest.raises(ImportError, match=rf"patch_{name}: {name}.* is not installed; pip install {name}.*=="),
        patch(),
    ):
        pass
