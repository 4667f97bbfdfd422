"""Results in words: a line while measuring, Markdown tables after."""

from __future__ import annotations

from collections.abc import Iterable

from bench.core.schema import Case, Result, Variant
from bench.core.targets import OURS, blend_over_merged, most_over_one, most_weightings
from bench.core.text import seconds, size
from clp_engine.core.tables import compact

YARDSTICKS = ("torch", "torch, full logits", "trl + peft", "transformers generate, merged model")


def spread(variant: Variant) -> str:
    """median [first quartile, third quartile], or the range where quartiles were not kept."""
    t = variant.times
    low, high = (t.q1, t.q3) if t.q1 is not None else (t.min, t.max)
    return f"{seconds(t.median)} [{seconds(low)}, {seconds(high)}]"


def yardstick(case: Case) -> str | None:
    return next((name for name in YARDSTICKS if case.median(name)), None)


def heading(case: Case) -> str:
    sizes = " ".join(f"{name}={size}" for name, size in case.shape.items())
    options = ", ".join(f"{name} {value}" for name, value in case.options.items())
    return f"{case.title}, {sizes}, {case.dtype}" + (f", {options}" if options else "")


def provenance(result: Result) -> str:
    """Device, threads, date, commit, and what measured."""
    e = result.environment
    plural = "" if e.get("threads") == 1 else "s"
    threads = (
        f", {e['threads']} thread{plural}" if e.get("threads") and e.get("device_type") != "cuda" else ""
    )
    if "threads" in str(e.get("device")):
        threads = ""
    versions = ", ".join(
        f"{name} {v}" for name, v in e["versions"].items() if v and name in ("torch", "triton", "trl")
    )
    commit = e.get("commit") or "unknown"
    short = commit[:7] + ("-dirty" if commit.endswith(("+", "-dirty")) else "")
    cores = f" ({e['instruction_set']})" if e.get("instruction_set") else ""
    return f"{e['device']}{cores}{threads}, {e['date']}, commit {short}, {versions}"


def line(case: Case) -> str:
    """For the terminal, as soon as a case is done."""
    ours = [v for v in case.variants if v.name.startswith(OURS)]
    parts = []
    for variant in ours:
        if variant.status != "ok":
            parts.append(f"{variant.name} {variant.status}: {variant.reason}")
            continue
        text = f"{variant.name} {seconds(variant.times.median)}"
        for name, label in ((yardstick(case), yardstick(case)), (case.bare, "bare")):
            if other := case.median(name):
                text += f", {variant.times.median / other:.2f}x {label}"
        parts.append(text)
    return f"{case.group}: {heading(case)}: {'; '.join(parts)}"


def tables(result: Result) -> str:
    lines = [provenance(result), ""]
    if result.ceilings:
        lines += [*_ceilings(result), ""]
    for case in result.cases:
        lines += [f"**{case.group}**: {heading(case)}", "", *case_table(case), ""]
    judged = targets(result.cases)
    if judged:
        lines += ["**Targets**", "", *judged, ""]
    left_out = result.settings.get("left_out") or {}
    if left_out:
        lines += ["**Left out**", "", *(f"- {name}: {reason}" for name, reason in left_out.items()), ""]
    return "\n".join(lines).rstrip()


def _ceilings(result: Result) -> list[str]:
    c = result.ceilings
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in c["matmul_flops"].items())
    return [
        f"Ceilings: matrix product of side {c['matmul_side']} {rates}; copy {c['copy_bytes'] / 1e9:,.1f} GB/s, "
        f"read {c['read_bytes'] / 1e9:,.1f} GB/s; {c['exp_rate'] / 1e9:,.2f} G exponentials/s"
    ]


