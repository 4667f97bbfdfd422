"""Measuring a front: a policy's rewards, KL and length at a grid of weightings and KL coefficients, and the base model's.

One model in memory serves every weighting, and the base model as the row of weight zero. Each batch holds rows of all points.
The random numbers are common to all points: completion g of prompt n draws from the random stream (seed, n, g) at every point,
so that two points differ by their parameters and not by luck.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clp_engine.core import ranges, statistics
from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError, shown
from clp_engine.core.provenance import source_commit, versions
from clp_engine.core.sizes import check_size
from clp_engine.core.statistics import CONFIDENCE, Interval
from clp_engine.data.prompts import PromptDataset
from clp_engine.data.rewards import RewardSet
from clp_engine.evaluation import completion_metrics as metrics
from clp_engine.evaluation import pareto
from clp_engine.evaluation.front import Base, Point, default_grid
from clp_engine.evaluation.measuring import Measured, Opponent, Plan, measure
from clp_engine.evaluation.report import ParetoReport
from clp_engine.objectives.weightings import simplex_lattice
from clp_engine.rollouts.types import Samplable, SamplingParams
from clp_engine.training.parallel.processes import Parallel

Row = Mapping[str, Any]


def evaluate(
    policy: Samplable,
    reward_funcs: RewardSet | Mapping[str, Callable] | Sequence[Callable],
    prompts: Sequence[str | Row],
    *,
    grid: int | Sequence | None = None,
    kl: float | Sequence[float] | None = None,
    kl_limit: float | None = None,
    num_generations: int = 1,
    sampling: SamplingParams | None = None,
    max_prompt_length: int | None = None,
    judge: Callable | str | None = None,
    against: Samplable | None = None,
    batch_rows: int = 128,
    reference_point: Mapping[str, float] | None = None,
    margin: float | Mapping[str, float] = 0.1,
    bootstrap: int = 1000,
    seed: int = 0,
    output_dir: str | Path | None = None,
    task: str | None = None,
    train_seconds: float | None = None,
    progress: bool = True,
    parallel: Parallel | None = None,
) -> ParetoReport:
    """Measure the policy at a grid of weightings, and the base model, and compute the metrics of the front.

    reward_funcs: a reward function for each objective of the policy, in its order, or a mapping by objective
    prompts: texts, or dataset rows with `prompt` and further columns, which the reward functions receive
    grid: weightings (mappings or sequences), or points along an edge of the simplex lattice; None takes 11 points for two
        objectives and 66 for three
    kl: the KL coefficient of all points, or a list, at each of which every weighting is evaluated; None takes the policy's
        default
    kl_limit: the largest KL at which reward is compared with KL (`pareto.kl_hypervolume`); None takes the largest KL of the
        points. Reports can be compared only at one limit
    num_generations: completions for each prompt and point
    max_prompt_length: tokens of a prompt that are kept, its last ones; None keeps all
    judge: a reward function, as a name or path a reward model's, that says which of two completions is better
        (`completion_metrics.preferences`); every point's completions are compared with those of `against` at the same
        conditions, None: with the base model's
    batch_rows: completions decoded together
    reference_point: by objective; None takes the base model's mean reward minus `margin`, in units of reward
    bootstrap: resamples of the prompts, for the 95 % intervals
    seed: of sampling and resampling
    output_dir: the folder for report.json, report.md and pareto.png; None writes nothing
    task, train_seconds: named in the report
    parallel: processes that share the work; each of them calls this, has the report, and the main one writes it. None: this one

    Raises ConfigError where reward functions, prompts, grid or reference point do not fit the policy.
    """
    start = time.perf_counter()
    sampling = sampling or SamplingParams()
    given = {"max_prompt_length": max_prompt_length, "kl_limit": kl_limit}
    ranges.check(
        ranges.EVALUATION,
        num_generations=num_generations,
        batch_rows=batch_rows,
        bootstrap=bootstrap,
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    profile = policy.profile
    rewards = _reward_set(reward_funcs, profile.objectives)
    rows = [{"prompt": row} if isinstance(row, str) else row for row in prompts]

    dataset = _dataset(policy, rows, max_prompt_length, sampling)
    weightings = _weightings(policy, grid)
    kls = _kl_coefficients(policy, kl)
    # All weightings at the first coefficient, then all at the second.
    repeated = [value for value in kls for _ in weightings]
    conditions = policy.conditions(weightings * len(kls), repeated, len(repeated))
    points, objectives = len(conditions) + 1, len(profile.objectives)
    check_size(
        f"num_generations={num_generations:,} completions of {len(rows):,} prompts at {points:,} points",
        8 * points * len(rows) * num_generations * (objectives + 3),
        "cpu",
    )
    check_size(
        f"bootstrap={bootstrap:,} resamples of {len(rows):,} prompts at {points:,} points",
        8 * bootstrap * (len(rows) + points * objectives),
        "cpu",
    )
    margins = _by_objective(margin, profile.objectives, "margin")
    if reference_point is not None:
        reference_point = _by_objective(reference_point, profile.objectives, "reference_point")

    parallel = parallel or Parallel()
    judging = None if judge is None else RewardSet(judge).to(policy.conditioned.device)
    opponent = None
    if against is not None:
        if judging is None or against.profile.objectives != profile.objectives:
            given = "no judge" if judging is None else f"objectives {', '.join(against.profile.objectives)}"
            raise ConfigError(
                f"against: expected a judge, and a policy with the objectives {', '.join(profile.objectives)}; got {given}"
            )
        theirs = against.conditions(weightings * len(kls), repeated, len(repeated))
        opponent = Opponent(against, _dataset(against, rows, max_prompt_length, sampling), theirs)
    plan = Plan(
        num_generations,
        sampling,
        batch_rows,
        seed,
        progress and parallel.is_main,
        parallel,
        judging,
        opponent,
    )
    measured = measure(policy, rewards, dataset, conditions, plan)
    means = pareto.mean_rewards(measured.rewards)
    for i, name in enumerate(profile.objectives):
        if np.isnan(means[:, i]).any():
            raise ConfigError(f"objective {name!r}: the reward function returned None for every completion")
    reference = means[-1] - margins if reference_point is None else reference_point
    setup = {
        "prompts": len(rows),
        "num_generations": num_generations,
        "sampling": {**dataclasses.asdict(sampling), "stop_strings": list(sampling.stop_strings)},
        "margin": None if reference_point is not None else dict(zip(profile.objectives, margins.tolist())),
        "bootstrap": bootstrap,
        "confidence": CONFIDENCE,
        "seed": seed,
        "device": str(policy.conditioned.device),
        "kl_name": "beta" if profile.kl_is_beta else "alpha",
        "random_numbers": "common: completion g of prompt n has the same random stream at every point",
    }
    summary = _summary(measured, means, conditions, reference, profile.objectives, bootstrap, seed)
    if len(kls) > 1:
        summary |= _kl_summary(measured, means, conditions, kls, kl_limit, bootstrap, seed)
    report = ParetoReport(
        task=task,
        model=profile.base_model,
        objectives=list(profile.objectives),
        **summary,
        seconds={"train": train_seconds, "evaluate": round(time.perf_counter() - start, 3)},
        setup=setup,
        versions=versions(),
        commit=source_commit(),
    )
    if output_dir is not None and parallel.is_main:
        report.save(output_dir)
    return report


# --- arguments -----------------------------------------------------------------------------------------------


def _reward_set(reward_funcs, objectives: Sequence[str]) -> RewardSet:
    """The rewards under the policy's names and in its order."""
    if isinstance(reward_funcs, RewardSet):
        if reward_funcs.names != tuple(objectives):
            raise ConfigError(
                f"reward functions {', '.join(reward_funcs.names)} are not the objectives "
                f"of the policy, {', '.join(objectives)}, in that order"
            )
        return reward_funcs
    if isinstance(reward_funcs, Mapping):
        odd = sorted(set(reward_funcs) ^ set(objectives))
        if odd:
            raise ConfigError(
                f"reward functions {', '.join(reward_funcs)} do not match the objectives "
                f"of the policy, {', '.join(objectives)} (they differ in {', '.join(odd)})"
            )
        return RewardSet({name: reward_funcs[name] for name in objectives})
    funcs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if len(funcs) != len(objectives):
        raise ConfigError(
            f"{len(funcs)} reward functions for {len(objectives)} objectives ({', '.join(objectives)})"
        )
    return RewardSet(dict(zip(objectives, funcs)))


