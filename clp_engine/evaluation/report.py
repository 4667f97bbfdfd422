"""A ParetoReport as files: report.json for programs, report.md for people, pareto.png to look at."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from clp_engine.core.files import write_bytes, write_text
from clp_engine.training.run_folder import note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from clp_engine.core.statistics import Interval
    from clp_engine.evaluation.evaluate import Base, ParetoReport, Point

# Corner colours of the weight simplex for three objectives and more; a weighting mixes them.
_CORNERS = ("#d1495b", "#2b7bba", "#2a9d5c", "#b8860b", "#7b4fa3", "#4d4d4d")
_GREY = "#8a8a8a"
# One per KL coefficient.
_MARKERS, _STYLES = "osD^vP", ("-", "--", "-.", ":")


def write_report(report: ParetoReport, directory: str | Path) -> list[Path]:
    """Write report.json, report.md and pareto.png into `directory`; returns what was written.

    Each file appears whole or not at all. Without matplotlib there is no picture; a line on stderr says so.
    """
    directory = Path(directory)
    written = [directory / "report.json", directory / "report.md"]
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(written[0], text + "\n")
    try:
        figure = draw(report)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        figure = None
        print(
            "clp-engine: pareto.png not written, matplotlib is missing: pip install 'clp-engine[plot]'",
            file=sys.stderr,
        )
    write_text(written[1], markdown(report, picture=figure is not None))
    if figure is not None:
        written.append(directory / "pareto.png")
        write_png(figure, written[-1])
    note(directory, written)
    return written


def write_png(figure: Figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_bytes(path, image.getvalue())


# --- text ---------------------------------------------------------------------------------------------------


def table(report: ParetoReport) -> str:
    """One line per point and one for the base, columns aligned; valid Markdown and readable as it is.

    alpha (or beta) has a column where it varies. Rewards are `mean [low, high]`; a star marks the points no
    other point dominates.
    """
    names = report.objectives
    coefficient = [report.kl_name] if len(report.kl_coefs) > 1 else []
    header = [*(f"w {name}" for name in names), *coefficient, *names, "KL", "tokens", "front"]
    rows = [
        [
            *(f"{p.weights[n]:.2f}" for n in names),
            *(f"{p.kl_coef:g}" for _ in coefficient),
            *(_with_interval(p.rewards[n]) for n in names),
            f"{p.kl:.2f}",
            f"{p.length:.1f}",
            "*" if p.non_dominated else "",
        ]
        for p in report.points
    ]
    base = report.base
    rows.append(
        [
            *("base" if i == 0 else "" for i in range(len(names) + len(coefficient))),
            *(_with_interval(base.rewards[n]) for n in names),
            "0",
            f"{base.length:.1f}",
            "",
        ]
    )
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    rule = ["-" * (width - 1) + ":" for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths)) + " |"
        for line in (header, rule, *rows)
    )


def summary(report: ParetoReport) -> str:
    """The metrics of the front, one `name  value` per line, columns aligned."""
    rho = ", ".join(
        f"{name} {'undefined' if value is None else f'{value:.2f}'}"
        for name, value in report.steerability.items()
    )
    reference = ", ".join(f"{name} {value:.3f}" for name, value in report.reference_point.items())
    lines = {
        "hypervolume": f"{_with_interval(report.hypervolume_interval, 4)}",
        "  of the base": f"{_with_interval(report.base.hypervolume_interval, 4)}",
        "  gain": f"{_with_interval(report.hypervolume_gain, 4)}",
        "  by chance": f"up to {report.hypervolume_chance:.4f}",
        "  reference": reference,
        "expected utility": f"{report.expected_utility:.3f}",
        "realised utility": _with_interval(report.realised_utility_interval),
        "regret": f"{report.regret['mean']:.3f} on average, {report.regret['max']:.3f} at worst",
        "steerability": rho,
    }
    if report.kl_hypervolume is not None:
        of_kl = "undefined" if report.kl_steerability is None else f"{report.kl_steerability:.2f}"
        lines |= {
            "KL steerability": of_kl,
            "reward against KL": f"{_with_interval(report.kl_hypervolume)}, KL up to {report.kl_limit:.2f}",
        }
    return "\n".join(f"{name:<18}{value}" for name, value in lines.items())


def _with_interval(value: Interval, digits: int = 3) -> str:
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


_HOW_TO_READ = """## How to read this

- Each row is one weighting `w` of the same model (and one KL coefficient, where it varies). Rewards are
  means over prompts with 95 % bootstrap intervals in brackets; `*` marks rows that no other row dominates.
  As the weight of an objective grows, its reward should grow too: **steerability** is the rank correlation
  of the two, 1 if it always does.
- **KL** is the exact divergence from the base model, summed over the tokens of a completion, in nats: how
  far the model had to move. **tokens** is the mean length of a completion.
- **hypervolume** is how much of the space of rewards the front covers above the reference point; higher is
  better. The base model's is that of its one point, *gain* the difference, over the same prompts. The best
  of many noisy points looks good by luck: *by chance* is what a front no better than the base model stays
  below 95 % of the time, and only a hypervolume well above it is evidence.
