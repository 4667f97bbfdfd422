"""Without a GPU, Triton kernels run in Triton's interpreter, which must be asked for before the import."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import clp_kernels  # noqa: E402


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request):
    """The test runs once with each back-end forced; one that this process cannot use is skipped.

    A test for some of them only: @pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True).
    """
    status = clp_kernels.backends()[request.param]
    if not status.available:
        pytest.skip(f"{request.param}: {status.reason}")
    with clp_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def instruction_sets():
    """Every instruction set that this processor runs; the one in force is put back after the test."""
    native = pytest.importorskip("clp_kernels._native")
    before, runnable = native.isa(), []
    for name in ("portable", "avx2", "avx512", "amx"):
        try:
            runnable.append(native.select_isa(name))
        except ValueError:
            continue
    native.select_isa(before)
    yield runnable
    native.select_isa(before)