def _dataset(
    policy: Samplable, rows: Sequence[Row], max_prompt_length: int | None, sampling: SamplingParams
) -> PromptDataset:
    """The prompts as the policy reads them. Raises ConfigError for one that leaves no room for a completion."""
    profile = policy.profile

    def check(ids: list[int], where: str) -> None:
        profile.room.check_prompt(ids, sampling.max_new_tokens, where, profile.tokenizer)

    return PromptDataset(rows, profile.tokenizer, max_prompt_length, check=check)


def _weightings(policy: Samplable, grid) -> list:
    if grid is None:
        return default_grid(len(policy.profile.objectives)).tolist()
    if isinstance(grid, numbers.Real):
        ranges.EVALUATION["grid"].check("grid", grid)
        return simplex_lattice(len(policy.profile.objectives), grid).tolist()
    if isinstance(grid, str) or not isinstance(grid, Iterable):
        raise ConfigError(f"grid={shown(grid)}: expected points per edge, or a list of weightings")
    grid = grid.tolist() if hasattr(grid, "tolist") else list(grid)
    if not grid:
        raise ConfigError("grid is empty; give at least one weighting")
    return grid


def _kl_coefficients(policy: Samplable, kl: float | Sequence[float] | None) -> list[float]:
    if kl is None:
        return [policy.profile.default_kl]
    several = isinstance(kl, Sequence | np.ndarray) and not isinstance(kl, str)
    kls = [float(ranges.EVALUATION["kl"].check("kl", value)) for value in (kl if several else [kl])]
    if not kls or len(set(kls)) < len(kls):
        raise ConfigError(f"kl={list(kls)}: expected at least one KL coefficient, none of them twice")
    return kls


