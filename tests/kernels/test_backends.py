"""Choosing a back-end: what is there, what is forced, and what a refusal says."""

import sys
import threading

import clp_kernels
import pytest
import torch
from clp_kernels import multi_lora_linear, use_backend
from clp_kernels.backends import batch_invariant, forced_backend, is_batch_invariant, plain_eager, select
from torch._subclasses.fake_tensor import FakeTensorMode

TABLE = {
    "reference": "clp_kernels.reference.multi_lora",
    "cpu": "clp_kernels.cpu.multi_lora",
    "triton": "clp_kernels.triton_kernels.multi_lora",
}


def chosen(dtype=torch.float32, device="cpu"):
    return select("multi_lora_linear", TABLE, torch.device(device), dtype=dtype).__name__.split(".")[1]


def test_every_backend_says_whether_it_is_there_and_why_not(monkeypatch):
    status = clp_kernels.backends()
    assert list(status) == ["reference", "cpu", "triton", "cuda"]
    assert status["reference"].available and status["cpu"].available
    assert clp_kernels._native.isa() in status["cpu"].reason
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    without = clp_kernels.backends()["triton"]
    assert (
        not without.available
        and "no CUDA or ROCm device" in without.reason
        and "TRITON_INTERPRET=1" in without.reason
    )


def test_what_is_missing_is_reported_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "clp_kernels._native", None)
    status = clp_kernels.backends()
    assert not status["triton"].available and "pip install" in status["triton"].reason
    assert not status["cpu"].available and "C++ compiler" in status["cpu"].reason


def test_the_choice_follows_the_dtype():
    assert chosen(torch.float32) == chosen(torch.bfloat16) == "cpu"
    assert chosen(torch.float64) == chosen(torch.float16) == "reference"


def test_use_backend_nests_and_lifts():
    assert forced_backend() is None
    with use_backend("reference"):
        assert chosen() == "reference"
        with use_backend("auto"):
            assert chosen() == "cpu"
        assert forced_backend() == "reference"
    assert forced_backend() is None


def test_the_environment_forces_and_use_backend_overrides_it(monkeypatch):
    monkeypatch.setenv("CLP_KERNELS_BACKEND", "reference")
    assert chosen() == "reference"
    with use_backend("cpu"):
        assert chosen() == "cpu"
    monkeypatch.setenv("CLP_KERNELS_BACKEND", "fast")
    with pytest.raises(
        ValueError, match="CLP_KERNELS_BACKEND: unknown back-end 'fast'; expected one of reference"
    ):
        chosen()


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="use_backend: unknown back-end 'gpu'"):
        with use_backend("gpu"):
            pass


def test_an_unavailable_backend_cannot_be_forced(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="triton cannot be imported"):
        with use_backend("triton"):
            pass


def test_a_forced_backend_refuses_what_it_cannot_serve_and_says_what_would():
    x, a, b = torch.zeros(3, 4).double(), torch.zeros(2, 4).double(), torch.zeros(5, 2).double()
    with (
        use_backend("cpu"),
        pytest.raises(RuntimeError, match="take float32 and bfloat16, not torch.float64.*'reference'"),
    ):
        multi_lora_linear(x, torch.zeros(5, 4).double(), a, b, torch.ones(1, 2).double())
    with use_backend("triton"), pytest.raises(RuntimeError, match="not torch.float64"):
        chosen(torch.float64)
    with use_backend("cpu"), pytest.raises(RuntimeError, match="has no other_op"):
        select("other_op", {"reference": "clp_kernels.reference.multi_lora"}, torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the interpreter")
def test_the_interpreter_is_not_trusted_with_bfloat16_products():
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match="interpreter computes bfloat16 products wrongly"),
    ):
        chosen(torch.bfloat16)


def test_batch_invariance_nests_lifts_and_ends_with_its_block():
    assert not is_batch_invariant()
    with batch_invariant():
        assert is_batch_invariant()
        with batch_invariant(False):
            assert not is_batch_invariant()
        assert is_batch_invariant()
    with pytest.raises(KeyError):
        with clp_kernels.batch_invariant(True):
            raise KeyError
    assert not is_batch_invariant()


def test_batch_invariance_holds_on_the_threads_of_a_backward_pass():
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(is_batch_invariant()))
    with batch_invariant():
        thread = threading.Thread(target=lambda: x.sum().backward())
        thread.start()
        thread.join()
    assert seen == [True]


def test_a_traced_call_goes_through_the_dispatcher():
    x = torch.zeros(3, 4)
    assert plain_eager(x, torch.nn.Parameter(x))
    with FakeTensorMode() as mode:
        assert not plain_eager(x)
    assert not plain_eager(mode.from_tensor(x))
    seen = []
    torch.func.grad(lambda t: seen.append(plain_eager(t)) or t.sum())(x)
    assert seen == [False]
