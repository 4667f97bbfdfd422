"""The figures that most targets are judged by, measured in minutes: python -m bench.gpu.figures PART --out FILE [--seconds N]

    kernels   the ceilings, once; a conditioned layer with each of its strategies forced; log-probs forward, backward, and with
              reference and KL in one pass; decoding at 1, 8 and 64 rows; one interpolation
    rollout   decode steps of models of 0.5B and 7B, and where the time of TOKENS tokens goes, by kernel
    step      a training step of a 0.5B model: ours, TRL's, TRL's with Liger's kernels

The parts share FILE, a result of `python -m bench`, written after every case; what it holds is not measured again. No peer
beside plain torch is measured with the kernels, and none is compiled. --warm only calls what the part measures, with I/N every
N-th variant of the kernels, which leaves the compiled code in the caches.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import cases, peers
from bench.cases.e2e import TimedStep
from bench.core import ceilings, environment, schema, targets
from bench.core.case import Case
from bench.core.measure import Rounds, Timer
from bench.core.runner import BARE, failures, offers, run_case, say
from bench.pages import report
from bench.peers import clp
from bench.step import step_case

TOKENS = 20
STRATEGIES = [(product, dy) for product in ("fused", "blas") for dy in ("once", "twice")]
_DTYPES = [torch.bfloat16]
_LAYERS = ((4096, 4096), (896, 896), (18944, 3584))  # of the decode steps


def kernel_cases(device: str, sizes: str) -> list[Case]:
    """In the order of their worth."""
    of = {
        name: cases.group(name).cases(device, sizes)
        for name in ("multi_lora", "linear_logprob", "decode", "interpolate")
    }
    if sizes == "tiny":
        return [group[0] for group in of.values()]
    layers = [c for c in of["decode"] if c.targets and (c.shape["N"], c.shape["K"]) in _LAYERS]
    judged = {
        name: [c for c in of[name] if c.targets] for name in ("multi_lora", "linear_logprob", "interpolate")
    }
    return [*judged["multi_lora"], *judged["linear_logprob"], *layers, *judged["interpolate"][:1]]


def rollout_cases(device: str, sizes: str) -> list:
    """A group of eight completions for each of eight prompts, the smaller model first."""
    listed = cases.group("rollout").cases(device, sizes)
    main = [c for c in listed if sizes == "tiny" or (c.peers and c.prompts == 8)]
    return [replace(case, peers=False) for case in sorted(main, key=lambda c: c.model)]


@dataclass(frozen=True)
class OneStep(TimedStep):
    """A training step of one variant alone."""

    only: str = ""

    def _variants(self, modules):
        return {name: run for name, run in super()._variants(modules).items() if name == self.only}

    def _unavailable(self, modules):
        return (variant for variant in super()._unavailable(modules) if variant.name == self.only)

    def _engine_share(self, variants) -> None:
        """Left to the long round: it takes two further runs."""


def step_variants(device: str, sizes: str) -> Iterator[OneStep]:
    """Ours first. A judged case needs all of them."""
    first = step_case.cases(device, sizes, OneStep)[0]
    for name in (f"{targets.OURS}, one objective", "trl + peft", "trl + peft + liger"):
        yield replace(first, only=name)


def measure_kernels(result: schema.Result, device: str, sizes: str, end: float, save) -> None:
    chosen = [case for case in kernel_cases(device, sizes) if case.id not in {c.id for c in result.cases}]
    modules, timer = peers.chosen(["plain"]), Timer(device, result.settings["flush_bytes"])
    for number, case in enumerate(chosen):
        share = (end - time.monotonic()) / (len(chosen) - number)
        if share < 0.5:
            result.settings["left_out"] |= {c.id: "the time was used up" for c in chosen[number:]}
            say(f"{len(chosen) - number} cases left out")
            return
        rounds = Rounds(3 if sizes == "tiny" else 5, 40, 0.5 * share)
        save(run_case(case, modules, timer, result.ceilings, rounds, result.environment))


def measure_rollout(result: schema.Result, device: str, sizes: str, end: float, save, profile: Path) -> None:
    chosen = rollout_cases(device, sizes)
    for number, case in enumerate(chosen):
        if number == 0 and not profile.exists():
            found = token_profile(case, device)
            profile.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            say("\n".join(profile_lines(found)))
        if case.id not in {c.id for c in result.cases}:
            share = (end - time.monotonic()) / (len(chosen) - number)
            save(case.measure(peers.chosen(["plain"]), True, share, result))


def measure_step(result: schema.Result, device: str, sizes: str, end: float, save) -> None:
    for case in step_variants(device, sizes):
        before = next((c for c in result.cases if c.id == case.id), None)
        if before is not None and before.variant(case.only) is not None:
            continue
        found = case.measure(peers.chosen(["trl", "liger"]), True, 0.0, result)
        if before is not None:
            result.cases.remove(before)
            found.variants = [*before.variants, *found.variants]
            found.verdicts = targets.verdicts(case.targets, found, result.ceilings, result.environment)
        save(found)


def token_rollout(case) -> Callable[[], object]:
    """A rollout of TOKENS tokens of a rollout's case, with its most weightings."""
    from bench.cases.rollout import Subject
    from clp_engine.rollouts.rollout import rollout
    from clp_engine.rollouts.types import SamplingParams

    subject = Subject(case)
    conditions = subject.conditions(max(case.weightings))
    options = {"num_generations": case.group, "sampling": SamplingParams(max_new_tokens=TOKENS), "seed": 1}
    return functools.partial(rollout, subject.policy, subject.prompts, conditions, **options)


