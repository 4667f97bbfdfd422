"""python -m bench tune: which tile a kernel takes on this device, and which kernel does a product.

    python -m bench tune [KERNEL ...] --out tune.json     measures trials (bench/tuning/trials.py), the targets' shapes first
    python -m bench tune --write tune.json [FILE ...]     makes clp_kernels/triton_kernels/tuned.py of what files hold

Of each trial the default is measured, and the candidates in the order of their estimates, as far as its share of the budget
goes; results are checked against float64 first (bench/core/runner.py), and one that is wrong or raises is recorded, not timed.
Choices between kernels are measured with the tiles that won before them in the same file. The file is a result file
(bench/core/schema.py), with the device's name in the table among its settings.
"""

from __future__ import annotations

import argparse
import time

import torch
from clp_kernels.triton_kernels import tuning

from bench.core import environment, runner, schema
from bench.core.case import Case, Prepared, Tensors
from bench.core.measure import Rounds, Timer, interleave, summary
from bench.core.runner import attempt, input_sets, say
from bench.tuning import trials, tuned_table

LEAST = 2  # choices that are measured of a trial however short its time: the default and the most promising
FAILED = "left the device in a failed state in an earlier run"


def run(options: argparse.Namespace) -> int:
    if options.write:
        print(tuned_table.write(options.write, options.to or tuned_table.PATH))
        return 0
    device = runner.chosen_device(options)
    sizes = options.sizes or ("gpu" if device == "cuda" else "tiny")
    chosen = _chosen(options.kernels, device, sizes)
    mine = tuning.identity(torch.device(device))
    if mine is None:
        raise SystemExit(
            "bench tune: without a GPU the kernels run in Triton's interpreter alone, for a rehearsal: set TRITON_INTERPRET=1"
        )
    facts = environment.describe(device)
    settings = {
        "sizes": sizes, "quick": False, "seed": options.seed, "flush_bytes": facts["last_level_cache"], "table": mine[0],
        "capability": mine[1], "budget": options.budget, "left_out": {}, "failed": {},
    }  # fmt: skip
    timer = Timer(device, facts["last_level_cache"] if device == "cuda" else 1 << 20)
    result = runner.resumed(options, facts, settings)
    if result is None:
        result = schema.Result(schema.VERSION, facts, settings, {}, [], [])
    end = time.monotonic() + options.budget
    done = {case.id for case in result.cases}
    waiting = [trial for trial in chosen if trial.case.id not in done]
    if device == "cuda":
        _compile_ahead(waiting)
    for number, trial in enumerate(waiting):
        left = end - time.monotonic()
        if left <= 0:
            reason = f"the budget of {options.budget:g} s was used up"
            result.settings["left_out"].update({t.case.id: reason for t in waiting[number:]})
            schema.save(result, options.out)
            say(f"{len(waiting) - number} trials left out, {reason}; --resume measures them")
            return runner.OUT_OF_TIME
        result.settings["left_out"].pop(trial.case.id, None)
        # Trials further down are worth less: twice the even share, while it lasts.
        seconds = min(left, 2 * left / (len(waiting) - number))
        _measure_into(result, trial, timer, seconds, options)
    schema.save(result, options.out)
    print(tuned_table.report(tuned_table.devices([result])))
    return 0


def _chosen(kernels: list[str], device: str, sizes: str) -> list[trials.Trial]:
    found = trials.trials(device, sizes)
    known = sorted({trial.case.op for trial in found})
    for name in kernels:
        if name not in known:
            raise SystemExit(f"unknown kernel {name!r}; known: {', '.join(known)}")
    return [trial for trial in found if not kernels or trial.case.op in kernels]


def _compile_ahead(waiting: list[trials.Trial]) -> None:
    from triton.runtime import driver

    from bench.tuning.precompile import compile_ahead, noted

    def call(trial: trials.Trial, choice) -> None:
        with trial.forced(choice):
            trial.call(trials.ahead(trial.inputs))

    start = time.monotonic()
    calls = [
        lambda t=trial, c=choice: call(t, c)
        for trial in waiting
        if trial.inputs
        for choice, _ in trial.ranked()
    ]
    launches, unseen = noted(calls, torch.cuda.get_device_properties(0).major)
    failed = compile_ahead(launches, driver.active.get_current_target())
    took = time.monotonic() - start
    say(
        f"{took:6.1f} s  {len(launches)} kernels compiled ahead, {len(failed)} failed, {len(unseen)} calls not seen"
    )
    for problem in sorted({*failed, *unseen}):
        say(f"          {problem[:200]}")


