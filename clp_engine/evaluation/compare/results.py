"""The content of comparison.json, as dataclasses: each method over its seeds, and its differences from the baselines."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from clp_engine.core.statistics import Estimate
from clp_engine.evaluation.front import Base


@dataclass(frozen=True)
class FrontPoint:
    """A method at one weighting and KL coefficient, over its seeds.

    utility: w.R
    objective: the quantity that training maximises, `(1 - alpha) w.R - alpha KL` or `w.R - beta KL`
    matched: whether specialists were trained for this weighting (and KL coefficient)
    """

    weights: dict[str, float]
    kl_coef: float
    rewards: dict[str, Estimate]
    kl: Estimate
    length: Estimate
    utility: Estimate
    objective: Estimate
    matched: bool


@dataclass(frozen=True)
class MethodResult:
    """A method over the seeds that it was evaluated for.

    hypervolume, expected_utility, realised_utility, steerability: see `pareto`; over all points of the method
    igd_plus: of the non-dominated points of all methods and seeds (`pareto.igd_plus`). sparsity: see `pareto`. Both are in the
        coordinates of the volume
    kl_volume: hypervolume of the points (reward, -KL); None with several objectives
    kl_steerability: rank correlation of the KL coefficient with the KL, -1 where a larger coefficient always means less KL;
        None where one coefficient was evaluated
    kl, length: means over the points
    runs, steps, completions, generated_tokens, trained_parameters, seconds: of training, summed over the runs that the
        method needs, whether or not other methods share them; seconds are those of optimiser steps

    A metric with `_matched` is over the weightings and KL coefficients that specialists were trained for. It is None without
    specialists, and where the method lacks one of their points.
    """

    name: str
    kind: str
    description: str
    seeds: tuple[int, ...]
    points: tuple[FrontPoint, ...]
    hypervolume: Estimate
    hypervolume_matched: Estimate | None
    kl_volume: Estimate | None
    kl_volume_matched: Estimate | None
    expected_utility: Estimate
    realised_utility: Estimate
    realised_utility_matched: Estimate | None
    igd_plus: Estimate
    sparsity: Estimate
    steerability: dict[str, Estimate | None]
    kl_steerability: Estimate | None
    kl: Estimate
    length: Estimate
    runs: int
    steps: Estimate
    completions: Estimate
    generated_tokens: Estimate
    trained_parameters: int
    seconds: Estimate

    def volume(self, matched: bool = False) -> Estimate | None:
        """The hypervolume to compare: of rewards, or of reward and KL where there is one objective."""
        volumes = (
            (self.kl_volume, self.kl_volume_matched)
            if self.kl_volume
            else (self.hypervolume, self.hypervolume_matched)
        )
        return volumes[matched]


@dataclass(frozen=True)
class Difference:
    """The method minus the reference at one weighting and KL coefficient, paired over seeds."""

    weights: dict[str, float]
    kl_coef: float
    utility: Estimate
    objective: Estimate


@dataclass(frozen=True)
class Contrast:
    """A method against a reference, over the seeds that both were evaluated for.

    volume_ratio: `MethodResult.volume` of the method by that of the reference, each over all its points
    volume_ratio_matched: the same, both at the weightings of the specialists
    dominated: number of the reference's points that some point of the method dominates (with one objective: in reward and KL)
    reference_points: number of the reference's points
    differences: at every weighting that both were evaluated at
    utility, objective: the means of the differences over the weightings
    """

    method: str
    reference: str
    seeds: tuple[int, ...]
    volume_ratio: Estimate | None
    volume_ratio_matched: Estimate | None
    dominated: Estimate
    reference_points: int
    differences: tuple[Difference, ...]
    utility: Estimate | None
    objective: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """The content of comparison.json. missing: the methods and seeds without a complete evaluation."""

    task: str | None
    model: str
    objectives: list[str]
    seeds: list[int]
    reference_point: dict[str, float]
    kl_limit: float | None
    base: Base
    methods: list[MethodResult]
    contrasts: list[Contrast]
    missing: list[str]
    setup: dict[str, Any]
    config: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    commits: list[str]
    command: str

    def to_dict(self) -> dict[str, Any]:
        """The content of comparison.json."""
        return dataclasses.asdict(self)

    def method(self, name: str) -> MethodResult:
        return next(m for m in self.methods if m.name == name)

    def fair(self, contrast: Contrast | Difference) -> Estimate | None:
        """The difference that treats methods equally: of w.R, or with one objective that of the quantity training maximises."""
        return contrast.utility if self.kl_limit is None else contrast.objective

    @property
    def fair_name(self) -> str:
        """The name of the quantity that `fair` is a difference of."""
        return "w.R" if self.kl_limit is None else "objective"

    @property
    def varies_kl(self) -> bool:
        """Whether the points have several KL coefficients."""
        return len({p.kl_coef for m in self.methods for p in m.points}) > 1
