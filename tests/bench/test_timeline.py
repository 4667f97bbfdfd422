"""Every moment of a step is attributed once: to a phase, to whoever's account it is on, and to what ran."""

import pytest

from bench.step import timeline
from bench.step.timeline import ENGINE, REWARDS, Kernel, Span

STEP = Span("step", "step", 0.0, 100.0, 1)


def seconds(found, **wanted):
    return sum(s.seconds for s in found if all(getattr(s, name) == value for name, value in wanted.items()))


def test_the_outermost_scope_counts_and_the_outermost_operator_with_a_kind():
    spans = [
        STEP,
        Span("phase", "rollout", 10, 60, 1),
        Span("scope", "forward", 20, 40, 1),
        Span("op", "aten::scaled_dot_product_attention", 21, 31, 1),
        Span("op", "aten::copy_", 22, 25, 1),  # inside the attention
        Span("op", "aten::view", 31, 32, 1),  # computes nothing
        Span("scope", "kernels", 33, 36, 1),  # called by the model
        Span("native", "matmul", 34, 36, 1),
        Span("op", "aten::mul", 45, 50, 1),
        Span("native", "sample", 50, 52, 1),
        Span("phase", "update", 70, 80, 1),
        Span("op", "aten::_fused_adamw_", 71, 74, 1),
        Span("op", "aten::mm", 90, 95, 2),  # another thread
    ]
    found = timeline.segments(spans, STEP)
    assert sum(s.seconds for s in found) == pytest.approx(100)
    assert all(a.end == b.start for a, b in zip(found, found[1:]))
    assert seconds(found, scope="forward") == 20
    assert seconds(found, scope="forward", kind="attention") == 10
    assert seconds(found, scope="forward", kind="products") == 2
    assert seconds(found, scope="forward", kind="python") == 8
    assert seconds(found, scope="kernels") == seconds(found, kind="sampling") == 2
    assert seconds(found, scope="optimiser", phase="update") == 3
    assert seconds(found, scope=ENGINE, kind="elementwise") == 5
    assert seconds(found, scope=ENGINE) == 100 - 20 - 2 - 3
    assert seconds(found, phase="rest") == 40


def test_waiting_for_a_reward_function_on_another_thread_is_the_reward_functions():
    spans = [STEP, Span("scope", "forward", 30, 40, 1), Span("op", "aten::mul", 50, 55, 1)]
    found = timeline.during(timeline.segments(spans, STEP), [(35, 60), (20, 38), (90, 120)])
    # 20-30 and 40-50, 55-60, 90-100: what the engine did not compute meanwhile.
    assert seconds(found, scope=REWARDS) == 10 + 10 + 5 + 10
    assert seconds(found, scope="forward") == 10 and seconds(found, kind="elementwise") == 5
    assert sum(s.seconds for s in found) == pytest.approx(100)


def test_a_device_s_time_is_its_kernels_and_the_gaps_between_them():
    spans = [STEP, Span("phase", "update", 0, 50, 1), Span("scope", "forward", 10, 20, 1)]
    host = timeline.segments(spans, STEP)
    kernels = [
        Kernel("products", 30, 45, 12),  # launched by the model, run later
        Kernel("copies", 40, 50, 25),  # overlaps; launched by the engine
        Kernel("optimiser", 96, 99, 60),
        Kernel("products", 99, 140, 99),  # ends after the step
    ]
    found = timeline.on_device(host, kernels)
    assert sum(s.seconds for s in found) == pytest.approx(100)
    assert seconds(found, scope="forward", kind="products", phase="update") == 15
    assert (
        seconds(found, scope="forward", kind="idle") == 10
    )  # the host was in the model, the device had nothing to do
    assert seconds(found, scope=ENGINE, kind="copies") == 5
    assert seconds(found, scope="optimiser") == 3
    assert seconds(found, kind="idle") == 30 + 46


def test_a_trace_is_read_with_kernels_named_by_what_launched_them():
    def event(cat, name, ts, dur, tid=1, **args):
        return {
            "ph": "X",
            "cat": cat,
            "name": name,
            "ts": ts * 1e6,
            "dur": dur * 1e6,
            "tid": tid,
            "args": args,
        }

    events = [
        event("user_annotation", "step/step", 0, 10),
        event("user_annotation", "Optimizer.step#AdamW.step", 0, 1),
        event("cpu_op", "aten::linear", 1, 2),
        event("cpu_op", "aten::mm", 1.5, 1),
        event("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 4, 2),
        event("cpu_op", "MmBackward0", 4, 2),
        event("cuda_runtime", "cudaLaunchKernel", 2, 0.1, correlation=7),
        event("cuda_runtime", "cuLaunchKernel", 5, 0.1, correlation=8),
        event("kernel", "void at::native::elementwise_kernel<...>", 6, 1, tid=70, correlation=7),
        event("kernel", "_token_stats_forward", 7, 1, tid=70, correlation=8),
        {"ph": "i", "name": "no duration", "ts": 0},
    ]
    spans, kernels = timeline.read_trace(events)
    assert [s.name for s in spans if s.layer != "op"] == ["step"]
    assert [s.name for s in spans if s.layer == "op"] == ["aten::linear", "aten::mm"]
    assert [(k.kind, round(k.launched)) for k in kernels] == [("products", 2), ("token statistics", 5)]


@pytest.mark.parametrize(
    "name, kind",
    [
        ("aten::addmm", "products"),
        ("sm90_xmma_gemm_bf16bf16", "products"),
        ("aten::embedding", "copies"),
        ("aten::index_put_", "copies"),
        ("aten::add", "elementwise"),
        ("aten::transpose", None),
        ("clp_kernels::linear_logprob", None),
        ("token_stats_backward", "token statistics"),
        ("Decoder.step", "native decoding"),
        ("flash_fwd_kernel", "attention"),
    ],
)
def test_names_say_what_is_computed(name, kind):
    assert timeline.kind_of(name) == kind