def case_table(case: Case) -> list[str]:
    """Every variant; ratios only for those that are right."""
    other, bare = yardstick(case), case.median(case.bare)
    rows = []
    for v in case.variants:
        if v.status != "ok":
            timed = f"{seconds(v.times.median)}, but " if v.times else ""
            rows.append([v.name, f"{timed}{v.status}: {v.reason}", *[""] * 9])
            continue
        median = v.times.median
        rows.append(
            [
                v.name,
                spread(v),
                f"{case.median(other) / median:.2f}x" if other and v.name != case.bare else "",
                f"{median / bare:.2f}x" if bare and v.name != case.bare else "",
                _of_floor(case, v),
                size(v.extra_peak_bytes),
                _worst(v),
                f"{case.tokens / median:,.0f}" if case.tokens else "",
                *_measures(v),
            ]
        )
    names = [
        "variant",
        "median [quartiles]",
        f"faster than {(other or 'torch').partition(',')[0]}",
        "of the bare products' time",
        "of the floor",
        "extra peak memory",
        "error / torch's",
        "tokens/s",
        "engine's own",
        "log-prob gap, mean",
        "log-prob gap, largest",
    ]
    if case.floor:
        names[4] += f" ({case.floor.bound})"
    if case.bare and case.bare.startswith(OURS):
        names[3] = f"of the {case.bare.partition(', ')[2]}'s time"
    # Where quartiles were not kept, the spread is the range; columns that no row fills are left out.
    if any(v.times is not None and v.times.q1 is None for v in case.variants):
        names[1] = "median [range]"
    filled = [i for i in range(len(names)) if i < 2 or any(row[i] for row in rows)]
    table = compact([names[i] for i in filled], [[row[i] for i in filled] for row in rows])
    phases = phase_table(case)
    return [*table, "", *phases] if phases else table


def _of_floor(case: Case, variant: Variant) -> str:
    floor = case.floor_of(variant)
    return f"{100 * floor.seconds / variant.times.median:.0f}%" if floor else ""


def decode_table(cases: Iterable[Case]) -> list[str]:
    """A line for each case of the group `rollout`: its blend beside the merged model."""
    rows = []
    for case in cases:
        found, merged, s = most_weightings(case), case.variant(case.bare), case.shape
        if found is None or not case.median(case.bare):
            continue
        most, blend = found
        over_one, base, other = most_over_one(case, {}), case.median(f"{OURS}, reference"), yardstick(case)
        rows.append(
            [
                case.options["model"],
                f"{s['rows']} in groups of {s['group']}",
                spread(merged),
                spread(blend),
                str(most),
                f"{blend_over_merged(case, {}):.2f}x",
                f"{blend.times.median / base:.2f}x" if base else "",
                f"{over_one:.2f}x" if over_one else "",
                _of_floor(case, blend),
                f"{case.tokens / blend.times.median:,.0f}",
                f"{case.median(other) / blend.times.median:.1f}x" if other else "",
            ]
        )
    names = [
        "model", "rows", "step, merged model", "step, blend", "weightings", "over merged", "over base", "over one weighting",
        "of its floor", "tokens/s", "faster than transformers generate",
    ]  # fmt: skip
    return compact(names, rows) if rows else []


def phase_table(case: Case) -> list[str]:
    """Milliseconds of each phase of a training step or a rollout and its share; empty where no variant knows them."""
    known = [v for v in case.variants if v.status == "ok" and v.phases]
    names = list(
        dict.fromkeys(name for v in sorted(known, key=lambda v: -len(v.phases)) for name in v.phases)
    )
    rows = []
    for v in known:
        whole = sum(v.phases.values())
        shares = (v.phases.get(name) for name in names)
        rows.append(
            [v.name, *("" if s is None else f"{seconds(s)} ({100 * s / whole:.0f}%)" for s in shares)]
        )
    return compact(["phase", *names], rows) if rows else []


def _measures(variant: Variant) -> list[str]:
    share, *gaps = (variant.measures.get(n) for n in ("engine_share", "logprob_gap_mean", "logprob_gap_max"))
    return ["" if share is None else f"{100 * share:.1f}%", *("" if g is None else f"{g:.1e}" for g in gaps)]


def _worst(variant: Variant) -> str:
    """The largest error relative to torch's; "exact" where both are."""
    ratios = [e.own / e.torch for e in variant.errors.values() if e.own is not None and e.torch > 0]
    if ratios:
        return f"{max(ratios):.2f}"
    return "exact" if variant.errors else ""


def targets(cases: Iterable[Case]) -> list[str]:
    rows = []
    for case in cases:
        for v in case.verdicts:
            verdict = "not judged" if v.met is None else "met" if v.met else "not met"
            value = "" if v.value is None else f"{v.value:.3g}"
            where = f"{v.target} ({heading(case)})"
            rows.append(
                [where, v.on, f"{v.sense} {v.limit:g}", value, verdict + (f": {v.note}" if v.note else "")]
            )
    return compact(["target", "on", "limit", "measured", ""], rows) if rows else []
