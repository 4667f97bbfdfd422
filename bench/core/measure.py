"""Timing: variants interleaved within a round, many rounds, a cold cache before every call.

CPU     time.perf_counter around one call. Before it a buffer as large as the last-level cache is read. (Read, not written:
        dirty lines would be written back to memory during the timed call and charged to it.)
GPU     calls of 300 microseconds or more: CUDA events around one call, after a buffer of four times the L2 cache was read.
        Shorter ones: a CUDA graph of many calls that go round input sets which together are twice the L2 cache, its replay
        between two events, divided by the number of calls. Launch gaps then are the graph's, not Python's. A variant that
        cannot be captured (it waits for the host) is timed with events, and its `timing` says so.

The order of the variants within a round rotates from round to round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bench.core.schema import Times

SMALL = 300e-6
Call = Callable[[], object]


@dataclass(frozen=True)
class Rounds:
    """At least `least` rounds and at most `most`; between them as many as `seconds` allow."""

    least: int = 7
    most: int = 60
    seconds: float = 20.0


class Timer:
    """Seconds of one cold call. `cache`: bytes of the last-level cache."""

    def __init__(self, device: str, cache: int):
        self.device, self.cache = device, cache
        size = 4 * cache if device == "cuda" else cache
        self._buffer = torch.ones(size // 4, dtype=torch.float32, device=device)

    def cool(self) -> None:
        self._buffer.sum()

    def seconds(self, call: Call) -> float:
        if self.device == "cuda":
            return self._events(call)
        self.cool()
        start = time.perf_counter()
        kept = call()
        end = time.perf_counter()
        del kept
        return end - start

    def _events(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cool()
        start.record()
        kept = call()
        end.record()
        end.synchronize()
        del kept
        return start.elapsed_time(end) / 1e3


def capture(calls: Sequence[Call], repeats: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of all calls, `repeats` times over."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(repeats):
            for call in calls:
                call()
    return graph


@dataclass(frozen=True)
class Timed:
    """What a round runs for a variant, what it is divided by, and how it is described."""

    call: Call
    calls: int
    how: str


def timed(timer: Timer, calls: Sequence[Call]) -> Timed:
    """How a variant is timed, given its call on each input set."""
    if timer.device == "cpu":
        return Timed(calls[0], 1, "clock, cold cache")
    calls[0]()  # the first events call below is then not the first call
    estimate = statistics.median(timer._events(calls[0]) for _ in range(3))
    if estimate >= SMALL or len(calls) == 1:
        return Timed(calls[0], 1, "events, cold L2")
    repeats = max(1, round(2e-3 / max(estimate * len(calls), 1e-6)))
    try:
        graph = capture(calls, repeats)
    except (
        Exception
    ) as error:  # torch raises several kinds here; whichever it is, the reason goes into the result
        torch.cuda.synchronize()
        return Timed(calls[0], 1, f"events, cold L2 (not capturable: {type(error).__name__})")
    total = repeats * len(calls)
    return Timed(graph.replay, total, f"graph of {total} calls on {len(calls)} input sets")


def interleave(
    timer: Timer, variants: Mapping[str, Timed], rounds: Rounds, clock: Callable[[], float] = time.monotonic
) -> dict[str, list[float]]:
    """Seconds per call of every variant, one number for each round."""
    names = list(variants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = clock()
    for number in range(rounds.most):
        if number >= rounds.least and clock() - start > rounds.seconds:
            break
        shift = number % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            variant = variants[name]
            samples[name].append(timer.seconds(variant.call) / variant.calls)
    return samples


def medians(phases: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each name's seconds; a name that a call has not counts 0 there."""
    names = dict.fromkeys(name for found in phases for name in found)
    return {name: statistics.median(found.get(name, 0.0) for found in phases) for name in names}


def summary(samples: Sequence[float]) -> Times:
    ordered = sorted(samples)
    q1, median, q3 = (
        statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    )
    return Times(median, q1, q3, ordered[0], ordered[-1], len(ordered))
