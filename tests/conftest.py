"""With a GPU, the tests of its back-ends make their tensors on it and are marked `gpu`; CLP_PRETEND_GPU=1 rehearses them."""

import os
import shutil
import signal
import tempfile

import devices
import pytest
import torch

import clp_kernels  # isort: skip  (after devices)


def pytest_configure():
    # A shell starts what it puts in the background with SIGINT ignored, which the programs that tests interrupt would inherit.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(
        prefix="clp-state-"
    )  # runs of tests are not signed with the user's key


def pytest_unconfigure():
    shutil.rmtree(os.environ["XDG_STATE_HOME"], ignore_errors=True)
    devices.stop_pretending()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        chosen = item.callspec.params if hasattr(item, "callspec") else {}
        if {chosen.get("backend"), chosen.get("target")}.intersection(devices.ON_GPU):
            item.add_marker(pytest.mark.gpu)
        if devices.PRETENDED and item.get_closest_marker("traced"):
            item.add_marker(
                pytest.mark.skip(reason="torch traces the tensors that the pretended GPU's are made of")
            )


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request):
    """The test runs once with each back-end forced; one that this process cannot use is skipped.

    A test for some of them only: @pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True).
    """
    status = clp_kernels.backends()[request.param]
    if not status.available:
        pytest.skip(f"{request.param}: {status.reason}")
    with clp_kernels.use_backend(request.param), devices.default_device(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads():
    """A command that sets the number of threads does so for its test alone: beside other processes two threads wait for each
    other ten times as long as they compute."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_process_group_is_left():
    """A group of processes that a test leaves open would fail the next test that opens one, whichever runs in this process."""
    yield
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("the test left a process group open: torch.distributed.destroy_process_group()")


@pytest.fixture
def instruction_sets():
    """Every instruction set that this processor runs; the one in force is put back after the test."""
    native = pytest.importorskip("clp_kernels._native")
    before = native.isa()
    yield native.instruction_sets()
    native.select_isa(before)