- Where the KL coefficient varies, **KL steerability** is its rank correlation with the KL, -1 if a larger one
  always stays nearer to the base model. **reward against KL** is the area between the base model's
  reward and the best reward to be had for a KL of at most x, for x from 0 to the limit given with it,
  averaged over the weightings: compare it between reports with the same limit only.
- **expected utility** is what users with random weightings get who may pick any row; **realised utility**
  is what they get by asking for their own weighting, which punishes a model that ignores it. **regret** is
  what the best row for a weighting would have added to the row that was asked for."""


def markdown(report: ParetoReport, picture: bool = True) -> str:
    """report.md: table, metrics, and how to read them. picture: whether pareto.png lies beside it."""
    setup, each = report.setup, report.setup["num_generations"]
    coefficients = report.kl_coefs
    count = len(report.points) // len(coefficients)
    values = f" at each of {len(coefficients)} values of {report.kl_name}" if len(coefficients) > 1 else ""
    seconds = [f"{phase} {value:.0f} s" for phase, value in report.seconds.items() if value is not None]
    made = (
        f"Model {report.model or 'without a name'}, conditioned on {', '.join(report.objectives)}, and "
        f"the base model. {count} weighting{'s' * (count > 1)}{values}, {setup['prompts']} prompts, {each} "
        f"completion{'s' * (each > 1)} for each pair. On {setup['device']}, {' and '.join(seconds)}."
    )
    reference = "The reference point was given."
    if setup["margin"] is not None:
        margins = ", ".join(f"{margin:g} ({name})" for name, margin in setup["margin"].items())
        reference = f"The reference point is the base model's mean reward minus {margins}."
    versions = ", ".join(f"{name} {value}" for name, value in report.versions.items())
    commit = f", commit {report.commit}" if report.commit else ""
    return "\n\n".join(
        [
            "# Pareto front" + (f" on {report.task}" if report.task else ""),
            made,
            *(["![Pareto front](pareto.png)"] if picture else []),
            table(report),
            f"```\n{summary(report)}\n```",
            reference,
            _HOW_TO_READ,
            f"Made with {versions}{commit}.\n",
        ]
    )


# --- picture ------------------------------------------------------------------------------------------------


def draw(report: ParetoReport) -> Figure:
    """Two objectives: the front, coloured by weight, one line per KL coefficient. More: one panel per pair. One: its reward
    against KL, coloured by KL coefficient where there are several."""
    from matplotlib.figure import Figure

    pairs = list(combinations(report.objectives, 2))
    if not pairs:
        figure = Figure(figsize=(6, 4.5), layout="constrained")
        _reward_against_kl(figure, report)
        return figure
    columns = min(len(pairs), 3)
    rows = -(-len(pairs) // columns)
    wide = 7.2 if columns == 1 else 4.4 * columns
    figure = Figure(figsize=(wide, 5.2 if columns == 1 else 4.3 * rows + 0.6), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(len(pairs))]
    for axis, (x, y) in zip(axes, pairs):
        _panel(axis, report, x, y)
    if len(report.objectives) == 2:
        _colour_bar(figure, axes[0], report)
    else:
        _corner_legend(figure, report)
    volume = _with_interval(report.hypervolume_interval)
    figure.suptitle(
        f"{report.task or report.model or 'Pareto front'}: hypervolume {volume}, "
        f"base {report.base.hypervolume:.3f}",
        fontsize=11,
    )
    figure.get_layout_engine().set(w_pad=0.1)  # inches between panels
    return figure


def _panel(axis: Axes, report: ParetoReport, x: str, y: str) -> None:
    two, several = len(report.objectives) == 2, len(report.kl_coefs) > 1
    for i, kl in enumerate(report.kl_coefs):
        points = [p for p in report.points if p.kl_coef == kl]
        points.sort(key=lambda p: [p.weights[name] for name in report.objectives])
        across, up = ([p.rewards[name].mean for p in points] for name in (x, y))
        style, marker = _STYLES[i % len(_STYLES)], _MARKERS[i % len(_MARKERS)] if several else "o"
        if two:
            label = f"{report.kl_name} {kl:g}" if several else None
            axis.plot(across, up, color=_GREY, lw=1, ls=style, marker=marker, ms=5, zorder=1, label=label)
        for point in points:
            _error_bars(axis, point, x, y, _GREY, alpha=0.55 if two else 0.25)
        axis.scatter(
            across,
            up,
            c=_colours(report, points),
            s=60 if two else 30,
            marker=marker,
            edgecolors="white",
            linewidths=0.7,
            zorder=3,
        )
    base = report.base
    _error_bars(axis, base, x, y, "black", alpha=0.8)
    axis.scatter(
        base.rewards[x].mean,
        base.rewards[y].mean,
        marker="*",
        s=190 if two else 120,
        color="black",
        edgecolors="white",
        linewidths=0.8,
        zorder=4,
        label="base model",
    )
    axis.scatter(
        report.reference_point[x],
        report.reference_point[y],
        marker="+",
        s=80,
        color="black",
        zorder=2,
        label="reference point",
    )
    axis.set_xlabel(f"{x} (mean reward)")
    axis.set_ylabel(f"{y} (mean reward)")
    axis.grid(alpha=0.25, lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(0.08)
    if two:
        axis.legend(frameon=False, loc="best", fontsize=9)


def _error_bars(axis: Axes, at: Point | Base, x: str, y: str, colour: str, alpha: float) -> None:
    horizontal, vertical = at.rewards[x], at.rewards[y]
    # Not axis.errorbar: it takes lengths >= 0, and a percentile interval need not contain the mean.
    axis.hlines(vertical.mean, horizontal.low, horizontal.high, color=colour, lw=1, alpha=alpha, zorder=2)
    axis.vlines(horizontal.mean, vertical.low, vertical.high, color=colour, lw=1, alpha=alpha, zorder=2)


def _colours(report: ParetoReport, points: Sequence[Point]) -> list:
    """Two objectives: the colour map at the first one's weight. More: the corner colours, mixed by weight."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    names = report.objectives
    if len(names) == 2:
        return [colormaps["viridis"](p.weights[names[0]]) for p in points]
    corners = [to_rgb(_CORNERS[i % len(_CORNERS)]) for i in range(len(names))]
    return [
        tuple(sum(p.weights[n] * c[channel] for n, c in zip(names, corners)) for channel in range(3))
        for p in points
    ]


