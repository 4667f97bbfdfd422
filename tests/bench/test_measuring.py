"""What the numbers mean: interleaved rounds, cold calls, peak memory, errors, floors, targets."""

import math
import statistics

import pytest
import torch

from bench import cases
from bench.core import accuracy, ceilings, measure, memory, targets
from bench.core.case import Work
from bench.core.measure import Rounds, Timed, Timer, interleave, summary
from bench.core.schema import Case, Error, Result, Times, Variant


class CountingTimer:
    """Seconds are the call's own return value; notes the order of the calls."""

    device = "cpu"

    def __init__(self):
        self.order = []

    def seconds(self, call):
        name, value = call()
        self.order.append(name)
        return value


def test_variants_are_interleaved_and_every_one_comes_first_in_turn():
    timer = CountingTimer()
    variants = {name: Timed(lambda name=name: (name, 6.0), 3, "") for name in "abc"}
    samples = interleave(timer, variants, Rounds(least=3, most=3, seconds=100))
    assert timer.order == list("abcbcacab")
    assert samples == {name: [2.0] * 3 for name in "abc"}  # six seconds for three calls each


def test_rounds_end_with_the_time_but_not_before_the_least():
    clock = iter(range(100))
    timer = CountingTimer()
    samples = interleave(
        timer, {"a": Timed(lambda: ("a", 1.0), 1, "")}, Rounds(5, 50, 0.5), lambda: next(clock)
    )
    assert len(samples["a"]) == 5


def test_the_cache_is_cleared_before_each_call():
    timer, events = Timer("cpu", 1 << 20), []
    timer.cool = lambda: events.append("cool")
    timer.seconds(lambda: events.append("call"))
    timer.seconds(lambda: events.append("call"))
    assert events == ["cool", "call"] * 2


class Device:
    """Stands in for the timer of a GPU: every call takes `estimate` seconds."""

    device = "cuda"

    def __init__(self, estimate):
        self.estimate = estimate

    def _events(self, call):
        call()
        return self.estimate


class Graph:
    def replay(self):
        return "replayed"


def test_small_calls_on_a_gpu_go_round_their_input_sets_in_a_graph(monkeypatch):
    captured = []
    monkeypatch.setattr(
        measure, "capture", lambda calls, repeats: captured.append((calls, repeats)) or Graph()
    )
    calls = [lambda: None] * 4
    found = measure.timed(Device(50e-6), calls)
    # Two milliseconds: 40 calls of 50 microseconds, ten times round the four sets.
    assert captured == [(calls, 10)] and (found.call(), found.calls) == ("replayed", 40)
    assert found.how == "graph of 40 calls on 4 input sets"


def test_large_calls_and_those_that_cannot_be_captured_are_timed_with_events(monkeypatch):
    def refusing(calls, repeats):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(measure, "capture", refusing)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = [lambda: None] * 4
    assert measure.timed(Device(1e-3), calls) == Timed(calls[0], 1, "events, cold L2")
    found = measure.timed(Device(50e-6), calls)
    assert found.calls == 1 and found.how == "events, cold L2 (not capturable: RuntimeError)"


def test_the_summary_is_median_and_quartiles():
    samples = [5.0, 1.0, 2.0, 4.0, 3.0]
    found = summary(samples)
    assert (found.min, found.q1, found.median, found.q3, found.max, found.runs) == (1, 2, 3, 4, 5, 5)
    assert found.median == statistics.median(samples)
    assert summary([7.0]) == Times(7.0, 7.0, 7.0, 7.0, 7.0, 1)


@pytest.mark.parametrize(
    "mebibytes", [24, 96]
)  # below and above what the C library takes from the system at once
def test_peak_memory_is_what_the_call_takes_beyond_what_was_there(mebibytes):
    held = torch.ones(8 << 20)
    torch.ones(
        mebibytes << 18
    )  # given back, and perhaps kept by the C library: it must not hide the next one

    def call():
        scratch = torch.ones(mebibytes << 18)
        scratch.add_(held[0])
        del scratch
        return torch.ones(1 << 20)

    peak = memory.extra_peak(call, "cpu")
    if peak is None:
        pytest.skip("no /proc/self/clear_refs here")
    # The scratch memory is freed before the result of 4 MiB is made: the larger of the two is the peak.
    assert peak == pytest.approx(mebibytes << 20, rel=0.1, abs=6 << 20)


def test_free_memory_that_the_c_library_keeps_does_not_hide_an_allocation():
    blocks = [torch.ones(25_000) for _ in range(800)]  # 80 MB in pieces that come from the heap
    above = torch.ones(25_000)  # keeps the heap from shrinking when they are freed
    del blocks
    peak = memory.extra_peak(lambda: [torch.ones(25_000) for _ in range(600)], "cpu")
    if peak is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert peak == pytest.approx(600 * 100_000, rel=0.2) and above[0] == 1


def test_an_error_beyond_torchs_is_wrong_and_so_is_a_missing_or_infinite_output():
    exact = {"y": torch.randn(1000, dtype=torch.float64)}
    noise = torch.randn(1000, dtype=torch.float64)
    plain = {"y": exact["y"] + 1e-4 * noise}

    def complaint(output):
        found = accuracy.errors({} if output is None else {"y": output}, plain, exact)
        return accuracy.complaint(found, ("y",))

    assert complaint((exact["y"] + 1.4e-4 * noise).float()) is None
    assert "torch has" in complaint((exact["y"] + 1.6e-4 * noise).float())
    broken = exact["y"].clone()
    broken[3] = torch.nan
    assert "not finite" in complaint(broken)
    assert "did not return y" in complaint(None)


