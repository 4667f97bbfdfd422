"""Runs every kernel at small, awkward shapes, for compute-sanitizer to watch.

    python -m bench.gpu.sanitize [OP ...] [--device cuda]

The calls are bench.calls.CHECKS: every op of clp_kernels, forwards and backwards, in every dtype that its back-end takes, with
Triton and, where it has such kernels, CUDA C++ forced: ragged sizes and aligned ones, few rows and many, so that each kernel is
launched with each tile of its tables. On a GPU the calls that a CUDA graph can hold are captured and replayed, too. Results are
compared with float64, so that a run that finds nothing has also computed something. On a CPU Triton's interpreter runs the
kernels.

The last lines say how many kernels were launched, and fail the run where one of clp_kernels.triton_kernels never was. For a
slow tool the ops may go in several processes (`--list` names them), each with --record FILE; --judge FILE ... then puts the
launches together. prefix_attention's kernels are compiled by torch and have no names here. --graphs runs what a graph can hold
alone, --candidates everything that tuning may choose, each choice once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import os
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

if "cpu" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import clp_kernels
import torch
from clp_kernels import triton_kernels, use_backend
from clp_kernels.backends import interpreting
from clp_kernels.triton_kernels import tuning

from bench.calls import CHECKS
from bench.calls.call import HALF, Call, Tensors, inputs, outputs
from bench.core import accuracy

# Wider than the benchmarks' bound: some results here are a few numbers, whose errors do not average out, or a difference of
# numbers of order 10 that is nearly 0 (the log-prob of a token that is nearly certain).
FACTOR, ABSOLUTE = 4.0, 2e-6


def _replayed(check: Call, tensors: Tensors) -> Tensors:
    """The outputs of a CUDA graph's replay, whose memory was filled with NaN before it."""
    from bench.core.measure import capture

    kept: list[Tensors] = []
    graph = capture([lambda: kept.append(check.call(tensors))], 1)
    for output in kept[-1].values():
        output.fill_(torch.nan if output.is_floating_point() else -7)
    graph.replay()
    torch.cuda.synchronize()
    return kept[-1]


def _captures(device: str) -> bool:
    """Whether CUDA graphs can be captured: not where every tensor is an allocation of its own."""
    return device == "cuda" and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ


def complaint(check: Call, dtype: torch.dtype, device: str, truth: str = "cpu") -> str | None:
    """Runs the check; what is wrong with its results, or None. truth: where it is computed."""
    tensors, on_cpu = inputs(check, dtype, device), inputs(check, dtype, truth)
    with use_backend(check.backend), check.context():
        runs = {"": outputs(check, tensors)}
        if check.graph and _captures(device):
            runs[" replayed"] = _replayed(check, tensors)
    # Commonly on the CPU: torch's own kernels need no watching, and being watched takes them long.
    plain = exact = {}
    with use_backend("reference"):
        if check.judge is None:
            plain = outputs(check, on_cpu)
            exact = outputs(check, {n: t.double() if t.is_floating_point() else t for n, t in on_cpu.items()})
    for name, returned in runs.items():
        found = {n: t.to(truth) for n, t in returned.items()}
        if check.judge is not None:
            exact = check.judge(
                {n: t.double() if t.is_floating_point() else t for n, t in on_cpu.items()}, found
            )
            plain = {n: t.float() for n, t in exact.items()}
        errors = accuracy.errors(found, plain, exact)
        for output, error in errors.items():
            size = exact[output].double().norm().clamp_min(1e-30).item()
            error.allowed = FACTOR * (error.torch + torch.finfo(dtype).eps) + ABSOLUTE / size
        if wrong := accuracy.complaint(errors, tuple(n for n, t in exact.items() if t.is_floating_point())):
            return wrong + name
    return None


# --- which kernels were launched ---------------------------------------------------------------------------


def kernels() -> dict[str, object]:
    """Every kernel of clp_kernels.triton_kernels that is launched from the host, by module.name: those that no other calls."""
    found, called = {}, set()
    for info in pkgutil.iter_modules(triton_kernels.__path__):
        module = importlib.import_module(f"{triton_kernels.__name__}.{info.name}")
        for name, value in vars(module).items():
            function = getattr(value, "fn", None)
            if hasattr(value, "run") and getattr(function, "__module__", None) == module.__name__:
                found[f"{info.name}.{name}"] = value
                names = function.__code__.co_names
                called |= {id(function.__globals__[n]) for n in names if n in function.__globals__}
    return {name: kernel for name, kernel in found.items() if id(kernel) not in called}


def tiles() -> dict[str, tuple]:
    """Every Tile of the kernels' tables: "module.table[key]" and which -> (module, tile)."""
    from clp_kernels.triton_kernels.launch import Tile

    found = {}

    def walk(where: str, module: str, value: object) -> None:
        if isinstance(value, Tile):
            found[f"{where} {tuple(value)}"] = module, value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{where}[{key}]", module, inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                walk(where, module, inner)

    for info in pkgutil.iter_modules(triton_kernels.__path__):
        module = importlib.import_module(f"{triton_kernels.__name__}.{info.name}")
        for name, value in vars(module).items():
            if name.isupper() or name.startswith("_"):
                if isinstance(value, dict | tuple):
                    walk(f"{info.name}.{name}", info.name, value)
    return found


