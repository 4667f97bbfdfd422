"""python -m bench profile-step --model NAME: every millisecond of a training step, and the engine's own share of it.

The engine's own time is what is left of a step (all that the trainer does for it, logging and callbacks included) after

    the model            calls of the decoder (its conditioned layers with their Python included, or in C++ while completions
                         are written) and of the output projection, and autograd's backward pass
    kernels              calls of a back-end of clp_kernels outside of those: token statistics, sampling, their products
    the optimiser        torch's operators of gradient clipping and AdamW (not the Python around them)
    reward functions     the user's, and, where they run on another thread, the time the engine does nothing but wait for them

So the rollout's loop, estimators, masks, packing, checks of arguments, tokenising, metrics, and every small operator that any
of them runs are the engine's. Python inside the model's forward pass is the model's: the table shows it as a line of its own,
and `python_share` is the Python and dispatch of the whole step, reward functions aside.

Two runs say it. Under a clock: spans around those calls alone, many steps, next to no distortion; that is `engine_share` on a
CPU. Under torch.profiler: every operator, so that the time inside has kinds (products, attention, ...); the profiler slows
Python down, so its shares lean towards Python. On a GPU the table is of the device's time: a kernel is on the account of
what launched it, a gap on that of what the host was doing, and `engine_share` comes from it (a clock on the host would see
launches).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import inspect
import json
import pkgutil
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from clp_kernels.decoder import Decoding

from bench.core import environment
from bench.step import timeline
from bench.step.step_case import StepCase, case_of, length_reward, other_reward, our_trainer
from bench.step.timeline import ENGINE, IDLE, PYTHON, REWARDS, Span

WARM = 1  # steps before those that are looked at
LIMIT = 0.03  # of a step: the target in bench.core.targets
Mark = Callable[[str, str], contextlib.AbstractContextManager]
# torch's operators as the optimiser's Python calls them: a clock sees them through these names.
_OPTIMISER = ("_fused_adamw_", "_foreach_norm", "_foreach_mul_", "_foreach_add_", "_foreach_lerp_")
_BACK_ENDS = ("cpu", "cuda", "triton_kernels", "reference")


@dataclass(frozen=True)
class StepProfile:
    """Seconds are medians over the clock's steps, means over the profiler's.

    step: seconds of a whole step. scopes: by `timeline.SCOPES`. engine_share, python_share: of a step. traced_step: seconds
    of a step under the profiler. table: rows of phase, scope, kind, seconds, share (of the traced step).
    """

    model: str
    objectives: int
    shape: dict[str, int]
    environment: dict
    definition: str
    steps: int
    step: float
    scopes: dict[str, float]
    engine_share: float
    traced_step: float
    python_share: float
    table: list[dict]


class Clock:
    """Spans by the clock, of whatever thread opens them."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    @contextlib.contextmanager
    def mark(self, layer: str, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spans.append(Span(layer, name, start, time.perf_counter(), threading.get_ident()))


def _record(layer: str, name: str) -> contextlib.AbstractContextManager:
    """A span in the profiler's trace."""
    return torch.profiler.record_function(f"{layer}/{name}")


def marked(function: Callable, mark: Mark, layer: str, name: str) -> Callable:
    @functools.wraps(function)
    def call(*arguments, **options):
        with mark(layer, name):
            return function(*arguments, **options)

    call.changes_no_numbers = (
        True  # so that the decoder in C++ still stands in for a model whose forward is this
    )
    return call


@contextlib.contextmanager
def instrumented(trainer, mark: Mark, after_step: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside, `mark` is told of the trainer's steps and phases, of calls of its model, of clp_kernels and of the optimiser."""
    with contextlib.ExitStack() as undo:

        def put(owner: object, name: str, value: object) -> None:
            own = vars(owner)
            undo.callback(*((setattr, owner, name, own[name]) if name in own else (delattr, owner, name)))
            setattr(owner, name, value)

        def wrap(owner: object, name: str, layer: str, label: str) -> None:
            put(owner, name, marked(getattr(owner, name), mark, layer, label))

        step = marked(trainer._step, mark, "step", "step")

        def one_step(*arguments):
            loss = step(*arguments)
            after_step()
            return loss

        put(trainer, "_step", one_step)
        timer, plain = trainer.timer, type(trainer.timer)
        timer.__class__ = with_marks(plain, mark)  # in place: others hold it too
        undo.callback(setattr, timer, "__class__", plain)
        backbone = trainer.policy.backbone
        for module in {id(m): m for m in (_stack(backbone), backbone.head.module)}.values():
            wrap(module, "forward", "scope", "forward")
        for name in (
            "step",
            "write",
        ):  # the model of a rollout, where it is in C++; `write` draws the tokens, too
            wrap(Decoding, name, "scope", "forward")
        for name in ("backward", "grad"):
            wrap(torch.autograd, name, "scope", "backward")
        for name in _OPTIMISER:
            wrap(torch, name, "native", name)
        for module in _back_ends():
            for name, function in list(vars(module).items()):
                # Plain functions: a Triton kernel is an object that is indexed with its grid.
                if inspect.isfunction(function) and function.__module__ == module.__name__ and name[0] != "_":
                    wrap(module, name, "scope", "kernels")
        for owner, name in _native_functions():
            label = f"{owner.__name__}.{name}" if isinstance(owner, type) else name
            wrap(owner, name, "native", label)
        yield


def _stack(backbone) -> torch.nn.Module:
    return getattr(backbone, "decoder", backbone.model.base_model)


def with_marks(timer: type, mark: Mark) -> type:
    class Marked(timer):
        @contextlib.contextmanager
        def __call__(self, phase: str) -> Iterator[None]:
            with mark("phase", phase), super().__call__(phase):
                yield

    return Marked


def _back_ends() -> list:
    """The modules of every back-end of clp_kernels that this machine can import."""
    found = []
    for package in _BACK_ENDS:
        try:
            root = importlib.import_module(f"clp_kernels.{package}")
            names = [m.name for m in pkgutil.iter_modules(root.__path__, root.__name__ + ".")]
            found += [root, *map(importlib.import_module, names)]
        except ImportError:
            continue  # Triton, say: nothing of it can run here
    return found


def _native_functions() -> Iterator[tuple[object, str]]:
    """(module or class, name) of the compiled functions and methods that compute something."""
    from clp_kernels import _native

    for name, value in list(vars(_native).items()):
        if name.startswith(("_", "has_", "isa", "select_isa")):
            continue
        if isinstance(value, type):
            methods = (n for n, m in vars(value).items() if n[0] != "_" and callable(m))
            yield from ((value, method) for method in methods)
        elif callable(value):
            yield _native, name


def _rewards(rewards: Sequence[Callable], mark: Mark) -> list[Callable]:
    return [marked(function, mark, "scope", REWARDS) for function in rewards]


def _attributed(
    spans: Sequence[Span], kernels: Sequence[timeline.Kernel] = ()
) -> list[list[timeline.Segment]]:
    """Every step's time; the device's where there are kernels."""
    found = []
    for step in (s for s in spans if s.layer == "step"):
        segments = timeline.segments(spans, step)
        elsewhere = [(s.start, s.end) for s in spans if s.name == REWARDS and s.thread != step.thread]
        segments = timeline.during(segments, elsewhere)
        found.append(timeline.on_device(segments, kernels) if kernels else segments)
    return found


def clocked(case: StepCase, rewards: Sequence[Callable], steps: int) -> list[list[timeline.Segment]]:
    """Segments of `steps` steps by the clock: phases and scopes."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(case, WARM + steps, _rewards(rewards, clock.mark), folder)
        with instrumented(trainer, clock.mark):
            trainer.train()
    return _attributed(clock.spans)[WARM:]


def traced(
    case: StepCase, rewards: Sequence[Callable], steps: int, keep: str | None = None
) -> list[list[timeline.Segment]]:
    """Segments of `steps` steps by torch.profiler: phases, scopes and kinds; of the device's time on a GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if case.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    seen = 0
    with tempfile.TemporaryDirectory() as folder:
        profiler = torch.profiler.profile(activities=activities)

        def after_step() -> None:
            nonlocal seen
            seen += 1
            if case.device == "cuda":
                torch.cuda.synchronize()
            if seen == WARM:
                profiler.start()
            elif seen == WARM + steps:
                profiler.stop()

        trainer = our_trainer(case, WARM + steps, _rewards(rewards, _record), folder)
        with instrumented(trainer, _record, after_step):
            trainer.train()
        path = Path(keep or Path(folder) / "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    spans, kernels = timeline.read_trace(events)
    if case.device == "cuda" and not kernels:
        raise RuntimeError(
            "the profiler saw no kernel on the GPU (CUPTI is missing, or another profiler holds it)"
        )
    return _attributed(spans, kernels)


def _share(segments: Sequence[timeline.Segment], scope: str) -> float:
    whole = sum(s.seconds for s in segments)
    return sum(s.seconds for s in segments if s.scope == scope) / whole


def engine_share(case: StepCase, rewards: Sequence[Callable], steps: int = 4) -> float:
    """The engine's own share of a step: by the clock on a CPU, of the device's time line on a GPU."""
    found = clocked(case, rewards, steps) if case.device == "cpu" else traced(case, rewards, 1)
    return statistics.median(_share(segments, ENGINE) for segments in found)


def profile(case: StepCase, rewards: Sequence[Callable], steps: int, keep: str | None = None) -> StepProfile:
    by_clock = clocked(case, rewards, steps)
    by_trace = traced(case, rewards, min(steps, 2), keep)
    sums: Counter = Counter()
    for segments in by_trace:
        sums.update(timeline.totals(segments))
    whole = sum(sums.values())
    shares = by_clock if case.device == "cpu" else by_trace
    python = sum(s for (_, scope, kind), s in sums.items() if kind in (PYTHON, IDLE) and scope != REWARDS)
    rows = [
        {
            "phase": phase,
            "scope": scope,
            "kind": kind,
            "seconds": spent / len(by_trace),
            "share": spent / whole,
        }
        for (phase, scope, kind), spent in sums.most_common()
    ]
    return StepProfile(
        model=case.model,
        objectives=len(rewards),
        shape=case.shape,
        environment=environment.describe(case.device),
        definition=" ".join(__doc__.split("\n\nTwo runs")[0].split("\n\n", 1)[1].split()),
        steps=steps,
        step=statistics.median(sum(s.seconds for s in segments) for segments in by_clock),
        scopes={
            scope: statistics.median(
                sum(s.seconds for s in segments if s.scope == scope) for segments in by_clock
            )
            for scope in timeline.SCOPES
        },
        engine_share=statistics.median(_share(segments, ENGINE) for segments in shares),
        traced_step=whole / len(by_trace),
        python_share=python / whole,
        table=rows,
    )


def table(found: StepProfile) -> str:
    """What the terminal shows: kinds by phase, scopes, what the engine's own time consists of, the verdict."""
    from bench.core.text import seconds
    from clp_engine.core import tables

    def cell(**wanted: str) -> float:
        return sum(row["seconds"] for row in found.table if all(row[n] == v for n, v in wanted.items()))

    def milliseconds(value: float) -> str:
        return f"{1e3 * value:.1f}" if value else ""

    def percent(value: float) -> str:
        return f"{100 * value / found.traced_step:.1f}%"

    phases = list(dict.fromkeys(row["phase"] for row in found.table))
    sums = {(r["phase"], r["scope"], r["kind"]): r["seconds"] for r in found.table}
    rows = []
    for scope in timeline.SCOPES:
        if not cell(scope=scope):
            continue
        rows.append([f"**{scope}**", *(milliseconds(cell(scope=scope, phase=p)) for p in phases),
                     milliseconds(cell(scope=scope)), percent(cell(scope=scope))])  # fmt: skip
        kinds = timeline.by({key: s for key, s in sums.items() if key[1] == scope}, "kind")
        for kind, spent in kinds.items():
            rows.append([f"{kind}", *(milliseconds(cell(scope=scope, kind=kind, phase=p)) for p in phases),
                         milliseconds(spent), percent(spent)])  # fmt: skip
    rows.append(
        ["**step**", *(milliseconds(cell(phase=p)) for p in phases), milliseconds(found.traced_step), ""]
    )
    names = ["ms under the profiler", *phases, "step", "share"]
    clock = ", ".join(f"{scope} {100 * spent / found.step:.1f}%" for scope, spent in found.scopes.items())
    verdict = "met" if found.engine_share <= LIMIT else "not met"
    sizes = " ".join(f"{name}={size}" for name, size in found.shape.items())
    return "\n".join([
        f"{found.model}, {found.objectives} objective{'s' * (found.objectives > 1)}, {sizes}, {found.environment['device']}",
        "",
        *tables.compact(names, rows),
        "",
        f"A step: {seconds(found.step)} by the clock, {seconds(found.traced_step)} under the profiler. By the clock: {clock}.",
        f"Python and dispatch of the whole step, under the profiler: {100 * found.python_share:.1f}%.",
        f"The engine's own: {100 * found.engine_share:.2f}% of a step (target: at most {100 * LIMIT:g}%, {verdict}).",
    ])  # fmt: skip


def main(options: argparse.Namespace) -> int:
    environment.pin([int(c) for c in options.cpus.split(",")] if options.cpus else None, options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        case = case_of(options.model, device)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    rewards = (length_reward, other_reward)[: options.objectives]
    found = profile(case, rewards, options.steps, options.trace)
    if options.out:
        path = Path(options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    print(table(found))
    return 0
