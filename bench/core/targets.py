"""The numbers to beat, and what a case says about each.

A target is judged on the machine it is for: "H200", or "2 CPU cores" (two threads). On another GPU, or with another number of
threads, its value is reported with `met` left open. No verdict comes from a variant that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.core.schema import Case, Variant, Verdict

OURS = "clp-engine"
MERGED = f"{OURS}, merged model"  # of a rollout; see bench.cases.rollout
_WEIGHTINGS = re.compile(rf"{OURS}, (\d+) weightings?")


@dataclass(frozen=True)
class Target:
    what: str
    on: str
    sense: str  # "<=" or ">="
    limit: float
    value: Callable[[Case, Mapping], float | None]


def _over(case: Case, ceilings: Mapping) -> float | None:
    ours, bare = case.median(OURS), case.median(case.bare)
    return ours / bare if ours and bare else None


def _over_its_flops(case: Case, ceilings: Mapping) -> float | None:
    """Time over the bare linear's, divided by the same ratio of FLOPs."""
    ratio = _over(case, ceilings)
    bare = 4.0 * case.shape["T"] * case.shape["N"] * case.shape["K"]
    return ratio / (case.floor.flops / bare) if ratio and case.floor else None


def _of_bandwidth(case: Case, ceilings: Mapping) -> float | None:
    ours = case.median(OURS)
    return case.floor.bytes / ours / ceilings["copy_bytes"] if ours and case.floor else None


def _of_matmul(case: Case, ceilings: Mapping) -> float | None:
    ours, rate = case.median(OURS), ceilings.get("matmul_flops", {}).get(case.dtype)
    return case.floor.flops / ours / rate if ours and rate and case.floor else None


def _teraflops(case: Case, ceilings: Mapping) -> float | None:
    ours = case.median(OURS)
    return case.floor.flops / ours / 1e12 if ours and case.floor else None


def _over_two_passes(case: Case, ceilings: Mapping) -> float | None:
    ours, twice = case.median(OURS), case.median(f"{OURS}, two log-prob passes")
    return ours / twice if ours and twice else None


def _memory_of_logits(case: Case, ceilings: Mapping) -> float | None:
    found = case.variant(OURS)
    if found is None or found.status != "ok" or found.extra_peak_bytes is None:
        return None
    return found.extra_peak_bytes / (4.0 * case.shape["T"] * case.shape["V"])


def _times_faster_than_trl(case: Case, ceilings: Mapping) -> float | None:
    trl = [t for v in case.variants if v.name.startswith("trl") and (t := case.median(v.name))]
    ours = case.median(f"{OURS}, one objective")
    return min(trl) / ours if trl and ours else None


def _memory_of_trl(case: Case, ceilings: Mapping) -> float | None:
    trl = [v.extra_peak_bytes for v in case.variants if v.name.startswith("trl") and v.extra_peak_bytes]
    ours = case.variant(f"{OURS}, one objective")
    return ours.extra_peak_bytes / min(trl) if trl and ours and ours.extra_peak_bytes else None


def _engine_share(case: Case, ceilings: Mapping) -> float | None:
    """The largest of our variants'."""
    shares = [v.measures.get("engine_share") for v in case.variants if v.name.startswith(OURS)]
    return max(shares) if shares and None not in shares else None


def of_weightings(count: int) -> str:
    """The variant of a rollout with so many different weightings in its batch."""
    return f"{OURS}, {count} weighting{'' if count == 1 else 's'}"


def most_weightings(case: Case) -> tuple[int, Variant] | None:
    """A rollout's variant with the most weightings and how many they are; None where another one did not run or is wrong, lest
    an easier one be judged."""
    offered = [(int(m[1]), v) for v in case.variants if (m := _WEIGHTINGS.fullmatch(v.name))]
    if not offered or any(case.median(v.name) is None for _, v in offered):
        return None
    return max(offered, key=lambda found: found[0])


def _of_decode_bandwidth(case: Case, ceilings: Mapping) -> float | None:
    found = most_weightings(case)
    floor = case.floor_of(found[1]) if found else None
    return floor.bytes / found[1].times.median / ceilings["copy_bytes"] if floor else None


def _most_over(case: Case, other: str) -> float | None:
    found, beside = most_weightings(case), case.median(other)
    return found[1].times.median / beside if found and beside and found[1].name != other else None


def blend_over_merged(case: Case, ceilings: Mapping) -> float | None:
    return _most_over(case, MERGED)