@dataclass
class Launches:
    """kernel -> its configurations: constants that are blocks, warps, stages."""

    by_kernel: dict[str, set[tuple]] = field(default_factory=dict)

    def note(self, name: str, options: Mapping) -> None:
        blocks = tuple(sorted(v for k, v in options.items() if k.startswith("BLOCK") and isinstance(v, int)))
        config = (blocks, options.get("num_warps"), options.get("num_stages"))
        self.by_kernel.setdefault(name, set()).add(config)

    def has_tile(self, module: str, tile) -> bool:
        return any(
            {tile.rows, tile.depth} <= set(blocks) and (warps, stages) == (tile.num_warps, tile.num_stages)
            for name, configs in self.by_kernel.items()
            if name.partition(".")[0] == module
            for blocks, warps, stages in configs
        )

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Notes what Triton launches in the block."""
        names = {id(kernel): name for name, kernel in kernels().items()}
        kind = type(next(iter(kernels().values())))
        run = kind.run

        def noted(kernel, *args, **options):
            if name := names.get(id(kernel)):
                self.note(name, options)
            return run(kernel, *args, **options)

        with mock.patch.object(kind, "run", noted):
            yield

    def save(self, path: Path, ops: list[str]) -> None:
        held = {
            name: sorted(map(list, configs), key=repr) for name, configs in sorted(self.by_kernel.items())
        }
        path.write_text(json.dumps({"ops": ops, "kernels": held}, indent=1) + "\n", encoding="utf-8")

    def add(self, path: Path) -> list[str]:
        """Takes in what `save` wrote; the ops that it is of."""
        saved = json.loads(path.read_text(encoding="utf-8"))
        for name, configs in saved["kernels"].items():
            held = {(tuple(blocks), warps, stages) for blocks, warps, stages in configs}
            self.by_kernel.setdefault(name, set()).update(held)
        return saved["ops"]


# --- what a table of tuned choices may ask for ------------------------------------------------------------------


def candidates(device: str) -> Iterator[tuple[str, str, torch.dtype, Call]]:
    """(op, label, dtype, check) for everything that tuning may choose: the largest check whose launchers ask for such a choice,
    with the choice forced. Found by a run in which nothing is launched."""
    askers: dict[tuple[str, str], tuple[str, torch.dtype, Call]] = {}
    choose = tuning.Tunable.choice
    kind = type(next(iter(kernels().values())))
    for op in CHECKS:
        for dtype, check in _chosen(op, device, 1):

            def noted(tunable, family, *sizes, here=(op, dtype, check)):
                before = askers.get((tunable.kernel, family))
                if before is None or _elements(before[2]) < _elements(here[2]):
                    askers[tunable.kernel, family] = here
                return choose(tunable, family, *sizes)

            unlaunched = mock.patch.object(kind, "run", lambda *a, **options: None)
            # What the kernels left unwritten may be no token, and is then refused.
            with (
                unlaunched,
                mock.patch.object(tuning.Tunable, "choice", noted),
                contextlib.suppress(ValueError),
            ):
                with use_backend(check.backend), check.context():
                    outputs(check, inputs(check, dtype, device))
    declared = {}  # by identity: modules import each other's
    for info in pkgutil.iter_modules(triton_kernels.__path__):
        module = importlib.import_module(f"{triton_kernels.__name__}.{info.name}")
        declared |= {id(v): v for v in vars(module).values() if isinstance(v, tuning.Tunable)}
    for tunable in declared.values():
        for _, family, choice in tunable.possible():
            if (tunable.kernel, family) not in askers:
                print(f"{tunable.kernel}, {family}: no check asks for it")
                continue
            op, dtype, check = askers[tunable.kernel, family]
            context = functools.partial(_both, check.context, tunable.kernel, family, choice)
            label = f"{tunable.kernel}, {family}, {tuple(choice) if isinstance(choice, tuple) else choice}"
            yield op, label, dtype, replace(check, context=context, graph=False)


def _elements(check: Call) -> int:
    return sum(tensor.numel() for tensor in check.tensors.values())


@contextlib.contextmanager
def _both(context: Callable, kernel: str, family: str, choice) -> Iterator[None]:
    with context(), tuning.force(kernel, family, choice):
        yield


def never_launched(launches: Launches, device: str) -> list[str]:
    from clp_kernels.triton_kernels import launch

    missing = [name for name in kernels() if name not in launches.by_kernel]
    if launch.major(torch.device(device, 0) if device == "cuda" else torch.device("cpu")) < 9:
        missing = [
            name for name in missing if not name.endswith("_described")
        ]  # they need the bulk copy engine
    return missing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"default: all of {', '.join(CHECKS)}")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--list", action="store_true", help="print the names of the ops, and do nothing else")
    parser.add_argument(
        "--graphs",
        action="store_true",
        help="only the checks that a CUDA graph can hold, which needs torch's cache",
    )
    parser.add_argument(
        "--candidates", action="store_true", help="only what tuning may choose, each choice once"
    )
    parser.add_argument("--record", metavar="FILE", type=Path, help="what was launched, for --judge")
    parser.add_argument(
        "--judge", metavar="FILE", type=Path, nargs="+", help="run nothing; put these records together"
    )
    parser.add_argument("--thin", type=int, default=1, metavar="N", help="only every N-th check of an op")
    parser.add_argument("--backend", choices=("triton", "cuda"), help="only the checks of this back-end")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(CHECKS))
        return 0
    for name in options.ops:
        if name not in CHECKS:
            raise SystemExit(f"unknown op {name!r}; known: {', '.join(CHECKS)}")
    ops, device, launches, failed, count = options.ops or list(CHECKS), options.device, Launches(), [], 0
    if options.judge:
        done = [op for path in options.judge for op in launches.add(path)]
        return _judge(launches, done, device, whole=options.thin == 1 and options.backend is None)
    if options.candidates:
        chosen, ops = (
            ((op, f"{label}: {check.label}", d, check) for op, label, d, check in candidates(device)),
            [],
        )
        chosen = itertools.islice(chosen, None, None, options.thin)
    else:
        chosen = (
            (op, c.label, d, c) for op in ops for d, c in _chosen(op, device, options.thin, options.backend)
        )
    with launches.watched():
        for op, words, dtype, check in chosen:
            if check.graph or not options.graphs:
                label = f"{op}: {words}, {str(dtype).removeprefix('torch.')} [{check.backend}]"
                start = time.monotonic()
                wrong = _run(check, dtype, device, launches)
                count += 1
                failed += [label] if wrong else []
                print(f"{time.monotonic() - start:6.1f} s  {label}: {wrong or 'right'}", flush=True)
    if options.graphs:
        ops = []  # none of them as a whole
        print(f"graphs were {'' if _captures(device) else 'not '}captured and replayed")
    if options.record:
        launches.save(options.record, ops)
    for label in failed:
        print(f"WRONG {label}")
    print(f"{count} checks, {len(failed)} wrong")
    whole = options.thin == 1 and options.backend is None
    return max(_judge(launches, ops, device, whole), 1 if failed else 0)


def _judge(launches: Launches, ops: list[str], device: str, whole: bool) -> int:
    """Prints what was launched and what never was; 1 where all ops' checks were run and a kernel was not, else 0."""
    configurations = sum(map(len, launches.by_kernel.values()))
    launched = f"{len(launches.by_kernel)} kernels in {configurations} configurations"
    waiting = [op for op in CHECKS if op not in ops]
    if waiting or not whole:
        left = f"{', '.join(waiting)}" if waiting else "checks that --thin left out"
        print(f"{launched}; which are never launched is judged with {left}")
        return 0
    for where, (module, tile) in tiles().items():
        if not launches.has_tile(module, tile):
            print(f"tile not launched: {where}")
    missing = never_launched(launches, device)
    for name in missing:
        print(f"NEVER LAUNCHED {name}: give it a check in bench/calls, or take it out")
    print(f"{launched}, {len(missing)} never launched")
    return 1 if missing else 0


