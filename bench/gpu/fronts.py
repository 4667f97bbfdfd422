"""Whether two Pareto reports show the same front: python -m bench.gpu.fronts REFERENCE.json MEASURED.json [--out STEM]

Compared are the mean reward of each objective at each weighting, the base model's rewards, the hypervolume and the realised
utility: one difference each. Reports keep 95% bootstrap intervals, so a standard error is an interval's width / (2 * 1.96), and

    z = (measured - reference) / sqrt(se_measured^2 + se_reference^2)          p = P(|Normal| > |z|)

The fronts agree where no p is below 0.05 after Holm's correction for the number of comparisons, which holds whatever their
dependence: 1 in 20 pairs of equal fronts would be called different at most, however many weightings there are. That two
intervals overlap is said for each comparison beside it, but judges nothing.

What this cannot see: a difference below `smallest`, which the correction would let through at any one comparison. What it
leaves out: two trainings with other rounding are two runs, and differ by more than the prompts they are evaluated on, while
intervals are over prompts alone; on the other hand both use the same prompts, which makes the test conservative. KL and length
come without intervals and are shown, not judged.

With --out: STEM.json, STEM.md and, where matplotlib is there, STEM.png with both fronts. Exits with 0 where they agree, 1 where
they do not, 2 where they cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist

from clp_engine.core import tables
from clp_engine.core.errors import ConfigError
from clp_engine.core.statistics import Interval
from clp_engine.evaluation.front import Point
from clp_engine.evaluation.report import ParetoReport

LEVEL = 0.05
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Comparison:
    """One number of both reports; p is adjusted for all comparisons, smallest the difference that would have been seen."""

    what: str
    reference: Interval
    measured: Interval
    z: float
    p: float
    overlap: bool
    smallest: float

    @property
    def differs(self) -> bool:
        return self.p < LEVEL


def standard_error(value: Interval, confidence: float = 0.95) -> float:
    return (value.high - value.low) / (2 * _NORMAL.inv_cdf((1 + confidence) / 2))


def holm(p_values: list[float]) -> list[float]:
    """p adjusted for their number: the k-th smallest of n times (n - k + 1), made non-decreasing, at most 1."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = highest
    return adjusted


def compare(reference: ParetoReport, measured: ParetoReport) -> list[Comparison]:
    """Raises ConfigError where the reports are of other objectives, weightings, prompts or KL coefficients."""
    for name, one, other in (
        ("task", reference.task, measured.task),
        ("objectives", reference.objectives, measured.objectives),
        ("points", [_asked(p) for p in reference.points], [_asked(p) for p in measured.points]),
        *((f"setup.{n}", reference.setup.get(n), measured.setup.get(n)) for n in _SETUP),
    ):
        if one != other:
            raise ConfigError(f"the reports differ in {name}: {one} and {other}; evaluate both alike")
    pairs = [("hypervolume", reference.hypervolume_interval, measured.hypervolume_interval)]
    realised = "realised utility", reference.realised_utility_interval, measured.realised_utility_interval
    pairs.append(realised)
    for name in reference.objectives:
        pairs.append((f"{name}, base model", reference.base.rewards[name], measured.base.rewards[name]))
        for one, other in zip(reference.points, measured.points):
            pairs.append((f"{name} at {label(one)}", one.rewards[name], other.rewards[name]))
    errors = [math.hypot(standard_error(a), standard_error(b)) for _, a, b in pairs]
    scores = [_score(b.mean - a.mean, error) for (_, a, b), error in zip(pairs, errors)]
    p_values = holm([2 * (1 - _NORMAL.cdf(abs(z))) for z in scores])
    reach = _NORMAL.inv_cdf(1 - LEVEL / (2 * len(pairs)))
    return [
        Comparison(what, a, b, z, p, a.low <= b.high and b.low <= a.high, reach * error)
        for (what, a, b), z, p, error in zip(pairs, scores, p_values, errors)
    ]


_SETUP = ("prompts", "num_generations", "sampling", "seed", "confidence")
_FAR = 1e3  # standard errors: what a difference of two exact numbers counts as


def _score(difference: float, error: float) -> float:
    if error == 0:
        return 0.0 if difference == 0 else math.copysign(_FAR, difference)
    return max(-_FAR, min(_FAR, difference / error))


def _asked(point: Point) -> tuple:
    return tuple(round(w, 6) for w in point.weights.values()), round(point.kl_coef, 6)


def label(point: Point) -> str:
    return ", ".join(f"{name} {weight:g}" for name, weight in point.weights.items())


def to_dict(reference: ParetoReport, measured: ParetoReport, found: list[Comparison]) -> dict:
    def of(one: ParetoReport) -> dict:
        return {
            "device": one.setup.get("device"),
            "seconds": one.seconds,
            "commit": one.commit,
            "versions": one.versions,
            "kl": [point.kl for point in one.points],
            "length": [point.length for point in one.points],
        }

    return {
        "agree": not any(c.differs for c in found),
        "level": LEVEL,
        "comparisons": [asdict(c) for c in found],
        "weightings": [label(point) for point in reference.points],
        "reference": of(reference),
        "measured": of(measured),
    }


