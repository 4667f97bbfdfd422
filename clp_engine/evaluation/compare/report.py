"""A Comparison as files: comparison.json for programs; comparison.md, fronts.png and metrics.png for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from clp_engine.core import tables
from clp_engine.core.files import write_text
from clp_engine.core.statistics import Estimate
from clp_engine.evaluation.compare.results import Comparison, Contrast, MethodResult
from clp_engine.evaluation.plots import write_png

PICTURES = ("fronts.png", "metrics.png")


def write(comparison: Comparison, directory: str | Path) -> list[Path]:
    """Write all files into `directory`, and return their paths. Each file appears whole or not at all.

    Without matplotlib there are no pictures, and a line on stderr says so.
    """
    directory = Path(directory)
    written = [directory / "comparison.json", directory / "comparison.md"]
    text = json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(written[0], text + "\n")
    try:
        from clp_engine.evaluation.compare.plots import draw_fronts, draw_metrics

        figures = [draw_fronts(comparison), draw_metrics(comparison)]
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        figures = []
        print(
            "clp-engine: no pictures, matplotlib is missing: pip install 'clp-engine[plot]'",
            file=sys.stderr,
        )
    write_text(written[1], markdown(comparison, pictures=bool(figures)))
    for figure, name in zip(figures, PICTURES):
        written.append(directory / name)
        write_png(figure, written[-1])
    return written


# --- tables --------------------------------------------------------------------------------------------------------------


def shown(value: Estimate | None, digits: int = 3, scale: float = 1.0, sign: bool = False) -> str:
    """`mean ± half width`, or the mean alone with one seed, or a dash for None."""
    if value is None:
        return "–"
    text = f"{value.mean * scale:{'+' if sign else ''}.{digits}f}"
    return text if value.half_width is None else f"{text} ± {value.half_width * scale:.{digits}f}"


def method_table(comparison: Comparison) -> str:
    """The metrics, a row for each method."""
    names = comparison.objectives if len(comparison.objectives) > 1 else []
    header = [
        "method",
        "seeds",
        "points",
        "volume",
        "volume, matched",
        "utility, matched",
        "expected utility",
        "IGD+",
        *(f"steerability: {n}" for n in names),
        *(["KL steerability"] if comparison.varies_kl else []),
        "KL",
        "tokens",
    ]
    rows = [
        [
            m.name,
            str(len(m.seeds)),
            str(len(m.points)),
            shown(m.volume(), 4),
            shown(m.volume(matched=True), 4),
            shown(m.realised_utility_matched),
            shown(m.expected_utility),
            shown(m.igd_plus),
            *(shown(m.steerability[n], 2) for n in names),
            *([shown(m.kl_steerability, 2)] if comparison.varies_kl else []),
            shown(m.kl, 2),
            shown(m.length, 1),
        ]
        for m in comparison.methods
    ]
    return tables.markdown(header, rows, left=1)


def cost_table(comparison: Comparison) -> str:
    """The cost of training, a row for each method."""
    header = ["method", "runs", "steps", "completions", "tokens generated", "parameters", "seconds"]

    def whole(value: Estimate) -> str:
        spread = "" if value.half_width is None or value.half_width < 0.5 else f" ± {value.half_width:,.0f}"
        return f"{value.mean:,.0f}{spread}"

    rows = [
        [
            m.name,
            str(m.runs),
            whole(m.steps),
            whole(m.completions),
            whole(m.generated_tokens),
            f"{m.trained_parameters:,}",
            whole(m.seconds),
        ]
        for m in comparison.methods
    ]
    return tables.markdown(header, rows, left=1)


def contrast_table(contrasts: Sequence[Contrast]) -> str:
    """The contrasts with one reference, a row for each method."""
    header = ["method", "seeds", "volume ratio", "ratio, matched", "utility", "objective", "dominated"]
    rows = [
        [
            c.method,
            str(len(c.seeds)),
            shown(c.volume_ratio),
            shown(c.volume_ratio_matched),
            shown(c.utility, 4, sign=True),
            shown(c.objective, 4, sign=True),
            f"{shown(c.dominated, 1)} of {c.reference_points}",
        ]
        for c in contrasts
    ]
    return tables.markdown(header, rows, left=1)


def difference_table(contrasts: Sequence[Contrast], comparison: Comparison) -> str:
    """w.R (or the objective) of each method minus that of one reference, a row for each weighting."""
    # The first method may have few weightings. The longest list holds all of them, in order.
    keys = [_asked(d, comparison) for d in max((c.differences for c in contrasts), key=len)]
    header = [*_asked_header(comparison), *(c.method for c in contrasts)]
    by_method = [{tuple(_asked(d, comparison)): comparison.fair(d) for d in c.differences} for c in contrasts]
    rows = [[*key, *(shown(found.get(tuple(key)), 4, sign=True) for found in by_method)] for key in keys]
    return tables.markdown(header, rows)


def front_table(method: MethodResult, comparison: Comparison) -> str:
    """The points of a method, a row for each."""
    names = comparison.objectives
    header = [*_asked_header(comparison), *names, "utility", "objective", "KL", "tokens"]
    rows = [
        [
            *_asked(p, comparison),
            *(shown(p.rewards[n]) for n in names),
            shown(p.utility),
            shown(p.objective),
            shown(p.kl, 2),
            shown(p.length, 1),
        ]
        for p in method.points
    ]
    return tables.markdown(header, rows)


def _asked_header(comparison: Comparison) -> list[str]:
    weights = [f"w {n}" for n in comparison.objectives] if len(comparison.objectives) > 1 else []
    return [*weights, *(["KL coefficient"] if comparison.varies_kl or not weights else [])]


def _asked(point, comparison: Comparison) -> list[str]:
    weights = (
        [f"{point.weights[n]:.3g}" for n in comparison.objectives] if len(comparison.objectives) > 1 else []
    )
    return [*weights, *([f"{point.kl_coef:g}"] if comparison.varies_kl or not weights else [])]


# --- the page ------------------------------------------------------------------------------------------------------------


def markdown(comparison: Comparison, pictures: bool = True) -> str:
    """The content of comparison.md. pictures: whether the pictures lie beside it."""
    c = comparison
    title = c.config.get("title") or f"Comparison on {c.task or c.model}: {', '.join(c.objectives)}"
    parts = [f"# {title}", _what_was_run(c), _methods(c)]
    if short := in_short(c):
        parts += ["## In short", short]
    if c.missing:
        parts.append(f"**Not complete**: {'; '.join(c.missing)}. The figures below are of what there is.")
    if pictures:
        parts.append(f"![Fronts of all methods]({PICTURES[0]})")
    parts += ["## Methods", method_table(c), _about_the_volume(c)]
    if pictures:
        parts.append(f"![Metrics by method]({PICTURES[1]})")
    for reference in dict.fromkeys(contrast.reference for contrast in c.contrasts):
        against = [contrast for contrast in c.contrasts if contrast.reference == reference]
        parts += [f"## Against {reference}", contrast_table(against)]
        if any(contrast.differences for contrast in against):
            parts.append(
                _folded(
                    f"{c.fair_name} less that of {reference}, point by point",
                    difference_table([a for a in against if a.differences], c),
                )
            )
    parts += ["## What training took", cost_table(c), _about_the_cost(c)]
    parts += ["## Fronts", *(_folded(m.name, front_table(m, c)) for m in c.methods)]
    parts += ["## How to read this", _how_to_read(c), "## How it was made", _provenance(c)]
    return "\n\n".join(parts) + "\n"


def in_short(c: Comparison) -> str:
    """The main figures of each conditioned method, a line for each. Empty without a baseline."""
    lines = []
    for method in (m for m in c.methods if m.kind == "clp"):
        said = []
        for contrast in (contrast for contrast in c.contrasts if contrast.method == method.name):
            volume = contrast.volume_ratio_matched or contrast.volume_ratio
            where = " at the same weightings" if contrast.volume_ratio_matched else ""
            ratio = "" if volume is None else f"{shown(volume, 2)} times the volume{where}, "
            difference = c.fair(contrast)
            better = (
                ""
                if difference is None
                else f"{c.fair_name} {shown(difference, 4, sign=True)}{_verdict(difference)}, "
            )
            cost = method.generated_tokens.mean / c.method(contrast.reference).generated_tokens.mean
            said.append(f"against {contrast.reference} {ratio}{better}for {cost:.2f} times the tokens")
        steered = [f"{n} {shown(e, 2)}" for n, e in method.steerability.items() if e is not None]
        if said and steered:
            said.append(f"steerability {', '.join(steered)}")
        if said:
            lines.append(f"- **{method.name}**: {'; '.join(said)}.")
    return "\n".join(lines)


def _verdict(difference: Estimate) -> str:
    """A remark where the interval of a difference holds zero."""
    if difference.low is None:
        return ""
    return " (within the luck of seeds)" if difference.low <= 0 <= difference.high else ""


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _what_was_run(c: Comparison) -> str:
    tokens = c.config.get("budget_tokens")
    budget = f"{tokens:,} generated tokens" if tokens else f"{c.config['max_steps']:,} optimiser steps"
    setup = c.setup
    prompts = "all" if setup["prompts"] is None else str(setup["prompts"])
    each = setup["num_generations"]
    return (
        f"Model {c.model}, rewards {', '.join(c.objectives)}. A full budget is {budget}; "
        f"{len(c.seeds)} training seed{'s' * (len(c.seeds) > 1)} ({', '.join(map(str, c.seeds))}). Every policy is "
        f"evaluated on the same {prompts} held-out prompts with {each} completion{'s' * (each > 1)} each, drawn "
        f"at temperature {setup['temperature']:g} with the same random numbers."
    )


def _methods(c: Comparison) -> str:
    return "\n".join(f"- **{m.name}**: {m.description}" for m in c.methods)


def _about_the_volume(c: Comparison) -> str:
    reference = ", ".join(f"{name} {value:.3f}" for name, value in c.reference_point.items())
    margin = c.setup["margin"]
    margin = (
        f"{margin:g}" if not isinstance(margin, dict) else ", ".join(f"{k} {v:g}" for k, v in margin.items())
    )
    if c.kl_limit is None:
        what = (
            f"of rewards above the reference point {reference}, which is the base model's mean reward minus {margin}, the "
            "same for all"
        )
    else:
        given = "given" if c.setup["kl_limit"] is not None else "the largest of any point here"
        what = (
            "of reward and KL, above the base model's reward and up to a KL of "
            f"{c.kl_limit:.3f} ({given}): divided by that limit, it is what a user gains over the base model who may spend x "
            "nats, x uniform up to the limit"
        )
    return (
        f"**volume** is the hypervolume {what}. It grows with the number of points, and methods differ in that: "
        "**matched** columns use the specialists' weightings alone, which all methods have."
    )


def _about_the_cost(c: Comparison) -> str:
    threads = ", ".join(map(str, c.machine["threads"]))
    return (
        "Of all the runs a method needs, also where another method uses the same ones. Seconds are those of optimiser "
        f"steps on this machine ({c.machine['processor']}, {', '.join(c.machine['devices'])}, "
        f"{threads} thread{'s' * (threads != '1')} a run), without loading, saving and evaluation; a machine that was busy "
        "with other work shows in them."
    )


def _how_to_read(c: Comparison) -> str:
    n = len(c.seeds)
    interval = (
        "With one seed there are no intervals, and no difference between methods can be told from luck."
        if n == 1
        else f"**± is the half width of a 95 % interval over training seeds**: Student's t for the mean of n = {n} "
        "(fewer where the table says so). It covers the luck of training, not the choice of prompts, which all methods "
        "share; each `report.json` has bootstrap intervals over prompts. With so few seeds intervals are wide and no better "
        "than the assumption that seeds scatter normally."
    )
    ties = (
        " With three or more objectives many weightings tie, and 1 is out of reach."
        if len(c.objectives) > 2
        else ""
    )
    formula = "w.R - beta KL" if _is_beta(c) else "(1 - alpha) w.R - alpha KL"
    return "\n".join(
        [
            f"- {interval}",
            "- **utility** is w.R, the weighted reward at the weighting that was asked for; *matched*: its mean over the "
            "specialists' weightings (`pareto.realised_utility`). **expected utility** is what users get who may pick any "
            "point of the front (`pareto.expected_utility`). **IGD+** is how far the best points of all methods and seeds "
            "lie beyond those of the method, on average (`pareto.igd_plus`): 0 is best.",
            f"- **objective** is what training maximises, {formula}, per completion: a method that buys reward with more KL "
            "does not gain by it.",
            "- **utility** and **objective** in the tables against a baseline are differences at equal weightings, paired "
            "by seed and prompts, averaged over the weightings both have. This is the fairest of the measures: it does not "
            "depend on how many points a front has.",
            "- **ratio**: of the two volumes, seed by seed, then averaged. **dominated**: points of the baseline's front that "
            "some point of the method's front beats or equals in every reward and beats in one (with one reward: in reward and "
            "KL; of means, noise included).",
            "- **steerability** is the rank correlation of an objective's weight with its reward over the front "
            f"(`pareto.steerability`), KL steerability that of the KL coefficient with the KL (-1 is best).{ties} "
            "**KL** is exact, from the base model, summed over a completion, in nats; **tokens** the mean length; both are "
            "means over the method's points.",
        ]
    )


def _is_beta(c: Comparison) -> bool:
    values = [c.config, *(m for m in c.config["methods"].values() if m)]
    return any(name.startswith("beta") for v in values for name in v)


def _provenance(c: Comparison) -> str:
    import yaml

    versions = ", ".join(f"{name} {value}" for name, value in c.versions.items())
    commits = f" Commit{'s' * (len(c.commits) > 1)} {', '.join(c.commits)}." if c.commits else ""
    text = yaml.safe_dump(c.config, sort_keys=False, allow_unicode=True, width=110)
    command = (
        f"`{c.command}`, with this configuration"
        if c.command
        else "`clp-engine compare` with this configuration"
    )
    return f"Made by {command}, on {c.machine['platform']}: {versions}.{commits}\n\n" + _folded(
        "configuration", f"```yaml\n{text}```"
    )


def summary(comparison: Comparison) -> str:
    """The table of methods and the contrasts with each reference, for the terminal."""
    parts = [method_table(comparison)]
    for reference in dict.fromkeys(c.reference for c in comparison.contrasts):
        against = [c for c in comparison.contrasts if c.reference == reference]
        parts.append(f"against {reference}\n{contrast_table(against)}")
    return "\n\n".join(parts)
