"""The picture of a front, pareto.png. Drawing needs matplotlib; importing this module does not."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from clp_engine.core.files import write_bytes
from clp_engine.evaluation.front import Base, ParetoFront, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Corner colours of the weight simplex for three objectives and more; a weighting mixes them.
_CORNERS = ("#d1495b", "#2b7bba", "#2a9d5c", "#b8860b", "#7b4fa3", "#4d4d4d")
_GREY = "#8a8a8a"
# One per KL coefficient.
_MARKERS, _STYLES = "osD^vP", ("-", "--", "-.", ":")


def draw(report: ParetoFront) -> Figure:
    """The picture of a front.

    One objective: its reward against KL, coloured by KL coefficient where several were evaluated. Two objectives: the one
    reward against the other, coloured by weight, with a line for each KL coefficient. More objectives: a panel for each pair.
    """
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
    figure.suptitle(
        f"{report.task or report.model or 'Pareto front'}: hypervolume {report.hypervolume_interval:.3f}, "
        f"base {report.base.hypervolume:.3f}",
        fontsize=11,
    )
    figure.get_layout_engine().set(w_pad=0.1)  # inches between panels
    return figure


def _panel(axis: Axes, report: ParetoFront, x: str, y: str) -> None:
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


def _colours(report: ParetoFront, points: Sequence[Point]) -> list:
    """The colour of each point. Two objectives: a colour map at the first weight. More: corner colours, mixed by weight."""
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


def _colour_bar(figure: Figure, axis: Axes, report: ParetoFront) -> None:
    from matplotlib.cm import ScalarMappable

    first, second = report.objectives
    bar = figure.colorbar(ScalarMappable(cmap="viridis"), ax=axis, pad=0.02)
    bar.set_label(f"weight of {first}  (the rest: {second})")
    bar.outline.set_visible(False)


def _corner_legend(figure: Figure, report: ParetoFront) -> None:
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


def _reward_against_kl(figure: Figure, report: ParetoFront) -> None:
    """Draw the points in the order of their KL, with the base model at KL 0. A line connects several points."""
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


def _scatter_by_coefficient(figure: Figure, axis: Axes, report: ParetoFront, points: Sequence[Point]) -> None:
    """Draw the points, coloured by KL coefficient: on a logarithmic scale, unless a coefficient is 0."""
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


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; the file appears whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_bytes(path, image.getvalue())