def _colour_bar(figure: Figure, axis: Axes, report: ParetoReport) -> None:
    from matplotlib.cm import ScalarMappable

    first, second = report.objectives
    bar = figure.colorbar(ScalarMappable(cmap="viridis"), ax=axis, pad=0.02)
    bar.set_label(f"weight of {first}  (the rest: {second})")
    bar.outline.set_visible(False)


def _corner_legend(figure: Figure, report: ParetoReport) -> None:
    from matplotlib.lines import Line2D

    def dot(colour: str, label: str, marker: str = "o") -> Line2D:
        return Line2D([], [], marker=marker, ls="", color=colour, ms=9, label=label)

    handles = [
        dot(_CORNERS[i % len(_CORNERS)], f"all weight on {name}") for i, name in enumerate(report.objectives)
    ]
    if len(report.kl_coefs) > 1:
        handles += [
            dot(_GREY, f"{report.kl_name} {kl:g}", _MARKERS[i % len(_MARKERS)])
            for i, kl in enumerate(report.kl_coefs)
        ]
    handles += [dot("black", "base model", "*"), dot("black", "reference point", "+")]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False, fontsize=9
    )


def _reward_against_kl(figure: Figure, report: ParetoReport) -> None:
    """The points in the order of their KL, connected where there are several KL coefficients, the base model at KL 0."""
    axis, name = figure.add_subplot(), report.objectives[0]
    points = sorted(report.points, key=lambda p: p.kl)
    rewards = [p.rewards[name] for p in points]
    base = report.base.rewards[name]
    axis.vlines([0.0], base.low, base.high, color=_GREY, lw=1)
    axis.scatter(0.0, base.mean, marker="*", s=120, color="black", zorder=3, label="base model")
    axis.vlines(
        [p.kl for p in points], [r.low for r in rewards], [r.high for r in rewards], color=_GREY, lw=1
    )
    if len(points) > 1:
        axis.plot(
            [0.0, *(p.kl for p in points)],
            [base.mean, *(r.mean for r in rewards)],
            color=_GREY,
            lw=1,
            zorder=1,
        )
        _scatter_by_coefficient(figure, axis, report, points)
    else:
        axis.scatter(
            points[0].kl, rewards[0].mean, s=120, color=_CORNERS[1], zorder=3, label="conditioned policy"
        )
    axis.set_xlabel("KL from the base model (nats per completion)")
    axis.set_ylabel(f"{name} (mean reward)")
    axis.grid(alpha=0.25, lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)


def _scatter_by_coefficient(
    figure: Figure, axis: Axes, report: ParetoReport, points: Sequence[Point]
) -> None:
    """Colour is the KL coefficient, on a logarithmic scale where none is 0."""
    from matplotlib.colors import LogNorm, Normalize

    coefficients = [p.kl_coef for p in points]
    norm = (LogNorm if min(coefficients) > 0 else Normalize)(min(coefficients), max(coefficients))
    drawn = axis.scatter(
        [p.kl for p in points],
        [p.rewards[report.objectives[0]].mean for p in points],
        c=coefficients,
        norm=norm,
        s=70,
        cmap="viridis_r",
        edgecolors="white",
        linewidths=0.7,
        zorder=3,
        label="conditioned policy",
    )
    bar = figure.colorbar(drawn, ax=axis, pad=0.02)
    bar.set_label(report.kl_name)
    bar.outline.set_visible(False)
