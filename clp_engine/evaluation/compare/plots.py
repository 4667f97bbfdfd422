"""The pictures of a comparison: the fronts of all methods, and their metrics with intervals. Importing needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from clp_engine.core.statistics import Estimate
from clp_engine.evaluation.compare.results import Comparison, FrontPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, distinguishable for colour-blind readers, without the yellow; markers tell them apart as well.
_COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7B4FA3", "#8C6D31", "#E41A6B", "#5C6B73",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "p", "h", "<", ">", "X")
_SPECIALIST = "#222222"
_BASELINES = ("soup", "logit_mixing")


@dataclass(frozen=True)
class Style:
    """The look of a method in all pictures. line: matplotlib's style; empty for unconnected points."""

    colour: str
    marker: str
    line: str


def styles(comparison: Comparison) -> dict[str, Style]:
    """The style of each method: conditioned methods solid, baselines dashed, specialists black and unconnected."""
    result: dict[str, Style] = {}
    taken = 0
    for method in comparison.methods:
        if method.kind.endswith("specialists"):
            result[method.name] = Style(_SPECIALIST, "d", "")
            continue
        line = "--" if method.kind in _BASELINES else "-"
        result[method.name] = Style(
            _COLOURS[taken % len(_COLOURS)],
            # Beyond ten methods the colours repeat, with other markers.
            _MARKERS[(taken + taken // len(_COLOURS)) % len(_MARKERS)],
            line,
        )
        taken += 1
    return result


# --- fronts --------------------------------------------------------------------------------------------------------------


def draw_fronts(comparison: Comparison) -> Figure:
    """The fronts of all methods.

    One objective: reward against KL. Two objectives: one reward against the other. More objectives: a panel for each pair,
    with the weightings of these two alone, and a panel of the realised utility at every weighting of the specialists.
    """
    names = comparison.objectives
    if len(names) <= 2:
        figure = Figure(figsize=(9.6, 5.8), layout="constrained")
        axis = figure.add_subplot()
        if len(names) == 1:
            _front_panel(axis, comparison, None, names[0])
            axis.set_xlabel("KL from the base model (nats per completion)")
            axis.set_ylabel(f"{names[0]} (mean reward)")
        else:
            _reward_panel(axis, comparison, *names)
    else:
        pairs = list(combinations(names, 2))
        columns = min(len(pairs), 3)
        rows = -(-len(pairs) // columns)
        figure = Figure(figsize=(4.4 * columns, 4.0 * (rows + 1)), layout="constrained")
        grid = figure.add_gridspec(rows + 1, columns)
        for i, pair in enumerate(pairs):
            _reward_panel(figure.add_subplot(grid[i // columns, i % columns]), comparison, *pair)
        _utility_panel(figure.add_subplot(grid[rows, :]), comparison)
    _legend(figure, comparison)
    figure.suptitle(_title(comparison), fontsize=11, x=0.01, ha="left")
    return figure


def _title(comparison: Comparison) -> str:
    counts = sorted({len(m.seeds) for m in comparison.methods})
    seeds = (
        f"{counts[-1]} seed{'s' * (counts[-1] > 1)}"
        if len(counts) == 1
        else f"{counts[0]} to {counts[-1]} seeds"
    )
    spread = "; bars: range over seeds" if counts[-1] > 1 else ""
    name = comparison.config.get("title") or comparison.task or comparison.model
    return f"{name}: {'mean over ' if spread else ''}{seeds}{spread}"


def _reward_panel(axis: Axes, comparison: Comparison, x: str, y: str) -> None:
    def on_edge(point: FrontPoint) -> bool:
        return abs(point.weights[x] + point.weights[y] - 1) < 1e-6

    _front_panel(axis, comparison, x, y, on_edge)
    axis.set_xlabel(f"{x} (mean reward)")
    axis.set_ylabel(f"{y} (mean reward)")
    if len(comparison.objectives) > 2:
        axis.set_title("weight on these two only", fontsize=9, color="#555555")


def _front_panel(
    axis: Axes,
    comparison: Comparison,
    x: str | None,
    y: str,
    shown: Callable[[FrontPoint], bool] = lambda point: True,
) -> None:
    """Draw a line for each method through its mean points, with the range over seeds at each point. x: None is the KL."""

    def horizontal(point: FrontPoint) -> Estimate:
        return point.kl if x is None else point.rewards[x]

    for method in comparison.methods:
        style = styles(comparison)[method.name]
        special = style.line == ""
        for points in _lines([p for p in method.points if shown(p)], comparison):
            across, up = [horizontal(p).mean for p in points], [p.rewards[y].mean for p in points]
            for point in points:
                _range_bars(axis, horizontal(point), point.rewards[y], style.colour)
            axis.plot(
                across,
                up,
                color=style.colour,
                marker=style.marker,
                ls=style.line or "none",
                lw=1.6,
                ms=8 if special else 5.5,
                mfc="none" if special else style.colour,
                mew=1.6 if special else 0.6,
                mec=style.colour if special else "white",
                zorder=5 if special else 3,
            )
    base = comparison.base.rewards
    at = (0.0 if x is None else base[x].mean, base[y].mean)
    axis.scatter(*at, marker="*", s=210, color="black", edgecolors="white", linewidths=0.8, zorder=6)
    _plain(axis)


def _lines(points: Sequence[FrontPoint], comparison: Comparison) -> list[list[FrontPoint]]:
    """The points of each line: one line in the order of KL with one objective, else a line for each KL coefficient."""
    if len(comparison.objectives) == 1:
        return [sorted(points, key=lambda p: p.kl.mean)]
    by_kl: dict[float, list[FrontPoint]] = {}
    for point in points:
        by_kl.setdefault(point.kl_coef, []).append(point)
    return [sorted(line, key=lambda p: tuple(p.weights.values())) for line in by_kl.values()]


def _range_bars(axis: Axes, x: Estimate, y: Estimate, colour: str) -> None:
    if len(x.values) < 2:
        return
    axis.hlines(y.mean, min(x.values), max(x.values), color=colour, lw=1, alpha=0.45, zorder=2)
    axis.vlines(x.mean, min(y.values), max(y.values), color=colour, lw=1, alpha=0.45, zorder=2)


def _utility_panel(axis: Axes, comparison: Comparison) -> None:
    """Draw w.R at every weighting of the specialists, or at all weightings without specialists, methods side by side."""
    points = {m.name: [p for p in m.points if p.matched] or list(m.points) for m in comparison.methods}
    keys = sorted({_weights(p) for found in points.values() for p in found}, reverse=True)
    wide = 0.8 / max(len(comparison.methods), 1)
    for i, method in enumerate(comparison.methods):
        style = styles(comparison)[method.name]
        for point in points[method.name]:
            at = keys.index(_weights(point)) + (i - (len(comparison.methods) - 1) / 2) * wide
            axis.vlines(
                at,
                min(point.utility.values),
                max(point.utility.values),
                color=style.colour,
                lw=1.4,
                alpha=0.6,
            )
            hollow = style.line == ""
            axis.plot(
                at,
                point.utility.mean,
                marker=style.marker,
                ms=6,
                color=style.colour,
                mfc="none" if hollow else style.colour,
                mec=style.colour if hollow else "white",
                mew=1.4 if hollow else 0.6,
            )
    for i in range(len(keys) - 1):
        axis.axvline(i + 0.5, color="#dddddd", lw=0.8, zorder=0)
    axis.set_xticks(range(len(keys)), [", ".join(f"{w:.2g}" for w in key) for key in keys])
    axis.set_xlim(-0.5, len(keys) - 0.5)
    axis.set_xlabel(f"weighting ({', '.join(comparison.objectives)})")
    axis.set_ylabel("utility w.R")
    _plain(axis)
    axis.grid(False, axis="x")


def _weights(point: FrontPoint) -> tuple[float, ...]:
    return tuple(point.weights.values())


def _legend(figure: Figure, comparison: Comparison) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for method in comparison.methods:
        style = styles(comparison)[method.name]
        special = style.line == ""
        handles.append(
            Line2D(
                [],
                [],
                color=style.colour,
                marker=style.marker,
                ls=style.line or "none",
                ms=7,
                mfc="none" if special else style.colour,
                mec=style.colour if special else "white",
                mew=1.5 if special else 0.6,
                label=method.name,
            )
        )
    handles.append(
        Line2D([], [], color="black", marker="*", ls="none", ms=12, mec="white", label="base model")
    )
    if len(comparison.objectives) > 2:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False, fontsize=9
        )
    else:
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)


# --- metrics -------------------------------------------------------------------------------------------------------------


def draw_metrics(comparison: Comparison) -> Figure:
    """A panel for each metric and a row for each method: mean and 95 % interval over seeds, and small dots for the seeds."""
    methods = comparison.methods
    panels: list[tuple[str, list[Estimate | None]]] = [("volume", [m.volume() for m in methods])]
    if any(m.volume(matched=True) for m in methods):
        panels.append(("volume at the\nspecialists' weightings", [m.volume(matched=True) for m in methods]))
    for reference in dict.fromkeys(c.reference for c in comparison.contrasts):
        by_method = {c.method: comparison.fair(c) for c in comparison.contrasts if c.reference == reference}
        zero = Estimate(0.0, None, None, ())
        panels.append(
            (
                f"{comparison.fair_name} less that of\n{reference}",
                [zero if m.name == reference else by_method.get(m.name) for m in methods],
            )
        )
    if len(comparison.objectives) > 1:
        panels += [
            (f"steerability:\n{name}", [m.steerability[name] for m in methods])
            for name in comparison.objectives
        ]
    panels.append(("KL (nats)", [m.kl for m in methods]))
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    height = 0.34 * len(methods) + 1.25
    figure = Figure(figsize=(2.7 * columns + 1.8, height * rows + 0.4), layout="constrained")
    for i, (title, values) in enumerate(panels):
        axis = figure.add_subplot(rows, columns, i + 1)
        _metric_panel(axis, comparison, title, values, labels=i % columns == 0)
    title, _, several = _title(comparison).partition(";")
    figure.suptitle(title + (", 95 % intervals; dots: single seeds" if several else ""), fontsize=11)
    return figure


def _metric_panel(
    axis: Axes, comparison: Comparison, title: str, values: Sequence[Estimate | None], labels: bool
) -> None:
    shown = [v for v in values if v is not None]
    # Three seeds can make an interval much wider than all differences: it is cut off rather than shrinking everything else.
    points = [x for v in shown for x in (v.mean, *v.values)]
    low, high = (min(points), max(points)) if points else (0.0, 1.0)
    room = max(high - low, 1e-9) * 0.35
    if title.startswith("steerability"):  # a correlation ends at 1
        low, high, room = min(low, 0.9), 1.0, (1.0 - min(low, 0.9)) * 0.08
    for i, (method, value) in enumerate(zip(comparison.methods, values)):
        if value is None:
            axis.text(
                0.5, i, "–", transform=axis.get_yaxis_transform(), ha="center", va="center", color="#888888"
            )
            continue
        style = styles(comparison)[method.name]
        if value.low is not None:
            axis.hlines(i, value.low, value.high, color=style.colour, lw=2, alpha=0.55, zorder=2)
        axis.scatter(
            value.values, [i] * len(value.values), s=9, color=style.colour, alpha=0.55, lw=0, zorder=3
        )
        axis.plot(value.mean, i, marker="|", ms=13, mew=2.4, color=style.colour, zorder=4)
    if " less that of" in title:
        axis.axvline(0, color="#888888", lw=0.9, ls=":", zorder=1)
    axis.set_xlim(low - room, high + room)
    axis.set_ylim(len(values) - 0.4, -0.6)
    axis.set_yticks(
        range(len(values)), [m.name for m in comparison.methods] if labels else [""] * len(values)
    )
    axis.set_title(title, fontsize=9.5)
    axis.locator_params(axis="x", nbins=4)
    _plain(axis)
    axis.tick_params(axis="y", length=0)


def _plain(axis: Axes) -> None:
    axis.grid(alpha=0.25, lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8.5)
