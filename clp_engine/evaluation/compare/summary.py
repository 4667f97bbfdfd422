"""From the reports of evaluations to a Comparison: every method over its seeds, and every method against the baselines.

Intervals are over training seeds: Student's interval for the mean of n independent seeds,

    mean +- t_(n-1, 97.5 %) * s / sqrt(n),

and None with one seed. All methods and seeds share the prompts and the random numbers of the evaluation, so that the
difference of two methods at one seed is paired. The interval covers the luck of training. It does not cover the choice of
prompts, which all methods share; each report.json has bootstrap intervals over prompts.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clp_engine.core import provenance
from clp_engine.core.errors import ConfigError
from clp_engine.core.provenance import source_commit, versions
from clp_engine.core.statistics import Estimate
from clp_engine.evaluation import pareto
from clp_engine.evaluation.compare import work
from clp_engine.evaluation.compare.methods import Method
from clp_engine.evaluation.compare.plan import Plan
from clp_engine.evaluation.compare.results import Comparison, Contrast, Difference, FrontPoint, MethodResult
from clp_engine.evaluation.front import Point, default_grid
from clp_engine.evaluation.report import ParetoReport


@dataclass(frozen=True)
class Front:
    """The P points of a method at one seed, as arrays: weights and rewards (P, M), kl_coefs, kl and length (P,)."""

    weights: np.ndarray
    kl_coefs: np.ndarray
    rewards: np.ndarray
    kl: np.ndarray
    length: np.ndarray

    @classmethod
    def of(cls, points: Sequence[Point], objectives: Sequence[str]) -> Front:
        points = sorted(points, key=lambda p: ([p.weights[n] for n in objectives], p.kl_coef))
        return cls(
            np.array([[p.weights[n] for n in objectives] for p in points]),
            np.array([p.kl_coef for p in points]),
            np.array([[p.rewards[n].mean for n in objectives] for p in points]),
            np.array([p.kl for p in points]),
            np.array([p.length for p in points]),
        )

    def at(self, rows) -> Front:
        return Front(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))

    @property
    def keys(self) -> list[tuple[float, ...]]:
        """(w_1 ... w_M, KL coefficient) of every point. Two methods have one key for one weighting and coefficient."""
        return [
            (*(round(w, 6) for w in row), round(kl, 6))
            for row, kl in zip(self.weights.tolist(), self.kl_coefs.tolist())
        ]

    @property
    def utility(self) -> np.ndarray:
        """w.R of each point, (P,)."""
        return (self.weights * self.rewards).sum(-1)

    def objective(self, kl_is_beta: bool) -> np.ndarray:
        """`(1 - alpha) w.R - alpha KL` of each point, or `w.R - beta KL`, (P,)."""
        keep = 1.0 if kl_is_beta else 1 - self.kl_coefs
        return keep * self.utility - self.kl_coefs * self.kl

    def restricted(self, keys: set[tuple[float, ...]]) -> Front | None:
        """The points with these keys, or None where one of them is missing."""
        rows = [i for i, key in enumerate(self.keys) if key in keys]
        return self.at(rows) if keys and len(rows) == len(keys) else None


# --- from reports --------------------------------------------------------------------------------------------------------


def collect(plan: Plan, command: str = "") -> Comparison:
    """The Comparison of all finished evaluations of a plan. Raises ConfigError where none is finished."""
    fronts: dict[str, dict[int, Front]] = {}
    trainings: dict[str, dict[int, list[work.Training]]] = {}
    missing = []
    for method in plan.methods:
        fronts[method.name], trainings[method.name] = {}, {}
        for seed in plan.seeds:
            evaluations = plan.of(method.name, seed)
            if not all(work.is_evaluated(plan, e) for e in evaluations):
                missing.append(f"{method.name}, seed {seed}")
                continue
            points = [p for e in evaluations for p in work.report_of(plan, e).points]
            fronts[method.name][seed] = Front.of(points, plan.objectives)
            needed = dict.fromkeys(name for e in evaluations for name in e.runs)
            trainings[method.name][seed] = [work.Training.load(plan.training_record(name)) for name in needed]
    if not any(fronts.values()):
        raise ConfigError(
            f"{plan.output_dir}: no method has been evaluated yet; run without --report-only first"
        )
    base = work.report_of(plan, None)
    return summarise(
        plan.methods,
        fronts,
        trainings,
        base,
        objectives=plan.objectives,
        references=plan.references,
        kl_is_beta=plan.kl_is_beta,
        kl_limit=plan.evaluation.kl_limit,
        missing=missing,
        task=plan.spec.task,
        model=plan.spec.model,
        seeds=list(plan.seeds),
        setup={**dataclasses.asdict(plan.evaluation), **plan.sampling},
        config=plan.config,
        command=command,
    )


def summarise(
    methods: Sequence[Method],
    fronts: Mapping[str, Mapping[int, Front]],
    trainings: Mapping[str, Mapping[int, Sequence[work.Training]]],
    base: ParetoReport,
    *,
    objectives: Sequence[str],
    references: Sequence[str],
    kl_is_beta: bool = False,
    kl_limit: float | None = None,
    **about: Any,
) -> Comparison:
    """Aggregate fronts and trainings (both method -> seed) over seeds. about: the other fields of Comparison."""
    present = [m for m in methods if fronts[m.name]]
    every = [f for m in present for f in fronts[m.name].values()]
    if len(objectives) > 1:
        kl_limit = None
    elif kl_limit is None:
        kl_limit = float(max(f.kl.max() for f in every))
    reference = np.array([base.reference_point[n] for n in objectives])
    base_rewards = np.array([base.base.rewards[n].mean for n in objectives])
    matched = next(
        (set(next(iter(fronts[m.name].values())).keys) for m in present if m.kind.endswith("specialists")),
        set(),
    )
    everywhere = np.concatenate([_coordinates(f, kl_limit) for f in every])
    target = everywhere[pareto.non_dominated(everywhere)]
    measure = _Measure(objectives, reference, base_rewards, kl_limit, kl_is_beta, matched, target)
    results = [_method_result(m, fronts[m.name], trainings[m.name], measure) for m in present]
    contrasts = [
        _contrast(m.name, r, fronts[m.name], fronts[r], measure)
        for r in references
        for m in present
        if m.name != r and set(fronts[m.name]) & set(fronts[r])
    ]
    used = [t for by_seed in trainings.values() for runs in by_seed.values() for t in runs]
    return Comparison(
        objectives=list(objectives),
        reference_point=dict(base.reference_point),
        kl_limit=kl_limit,
        base=base.base,
        methods=results,
        contrasts=contrasts,
        machine={
            "processor": provenance.processor(),
            "platform": platform.platform(),
            "devices": sorted({t.device for t in used}),
            "threads": sorted({t.threads for t in used}),
        },
        versions=versions(),
        commits=sorted({c for c in [*(t.commit for t in used), base.commit, source_commit()] if c}),
        **about,
    )


@dataclass(frozen=True)
class _Measure:
    """The yardsticks that all fronts share: reference point, base model, limit of KL, the points of specialists, and the best
    points of all fronts."""

    objectives: Sequence[str]
    reference: np.ndarray
    base: np.ndarray
    kl_limit: float | None
    kl_is_beta: bool
    matched: set[tuple[float, ...]]
    target: np.ndarray

    def coordinates(self, front: Front) -> np.ndarray:
        return _coordinates(front, self.kl_limit)

    def hypervolume(self, front: Front) -> float:
        return float(pareto.hypervolume(front.rewards, self.reference))

    def kl_volume(self, front: Front) -> float:
        """The hypervolume of the points (R, -KL) above (R_base, -kl_limit): the gain in reward over the base model, integrated
        over the KL that may be spent,  integral_0^limit max(0, max_{p : KL_p <= x} R_p - R_base) dx."""
        return float(pareto.hypervolume(self.coordinates(front), np.array([self.base[0], -self.kl_limit])))

    def volume(self, front: Front) -> float:
        return self.hypervolume(front) if self.kl_limit is None else self.kl_volume(front)


def _coordinates(front: Front, kl_limit: float | None) -> np.ndarray:
    """The coordinates in which points are compared, larger ones being better: rewards (P, M), or (R, -KL) (P, 2)."""
    return front.rewards if kl_limit is None else np.stack([front.rewards[:, 0], -front.kl], -1)


def _method_result(
    method: Method,
    fronts: Mapping[int, Front],
    trainings: Mapping[int, Sequence[work.Training]],
    measure: _Measure,
) -> MethodResult:
    seeds = tuple(fronts)
    each = [fronts[seed] for seed in seeds]
    matched = [f.restricted(measure.matched) for f in each]
    matched = None if any(f is None for f in matched) else matched
    lattice = default_grid(len(measure.objectives))
    took = [trainings[seed] for seed in seeds]
    one = len(measure.objectives) == 1
    return MethodResult(
        name=method.name,
        kind=method.kind,
        description=method.description,
        seeds=seeds,
        points=_points(each, measure),
        hypervolume=_over(each, measure.hypervolume),
        hypervolume_matched=_over(matched, measure.hypervolume),
        kl_volume=_over(each, measure.kl_volume) if one else None,
        kl_volume_matched=_over(matched, measure.kl_volume) if one else None,
        expected_utility=_over(each, lambda f: pareto.expected_utility(f.rewards, lattice)),
        realised_utility=_over(each, lambda f: f.utility.mean()),
        realised_utility_matched=_over(matched, lambda f: f.utility.mean()),
        igd_plus=_over(each, lambda f: pareto.igd_plus(measure.coordinates(f), measure.target)),
        sparsity=_over(each, lambda f: pareto.sparsity(measure.coordinates(f))),
        steerability=_steerability(each, measure.objectives),
        kl_steerability=_kl_steerability(each),
        kl=_over(each, lambda f: f.kl.mean()),
        length=_over(each, lambda f: f.length.mean()),
        runs=len(took[0]),
        steps=Estimate.of([sum(t.steps for t in runs) for runs in took]),
        completions=Estimate.of([sum(t.completions for t in runs) for runs in took]),
        generated_tokens=Estimate.of([sum(t.generated_tokens for t in runs) for runs in took]),
        trained_parameters=sum(t.trained_parameters for t in took[0]),
        seconds=Estimate.of([sum(t.seconds for t in runs) for runs in took]),
    )


def _over(fronts: Sequence[Front] | None, metric) -> Estimate | None:
    return None if fronts is None else Estimate.of([metric(front) for front in fronts])


def _points(fronts: Sequence[Front], measure: _Measure) -> tuple[FrontPoint, ...]:
    def over_seeds(values) -> list[Estimate]:
        return [Estimate.of(column) for column in np.stack(values, -1).tolist()]

    first, names = fronts[0], measure.objectives
    rewards = [over_seeds([f.rewards[:, i] for f in fronts]) for i in range(len(names))]
    columns = zip(
        first.keys,
        zip(*rewards),
        over_seeds([f.kl for f in fronts]),
        over_seeds([f.length for f in fronts]),
        over_seeds([f.utility for f in fronts]),
        over_seeds([f.objective(measure.kl_is_beta) for f in fronts]),
    )
    return tuple(
        FrontPoint(
            dict(zip(names, key)),
            key[-1],
            dict(zip(names, reward)),
            kl,
            length,
            utility,
            objective,
            key in measure.matched,
        )
        for key, reward, kl, length, utility, objective in columns
    )


def _steerability(fronts: Sequence[Front], objectives: Sequence[str]) -> dict[str, Estimate | None]:
    """Steerability by objective. None where it is undefined at some seed."""
    by_seed = np.stack([pareto.steerability(f.rewards, f.weights) for f in fronts])  # (seeds, M)
    return {
        name: None if np.isnan(column).any() else Estimate.of(column.tolist())
        for name, column in zip(objectives, by_seed.T)
    }


def _kl_steerability(fronts: Sequence[Front]) -> Estimate | None:
    """Mean over weightings of the rank correlation of KL coefficient and KL; None where it is undefined at some seed."""
    by_seed = []
    for front in fronts:
        same = [np.flatnonzero((front.weights == w).all(-1)) for w in np.unique(front.weights, axis=0)]
        columns = [(front.kl_coefs[rows], front.kl[rows]) for rows in same]
        if not all(len(set(asked)) > 1 and len(set(got)) > 1 for asked, got in columns):
            return None
        by_seed.append(np.mean([np.corrcoef(pareto.ranks(a), pareto.ranks(g))[0, 1] for a, g in columns]))
    return Estimate.of(by_seed)


def _contrast(
    method: str, reference: str, mine: Mapping[int, Front], theirs: Mapping[int, Front], measure: _Measure
) -> Contrast:
    seeds = tuple(seed for seed in mine if seed in theirs)
    pairs = [(mine[seed], theirs[seed]) for seed in seeds]
    matched = [(a.restricted(measure.matched), b.restricted(measure.matched)) for a, b in pairs]
    differences = _differences(pairs, measure)
    return Contrast(
        method,
        reference,
        seeds,
        _ratio(pairs, measure),
        None if any(None in pair for pair in matched) else _ratio(matched, measure),
        Estimate.of([dominated(measure.coordinates(a), measure.coordinates(b)) for a, b in pairs]),
        len(pairs[0][1].kl_coefs),
        differences,
        _mean_over_points([d.utility for d in differences]),
        _mean_over_points([d.objective for d in differences]),
    )


def _ratio(pairs: Sequence[tuple[Front, Front]], measure: _Measure) -> Estimate | None:
    volumes = [(measure.volume(a), measure.volume(b)) for a, b in pairs]
    return Estimate.of([a / b for a, b in volumes]) if all(b > 0 for _, b in volumes) else None


def dominated(front: np.ndarray, reference: np.ndarray) -> int:
    """The number of points of `reference` (Q, M) that some point of `front` (P, M) dominates: it is at least as good in every
    objective, and better in one."""
    q, p = front[None, :, :], reference[:, None, :]
    return int(((q >= p).all(-1) & (q > p).any(-1)).any(-1).sum())


def _differences(pairs: Sequence[tuple[Front, Front]], measure: _Measure) -> tuple[Difference, ...]:
    shared = [key for key in pairs[0][0].keys if key in set(pairs[0][1].keys)]
    if not shared:
        return ()

    def minus(value) -> list[Estimate]:
        rows = [
            value(a)[[a.keys.index(k) for k in shared]] - value(b)[[b.keys.index(k) for k in shared]]
            for a, b in pairs
        ]
        return [Estimate.of(column) for column in np.stack(rows, -1).tolist()]

    utilities = minus(lambda f: f.utility)
    objectives = minus(lambda f: f.objective(measure.kl_is_beta))
    return tuple(
        Difference(dict(zip(measure.objectives, key)), key[-1], u, o)
        for key, u, o in zip(shared, utilities, objectives)
    )


def _mean_over_points(estimates: Sequence[Estimate]) -> Estimate | None:
    """The mean over points at each seed, then over seeds."""
    return Estimate.of(np.mean([e.values for e in estimates], 0).tolist()) if estimates else None
