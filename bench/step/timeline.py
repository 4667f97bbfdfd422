"""Where the time of a step went: nested spans of a clock or a profiler's trace, and every moment of it attributed once.

    segments(spans, step)            the main thread, cut where anything begins or ends: (start, end, phase, scope, kind)
    during(segments, intervals)      engine time in which another thread ran a reward function is the reward function's
    on_device(segments, kernels)     a GPU's own time line: kernels, and the gaps between them
    read_trace(events)               spans and kernels of a trace in Chrome's format, as torch.profiler exports it

Every moment has a phase (what the trainer says it is doing), a scope (on whose account), and a kind (what runs):

    scope   forward, backward    a call of the model (decoder or output projection); autograd going through the graph
            kernels              a call of a back-end of clp_kernels from outside the model (log-probs, sampling)
            optimiser            torch's operators of clipping and AdamW
            reward functions     the user's
            engine               all the rest: the engine's own
    kind    what the operator computes (`kind_of`; "copies" are all that moves, fills or allocates), or "python" where none
            does: the interpreter, views, dispatch ("idle" on a GPU's time line: no kernel runs)

The outermost scope counts, and the outermost operator with a kind: a copy inside an attention is attention.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

ENGINE, REWARDS = "engine", "reward functions"
SCOPES = ("forward", "backward", "kernels", "optimiser", REWARDS, ENGINE)
REST = "rest"  # the phase outside of every phase
PYTHON, IDLE = "python", "idle"
_LAYERS = ("step", "phase", "scope", "native")  # of the annotations "layer/name" that a profiled run carries
_PATTERNS = (
    ("native decoding", r"decoder"),
    ("optimiser", r"fused_adam|foreach|multi_tensor|clip_grad"),
    ("attention", r"attention|flash|fmha|sdpa"),
    ("token statistics", r"token_stats|logprob|log_softmax|lse"),
    ("sampling", r"sampl|multinomial"),
    ("products", r"(^|:)(linear|mm|bmm|addmm|baddbmm|matmul|einsum|dot|mv)$|gemm|gemv|cutlass|nvjet|cublas|matmul|lora"),
    (
        "copies",
        r"copy|clone|memcpy|memset|_index|masked_|(^|:)(new_)?(cat|stack|index|take|gather|scatter|embedding|repeat|pad|fill|zero|one"
        r"|empty|full|select_backward|slice_backward|arange|nonzero)",
    ),
)  # fmt: skip
_KINDS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _PATTERNS)
# What computes nothing itself: views, reads by the host, and ops of ours, whose insides have kinds.
_TRANSPARENT = re.compile(
    r"^clp_kernels::|^aten::(as_strided_?|view|_unsafe_view|_reshape_alias|reshape|transpose|t|expand|expand_as|slice|narrow|"
    r"select|squeeze|unsqueeze|flatten|unflatten|unbind|split|chunk|permute|alias|detach_?|lift_fresh|resolve_conj|resolve_neg|"
    r"result_type|to|contiguous|item|_local_scalar_dense|is_nonzero|set_|resize_|as_strided_)$"
)


@dataclass(frozen=True)
class Span:
    """layer: "step", "phase", "scope", "native" (a function of a compiled back-end) or "op". Times in seconds."""

    layer: str
    name: str
    start: float
    end: float
    thread: int = 0


@dataclass(frozen=True)
class Kernel:
    """Something that ran on the device; launched: when the host asked for it; kind: by its launching operator, or its name."""

    kind: str
    start: float
    end: float
    launched: float


@dataclass(frozen=True)
class Segment:
    start: float
    end: float
    phase: str
    scope: str
    kind: str

    @property
    def seconds(self) -> float:
        return self.end - self.start


def kind_of(name: str) -> str | None:
    """What an operator, native function or kernel computes; None for what is only a wrapper around those."""
    if _TRANSPARENT.search(name):
        return None
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "elementwise")


def segments(spans: Iterable[Span], step: Span) -> list[Segment]:
    """The time of `step` on its thread: no moment left out, none counted twice."""
    inside = sorted(
        (
            s
            for s in spans
            if s.thread == step.thread and s.layer != "step" and step.start <= s.start < step.end
        ),
        key=lambda s: (s.start, -s.end),
    )
    found: list[Segment] = []
    open_: list[Span] = []
    clock = step.start

    def until(time: float) -> None:
        nonlocal clock
        time = min(time, step.end)
        if time > clock:
            found.append(Segment(clock, time, *_state(open_)))
            clock = time

    for span in inside:
        while open_ and open_[-1].end <= span.start:
            until(open_[-1].end)
            open_.pop()
        until(span.start)
        open_.append(span)
    while open_:
        until(open_[-1].end)
        open_.pop()
    until(step.end)
    return found


def _state(open_: Sequence[Span]) -> tuple[str, str, str]:
    """(phase, scope, kind) of what is open, outermost first."""
    phase = next((s.name for s in reversed(open_) if s.layer == "phase"), REST)
    scope = next((s.name for s in open_ if s.layer == "scope"), None)
    running = (kind_of(s.name) for s in open_ if s.layer in ("op", "native"))
    kind = next((kind for kind in running if kind is not None), PYTHON)
    if scope is None:
        ours = any(s.layer == "native" or s.name.startswith("clp_kernels::") for s in open_)
        scope = "optimiser" if kind == "optimiser" else "kernels" if ours else ENGINE
    return phase, scope, kind


def during(found: Sequence[Segment], intervals: Iterable[tuple[float, float]]) -> list[Segment]:
    """The segments, those parts of the engine's Python that lie in one of `intervals` on the reward functions' account."""
    merged: list[list[float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    result: list[Segment] = []
    for segment in found:
        if (segment.scope, segment.kind) != (ENGINE, PYTHON):
            result.append(segment)
            continue
        clock = segment.start
        for start, end in merged:
            start, end = max(start, clock), min(end, segment.end)
            if start < end:
                if clock < start:
                    result.append(replace(segment, start=clock, end=start))
                result.append(replace(segment, start=start, end=end, scope=REWARDS))
                clock = end
        if clock < segment.end:
            result.append(replace(segment, start=clock))
    return result


def on_device(found: Sequence[Segment], kernels: Iterable[Kernel]) -> list[Segment]:
    """The same stretch of time as the device saw it.

    A kernel is on the account of what the main thread was doing when it was launched. A gap is idle, and on the account of
    what the main thread was doing then.
    """
    start, end = found[0].start, found[-1].end
    result: list[Segment] = []
    clock = start
    for kernel in sorted(kernels, key=lambda k: k.start):
        first, last = max(kernel.start, clock), min(kernel.end, end)
        if first >= last:
            continue
        result += _idle(found, clock, first)
        cause = found[_position(found, kernel.launched)]
        scope = "optimiser" if kernel.kind == "optimiser" and cause.scope == ENGINE else cause.scope
        result.append(Segment(first, last, cause.phase, scope, kernel.kind))
        clock = last
    return result + _idle(found, clock, end)


def _position(found: Sequence[Segment], time: float) -> int:
    """Of the segment that holds `time`, or the one nearest to it."""
    return max(0, bisect_right(found, time, key=lambda s: s.start) - 1)


def _idle(found: Sequence[Segment], start: float, end: float) -> list[Segment]:
    result = []
    for number in range(_position(found, start), len(found)):
        segment = found[number]
        if segment.start >= end:
            break
        first, last = max(start, segment.start), min(end, segment.end)
        if first < last:
            result.append(replace(segment, start=first, end=last, kind=IDLE))
    return result


def totals(found: Iterable[Segment]) -> Counter[tuple[str, str, str]]:
    """Seconds by (phase, scope, kind)."""
    sums: Counter[tuple[str, str, str]] = Counter()
    for segment in found:
        sums[segment.phase, segment.scope, segment.kind] += segment.seconds
    return sums


def by(sums: Mapping[tuple[str, str, str], float], which: str) -> dict[str, float]:
    """Sums over one of "phase", "scope", "kind", largest first."""
    position = ("phase", "scope", "kind").index(which)
    found: Counter[str] = Counter()
    for key, seconds in sums.items():
        found[key[position]] += seconds
    return dict(found.most_common())


def read_trace(events: Iterable[Mapping]) -> tuple[list[Span], list[Kernel]]:
    """Spans of all threads, and what ran on a device. Annotations "layer/name" are spans of that layer."""
    spans: list[Span] = []
    ran: list[Mapping] = []
    launches: dict[int, tuple[float, int]] = {}
    for event in events:
        if event.get("ph") != "X":
            continue
        category, name = event.get("cat", ""), event["name"]
        start = event["ts"] * 1e-6
        end = start + event.get("dur", 0) * 1e-6
        if category == "user_annotation":
            layer, _, rest = name.partition("/")
            if layer in _LAYERS:
                spans.append(Span(layer, rest, start, end, event["tid"]))
        elif category == "cpu_op":
            # Names without a namespace, and autograd's, are of what goes around operators.
            if "::" in name and not name.startswith(("autograd::", "torch::autograd")):
                spans.append(Span("op", name, start, end, event["tid"]))
        elif category in ("cuda_runtime", "cuda_driver"):
            launches[event.get("args", {}).get("correlation")] = start, event["tid"]
        elif category in ("kernel", "gpu_memcpy", "gpu_memset"):
            ran.append({**event, "start": start, "end": end})
    return spans, _kernels(spans, ran, launches)


def _kernels(spans: Sequence[Span], ran: Sequence[Mapping], launches: Mapping) -> list[Kernel]:
    """The operator that launched a kernel says what it computes; without one (Triton, a graph's replay) its name does."""
    operators: dict[int, list[Span]] = {}
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        if span.layer in ("op", "native") and kind_of(span.name) is not None:
            kept = operators.setdefault(span.thread, [])
            if not kept or span.start >= kept[-1].end:  # outermost ones
                kept.append(span)
    starts = {thread: [s.start for s in kept] for thread, kept in operators.items()}
    found = []
    for event in ran:
        launched, thread = launches.get(event.get("args", {}).get("correlation"), (event["start"], None))
        kind = kind_of(event["name"]) or "elementwise"
        if thread in starts:
            position = bisect_right(starts[thread], launched) - 1
            if position >= 0 and launched <= operators[thread][position].end:
                kind = kind_of(operators[thread][position].name)
        found.append(Kernel(kind, event["start"], event["end"], launched))
    return found
