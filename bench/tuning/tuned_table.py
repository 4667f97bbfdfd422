"""From measurements of `python -m bench tune` to clp_kernels/triton_kernels/tuned.py, and what is to be said about it.

    ratio       a choice's time over the default's, at one entry of the table; the mean of logarithms over its trials
    winner      the least ratio; the default stays where nothing is faster than it by MARGIN
    reduced     the winners, less those that the table picks as well without (within SAME of the best at every shape)

The report says how the reduced table does on all that was measured, and how each shape would have fared had it not been
measured: with what the nearest other one takes ("unseen").
"""

from __future__ import annotations

import ast
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from clp_kernels.triton_kernels import tuned, tuning

from bench.core import schema
from clp_engine.core.tables import compact

MARGIN, SAME = 0.02, 0.01
PATH = Path(tuned.__file__)
Key = tuple[str, str, int]  # kernel, family, bytes of an element
Sizes = tuple[int, ...]


@dataclass
class Measured:
    """One entry of the table: every choice's time over the default's, and what the estimate had promised of it."""

    default: Any
    names: tuple[str, ...]
    ratios: dict[Any, float]
    promised: dict[Any, float] = field(default_factory=dict)

    @property
    def winner(self) -> Any:
        best = min(self.ratios, key=self.ratios.get)
        return best if self.ratios[best] <= 1 - MARGIN else self.default

    def loss(self, choice: Any) -> float:
        """Of a choice against the fastest; infinite where it was not measured or is wrong. None is the default."""
        ratio = self.ratios.get(self.default if choice is None else choice, math.inf)
        return ratio / min(self.ratios.values()) - 1


@dataclass
class Device:
    capability: str
    source: str
    entries: dict[Key, dict[Sizes, Measured]]


def choice_of(name: str) -> Any:
    return ast.literal_eval(name) if name.startswith("(") else name


def devices(results: Iterable[schema.Result]) -> dict[str, Device]:
    """What files of `bench tune` hold, by the names under which launchers look. A later file's case replaces an earlier's."""
    found: dict[str, tuple[dict, list[dict], dict[str, schema.Case]]] = {}
    for result in results:
        settings = result.settings
        if "table" not in settings:
            raise ValueError(
                "a result file of another command: expected one that `python -m bench tune --out FILE` wrote"
            )
        _, sources, cases = found.setdefault(settings["table"], (settings, [], {}))
        sources.append(result.environment)
        cases.update({case.id: case for case in result.cases})
    return {
        name: Device(settings["capability"], "; ".join(map(_source, sources)), _entries(cases.values()))
        for name, (settings, sources, cases) in found.items()
    }


def _source(environment: Mapping) -> str:
    versions = environment["versions"]
    return f"{environment['date']}, commit {environment['commit']}, torch {versions['torch']}, triton {versions['triton']}"


def _entries(cases: Iterable[schema.Case]) -> dict[Key, dict[Sizes, Measured]]:
    trials: dict[tuple[Key, Sizes], list[schema.Case]] = {}
    for case in cases:
        if case.median(case.options["default"]) is None:
            continue  # nothing to compare with
        key = (case.op, case.options["family"], getattr(torch, case.dtype).itemsize)
        trials.setdefault((key, tuple(case.shape.values())), []).append(case)
    entries: dict[Key, dict[Sizes, Measured]] = {}
    for (key, sizes), alike in trials.items():
        default = alike[0].options["default"]
        alike = [case for case in alike if case.options["default"] == default]
        names = set.intersection(
            *({v.name for v in c.variants if c.median(v.name) is not None} for c in alike)
        )
        times, promised = {}, {}
        for name in sorted(names):
            logs = [math.log(case.median(name) / case.median(default)) for case in alike]
            times[choice_of(name)] = math.exp(statistics.fmean(logs))
            said = [c.variant(name).measures.get("estimate") for c in alike]
            at_default = [c.variant(default).measures.get("estimate") for c in alike]
            if all(said) and all(at_default):
                logs = [math.log(a / b) for a, b in zip(said, at_default)]
                promised[choice_of(name)] = math.exp(statistics.fmean(logs))
        entries.setdefault(key, {})[sizes] = Measured(
            choice_of(default), tuple(alike[0].shape), times, promised
        )
    return entries


def reduced(measured: Mapping[Sizes, Measured]) -> dict[Sizes, Any]:
    """The winners without those that no measured shape misses, the largest shapes kept longest."""
    table = {sizes: m.winner for sizes, m in sorted(measured.items(), key=lambda item: -math.prod(item[0]))}
    for sizes in sorted(table, key=math.prod):
        rest = {other: choice for other, choice in table.items() if other != sizes}
        if all(
            # A winner within MARGIN of the best is not to be missed for what is further from it.
            m.loss(tuning.nearest(rest, shape)) <= max(SAME, m.loss(table.get(shape, m.winner)))
            for shape, m in measured.items()
        ):
            table = rest
    return table


def tables(found: Mapping[str, Device]) -> dict[str, dict]:
    """In the form of tuned.DEVICES."""
    return {
        name: {
            "capability": device.capability,
            "source": device.source,
            "choices": {key: table for key, m in sorted(device.entries.items()) if (table := reduced(m))},
        }
        for name, device in sorted(found.items())
    }


