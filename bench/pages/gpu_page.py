"""What docs/gpu.md and README.md say of GPUs: views of every result in bench/results that comes from one.

    summary     a sentence where nothing was measured, else each target with the worst of the cases that it judges
    targets     for each target of a GPU: limit, what was measured, whether it is met, share of the floor, what bounds it
    round       the stages of each GPU round: exit code, seconds, last line
    ceilings    what each device can do
    cases       every case, as `python -m bench table` has them
    counters    what bounds each kernel, by the hardware's counters
    fronts      the demo's front on the GPU beside the CPU's
    steps       where the time of a training step goes
    tokens      where the time of some tokens of a rollout goes

DEVICE_GROUP.json are the groups' results, and counters/DEVICE.json, fronts/DEVICE.json, rounds/DEVICE.json, tokens/DEVICE.json
and profiles/DEVICE_MODEL.json the rest of a round, as `python -m bench collect` puts them there.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench.core import schema, text
from bench.core.targets import OURS, TARGETS
from bench.gpu import counters, fronts
from bench.pages import report
from clp_engine.core import tables

GPU = "H200"  # what TARGETS calls the machine
_EXITS = {0: "passed", 3: "budget used up", 124: "stopped at its limit"}
NOTHING = "Nothing has been measured on a GPU yet."


def view(name: str, results: Path) -> list[str]:
    """Lines of Markdown. Raises ValueError for a view that there is not."""
    if name not in VIEWS:
        raise ValueError(f"<!-- bench:gpu/{name} -->: there is no such view; known: {', '.join(VIEWS)}")
    return VIEWS[name](results)


def found(results: Path) -> dict[str, schema.Result]:
    """The results that were measured on a GPU, by the stem of their file."""
    loaded = {}
    for path in sorted(results.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("environment", {}).get("device_type") == "cuda" and "cases" in data:
            loaded[path.stem] = schema.load(path)
    return loaded


def _kept(results: Path, folder: str) -> dict[str, dict]:
    return {
        p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted((results / folder).glob("*.json"))
    }


def _of_a_gpu(results: Path, folder: str) -> dict[str, dict]:
    kept = _kept(results, folder)
    return {stem: c for stem, c in kept.items() if c.get("environment", {}).get("device_type") == "cuda"}


def _summary(results: Path) -> list[str]:
    return _targets(results, worst=True) if found(results) else [NOTHING]


def _targets(results: Path, worst: bool = False) -> list[str]:
    measured = found(results)
    bounds = {
        case["id"]: case["kernels"][0]
        for content in _of_a_gpu(results, "counters").values()
        for case in content["cases"]
        if case["kernels"]
    }
    rows = []
    for target in (t for t in TARGETS.values() if t.on == GPU):
        judged = [
            (result, case, verdict)
            for result in measured.values()
            for case in result.cases
            for verdict in case.verdicts
            if verdict.target == target.what
        ]
        if worst:
            valued = [one for one in judged if one[2].value is not None]
            extreme = max if target.sense == "<=" else min
            judged = [extreme(valued, key=lambda one: one[2].value)] if valued else judged[:1]
        limit = f"{target.sense} {target.limit:g}"
        rows += [_row(limit, bounds, *one) for one in judged] or [
            [target.what, limit, "not measured", "", "", "", ""]
        ]
    names = ["target", "limit", "measured", "", "of the floor", "bound by", "on"]
    table = tables.compact(names, rows)
    return table if measured else [NOTHING, "", *table]


def _row(
    limit: str, bounds: dict, result: schema.Result, case: schema.Case, verdict: schema.Verdict
) -> list[str]:
    ours = case.median(OURS)
    floor = f"{100 * case.floor.seconds / ours:.0f}%" if ours and case.floor else ""
    bound = f"{case.floor.bound} (floor)" if case.floor else ""
    if kernel := bounds.get(case.id):
        bound += f"; `{kernel['name']}`: {kernel['bound']}"
    value = "" if verdict.value is None else f"{verdict.value:.3g}"
    met = "not judged" if verdict.met is None else "met" if verdict.met else "**not met**"
    met += f": {verdict.note}" if verdict.note else ""
    where = f"{verdict.target} ({report.heading(case)})"
    return [where, limit, value, met, floor, bound, str(result.environment["device"])]


def _ceilings(results: Path) -> list[str]:
    rows = []
    for stem, result in found(results).items():
        c = result.ceilings
        if not c:
            continue
        rates = ", ".join(f"{name} {rate / 1e12:,.0f}" for name, rate in c["matmul_flops"].items())
        numbers = [f"{c[name] / 1e12:.2f}" for name in ("copy_bytes", "read_bytes", "exp_rate")]
        rows.append([f"`{stem}`", result.environment["device"], rates, *numbers])
    names = ["result", "device", "matrix product, TFLOP/s", "copy, TB/s", "read, TB/s", "exponentials, T/s"]
    return tables.compact(names, rows) if rows else [NOTHING]


def _cases(results: Path) -> list[str]:
    lines = []
    for stem, result in found(results).items():
        for case in result.cases:
            lines += [f"**{case.group}**: {report.heading(case)}", "", *report.case_table(case), ""]
        left_out = result.settings.get("left_out") or {}
        if left_out:
            lines += [f"Left out of `{stem}`: {len(left_out)} cases, whose reasons are in the file.", ""]
        lines += [f"{report.provenance(result)} (`bench/results/{stem}.json`).", ""]
    return lines or [NOTHING]


def _counters(results: Path) -> list[str]:
    lines = []
    for stem, content in _of_a_gpu(results, "counters").items():
        source = f"{content['environment']['device']} (`bench/results/counters/{stem}.json`)."
        lines += [*counters.table(content), "", source, ""]
    return lines or ["No counters have been read yet."]


def _fronts(results: Path) -> list[str]:
    lines = []
    for stem, content in _kept(results, "fronts").items():
        picture = f"![Both fronts]({stem}_front.png)"
        lines += [*fronts.brief(content), "", picture, "", f"`bench/results/fronts/{stem}.json`", ""]
    return lines or ["The demo has not been run on a GPU yet."]


def _round(results: Path) -> list[str]:
    lines = []
    for stem, content in _of_a_gpu(results, "rounds").items():
        rows = [
            [name, _EXITS.get(s["exit"], f"exit code {s['exit']}"), f"{s['seconds']:.0f}", s["last"]]
            for name, s in content["stages"].items()
        ]
        e, file = content["environment"], f"`bench/results/rounds/{stem}.json`"
        source = f"{e['device']}, {e['date']}, commit {(e.get('commit') or 'unknown')[:7]} ({file})."
        lines += [*tables.compact(["stage", "", "seconds", "its last line"], rows), "", source, ""]
    return lines or [NOTHING]


def _steps(results: Path) -> list[str]:
    rows = []
    for stem, profile in _of_a_gpu(results, "profiles").items():
        shape = " ".join(f"{name}={size}" for name, size in profile["shape"].items())
        rows.append(
            [
                f"`{stem}`",
                profile["model"],
                shape,
                text.seconds(profile["step"]),
                f"{100 * profile['engine_share']:.1f}%",
            ]
        )
    names = ["profile", "model", "shape", "step", "engine's own"]
    return tables.compact(names, rows) if rows else [NOTHING]


def _tokens(results: Path) -> list[str]:
    lines = []
    for stem, found in _of_a_gpu(results, "tokens").items():
        rows = [
            [f"`{kernel['name']}`", kernel["launches"], f"{1e3 * kernel['seconds']:.2f}"]
            for kernel in found["kernels"][:12]
        ]
        span, busy = (f"{1e3 * found[name]:.1f} ms" for name in ("span", "busy"))
        source = (
            f"{found['tokens']} tokens of {found['model']}: {span}, of which kernels run {busy}; "
            f"{found['environment']['device']} (`bench/results/tokens/{stem}.json`)."
        )
        lines += [*tables.compact(["kernel", "launches", "ms"], rows), "", source, ""]
    return lines or [NOTHING]


VIEWS = {
    "summary": _summary, "targets": _targets, "round": _round, "ceilings": _ceilings, "cases": _cases,
    "counters": _counters, "fronts": _fronts, "steps": _steps, "tokens": _tokens,
}  # fmt: skip