def most_over_one(case: Case, ceilings: Mapping) -> float | None:
    return _most_over(case, of_weightings(1))


TARGETS = {
    "multi-lora-4096": Target(
        "multi-LoRA fwd+bwd 4096x4096, T=8192, over the frozen linear alone", "H200", "<=", 1.08, _over
    ),
    "multi-lora-896": Target(
        "multi-LoRA fwd+bwd 896x896, T=8192, over the frozen linear alone", "H200", "<=", 1.35, _over
    ),
    "multi-lora-cpu": Target(
        "multi-LoRA fwd+bwd 1024x1024, T=2048, over its FLOP floor relative to the bare linear",
        "2 CPU cores", "<=", 1.05, _over_its_flops,
    ),
    "decode": Target("multi-LoRA decode, 1-64 rows, share of copy bandwidth", "H200", ">=", 0.80, _of_bandwidth),
    "logprob-forward": Target(
        "linear_logprob forward 8192x4096x131072, share of the matrix-product rate", "H200", ">=", 0.95, _of_matmul
    ),
    "logprob-backward": Target(
        "linear_logprob fwd+bwd, frozen head, TFLOP/s of the two products it cannot do without", "H200", ">=", 745,
        _teraflops,
    ),
    "one-pass": Target(
        "log-prob, reference, entropy and exact KL, over two log-prob forwards", "H200", "<=", 1.05, _over_two_passes
    ),
    "interpolate": Target("weight-space op, share of copy bandwidth", "H200", ">=", 0.90, _of_bandwidth),
    "statistics-cpu": Target(
        "token statistics fwd+bwd T=2048 H=512 V=32000 float32, over the bare products", "2 CPU cores", "<=", 1.25, _over
    ),
    "statistics-cpu-memory": Target(
        "the same, peak extra memory over that of float32 logits", "2 CPU cores", "<=", 0.1, _memory_of_logits
    ),
    "rollout-floor": Target(
        "decode step of a rollout, most weightings, share of its bandwidth floor", "H200", ">=", 0.70, _of_decode_bandwidth
    ),
    "rollout-blend-gpu": Target(
        "decode step of a rollout, most weightings, over the merged model", "H200", "<=", 1.1, blend_over_merged
    ),
    "rollout-blend-cpu": Target(
        "decode step of a rollout, most weightings, over the merged model", "2 CPU cores", "<=", 1.1, blend_over_merged
    ),
    "rollout-weightings-gpu": Target(
        "decode step of a rollout, most weightings, over one weighting", "H200", "<=", 1.02, most_over_one
    ),
    "rollout-weightings-cpu": Target(
        "decode step of a rollout, most weightings, over one weighting", "2 CPU cores", "<=", 1.02,
        most_over_one,
    ),
    "step-cpu": Target("whole training step, times faster than TRL + PEFT", "2 CPU cores", ">=", 4, _times_faster_than_trl),
    "step-gpu": Target("whole training step, times faster than TRL + PEFT (+ Liger)", "H200", ">=", 2, _times_faster_than_trl),
    "step-gpu-memory": Target("whole training step, peak memory over TRL's", "H200", "<=", 0.6, _memory_of_trl),
    "engine-cpu": Target("whole training step, the engine's own share", "2 CPU cores", "<=", 0.03, _engine_share),
    "engine-gpu": Target("whole training step, the engine's own share", "H200", "<=", 0.03, _engine_share),
}  # fmt: skip


def verdicts(names: tuple[str, ...], case: Case, ceilings: Mapping, environment: Mapping) -> list[Verdict]:
    found = []
    for name in names:
        target = TARGETS[name]
        if (target.on == "H200") is not (environment.get("device_type") == "cuda"):
            continue
        value = target.value(case, ceilings)
        note = _why_not_judged(target, environment)
        met = None
        if value is None:
            note = "one of the variants it compares did not run or is wrong, or a ceiling was not measured"
        elif note is None:
            met = value <= target.limit if target.sense == "<=" else value >= target.limit
        found.append(Verdict(target.what, target.on, value, target.sense, target.limit, met, note))
    return found


def _why_not_judged(target: Target, environment: Mapping) -> str | None:
    if target.on == "H200":
        device = environment.get("device", "")
        return None if "H200" in device else f"for an H200; measured on {device}"
    threads = environment.get("threads")
    return None if threads == 2 else f"for two CPU cores; measured with {threads} threads"
