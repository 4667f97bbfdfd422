"""Two result files, case by case: how much slower or faster, and whether that is more than the spread.

A slow-down counts as a regression where it exceeds the tolerance and the two spreads (quartiles, or the range where quartiles
were not kept) do not overlap; so does a variant that was right and is not any more.
"""

from __future__ import annotations

from bench.core import schema, text
from bench.core.schema import Times
from bench.core.targets import OURS
from clp_engine.core import tables


def interval(times: Times) -> tuple[float, float]:
    return (times.q1, times.q3) if times.q1 is not None and times.q3 is not None else (times.min, times.max)


def overlap(a: Times, b: Times) -> bool:
    (low_a, high_a), (low_b, high_b) = interval(a), interval(b)
    return low_a <= high_b and low_b <= high_a


def compare(before: str, after: str, tolerance: float, everyone: bool = False) -> int:
    """Prints a table; 1 where there is a regression (of this project's variants, or of all with `everyone`), else 0."""
    old, new = schema.load(before), schema.load(after)
    for name in ("device", "threads"):
        if old.environment.get(name) != new.environment.get(name):
            print(f"note: {name} differs: {old.environment.get(name)} and {new.environment.get(name)}")
    rows, regressions = [], []
    found = {case.id: case for case in new.cases}
    for case in old.cases:
        other = found.pop(case.id, None)
        if other is None:
            rows.append([case.id, "", "", "", "only in the first"])
            continue
        for variant in case.variants:
            again = other.variant(variant.name)
            verdict, numbers = _judge(variant, again, tolerance)
            if verdict is None:
                continue
            rows.append([case.id, variant.name, *numbers, verdict])
            if verdict.startswith(("slower", "no longer")) and (everyone or variant.name.startswith(OURS)):
                regressions.append(f"{case.id}: {variant.name}: {verdict}")
    rows += [[case, "", "", "", "only in the second"] for case in found]
    print("\n".join(tables.compact(["case", "variant", "before", "after / before", ""], rows)))
    for line in regressions:
        print(f"REGRESSION {line}")
    return 1 if regressions else 0


def _judge(
    variant: schema.Variant, again: schema.Variant | None, tolerance: float
) -> tuple[str | None, list[str]]:
    """What to say of a variant, and its two numbers; None where it ran in neither."""
    if variant.status != "ok" and (again is None or again.status != "ok"):
        return None, []
    if variant.status != "ok":
        return f"now ok; was {variant.status}", ["", ""]
    if again is None:
        return "no longer there", [text.seconds(variant.times.median), ""]
    if again.status != "ok":
        return f"no longer ok: {again.status}, {again.reason}", [text.seconds(variant.times.median), ""]
    ratio = again.times.median / variant.times.median
    numbers = [text.seconds(variant.times.median), f"{ratio:.3f}"]
    if overlap(variant.times, again.times):
        return "same within the spread", numbers
    if ratio > 1 + tolerance:
        return "slower", numbers
    return ("faster" if ratio < 1 else "within the tolerance"), numbers
