"""Every op on a GPU: in a CUDA graph, on a side stream, under torch.compile, and the same bits again.

Accuracy is tested where each op is, with the back-end "triton" (conftest.py).
"""

import sys

import pytest
import torch
from clp_kernels import batch_invariant, decode_step, use_backend
from devices import PRETENDED, default_device

from bench.calls.small import ALL, CONSTANT, DIFFERENTIABLE, outputs_and_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton"),
]
EACH = pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
EACH_DIFFERENTIABLE = pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.name)
# Rows of which depend on nothing else; prefix_attention's tokens see each other, and weight-space ops have no rows.
BY_ROW = [case for case in ALL if case.name in ("multi_lora_linear", "interpolated_linear", "linear_logprob", "logits_logprob",
                                                "sample_tokens")]  # fmt: skip


@pytest.fixture(autouse=True)
def _on_the_gpu(request):
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    if PRETENDED and case is not None and case.name == "prefix_attention":
        pytest.skip("the reference stands in for flex_attention, which no pretended GPU compiles")
    with default_device("triton"):
        yield


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.device.type == "cuda" and torch.equal(a, b)


@EACH
def test_a_graph_of_a_call_computes_anew_what_is_in_its_inputs(case):
    tensors = case.tensors(requires_grad=False)
    assert_same(case.call(**tensors), case.call(**tensors))  # compiled, and scratch memory is there
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = case.call(**tensors)
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) - 0.5)
    expected = [output.clone() for output in case.call(**tensors)]
    for _ in range(3):
        for output in outputs:
            output.fill_(7)
        graph.replay()
        assert_same(outputs, expected)


@EACH_DIFFERENTIABLE
def test_a_graph_of_forward_and_backward(case):
    tensors = case.tensors()
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]

    def step():
        outputs = [output for output in case.call(**tensors) if output.requires_grad]
        return torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    expected = step()
    for gradient in gradients:
        gradient.fill_(7)
    graph.replay()
    assert_same(gradients, expected)


@EACH
def test_the_same_call_gives_the_same_bits_every_time(case):
    tensors = case.tensors(9 if PRETENDED else 100)
    outputs, gradients = outputs_and_gradients(case.call, tensors)
    for _ in range(2 if PRETENDED else 20):
        again, again_gradients = outputs_and_gradients(case.call, tensors)
        assert_same(again, outputs)
        assert_same(again_gradients.values(), gradients.values())


@EACH
def test_work_on_a_side_stream_is_done_there(case):
    tensors = case.tensors(requires_grad=False)
    expected = case.call(**tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = [case.call(**tensors) for _ in range(2 if PRETENDED else 50)]
    stream.synchronize()
    for outputs in found:
        assert_same(outputs, expected)


@pytest.mark.parametrize("case", BY_ROW, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(case, dtype):
    by_row = ("x", "hidden", "ref_hidden", "logits")
    tensors = {name: t.to(dtype) for name, t in case.tensors(140, requires_grad=False).items()}
    with batch_invariant():
        whole = case.call(**tensors)
        for rows in (1, 7, 17, 66, 128):
            part = {name: t[:rows] if name in by_row else t for name, t in tensors.items()}
            assert_same(case.call(**part), [output[:rows] for output in whole])


@pytest.mark.traced
@EACH
def test_compiled_by_inductor(case):
    torch.compiler.reset()
    compiled = torch.compile(case.call, fullgraph=True, dynamic=True)
    for rows in (6, 9):
        tensors = case.tensors(rows)
        got, expected = (outputs_and_gradients(call, tensors) for call in (compiled, case.call))
        torch.testing.assert_close(got, expected)


@pytest.mark.traced
@pytest.mark.parametrize("case", [case for case in ALL if case not in CONSTANT], ids=lambda case: case.name)
def test_compiled_into_graphs(case):
    torch.compiler.reset()
    compiled = torch.compile(case.call, fullgraph=True, mode="reduce-overhead")
    tensors = case.tensors(requires_grad=False)
    expected = case.call(**tensors)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(**tensors), expected)


@EACH_DIFFERENTIABLE
def test_no_element_is_left_as_it_was(case):
    """torch.empty gives NaN in this mode: what a kernel does not write shows."""
    tensors = case.tensors(37)
    torch.use_deterministic_algorithms(True)
    try:
        outputs, gradients = outputs_and_gradients(case.call, tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    with use_backend("reference"):
        expected = outputs_and_gradients(case.call, tensors)
    torch.testing.assert_close((outputs, gradients), expected, rtol=1e-3, atol=1e-4)


@EACH
@pytest.mark.skipif(not PRETENDED, reason="CLP_PRETEND_GPU=1 pretends a second GPU")
def test_every_launch_is_on_the_device_of_its_tensors(case, monkeypatch):
    """Of forward and backward, while another device is current; the pretended GPU raises at a launch elsewhere."""
    from pretend_gpu import second_gpu

    monkeypatch.setattr(sys.modules["clp_kernels.backends"], "_CHOSEN", {})
    with second_gpu():
        tensors = case.tensors()
        assert all(tensor.device.index == 1 for tensor in tensors.values())
        outputs_and_gradients(case.call, tensors)
        assert torch.cuda.current_device() == 0


@pytest.mark.skipif(not PRETENDED, reason="CLP_PRETEND_GPU=1 pretends a second GPU")
def test_every_launch_of_a_decode_step_is_on_the_device_of_its_tensors(monkeypatch):
    from pretend_gpu import second_gpu

    monkeypatch.setattr(sys.modules["clp_kernels.backends"], "_CHOSEN", {})
    with second_gpu(), use_backend("triton"):
        x, y, gain = torch.randn(3, 16), torch.randn(3, 16), torch.ones(16)
        decode_step.embed(torch.arange(3), torch.randn(5, 16), 1.0, gain, 1e-6)
        decode_step.add_norm(x, y, None, gain, 1.0, 1e-6)
        decode_step.gated(x, y, "silu")
        q, k, v = (torch.randn(3, heads, 16) for heads in (4, 2, 2))
        own, prompts = (
            [torch.randn(rows, 2, width, 16) for _ in range(2)] for rows, width in ((3, 4), (1, 5))
        )
        lengths, prompt_lengths = torch.zeros(3, dtype=torch.int64), torch.full((1,), 5)
        cos, sin = torch.ones(9, 16), torch.zeros(9, 16)
        decode_step.rope_and_store(q, k, v, *own, lengths, prompt_lengths, cos, sin, None, 3, 1e-6)
        decode_step.attend(q, tuple(prompts), tuple(own), lengths, prompt_lengths, 3, 0.25, None, None)
        assert torch.cuda.current_device() == 0


@EACH
def test_nothing_waits_for_the_device(case):
    """A call that reads a number from the device would stop the host for as long as the device's queue is."""
    tensors = case.tensors()
    outputs_and_gradients(case.call, tensors)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs_and_gradients(case.call, tensors)
    finally:
        torch.cuda.set_sync_debug_mode(before)