def _chosen(
    op: str, device: str, thin: int, backend: str | None = None
) -> Iterator[tuple[torch.dtype, Call]]:
    """The op's checks that can be run here, of one back-end or of all."""
    torch.manual_seed(1)
    number, status = 0, clp_kernels.backends()
    if op == "prefix_attention" and device == "cpu":
        print(f"{op}: left out: its kernels are compiled for CUDA tensors alone")
        return
    checks = [check for check in CHECKS[op]() if backend in (None, check.backend)]
    for backend in dict.fromkeys(check.backend for check in checks):
        if not status[backend].available:
            print(f"{op}: {backend} left out: {status[backend].reason}")
    for check in checks:
        if not status[check.backend].available:
            continue
        for dtype in check.dtypes:
            if dtype is HALF and interpreting():
                if torch.float16 in check.dtypes:
                    continue
                dtype = torch.float16  # Triton's interpreter computes bfloat16 products wrongly
            number += 1
            if (number - 1) % thin == 0:
                yield dtype, check


def _run(check: Call, dtype: torch.dtype, device: str, launches: Launches) -> str | None:
    try:
        wrong = complaint(check, dtype, device)
    except Exception as error:  # one kernel's failure is not to hide the others'
        if device == "cuda":
            torch.cuda.synchronize()  # where the device is gone, nothing after this would mean anything: let it raise
        return f"raised {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
    if check.backend == "cuda":
        launches.note("cuda.multi_lora_decode", {})
    return wrong


if __name__ == "__main__":
    sys.exit(main())
