"""The form of a result file, as dataclasses, and its check.

    load(path) -> Result        raises ValueError naming every place that does not fit
    save(result, path)          checks first, writes to a temporary name and renames

A file is one JSON object with the fields of `Result`. Times are seconds, sizes bytes. bench/README.md explains the fields in
words.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

VERSION = 1
STATUS = ("ok", "wrong", "unavailable")

_MISSING = re.compile("Object missing required field `(.+?)`")  # as msgspec says it


@dataclass
class Times:
    """Seconds per call over `runs` timed calls; quartiles are None in results that did not keep them."""

    median: float
    q1: float | None
    q3: float | None
    min: float
    max: float
    runs: int


@dataclass
class Error:
    """Of one output: ||output - exact|| / ||exact|| against float64, the variant's own and plain torch's in the same dtype."""

    own: float | None  # None where the output is not finite
    torch: float
    allowed: float


@dataclass
class Variant:
    """One way to compute a case. `reason` says why it is unavailable or wrong.

    Of a training step or a rollout: `phases`, the median seconds of each phase of it; of a training step `measures`, numbers
    without a unit of time (engine_share, logprob_gap_mean, logprob_gap_max). `floor`: where the variant has another than its
    case, since it computes more (low-rank factors beside the weights).
    """

    name: str
    status: str
    reason: str | None = None
    times: Times | None = None
    timing: str | None = None  # how: "clock, cold cache", "events, cold L2", "graph of 64 calls"
    extra_peak_bytes: int | None = None
    errors: dict[str, Error] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)
    floor: Floor | None = None


@dataclass
class Floor:
    """The least work of a case and the time it takes at the measured ceilings: max of the three terms."""

    flops: float
    bytes: float
    exps: float
    seconds: float
    bound: str  # which term it is: "compute", "memory" or "exp"


@dataclass
class Verdict:
    """A target of bench.core.targets and what this case says of it; `met` is None where `note` says it cannot be judged."""

    target: str
    on: str
    value: float | None
    sense: str
    limit: float
    met: bool | None
    note: str | None = None


@dataclass
class Case:
    id: str
    group: str
    op: str
    title: str
    shape: dict[str, int]
    dtype: str
    variants: list[Variant]
    options: dict[str, str] = field(default_factory=dict)
    bare: str | None = None  # the variant that is the library products alone
    floor: Floor | None = None
    verdicts: list[Verdict] = field(default_factory=list)

    def variant(self, name: str | None) -> Variant | None:
        return next((v for v in self.variants if v.name == name), None)

    @property
    def tokens(self) -> int | None:
        """Of what a time is for: of a training step prompt and completion, a prompt once for each of its completions; of a
        decode step one of each row; None for other cases."""
        if self.op == "decode_step":
            return self.shape["rows"]
        if self.op != "step":
            return None
        return self.shape["batch"] * (self.shape["prompt"] + self.shape["new"])

    def floor_of(self, variant: Variant) -> Floor | None:
        return variant.floor or self.floor

    def median(self, name: str | None) -> float | None:
        """Of a variant that ran and is right, else None."""
        found = self.variant(name)
        return found.times.median if found and found.status == "ok" and found.times else None


@dataclass
class Peer:
    name: str
    version: str | None
    unavailable: str | None


@dataclass
class Result:
    version: int
    environment: dict[str, typing.Any]
    settings: dict[str, typing.Any]
    ceilings: dict[str, typing.Any]
    peers: list[Peer]
    cases: list[Case]


def load(path: str | Path) -> Result:
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no JSON ({error}); measure or copy it again") from error
    return read(data, str(path))


def read(data: object, where: str = "result") -> Result:
    try:
        result = msgspec.convert(data, Result)
    except msgspec.ValidationError as error:
        said = _MISSING.sub(r"field '\1' is missing", str(error))
        raise ValueError(f"{where}: {said}") from error
    problems = [*_left_out(data, dataclasses.asdict(result), where)]
    problems = problems or [f"{where}: {problem}" for problem in _inconsistencies(result)]
    if problems:
        raise ValueError("\n".join(problems))
    return result


def save(result: Result, path: str | Path) -> None:
    data = dataclasses.asdict(result)
    read(data)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _left_out(given, read, where: str) -> typing.Iterator[str]:
    """What a file holds and a result has no place for: fields that are not known, numbers that are not finite."""
    if isinstance(given, dict):
        for name in sorted(given.keys() - read.keys()):
            yield f"{where}: unknown field {name!r}; known are {', '.join(read)}"
        for name in given.keys() & read.keys():
            yield from _left_out(given[name], read[name], f"{where}.{name}")
    elif isinstance(given, list):
        for i, (one, other) in enumerate(zip(given, read)):
            yield from _left_out(one, other, f"{where}[{i}]")
    elif isinstance(given, float) and not math.isfinite(given):
        yield f"{where}: {given} is not finite"


def _inconsistencies(result: Result):
    if result.version != VERSION:
        yield f"version {result.version}; this program reads {VERSION}"
    ids = [case.id for case in result.cases]
    for repeated in sorted({i for i in ids if ids.count(i) > 1}):
        yield f"case {repeated!r} occurs more than once"
    for case in result.cases:
        if case.bare is not None and case.variant(case.bare) is None:
            yield f"{case.id}: its bare variant {case.bare!r} is not among the variants"
        for v in case.variants:
            where = f"{case.id}: {v.name}"
            if v.status not in STATUS:
                yield f"{where}: status {v.status!r}; expected one of {', '.join(STATUS)}"
            if v.status != "ok" and not v.reason:
                yield f"{where}: {v.status} without a reason"
            if v.status == "ok" and v.times is None:
                yield f"{where}: ok without times"
            if v.status == "ok" and any(e.own is None or e.own > e.allowed for e in v.errors.values()):
                yield f"{where}: an error above what is allowed, yet not marked wrong"
            if v.times is not None:
                order = [
                    x
                    for x in (v.times.min, v.times.q1, v.times.median, v.times.q3, v.times.max)
                    if x is not None
                ]
                if order != sorted(order) or order[0] <= 0 or v.times.runs < 1:
                    yield f"{where}: times {v.times} are not in order"


def case_id(
    group: str, title: str, shape: typing.Mapping[str, int], dtype: str, options: typing.Mapping[str, str]
) -> str:
    """What makes two cases of two files the same case."""
    sizes = " ".join(f"{name}={size}" for name, size in shape.items())
    more = " ".join(f"{name}={value}" for name, value in options.items())
    return " / ".join(part for part in (group, title, sizes, dtype, more) if part)