def _comparisons(content: dict) -> list[Comparison]:
    return [
        Comparison(**{**c, "reference": Interval(**c["reference"]), "measured": Interval(**c["measured"])})
        for c in content["comparisons"]
    ]


def brief(content: dict) -> list[str]:
    """The verdict, what differs, and the times."""
    found = _comparisons(content)
    far = [c for c in found if c.differs]
    apart = sum(not c.overlap for c in found)
    worst = max(found, key=lambda c: abs(c.z))
    verdict = (
        f"Of {len(found)} comparisons {len(far)} differ at the level of {content['level']:g} (Holm); the largest difference is "
        f"{worst.z:+.1f} standard errors, in {worst.what}; {apart} pairs of 95% intervals do not overlap."
    )
    lines = [verdict, ""]
    lines += [f"- {c.what}: {c.reference.mean:.4f} and {c.measured.mean:.4f}, p {c.p:.2g}" for c in far]
    lines += [""] if far else []
    times = [
        f"{_seconds(content[part]['seconds'])} on {content[part]['device']}"
        for part in ("reference", "measured")
    ]
    return [*lines, f"Seconds of training and of evaluation: {times[0]}; {times[1]}."]


def markdown(content: dict) -> str:
    """All of it: `brief`, every comparison, and KL and length of each weighting."""
    found, lines = _comparisons(content), [*brief(content), ""]
    names = [
        "",
        f"reference ({content['reference']['device']})",
        f"measured ({content['measured']['device']})",
    ]
    rows = [
        [c.what, _shown(c.reference), _shown(c.measured), f"{c.z:+.1f}", f"{c.p:.2f}", f"{c.smallest:.3f}"]
        for c in found
    ]
    lines += tables.compact([*names, "difference / error", "p, corrected", "smallest that is seen"], rows)
    lines += [
        "",
        "KL to the base model in nats and tokens of a completion (not judged: no intervals are kept):",
        "",
    ]
    one, other = content["reference"], content["measured"]
    rows = [
        [weighting, f"{a:.2f}", f"{b:.2f}", f"{m:.1f}", f"{n:.1f}"]
        for weighting, a, b, m, n in zip(
            content["weightings"], one["kl"], other["kl"], one["length"], other["length"]
        )
    ]
    lines += tables.compact(["weighting", "KL, reference", "measured", "tokens, reference", "measured"], rows)
    return "\n".join(lines) + "\n"


def _shown(value: Interval) -> str:
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _seconds(seconds: dict) -> str:
    train = seconds.get("train")
    return f"{'unknown (in several parts)' if train is None else format(train, '.0f')} and {seconds['evaluate']:.0f}"


def draw(reference: ParetoReport, measured: ParetoReport, path: Path) -> Path | None:
    """Both fronts with their intervals, of the first two objectives; None where matplotlib or a second objective is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    if len(reference.objectives) < 2:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    x, y = reference.objectives[:2]
    figure, axes = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
    for one, colour in ((reference, "#b0643a"), (measured, "#1f6f8b")):
        rewards = [point.rewards for point in one.points]
        spread = {
            n: [[r[n].mean - r[n].low for r in rewards], [r[n].high - r[n].mean for r in rewards]]
            for n in (x, y)
        }
        axes.errorbar(
            [r[x].mean for r in rewards], [r[y].mean for r in rewards], xerr=spread[x], yerr=spread[y], color=colour,
            marker="o", markersize=4, linewidth=1, elinewidth=0.6, label=str(one.setup.get("device")),
        )  # fmt: skip
        base = one.base.rewards
        axes.plot([base[x].mean], [base[y].mean], marker="*", markersize=11, color=colour)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False, title="star: base model")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.fronts", description=__doc__.splitlines()[0])
    parser.add_argument("reference", metavar="REFERENCE.json")
    parser.add_argument("measured", metavar="MEASURED.json")
    parser.add_argument("--out", metavar="STEM", type=Path, help="write STEM.json, STEM.md and STEM.png")
    options = parser.parse_args(arguments)
    try:
        reference, measured = ParetoReport.load(options.reference), ParetoReport.load(options.measured)
        content = to_dict(reference, measured, compare(reference, measured))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    text = markdown(content)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        for suffix, written in ((".json", json.dumps(content, indent=1) + "\n"), (".md", text)):
            options.out.with_name(options.out.name + suffix).write_text(written, encoding="utf-8")
        if draw(reference, measured, options.out.with_name(options.out.name + ".png")) is None:
            print("no picture: matplotlib is not installed, or there is one objective")
    return 0 if content["agree"] else 1


if __name__ == "__main__":
    sys.exit(main())