def test_an_exact_torch_still_leaves_one_rounding():
    exact = {"y": torch.rand(100, dtype=torch.float64)}
    found = accuracy.errors({"y": exact["y"].float()}, exact, exact)
    assert accuracy.complaint(found, ("y",)) is None
    found = accuracy.errors({"y": (exact["y"] * (1 + 1e-6)).float()}, exact, exact)
    assert accuracy.complaint(found, ("y",)) is not None


def test_the_floor_is_the_largest_of_its_terms():
    measured = {"matmul_flops": {"float32": 100.0}, "copy_bytes": 10.0, "exp_rate": 1.0}
    floor = ceilings.floor(Work(flops=200.0, bytes=30.0, exps=1.0), "float32", measured)
    assert (floor.seconds, floor.bound) == (3.0, "memory")
    assert ceilings.floor(Work(flops=1.0), "bfloat16", measured) is None


def test_better_ceilings_lower_the_floors_and_renew_the_verdicts():
    ours = Variant("clp-engine", "ok", times=Times(1.0, 1.0, 1.0, 1.0, 1.0, 1))
    slow = {"matmul_flops": {"float32": 1.0}, "copy_bytes": 100.0, "read_bytes": 1.0, "exp_rate": 1.0}
    fast = {**slow, "copy_bytes": 200.0, "read_bytes": 0.5}
    floor = ceilings.floor(Work(bytes=90.0), "float32", slow)
    case = Case("i", "g", "o", "t", {"T": 8}, "float32", [ours], floor=floor)
    environment = {"device_type": "cuda", "device": "NVIDIA H200"}
    case.verdicts = targets.verdicts(("decode",), case, slow, environment)
    assert (floor.seconds, case.verdicts[0].value, case.verdicts[0].met) == (0.9, 0.9, True)
    result = Result(1, environment, {}, ceilings.best_of(slow, fast), [], [case])
    ceilings.apply(result)
    assert result.ceilings["copy_bytes"] == 200 and result.ceilings["read_bytes"] == 1
    assert (case.floor.seconds, case.verdicts[0].value, case.verdicts[0].met) == (0.45, 0.45, False)


def main_case(group, title, **shape):
    (found,) = [
        case
        for case in cases.group(group).cases("cpu", "gpu")
        if case.title == title
        and {**case.shape, **shape} == dict(case.shape)
        and case.dtype is torch.bfloat16
        and case.options.get("ranks", (16, 16, 16)) == (16, 16, 16)
        and case.options.get("blend", "dirichlet") == "dirichlet"
    ]
    return found


def test_the_least_work_is_that_of_the_formulas():
    t, d, n, r = 8192, 4096, 4096, 48
    forward = main_case("multi_lora", "forward", N=n)
    assert forward.work.flops == 2 * t * d * n + 2 * t * r * (d + n)
    assert forward.work.bytes == 2 * (t * d + n * d + t * n + r * (d + n))
    both = main_case("multi_lora", "forward+backward", N=n, K=d, T=t)
    assert both.work.flops - forward.work.flops == 2 * t * d * n + 4 * t * r * (d + n)
    assert both.work.bytes - forward.work.bytes == 2 * (t * n + n * d + 2 * t * d + t * r + 2 * r * (d + n))
    h, v = 4096, 131072
    scoring = main_case("linear_logprob", "logprob, scoring", T=t, V=v)
    assert (scoring.work.flops, scoring.work.bytes, scoring.work.exps) == (
        2 * t * h * v,
        2 * (t * h + v * h),
        t * v,
    )
    everything = main_case("linear_logprob", "logprob+ref_logprob+entropy+kl, scoring", T=t, V=v)
    assert (everything.work.flops, everything.work.bytes) == (4 * t * h * v, 2 * (2 * t * h + v * h))


def judged(environment, **medians):
    def variant(name, median):
        return Variant(
            name, "ok", times=Times(median, median, median, median, median, 1), extra_peak_bytes=100
        )

    variants = [variant(name.replace("_", "-"), median) for name, median in medians.items()]
    case = Case("i", "g", "o", "t", {"T": 10, "V": 100, "N": 4, "K": 4}, "float32", variants, bare="bare")
    return targets.verdicts(("statistics-cpu", "statistics-cpu-memory", "decode"), case, {}, environment)


def test_a_target_is_judged_on_its_own_machine_alone():
    two_cores = {"device_type": "cpu", "threads": 2}
    time, peak = judged(two_cores, clp_engine=1.2, bare=1.0)  # the H200's target says nothing here
    assert (time.value, time.met) == (pytest.approx(1.2), True) and (peak.value, peak.met) == (0.025, True)
    assert judged(two_cores, clp_engine=1.3, bare=1.0)[0].met is False
    other = judged({**two_cores, "threads": 1}, clp_engine=1.2, bare=1.0)[0]
    assert other.met is None and "1 threads" in other.note and other.value == pytest.approx(1.2)
    assert [v.on for v in judged({"device_type": "cuda", "device": "NVIDIA H200"}, clp_engine=1.0)] == [
        "H200"
    ]


def test_a_wrong_variant_meets_no_target():
    wrong = Variant("clp-engine", "wrong", "y: error", times=Times(1, 1, 1, 1, 1, 1))
    wrong.errors = {"y": Error(1.0, 0.1, 0.15)}
    case = Case("i", "g", "o", "t", {"T": 1}, "float32", [wrong], bare="bare")
    (verdict,) = targets.verdicts(("statistics-cpu",), case, {}, {"device_type": "cpu", "threads": 2})
    assert verdict.met is None and verdict.value is None and math.isclose(verdict.limit, 1.25)
