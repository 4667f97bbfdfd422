"""One case from inputs to result: check every variant against float64, measure its memory, time them all interleaved."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import torch

from bench.core import accuracy, ceilings, schema, targets
from bench.core.case import Case, Prepare, Prepared, Refused, Tensors
from bench.core.measure import Rounds, Timed, Timer, interleave, summary, timed
from bench.core.memory import LOGITS, available, extra_peak

OUT_OF_TIME = 3  # the exit code where a budget did not last: --resume measures the rest

BARE = "bare library products"


def run_case(
    case: Case,
    peers: Mapping[str, ModuleType],
    timer: Timer,
    measured: dict,
    rounds: Rounds,
    environment: Mapping,
    seed: int = 0,
) -> schema.Case:
    sets = input_sets(case, timer, seed)
    first = sets[0]
    exact = plain = {}
    if case.judge is None:
        exact = {k: v.detach() for k, v in case.exact(first, torch.float64).items()}
        plain = {k: v.detach() for k, v in case.exact(first, case.dtype).items()}
    variants, ready = [], {}
    for name, prepare in offers(case, peers):
        if isinstance(prepare, str):
            variants.append(schema.Variant(name, "unavailable", prepare))
            continue
        variant, found = attempt(case, name, prepare, sets, plain, exact, timer)
        if found is not None:
            ready[name] = found
        variants.append(variant)
        if timer.device == "cuda":
            torch.cuda.empty_cache()
    del exact, plain
    samples = interleave(timer, ready, rounds)
    for variant in variants:
        if variant.name in ready:
            variant.times = summary(samples[variant.name])
            variant.timing = ready[variant.name].how
    record = schema.Case(
        id=case.id,
        group=case.group,
        op=case.op,
        title=case.title,
        shape=dict(case.shape),
        dtype=case.dtype_name,
        variants=variants,
        options={name: str(value) for name, value in case.options.items()},
        bare=BARE if case.bare else None,
        floor=ceilings.floor(case.work, case.dtype_name, measured),
    )
    record.verdicts = targets.verdicts(case.targets, record, measured, environment)
    return record


def input_sets(case: Case, timer: Timer, seed: int) -> list[Tensors]:
    """One set on a CPU, whose cache is cleared between calls; on a GPU as many as fill twice its L2 cache, 64 at most."""
    generator = torch.Generator(case.device).manual_seed(seed)
    sets = [case.make(generator)]
    if case.device == "cuda":
        size = sum(t.numel() * t.element_size() for t in sets[0].values())
        count = min(64, math.ceil(2 * timer.cache / size) + 1) if size < 2 * timer.cache else 1
        sets += [case.make(generator) for _ in range(count - 1)]
    return sets


def offers(case: Case, peers: Mapping[str, ModuleType]) -> Iterator[tuple[str, Prepare | str]]:
    """Every variant of the case by name: how it is prepared, or why it is not there."""
    if case.bare is not None:
        yield BARE, case.bare
    for peer in peers.values():
        offer = getattr(peer, case.op, None)
        if offer is None:
            continue
        reason = peer.unavailable(case.device)
        if reason is None:
            try:
                yield from offer(case).items()
                continue
            except Refused as refusal:
                reason = str(refusal)
        yield peer.NAME, reason


def attempt(
    case: Case,
    name: str,
    prepare: Prepare,
    sets: list[Tensors],
    plain: Tensors,
    exact: Tensors,
    timer: Timer,
    memory: bool = True,
) -> tuple[schema.Variant, Timed | None]:
    """The variant, checked, and how it is timed; None where it raised. memory: whether its peak is of interest, which takes
    longer than many a call."""
    try:
        return _check(case, name, prepare, sets, plain, exact, timer, memory)
    except Refused as reason:
        return schema.Variant(name, "unavailable", str(reason)), None
    except Exception as error:
        # A variant's failure is a result too; ours makes the run fail (see `failures`).
        _check_device(timer.device, name, error)
        return schema.Variant(name, "unavailable", _reason(error)), None


def _check(
    case: Case,
    name: str,
    prepare: Prepare,
    sets: list[Tensors],
    plain: Tensors,
    exact: Tensors,
    timer: Timer,
    memory: bool,
) -> tuple[schema.Variant, Timed]:
    first = prepare(case, sets[0])
    errors, reason = _errors(case, name, first, sets[0], plain, exact)
    peak = extra_peak(first.call, case.device) if memory else None
    calls = [first.call, *(prepare(case, inputs).call for inputs in sets[1:])]
    variant = schema.Variant(name, "wrong" if reason else "ok", reason, extra_peak_bytes=peak, errors=errors)
    return variant, timed(timer, calls)


def _errors(case: Case, name: str, prepared: Prepared, inputs: Tensors, plain: Tensors, exact: Tensors):
    """The errors by output, and why the variant is wrong, if it is. This call also warms it up (compilation, handles)."""
    result = prepared.call()
    if name == BARE:
        return {}, None
    outputs = prepared.outputs(result)
    if case.judge is not None:
        plain, exact = case.judge(inputs, outputs)
    found = accuracy.errors(outputs, plain, exact)
    wanted = () if prepared.partial else (*case.outputs, *(f"d_{name}" for name in case.wanted))
    return found, accuracy.complaint(found, wanted)


def _check_device(device: str, name: str, error: Exception) -> None:
    """An illegal access leaves the GPU unusable to this process: nothing measured after it would mean anything."""
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except Exception:
        raise SystemExit(f"{name} left the device in a failed state: {error}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    return f"raised {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def failures(cases: list[schema.Case]) -> list[str]:
    """Where this project's own variants are wrong or raised: what a benchmark must not pass over."""
    return [
        f"{case.id}: {variant.name}: {variant.reason}"
        for case in cases
        for variant in case.variants
        if variant.name.startswith(targets.OURS)
        and (variant.status == "wrong" or (variant.reason or "").startswith(("raised", "out of memory")))
    ]


def too_large(case: Case) -> str | None:
    """Why a case cannot be measured at all: its float64 check does not fit."""
    if case.shape.get("V") is None or case.op == "sample_tokens":
        return None
    copies = 12 if "kl" in case.outputs else 6
    needed = copies * 8 * min(LOGITS, case.shape["T"] * case.shape["V"])
    free = available(case.device)
    return None if needed < free else f"its float64 check takes {needed >> 30} GiB, {free >> 30} are free"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def raised(name: str, error: Exception) -> schema.Variant:
    if isinstance(error, torch.OutOfMemoryError):
        return schema.Variant(name, "unavailable", "out of memory")
    first = (str(error).strip().splitlines() or [""])[0]
    return schema.Variant(name, "unavailable", f"raised {type(error).__name__}: {first[:200]}")


def chosen_device(options: argparse.Namespace) -> str:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device")
    return device


def resumed(options: argparse.Namespace, facts: dict, settings: dict) -> schema.Result | None:
    """What the file holds already; None where there is nothing to go on from."""
    path = Path(options.out)
    if not path.exists():
        return None
    if not options.resume:
        raise SystemExit(f"{path} exists; --resume goes on with it, or give another --out")
    result = schema.load(path)
    for name in ("device", "commit", "threads", "cpus", "versions"):
        if result.environment.get(name) != facts[name]:
            raise SystemExit(
                f"{path} was measured with {name} {result.environment.get(name)}, this is {facts[name]}: one file holds "
                "one environment; give another --out"
            )
    for name in ("sizes", "quick", "seed", "flush_bytes"):
        if result.settings.get(name) != settings[name]:
            raise SystemExit(
                f"{path} was measured with {name} {result.settings.get(name)}, this is {settings[name]}"
            )
    return result