def _measure_into(
    result: schema.Result, trial: trials.Trial, timer: Timer, seconds: float, options: argparse.Namespace
) -> None:
    start = time.monotonic()
    failed = result.settings["failed"].setdefault(trial.case.id, [])
    table = tuned_table.tables(tuned_table.devices([result])) if trial.between_kernels else {}
    try:
        with tuning.installed(table):
            case = measured(trial, timer, seconds, options.seed, failed)
    except SystemExit:
        # The last one tried is what the device did not survive: the next run leaves it out.
        schema.save(result, options.out)
        raise
    except Exception as error:
        # Inputs or truth that cannot be had (memory) must not end the run; the reason goes into the result.
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        result.settings["left_out"][trial.case.id] = reason
        schema.save(result, options.out)
        say(f"{trial.case.id}: left out, {reason}")
        return
    if not failed:
        del result.settings["failed"][trial.case.id]
    result.cases.append(case)
    schema.save(result, options.out)
    say(f"{time.monotonic() - start:6.1f} s  {_line(case)}")


def measured(
    trial: trials.Trial, timer: Timer, seconds: float, seed: int, failed: list[str] | None = None
) -> schema.Case:
    """The trial's choices, checked and timed. `failed` are names not to be tried; one that ends the process is added first."""
    failed = [] if failed is None else failed
    case, start = trial.case, time.monotonic()
    sets = input_sets(case, timer, seed)
    plain = exact = {}
    if case.judge is None:
        exact = {name: value.detach() for name, value in case.exact(sets[0], torch.float64).items()}
        plain = {name: value.detach() for name, value in case.exact(sets[0], case.dtype).items()}
    variants, ready = [], {}
    for number, (choice, estimate) in enumerate(trial.ranked()):
        name = trials.name_of(choice)
        if name in failed:
            variants.append(schema.Variant(name, "unavailable", FAILED))
            continue
        if number >= LEAST and time.monotonic() - start > seconds / 2:
            variants.append(schema.Variant(name, "unavailable", "left out: the trial's time was used up"))
            continue

        def prepare(_: Case, inputs: Tensors, choice=choice) -> Prepared:
            def call() -> Tensors:
                with trial.forced(choice):
                    return trial.call(inputs)

            return Prepared(call)

        failed.append(name)
        variant, found = attempt(case, name, prepare, sets, plain, exact, timer, memory=False)
        failed.pop()
        if estimate is not None:
            variant.measures["estimate"] = estimate
        variants.append(variant)
        if found is not None and variant.status == "ok":
            ready[name] = found
    del plain, exact
    left = max(seconds - (time.monotonic() - start), 0.1)
    samples = interleave(timer, ready, Rounds(5, 30, left / 2))
    for variant in variants:
        if variant.name in ready:
            variant.times = summary(samples[variant.name])
            variant.timing = ready[variant.name].how
    if timer.device == "cuda":
        torch.cuda.empty_cache()
    options = {
        **{name: str(value) for name, value in case.options.items()},
        "default": trials.name_of(trial.default),
    }
    return schema.Case(
        case.id, case.group, case.op, case.title, dict(case.shape), case.dtype_name, variants, options
    )


def _line(case: schema.Case) -> str:
    default = case.median(case.options["default"])
    right = {v.name: case.median(v.name) for v in case.variants if case.median(v.name) is not None}
    shape = " ".join(f"{name}={size}" for name, size in case.shape.items())
    text = f"{case.op}, {case.options['family']}, {shape}: {len(right)} of {len(case.variants)} measured"
    if default is None:
        return (
            f"{text}; the default {case.options['default']} is {case.variant(case.options['default']).reason}"
        )
    best = min(right, key=right.get)
    return f"{text}; best {best}, {right[best] / default:.2f} of the default's {default * 1e6:.1f} us"
