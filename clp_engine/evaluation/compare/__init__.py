"""clp-engine compare: conditioned policies and their baselines, same code and same budget, over seeds, in one report.

OUT/runs/<what>-<digest>-seed<k>/   ordinary run folders; methods that need the same training share one
OUT/evaluations/<method>-seed<k>/   an ordinary report each (for specialists one per weighting); base/ is the base model's
OUT/comparison.json, comparison.md, fronts.png, metrics.png

Doing it again does what is missing: an interrupted run goes on from its checkpoint, a finished one is left alone, and
whatever depends on a changed setting is done anew.
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
    """Some runs or evaluations failed; the rest is done and reported. comparison: of what there is, or None."""

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
    """Train, evaluate and report what `config` describes; the report is also written into its output_dir.

    config: settings of training that all methods share (see `CLPConfig`), what is trained on what (as for `clp-engine
        train`), output_dir, and

        seeds               of training: [0, 1, 2]
        methods             name -> {kind: ..., settings that differ}; kinds:
            clp             (default) one run, conditioned as its settings say
            specialists     weightings: [[1, 0], ...]; a run for each, evaluated at its own weighting
            soup            budget: equal (together one full budget) or each; a specialist per objective, deltas interpolated
            logit_mixing    the same specialists, their logits mixed while decoding
            kl_specialists  alphas: [...] or betas: [...]; one objective, a run for each
        budget_tokens       tokens generated in a full budget; or max_steps
        evaluation          see `plan.EvaluationSettings`
        reference_methods   what ratios are taken to; default the first soup and the first specialists
        keep_checkpoints    of finished runs; default false
        title               of the report

    only, seeds: do no more than these methods and seeds; the report covers whatever is there. jobs: above 1, so many
    processes with their share of the cores. report_only: train and evaluate nothing. command: for the report to name.
    Raises ConfigError for a configuration that cannot be meant, CompareFailed where something failed (everything that did
    not depend on it is done), and KeyboardInterrupt when interrupted; then the same call goes on.
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
    """The methods and seeds asked for, checked against the plan; methods also by their folder's name."""
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
    """The plan for people: methods, then every piece of work and how far it is."""
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