def rendered(found: Mapping[str, Device]) -> str:
    """The text of tuned.py."""
    head = (tuned.__doc__ or "").strip("\n")
    lines = [f'"""{head}\n"""', "", "# fmt: off"]
    contents = tables(found)
    if not contents:
        return "\n".join([*lines, "DEVICES: dict = {}", ""])
    lines.append("DEVICES: dict = {")
    for name, device in contents.items():
        lines += [f'    "{name}": {{', f'        "capability": "{device["capability"]}",']
        sources = device["source"].split("; ")
        lines += [
            '        "source": (',
            *(f'            "{text}{"; " * (text != sources[-1])}"' for text in sources),
            "        ),",
        ]
        lines.append('        "choices": {')
        for key, table in device["choices"].items():
            measured = found[name].entries[key]
            names = next(iter(measured.values())).names
            lines += [f"            # {', '.join(names)}", f"            {_literal(key)}: {{"]
            for sizes, choice in sorted(table.items()):
                ratio = measured[sizes].ratios[choice]
                said = (
                    "the default"
                    if choice == measured[sizes].default
                    else f"{ratio:.2f} of the default's time"
                )
                lines.append(f"                {_literal(sizes)}: {_literal(choice)},  # {said}")
            lines.append("            },")
        lines += ["        },", "    },"]
    return "\n".join([*lines, "}", ""])


def _literal(value: Any) -> str:
    """As ruff would write it."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        inner = ", ".join(map(_literal, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)


def report(found: Mapping[str, Device]) -> str:
    """Markdown: what each table is worth, which changes it makes, and where each way of doing a product wins."""
    lines = []
    for name, device in sorted(found.items()):
        lines += [f"{name} ({device.source})", ""]
        rows, changes, ways = [], [], []
        for key, measured in sorted(device.entries.items()):
            rows.append(_row(key, measured))
            changes += _changes(key, measured)
            if any(isinstance(m.default, str) for m in measured.values()):
                ways += _ways(key, measured)
        losses = ["loss, mean / worst: default", "table", "unseen"]
        lines += compact(["choice", "shapes", "entries", "right: default / table / unseen", *losses], rows)
        lines += ["", *compact(["choice", "shape", "default", "taken", "predicted", "measured"], changes)]
        lines += ["", *ways, ""]
    return "\n".join(lines)


def _label(key: Key) -> str:
    kernel, family, itemsize = key
    return f"{kernel}, {family}, {8 * itemsize} bits"


def _row(key: Key, measured: Mapping[Sizes, Measured]) -> Sequence[object]:
    table = reduced(measured)
    winners = {sizes: m.winner for sizes, m in measured.items()}
    picks = {
        "default": {sizes: None for sizes in measured},
        "table": {sizes: tuning.nearest(table, sizes) for sizes in measured},
        "unseen": {
            sizes: tuning.nearest({s: c for s, c in winners.items() if s != sizes}, sizes)
            for sizes in measured
        },
    }
    right, losses = [], []
    for picked in picks.values():
        found = [m.loss(picked[sizes]) for sizes, m in measured.items()]
        right.append(sum(loss <= SAME for loss in found))
        # A choice that was not measured at a shape (its estimate was hopeless) has no loss to be counted.
        known = [loss for loss in found if math.isfinite(loss)]
        text = f"{100 * statistics.fmean(known):.1f}% / {100 * max(known):.1f}%" if known else "-"
        losses.append(
            text + (f" ({len(found) - len(known)} not measured)" if len(known) < len(found) else "")
        )
    counts = " / ".join(map(str, right))
    return _label(key), len(measured), len(table), counts, *losses


def _changes(key: Key, measured: Mapping[Sizes, Measured]) -> list[Sequence[str]]:
    rows = []
    table = reduced(measured)
    for sizes, m in sorted(measured.items()):
        choice = tuning.nearest(table, sizes)
        if choice in (None, m.default) or choice not in m.ratios:
            continue
        said = f"{m.promised[choice]:.2f}" if choice in m.promised else "-"
        shape = " ".join(f"{name}={size}" for name, size in zip(m.names, sizes))
        rows.append((_label(key), shape, str(m.default), str(choice), said, f"{m.ratios[choice]:.2f}"))
    return rows


def _ways(key: Key, measured: Mapping[Sizes, Measured]) -> list[str]:
    lines = []
    for way in sorted({choice for m in measured.values() for choice in m.ratios}):
        wins = {
            sizes: m
            for sizes, m in measured.items()
            if way in m.ratios and m.loss(way) == 0 and len(m.ratios) > 1
        }
        if not wins:
            lines.append(f"- {_label(key)}: {way} wins at none of {len(measured)} shapes")
            continue
        gains = {s: sorted(m.ratios.values())[1] / m.ratios[way] for s, m in wins.items()}
        most = max(gains, key=gains.get)
        lines.append(
            f"- {_label(key)}: {way} wins at {len(wins)} of {len(measured)} shapes, by {gains[most]:.2f} at {most}"
        )
    return lines


def write(files: Iterable[str | Path], to: str | Path = PATH) -> str:
    """Replaces the table by what the files hold; returns the report. Other devices' entries are not kept: name their files."""
    found = devices(schema.load(file) for file in files)
    to = Path(to)
    simulated = [name for name, device in found.items() if device.capability == tuning.SIMULATED]
    if simulated and to.resolve() == PATH.resolve():
        raise SystemExit(
            f"{', '.join(simulated)}: a rehearsal without a GPU does not belong in {PATH.name}; give another file with --to"
        )
    dropped = sorted(set(tuned.DEVICES) - set(found)) if to.resolve() == PATH.resolve() else []
    to.write_text(rendered(found), encoding="utf-8")
    lines = [f"{name} is no longer in {to.name}: name its file too to keep it" for name in dropped]
    return "\n".join([*lines, report(found)])
