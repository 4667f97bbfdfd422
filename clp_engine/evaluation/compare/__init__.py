"""clp-engine compare: conditioned policies and their baselines over seeds, with the same code and budget, in one report.

OUT/runs/<what>-<digest>-seed<k>/   run folders as of clp-engine train; methods that need the same training share one
OUT/evaluations/<method>-seed<k>/   reports as of clp-engine evaluate (of specialists, one for each weighting); base/ is the
                                    report of the base model
OUT/comparison.json, comparison.md, fronts.png, metrics.png

A repeated comparison does only the missing work. An interrupted run is resumed from its checkpoint, a finished run is kept,
and runs and reports that depend on a changed setting are made again.

    methods.py    the methods, as the configuration names them
    plan.py       the runs and evaluations that the methods need
    schedule.py   the order of the work, in one process or several; worker.py is one of these processes
    work.py       one training or one evaluation
    results.py    the content of comparison.json
    summary.py    the results, computed from the reports
    report.py, plots.py    comparison.json, comparison.md and the pictures
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from clp_engine.core import ranges
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import check_folder, write_text
from clp_engine.evaluation.compare import report, schedule
from clp_engine.evaluation.compare.methods import slug
from clp_engine.evaluation.compare.plan import Plan, make_plan
from clp_engine.evaluation.compare.results import Comparison
from clp_engine.evaluation.compare.summary import collect

__all__ = ["CompareFailed", "Comparison", "Plan", "compare", "make_plan"]


class CompareFailed(RuntimeError):
    """Some runs or evaluations failed; the others are done. comparison: of the finished evaluations, or None without any."""

    def __init__(self, outcome: schedule.Outcome, comparison: Comparison | None):
        lines = [f"{key}: {reason} (see {log})" for key, (reason, log) in outcome.failed.items()]
        blocked = f"; {len(outcome.blocked)} more waited for them" if outcome.blocked else ""
        super().__init__(f"{len(lines)} failed{blocked}\n" + "\n".join(lines))
        self.outcome, self.comparison = outcome, comparison


def compare(
    config: Mapping[str, Any],
    *,
    only: Collection[str] | None = None,
    seeds: Collection[int] | None = None,
    jobs: int = 1,
    report_only: bool = False,
    command: str = "",
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> Comparison:
    """Train and evaluate the methods of `config`, write the report into its output_dir, and return it.

    config: settings of training that all methods share (see `CLPConfig`), the model, data and rewards (as for `clp-engine
        train`), output_dir, and

        seeds               of training: [0, 1, 2]
        methods             name -> {kind: ..., settings that differ}; kinds:
            clp             (default) one run, conditioned as its settings say
            specialists     weightings: [[1, 0], ...]; a run for each, evaluated at its own weighting
            soup            budget: equal (one full budget for all) or each; a specialist for each objective, and their
                            deltas interpolated
            logit_mixing    the same specialists, their logits mixed while decoding
            kl_specialists  alphas: [...] or betas: [...]; one objective, a run for each
        budget_tokens       tokens generated in a full budget; or max_steps
        evaluation          see `plan.EvaluationSettings`
        reference_methods   the baselines of ratios and differences; default the first soup and the first specialists
        keep_checkpoints    whether finished runs keep their checkpoints; default false
        title               of the report

    only, seeds: the methods and seeds to train and evaluate, by default all. The report covers every finished evaluation.
    jobs: processes, which share the cores. report_only: write the report without training or evaluating. command: named in
    the report. say: called with each line of progress.

    Raises ConfigError for an invalid configuration. Raises CompareFailed where a run or an evaluation failed, after the work
    that does not depend on it is done. Raises KeyboardInterrupt when interrupted; the same call then resumes the work.
    """
    plan = make_plan(config)
    chosen_methods, chosen_seeds = select(plan, only, seeds)
    ranges.check(ranges.COMMANDS, jobs=jobs)
    check_folder("output_dir", plan.output_dir)
    outcome = schedule.Outcome()
    if not report_only:
        write_text(schedule.plan_file(plan), json.dumps(dict(config), indent=2) + "\n")
        outcome = schedule.execute(plan, schedule.pieces(plan, chosen_methods, chosen_seeds), jobs, say)
    try:
        comparison = collect(plan, command)
    except ConfigError:
        if not outcome.failed:
            raise
        raise CompareFailed(outcome, None) from None
    report.write(comparison, plan.output_dir)
    if outcome.failed:
        raise CompareFailed(outcome, comparison)
    return comparison


def select(
    plan: Plan, only: Collection[str] | None, seeds: Collection[int] | None
) -> tuple[Collection[str] | None, Collection[int] | None]:
    """The requested methods and seeds, checked against the plan. A method may be named by its folder."""
    if only is not None:
        by_slug = {slug(m.name): m.name for m in plan.methods}
        unknown = [name for name in only if slug(name) not in by_slug]
        if unknown:
            raise ConfigError(f"unknown method {unknown[0]!r}; the methods are {', '.join(by_slug.values())}")
        only = [by_slug[slug(name)] for name in only]
    unknown = [seed for seed in seeds or () if seed not in plan.seeds]
    if unknown:
        raise ConfigError(f"seed {unknown[0]} is not among the seeds {', '.join(map(str, plan.seeds))}")
    return only, seeds


def describe(plan: Plan, only: Collection[str] | None = None, seeds: Collection[int] | None = None) -> str:
    """The plan as text: the methods, and every piece of work with its state."""
    only, seeds = select(plan, only, seeds)
    todo = schedule.pieces(plan, only, seeds)
    states = {piece.key: schedule.state(plan, piece) for piece in todo}
    width = max(len(s) for s in states.values())
    lines = [
        f"{method.name}: {method.description}"
        for method in plan.methods
        if only is None or method.name in only
    ]
    lines += ["", *(f"{states[piece.key]:<{width}}  {schedule.title(plan, piece)}" for piece in todo)]
    trainings = [s for key, s in states.items() if key.startswith("train:")]
    evaluations = [s for key, s in states.items() if not key.startswith("train:")]
    lines += [
        "",
        f"{trainings.count('done')} of {len(trainings)} runs and {evaluations.count('done')} of "
        f"{len(evaluations)} evaluations are done",
    ]
    return "\n".join(lines)
