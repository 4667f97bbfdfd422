"""A front as files: report.json for programs, report.md and pareto.png for people."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from clp_engine.core import records, tables
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import write_text
from clp_engine.evaluation.front import ParetoFront, Point
from clp_engine.evaluation.plots import draw, write_png
from clp_engine.training.runs.run_folder import note


class ParetoReport(ParetoFront):
    """A front and its files. The fields are those of `ParetoFront`.

    report.json    the fields, which `load` reads
    report.md      the table of points, the metrics, and how to read them
    pareto.png     the picture, where matplotlib is installed
    """

    @classmethod
    def load(cls, path: str | Path) -> ParetoReport:
        """The report in the file `path`, or in report.json of the folder `path`. Raises ConfigError where the file is missing
        or holds no report."""
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        if not path.exists():
            raise ConfigError(f"no report at {path}; write one with: clp-engine evaluate RUN")
        return records.read(path, cls, "write it again with: clp-engine evaluate RUN")

    def save(self, directory: str | Path) -> list[Path]:
        """Write report.json, report.md and pareto.png into `directory`, and return their paths.

        Each file appears whole or not at all. Without matplotlib there is no picture, and a line on stderr says so.
        """
        directory = Path(directory)
        written = [directory / "report.json", directory / "report.md"]
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(written[0], text + "\n")
        try:
            figure = draw(self)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "matplotlib":
                raise
            figure = None
            print(
                "clp-engine: pareto.png not written, matplotlib is missing: pip install 'clp-engine[plot]'",
                file=sys.stderr,
            )
        write_text(written[1], markdown(self, picture=figure is not None))
        if figure is not None:
            written.append(directory / "pareto.png")
            write_png(figure, written[-1])
        note(directory, written)
        return written


# --- text ---------------------------------------------------------------------------------------------------


def texts_table(report: ParetoFront) -> str:
    """The table of what is known of completions beside their rewards, a row for each point and one for the base model.

    Empty for an early report, which has none of it. A column is left out where it has no value in any row.
    """
    names, every = report.objectives, [*report.points, report.base]
    wins = [getattr(p, "win_rate", None) for p in every]
    columns: dict[str, list[float | None]] = {
        "distinct 2-grams": [p.distinct_2 for p in every],
        "self-similarity": [p.self_similarity for p in every],
        **{f"calibration error: {n}": [(p.calibration_error or {}).get(n) for p in every] for n in names},
    }
    shown = {head: ["" if v is None else f"{v:.3f}" for v in column] for head, column in columns.items()}
    shown["wins"] = ["" if w is None else f"{w:.2f}" for w in wins]
    shown = {head: column for head, column in shown.items() if any(column)}
    if not shown:
        return ""
    asked = [*(_condition(report, point) for point in report.points), "base"]
    return tables.markdown(["point", *shown], [list(row) for row in zip(asked, *shown.values())], left=1)


def _condition(report: ParetoFront, point: Point) -> str:
    """Weights of a point, and its KL coefficient where that varies."""
    weights = ", ".join(f"{n} {point.weights[n]:.2f}" for n in report.objectives)
    return weights + (f", {report.kl_name} {point.kl_coef:g}" if len(report.kl_coefs) > 1 else "")


def table(report: ParetoFront) -> str:
    """The table of a front: a row for each point, and one for the base model.

    alpha (or beta) has a column where it varies. Rewards are `mean [low, high]`. A star marks the points that no other
    point dominates.
    """
    names = report.objectives
    coefficient = [report.kl_name] if len(report.kl_coefs) > 1 else []
    header = [*(f"w {name}" for name in names), *coefficient, *names, "KL", "tokens", "front"]
    rows = [
        [
            *(f"{p.weights[n]:.2f}" for n in names),
            *(f"{p.kl_coef:g}" for _ in coefficient),
            *(f"{p.rewards[n]:.3f}" for n in names),
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
            *(f"{base.rewards[n]:.3f}" for n in names),
            "0",
            f"{base.length:.1f}",
            "",
        ]
    )
    return tables.markdown(header, rows)


def summary(report: ParetoFront) -> str:
    """The metrics of a front, a line `name  value` for each."""

    def by_name(values: dict[str, float | None]) -> str:
        return ", ".join(f"{name} {'undefined' if v is None else f'{v:.2f}'}" for name, v in values.items())

    reference = ", ".join(f"{name} {value:.3f}" for name, value in report.reference_point.items())
    lines = {
        "hypervolume": f"{report.hypervolume_interval:.4f}",
        "  of the base": f"{report.base.hypervolume_interval:.4f}",
        "  gain": f"{report.hypervolume_gain:.4f}",
        "  by chance": f"up to {report.hypervolume_chance:.4f}",
        "  reference": reference,
        "expected utility": f"{report.expected_utility:.3f}",
        "realised utility": f"{report.realised_utility_interval:.3f}",
        "regret": f"{report.regret['mean']:.3f} on average, {report.regret['max']:.3f} at worst",
        "steerability": by_name(report.steerability),
    }
    if report.kendall_tau is not None:
        lines |= {"Kendall's tau": by_name(report.kendall_tau), "sparsity": f"{report.sparsity:.4f}"}
    if report.kl_hypervolume is not None:
        of_kl = "undefined" if report.kl_steerability is None else f"{report.kl_steerability:.2f}"
        lines |= {
            "KL steerability": of_kl,
            "reward against KL": f"{report.kl_hypervolume:.3f}, KL up to {report.kl_limit:.2f}",
        }
    return "\n".join(tables.pairs(lines, 18))


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
  what the best row for a weighting would have added to the row that was asked for.
- **Kendall's tau** is the other rank correlation: of the pairs of rows that differ, (1 + tau) / 2 are in
  order. **sparsity** is the mean squared gap between neighbouring rows of the front: less is smoother.
- **distinct 2-grams** is the share of pairs of neighbouring tokens that do not repeat among the completions
  of a prompt; **self-similarity** is the overlap of two completions of one prompt. **calibration error** is
  how far the model's probability of its completions (per token) is from their reward, for rewards from 0
  to 1 such as a right answer. **wins** is the share of completions that the judge prefers, ties half."""


def markdown(report: ParetoFront, picture: bool = True) -> str:
    """The content of report.md: table, metrics, and how to read them. picture: whether pareto.png lies beside it."""
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
            *([of_texts] if (of_texts := texts_table(report)) else []),
            _HOW_TO_READ,
            f"Made with {versions}{commit}.\n",
        ]
    )
