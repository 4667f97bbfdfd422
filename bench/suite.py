"""`run` and `list`: which cases, in which order, within which time, into which file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch

from bench import cases, peers
from bench.core import ceilings, environment, schema
from bench.core.case import Case
from bench.core.measure import Rounds, Timer
from bench.core.runner import OUT_OF_TIME, chosen_device, failures, resumed, run_case, say, too_large
from bench.pages import report
from bench.peers import clp

DTYPES = [torch.float32, torch.bfloat16]


def _sizes(options: argparse.Namespace, device: str) -> str:
    return options.sizes or ("gpu" if device == "cuda" else "cpu")


def show(options: argparse.Namespace) -> int:
    device = chosen_device(options)
    print(f"peers on {device}")
    for name, peer in peers.chosen(options.peers.split(",")).items():
        version = environment.package_version(peer.PACKAGE) or "not installed"
        reason = peer.unavailable(device)
        print(f"  {name:14s}{version:16s}" + (f"unavailable: {reason}" if reason else ""))
    for group in options.groups:
        print(group)
        for case in cases.group(group).cases(device, _sizes(options, device)):
            print(f"  {case.id}")
    return 0


def run(options: argparse.Namespace) -> int:
    cpus = [int(c) for c in options.cpus.split(",")] if options.cpus else None
    environment.pin(cpus, options.threads)
    device = chosen_device(options)
    sizes = _sizes(options, device)
    modules = peers.chosen(options.peers.split(","))
    clp.backends[:] = [name for name in options.backends.split(",") if name]
    facts = environment.describe(device)
    cache = facts["last_level_cache"]
    flush = options.flush << 20 if options.flush is not None and device == "cpu" else cache
    timer = Timer(device, flush)
    settings = {
        "sizes": sizes, "quick": options.quick, "budget": options.budget, "seed": options.seed, "flush_bytes": flush,
        "peak_memory": "torch.cuda.max_memory_allocated" if device == "cuda" else "resident memory, high-water mark",
        "left_out": {},
    }  # fmt: skip
    result = resumed(options, facts, settings)
    if result is None:
        say(f"ceilings of {facts['device']}")
        measured = ceilings.measure(device, DTYPES, cache, small=sizes == "tiny")
        listed = [
            schema.Peer(name, environment.package_version(m.PACKAGE), m.unavailable(device))
            for name, m in modules.items()
        ]
        result = schema.Result(schema.VERSION, facts, settings, measured, listed, [])
        schema.save(result, options.out)
    before = len(result.cases)
    ran_out = False
    for group in options.groups:
        ran_out |= _run_group(group, device, sizes, options, modules, timer, result)
    if len(result.cases) > before:
        again = ceilings.measure(device, DTYPES, cache, small=sizes == "tiny")
        result.ceilings = ceilings.best_of(result.ceilings, again)
        ceilings.apply(result)
    schema.save(result, options.out)
    print(report.tables(result))
    wrong = failures(result.cases)
    for line in wrong:
        say(f"WRONG {line}")
    return 1 if wrong else OUT_OF_TIME if ran_out else 0


def _selected(group: str, device: str, sizes: str, options: argparse.Namespace) -> Iterator:
    """The group's cases that the options leave."""
    kinds = set()
    for case in cases.group(group).cases(device, sizes):
        if options.only and options.only not in case.id:
            continue
        if options.quick and (case.op, case.title) in kinds:
            continue
        kinds.add((case.op, case.title))
        yield case


def _run_group(group, device, sizes, options, modules, timer, result: schema.Result) -> bool:
    """True where the budget did not last for all cases."""
    done = {case.id for case in result.cases}
    selected = list(_selected(group, device, sizes, options))
    waiting = [case for case in _by_worth(selected) if case.id not in done]
    end = time.monotonic() + options.budget
    try:
        return _measure(group, waiting, end, options, modules, timer, result)
    finally:
        # As they are listed, whatever the order they were measured in.
        listed = {case.id: number for number, case in enumerate(selected)}
        result.cases.sort(key=lambda case: (cases.GROUPS.index(case.group), listed.get(case.id, 0)))


def _by_worth(selected: list) -> list:
    """What a target is judged by, then the first of each kind, then the rest: what a budget should last for."""
    firsts = {(case.op, case.title): case.id for case in reversed(selected)}
    main = set(firsts.values())
    return sorted(selected, key=lambda case: (not case.targets, case.id not in main))


def _measure(group, waiting, end, options, modules, timer, result: schema.Result) -> bool:
    for number, case in enumerate(waiting):
        left = end - time.monotonic()
        if left <= 0:
            reason = f"the group's budget of {options.budget:g} s was used up"
            result.settings["left_out"].update({c.id: reason for c in waiting[number:]})
            say(f"{group}: {len(waiting) - number} cases left out, {reason}")
            return True
        result.settings["left_out"].pop(case.id, None)
        share = left / (len(waiting) - number)
        start = time.monotonic()
        if isinstance(case, Case):
            reason = too_large(case)
            if reason is not None:
                result.settings["left_out"][case.id] = reason
                say(f"{case.id}: left out, {reason}")
                continue
            rounds = Rounds(3, 5, 0.5 * share) if options.quick else Rounds(seconds=0.7 * share)
            record = run_case(case, modules, timer, result.ceilings, rounds, result.environment, options.seed)
        else:
            record = case.measure(modules, options.quick, share, result)
        result.cases.append(record)
        schema.save(result, options.out)
        say(f"{time.monotonic() - start:6.1f} s  {report.line(record)}")
    return False