def token_profile(case, device: str) -> dict:
    """Where the time of TOKENS tokens of a rollout goes: seconds and launches by kernel, on a CPU by operator."""
    run = token_rollout(case)
    run()  # compiled, captured
    on_gpu = device == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(activities=kinds) as profiler:
            run()
            if on_gpu:
                torch.cuda.synchronize()
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    wanted = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
    events = [event for event in events if event.get("ph") == "X" and event.get("cat") in wanted]
    if not events:
        raise RuntimeError("the profiler saw nothing run (CUPTI is missing, or another profiler holds it)")
    seconds, launches = Counter(), Counter()
    for event in events:
        seconds[event["name"]] += event.get("dur", 0) * 1e-6
        launches[event["name"]] += 1
    span = max(e["ts"] + e.get("dur", 0) for e in events) - min(e["ts"] for e in events)
    ranked = [
        {"name": name[:120], "seconds": s, "launches": launches[name]} for name, s in seconds.most_common(40)
    ]
    return {
        "environment": environment.describe(device), "model": case.model, "shape": case.shape, "tokens": TOKENS,
        "span": span * 1e-6, "busy": sum(seconds.values()), "kernels": ranked,
    }  # fmt: skip


def profile_lines(found: dict) -> list[str]:
    head = f"{found['tokens']} tokens of {found['model']}: {1e3 * found['span']:.1f} ms, {1e3 * found['busy']:.1f} ms busy"
    return [
        head,
        *(f"{1e3 * k['seconds']:8.2f} ms  {k['launches']:6d} x  {k['name']}" for k in found["kernels"][:12]),
    ]


def warm(which: str, device: str, sizes: str, part: int, parts: int) -> None:
    """Calls every `parts`-th variant of the kernels once; or a short rollout; or two training steps."""
    if which == "rollout":
        token_rollout(rollout_cases(device, sizes)[0])()
        return
    if which == "step":
        case = next(step_variants(device, sizes))
        case._variants({})[case.only](2)
        return
    generator = torch.Generator(device)
    number = 0
    for case in kernel_cases(device, sizes):
        for name, prepare in offers(case, {"clp": clp}):
            number += 1
            if number % parts != part or isinstance(prepare, str) or name == BARE:
                continue
            prepare(case, case.make(generator.manual_seed(0))).call()
            say(f"{case.id}: {name}")
            gc.collect()
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()


def begun(out: Path, device: str, sizes: str) -> schema.Result:
    """What the file holds, or a result with the ceilings alone."""
    if out.exists():
        return schema.load(out)
    facts = environment.describe(device)
    cache = facts["last_level_cache"] if sizes != "tiny" else 4 << 20
    settings = {"sizes": sizes, "quick": True, "seed": 0, "flush_bytes": cache, "left_out": {}}
    dtypes = _DTYPES if sizes == "gpu" else [torch.float32]
    result = schema.Result(
        schema.VERSION, facts, settings, ceilings.measure(device, dtypes, cache, sizes == "tiny"), [], []
    )
    schema.save(result, out)
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.figures", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("kernels", "rollout", "step"))
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes, a rehearsal"
    )
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument(
        "--seconds", type=float, default=150.0, help="measure no longer (default %(default)s)"
    )
    parser.add_argument("--warm", metavar="I/N", help="compile, and measure nothing")
    options = parser.parse_args(arguments)
    end, device = time.monotonic() + options.seconds, options.device
    sizes = "gpu" if device == "cuda" else "tiny"
    if device == "cuda":
        clp.strategies[:] = STRATEGIES
    if options.warm:
        warm(options.part, device, sizes, *map(int, options.warm.split("/")))
        return 0
    if options.out is None:
        parser.error("--out is missing")
    result = begun(options.out, device, sizes)

    def save(case: schema.Case) -> None:
        result.cases.append(case)
        result.settings["left_out"].pop(case.id, None)
        schema.save(result, options.out)
        say(report.line(case))

    measuring = {"kernels": measure_kernels, "rollout": measure_rollout, "step": measure_step}[options.part]
    more = (options.out.with_suffix(".tokens.json"),) if options.part == "rollout" else ()
    before = len(result.cases)
    measuring(result, device, sizes, end, save, *more)
    schema.save(result, options.out)
    print(report.tables(result))
    wrong = failures(result.cases[before:])
    for line in wrong:
        say(f"WRONG {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
