"""The front of a conditioned policy as data: the measurements at each point, and the metrics over all points."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from clp_engine.core import records
from clp_engine.core.statistics import Interval
from clp_engine.objectives.weightings import simplex_lattice

# Points per edge of the default grid: 11 points for two objectives, 66 for three, and 56, 35, 21, 28, ... for more.
_POINTS_PER_EDGE = {1: 2, 2: 11, 3: 11, 4: 6, 5: 4}
_POINTS_PER_EDGE_ABOVE = 3
F = TypeVar("F", bound="ParetoFront")


@dataclass(frozen=True)
class Point:
    """The policy at one weighting and one KL coefficient.

    rewards: mean over prompts, by objective
    kl: mean over completions of `sum_t KL(pi(.|y_<t) || pi_ref(.|y_<t))`, in nats, exact over the vocabulary
    length: mean tokens of a completion, end token included
    truncated: share of the completions that were cut at the limit of tokens
    non_dominated: whether no other point is at least as good in every reward and better in one
    distinct_2, self_similarity: diversity of the completions of a prompt (`completion_metrics`), means over prompts;
        self_similarity is None with one completion of each
    calibration_error: by objective, of the completions' probability per token; None for rewards outside 0 to 1
    win_rate: share of completions that the judge prefers to those of the opponent, ties counted half; None without a judge
    """

    weights: dict[str, float]
    kl_coef: float
    rewards: dict[str, Interval]
    kl: float
    length: float
    truncated: float
    non_dominated: bool
    distinct_2: float | None = None
    self_similarity: float | None = None
    calibration_error: dict[str, float | None] | None = None
    win_rate: Interval | None = None


@dataclass(frozen=True)
class Base:
    """The base model at the same prompts. hypervolume: of its one point. The other fields are as in `Point`."""

    rewards: dict[str, Interval]
    hypervolume: float
    hypervolume_interval: Interval
    length: float
    truncated: float
    distinct_2: float | None = None
    self_similarity: float | None = None
    calibration_error: dict[str, float | None] | None = None


@dataclass(frozen=True)
class ParetoFront:
    """The content of report.json. `pareto` has the formula of each metric.

    task, model, objectives: what was evaluated
    points: the policy at each weighting and KL coefficient
    base: the base model
    reference_point: of the hypervolume, fixed before the front is known
    hypervolume: of all points
    hypervolume_gain: that of the front minus that of the base model, paired over prompts
    hypervolume_chance: the hypervolume that a front no better than the base model stays below in 95 % of cases
    expected_utility: over the default lattice of weightings
    realised_utility, regret: over the evaluated points
    steerability: by objective; None where the rank correlation is undefined
    kendall_tau: by objective, as steerability. sparsity: of the points that no other dominates
    seconds, setup, versions, commit: how the report was made
    kl_steerability: -1 if a larger KL coefficient always leads to less KL; None where it is undefined, or one coefficient
        was evaluated
    kl_hypervolume: of reward against KL up to kl_limit; None where one KL coefficient was evaluated
    kl_limit: the largest KL that counts in kl_hypervolume; None where one KL coefficient was evaluated
    """

    task: str | None
    model: str
    objectives: list[str]
    reference_point: dict[str, float]
    points: list[Point]
    base: Base
    hypervolume: float
    hypervolume_interval: Interval
    hypervolume_gain: Interval
    hypervolume_chance: float
    expected_utility: float
    realised_utility: float
    realised_utility_interval: Interval
    regret: dict[str, float]
    steerability: dict[str, float | None]
    seconds: dict[str, float | None]
    setup: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    kl_steerability: float | None = None
    kl_hypervolume: Interval | None = None
    kl_limit: float | None = None
    kendall_tau: dict[str, float | None] | None = None
    sparsity: float | None = None

    @property
    def kl_coefs(self) -> list[float]:
        """The evaluated KL coefficients, in order of evaluation."""
        return list(dict.fromkeys(point.kl_coef for point in self.points))

    @property
    def kl_name(self) -> str:
        """The name of the KL coefficient: alpha or beta."""
        return self.setup.get("kl_name", "alpha")

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json: dicts, lists, numbers and strings."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[F], raw: Mapping[str, Any]) -> F:
        """The inverse of `to_dict`.

        Unknown keys are ignored. Fields with a default may be missing, because early reports lack them. Raises ConfigError
        where another field is missing.
        """
        return records.of(cls, raw, "the report")


def default_grid(num_objectives: int) -> np.ndarray:
    """The default weightings (P, M): a simplex lattice with P = 1, 11, 66, 56, 35 points for M = 1 to 5 objectives."""
    edge = _POINTS_PER_EDGE.get(num_objectives, _POINTS_PER_EDGE_ABOVE)
    return simplex_lattice(num_objectives, edge).double().numpy()
