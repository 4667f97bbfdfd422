"""Charts of a result file: for each group one picture, a bar for each variant of each case, with its spread."""

from __future__ import annotations

from pathlib import Path

from bench.core import schema, text
from bench.core.targets import OURS
from bench.pages import report

COLOURS = {"ours": "#1f6f8b", "peer": "#b8b8b8", "bare": "#e0a458"}
CASES = 8  # of a group in one picture


def plot(file: str, folder: str | None = None) -> list[Path]:
    """PNG files beside the result (or in `folder`), named after it and the group."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("matplotlib is not installed; pip install -e .[plot]") from None
    matplotlib.use("Agg")
    result, path = schema.load(file), Path(file)
    target = Path(folder) if folder else path.parent
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for group in dict.fromkeys(case.group for case in result.cases):
        cases = [c for c in result.cases if c.group == group and any(v.status == "ok" for v in c.variants)][
            :CASES
        ]
        if cases:
            written.append(_picture(cases, report.provenance(result), target / f"{path.stem}_{group}.png"))
    return written


def _picture(cases: list[schema.Case], caption: str, path: Path) -> Path:
    from matplotlib import pyplot

    shown = [[v for v in case.variants if v.status == "ok"] for case in cases]
    heights = [0.55 + 0.27 * len(variants) for variants in shown]
    figure, axes = pyplot.subplots(
        len(cases),
        1,
        figsize=(8, sum(heights) + 0.8),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for ax, case, variants in zip(axes[:, 0], cases, shown):
        medians = [v.times.median for v in variants]
        low = [v.times.median - (v.times.q1 or v.times.min) for v in variants]
        high = [(v.times.q3 or v.times.max) - v.times.median for v in variants]
        colours = [
            COLOURS["bare" if v.name == case.bare else "ours" if v.name.startswith(OURS) else "peer"]
            for v in variants
        ]
        ax.barh([v.name for v in variants], medians, xerr=[low, high], color=colours, height=0.7)
        ax.invert_yaxis()
        ax.set_title(report.heading(case), fontsize=8, loc="left")
        ax.tick_params(labelsize=7)
        ax.set_xlim(0, max(m + h for m, h in zip(medians, high)) * 1.15)
        ax.xaxis.set_major_formatter(lambda value, _: text.seconds(value) if value > 0 else "0")
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        for y, (m, h) in enumerate(zip(medians, high)):
            ax.text(m + h, y, " " + text.seconds(m), va="center", fontsize=7)
        if case.floor:
            ax.axvline(case.floor.seconds, color="black", linewidth=0.8, linestyle=":")
    figure.supxlabel(f"{caption}\nbars: median, whiskers: quartiles, dotted: measured floor", fontsize=7)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
