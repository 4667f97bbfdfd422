"""The content of comparison.json: methods over their seeds, and their differences."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from clp_engine.core.statistics import Estimate
from clp_engine.evaluation.front import Base


@dataclass(frozen=True)
class FrontPoint:
    """One weighting (and KL coefficient) of a method, over its seeds. utility: w.R; objective: what training maximises there,
    `(1 - alpha) w.R - alpha KL`, or `w.R - beta KL`; matched: one of the specialists' weightings."""

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
    """A method over the seeds it has been evaluated for.

    hypervolume, expected_utility, realised_utility, steerability: see `pareto`; over all points of the method. kl_volume:
    hypervolume of (reward, -KL) points, for one objective only. kl_steerability: rank correlation of the KL coefficient with
    the KL, -1 where a larger one always means less; None where one coefficient was evaluated. `_matched`: over the
    weightings (and KL coefficients) that specialists were trained for: None where there are no specialists, or the method
    lacks one of their points.
    kl, length: means over the points. The rest is what training took, summed over the runs the method needs (whoever else
    needs them too): runs, optimiser steps, completions, tokens generated, parameters trained, seconds of steps.
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
        """The hypervolume that says something: of rewards, or of reward and KL where there is one reward."""
        volumes = (
            (self.kl_volume, self.kl_volume_matched)
            if self.kl_volume
            else (self.hypervolume, self.hypervolume_matched)
        )
        return volumes[matched]


@dataclass(frozen=True)
class Difference:
    """At one weighting (and KL coefficient), method minus reference, paired over seeds."""

    weights: dict[str, float]
    kl_coef: float
    utility: Estimate
    objective: Estimate


@dataclass(frozen=True)
class Contrast:
    """A method against a reference, over the seeds both have.

    volume_ratio: of `MethodResult.volume`, method by reference, each at all its own points; volume_ratio_matched: both at
    the specialists' weightings. dominated: how many of the reference's `reference_points` points some point of the method
    dominates (with one objective: in reward and KL).
    differences: at every weighting both have; utility, objective: their means over the weightings.
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
    """The content of comparison.json. missing: methods and seeds that have no complete report yet."""

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
        return dataclasses.asdict(self)

    def method(self, name: str) -> MethodResult:
        return next(m for m in self.methods if m.name == name)

    def fair(self, contrast: Contrast | Difference) -> Estimate | None:
        """The difference to look at: of w.R, or with one objective (which is compared at several KL) of the objective."""
        return contrast.utility if self.kl_limit is None else contrast.objective

    @property
    def fair_name(self) -> str:
        return "w.R" if self.kl_limit is None else "objective"

    @property
    def varies_kl(self) -> bool:
        return len({p.kl_coef for m in self.methods for p in m.points}) > 1