def _by_objective(value, objectives: Sequence[str], name: str) -> np.ndarray:
    """(M,) from one number or a mapping by objective."""
    values = value if isinstance(value, Mapping) else dict.fromkeys(objectives, value)
    if set(values) != set(objectives):
        raise ConfigError(f"{name} is for {', '.join(values) or 'nothing'}; expected {', '.join(objectives)}")
    return np.array([float(ranges.EVALUATION[name].check(name, values[o])) for o in objectives])


# --- metrics -------------------------------------------------------------------------------------------------


def _summary(
    measured: Measured,
    means: np.ndarray,
    conditions: Conditions,
    reference: np.ndarray,
    objectives: Sequence[str],
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """The fields of ParetoReport that are computed from the measurements."""
    front, weights = means[:-1], conditions.weights.double().numpy()
    resampled = statistics.bootstrap_means(measured.rewards, bootstrap, seed)  # (bootstrap, P + 1, M)
    resampled_front, resampled_base = resampled[:, :-1], resampled[:, -1:]
    volumes, base_volumes = (pareto.hypervolume(r, reference) for r in (resampled_front, resampled_base))
    volume, base_volume = pareto.hypervolume(front, reference), pareto.hypervolume(means[-1:], reference)
    chance = pareto.chance_hypervolume(
        resampled_front - resampled_base, front - means[-1], means[-1], reference
    )
    low, high = statistics.interval(resampled, CONFIDENCE)
    rewards = [
        {
            name: Interval(float(means[p, i]), float(low[p, i]), float(high[p, i]))
            for i, name in enumerate(objectives)
        }
        for p in range(len(means))
    ]
    kl, length, truncated = (getattr(measured, f).mean(-1).tolist() for f in ("kl", "length", "truncated"))
    texts = _of_texts(measured, objectives, bootstrap, seed)
    # Six digits: weights and KL coefficients are float32, and 0.1 should read as 0.1.
    asked = [{name: round(w, 6) for name, w in zip(objectives, row)} for row in weights.tolist()]
    kl_coefs = [round(value, 6) for value in conditions.kl.tolist()]
    alone = pareto.non_dominated(front).tolist()
    points = [
        Point(*values, **more)
        for *values, more in zip(asked, kl_coefs, rewards, kl, length, truncated, alone, texts)
    ]
    realised = pareto.realised_utility(front, weights)
    lost = pareto.regret(front, weights)
    return {
        "reference_point": dict(zip(objectives, reference.tolist())),
        "points": points,
        "base": Base(
            rewards[-1],
            float(base_volume),
            Interval.of(base_volume, base_volumes),
            length[-1],
            truncated[-1],
            **texts[-1],
        ),
        "hypervolume": float(volume),
        "hypervolume_interval": Interval.of(volume, volumes),
        "hypervolume_gain": Interval.of(volume - base_volume, volumes - base_volumes),
        "hypervolume_chance": float(np.quantile(chance, CONFIDENCE)),
        "expected_utility": float(pareto.expected_utility(front, default_grid(len(objectives)))),
        "realised_utility": float(realised),
        "realised_utility_interval": Interval.of(realised, pareto.realised_utility(resampled_front, weights)),
        "regret": {"mean": float(lost.mean()), "max": float(lost.max())},
        "steerability": _by_name(objectives, pareto.steerability(front, weights)),
        "kendall_tau": _by_name(objectives, pareto.kendall_tau(front, weights)),
        "sparsity": pareto.sparsity(front),
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else float(value)


def _by_name(names: Sequence[str], values: np.ndarray) -> dict[str, float | None]:
    return {name: _number(value) for name, value in zip(names, values.tolist())}


def _of_texts(
    measured: Measured, objectives: Sequence[str], bootstrap: int, seed: int
) -> list[dict[str, Any]]:
    """The fields of each Point, and last of Base, that describe completions."""
    found: list[dict[str, Any]] = [
        {
            "distinct_2": _number(distinct),
            "self_similarity": _number(similarity),
            "calibration_error": _by_name(objectives, errors),
        }
        for distinct, similarity, errors in zip(
            metrics.mean_of(measured.distinct), metrics.mean_of(measured.similarity), measured.calibration
        )
    ]
    if measured.wins is not None:
        judged = metrics.mean_of(measured.wins)
        if np.isnan(judged).any():
            raise ConfigError("judge: it returned None for every pair of a point; expected a score")
        resampled = statistics.bootstrap_means(measured.wins[..., None], bootstrap, seed)[..., 0]
        for of_point, mean, samples in zip(found, judged, resampled.T):
            of_point["win_rate"] = Interval.of(mean, samples)
    return found


def _kl_summary(
    measured: Measured,
    means: np.ndarray,
    conditions: Conditions,
    kls: Sequence[float],
    limit: float | None,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """The fields of ParetoReport that compare KL coefficients with each other."""
    weights = conditions.weights.double().numpy()

    def by_weighting(values: np.ndarray) -> np.ndarray:
        """(..., P), the weightings of one coefficient after those of another, as (..., W, K)."""
        return np.swapaxes(values.reshape(*values.shape[:-1], len(kls), -1), -1, -2)

    def volume(rewards: np.ndarray, kl: np.ndarray) -> np.ndarray:
        front, base = rewards[..., :-1, :], rewards[..., -1, :]
        of_base = base @ weights[: len(weights) // len(kls)].T
        return pareto.kl_hypervolume(
            by_weighting((front * weights).sum(-1)), by_weighting(kl), of_base, limit
        )

    kl = measured.kl[:-1].mean(-1)
    limit = float(kl.max()) if limit is None else float(limit)
    rho = float(pareto.kl_steerability(by_weighting(kl), kls))
    # One seed: the same prompts are drawn for rewards and KL.
    resampled_rewards = statistics.bootstrap_means(measured.rewards, bootstrap, seed)
    resampled_kl = statistics.bootstrap_means(measured.kl[:-1, :, None], bootstrap, seed)[..., 0]
    return {
        "kl_steerability": None if math.isnan(rho) else rho,
        "kl_hypervolume": Interval.of(volume(means, kl), volume(resampled_rewards, resampled_kl)),
        "kl_limit": limit,
    }
