"""Weightings: the distribution Q that training draws its conditions `(w, kl)` from.

Every draw comes from the CPU generator given to `sample`, which is made anew from (seed, step). A resumed run
therefore draws the same conditions; a weighting that adapts adds its `state_dict` to the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from clp_engine.core.conditions import Conditions
from clp_engine.core.sizes import check_size


def simplex_lattice(num_objectives: int, points_per_edge: int) -> torch.Tensor:
    """All weightings whose entries are multiples of `1 / (points_per_edge - 1)`: (n, M) float32,
    lexicographic.

    n = binomial(points_per_edge - 2 + M, M - 1): 11 points per edge give 11 weightings of two objectives
    and 66 of three.
    """
    if num_objectives < 1 or points_per_edge < 2:
        raise ValueError(
            f"simplex_lattice needs at least 1 objective and 2 points per edge; "
            f"got {num_objectives} and {points_per_edge}"
        )
    steps = points_per_edge - 1
    count = math.comb(steps + num_objectives - 1, num_objectives - 1)
    check_size(
        f"a lattice of {points_per_edge:,} points per edge, {count:,} weightings",
        count * (64 + 16 * num_objectives),
        "cpu",
    )

    def compositions(parts: int, total: int) -> list[tuple[int, ...]]:
        if parts == 1:
            return [(total,)]
        return [
            (first, *rest) for first in range(total + 1) for rest in compositions(parts - 1, total - first)
        ]

    return torch.tensor(compositions(num_objectives, steps), dtype=torch.float64).div(steps).float()


class WeightSampler(Protocol):
    def __call__(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """(rows, M) float32, each row on the simplex."""


class KLSampler(Protocol):
    @property
    def smallest(self) -> float: ...

    def __call__(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """(rows,) float32."""


@dataclass(frozen=True)
class Dirichlet:
    """w ~ Dirichlet(concentration), one per objective: below 1 prefers corners, above 1 the middle."""

    concentration: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(c > 0 and math.isfinite(c) for c in self.concentration):
            raise ValueError(
                f"concentration must be positive; got {', '.join(f'{c:g}' for c in self.concentration)}"
            )

    def __call__(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        concentration = torch.tensor(self.concentration, dtype=torch.float64).expand(rows, -1)
        # Normalised gammas, in logarithms: gamma(c) ~ gamma(c + 1) * u^(1/c), which does not underflow for
        # a small c. torch.distributions takes no generator; this is the function it calls.
        gammas = torch._standard_gamma(concentration + 1, generator=generator)
        exponentials = torch.empty_like(gammas).exponential_(generator=generator)
        return (gammas.log() - exponentials / concentration).softmax(-1).float()


@dataclass(frozen=True)
class UniformSimplex:
    """w uniform on the simplex.

    stratified: the rows of one draw fill the simplex evenly instead of independently (a randomly shifted
    Kronecker lattice); each row by itself is still uniform, so expectations over Q stay as they are and
    their estimates from few prompts vary less.
    """

    num_objectives: int
    stratified: bool = False

    def __call__(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        dims = self.num_objectives - 1
        if self.stratified:
            shift = torch.rand(1, dims, generator=generator, dtype=torch.float64)
            index = torch.arange(rows, dtype=torch.float64).unsqueeze(-1)
            cube = (shift + index * _kronecker_steps(dims)) % 1
        else:
            cube = torch.rand(rows, dims, generator=generator, dtype=torch.float64)
        # Stick breaking: entry i takes of what is left a share distributed as the least of M - 1 - i
        # uniforms.
        shares = 1 - (1 - cube) ** (1 / torch.arange(dims, 0, -1, dtype=torch.float64))
        left = torch.cat([torch.ones(rows, 1, dtype=torch.float64), (1 - shares).cumprod(-1)], -1)
        return torch.cat([left[:, :-1] * shares, left[:, -1:]], -1).float()


@dataclass(frozen=True)
class Grid:
    """w drawn uniformly from the lattice with steps of `1 / resolution`."""

    num_objectives: int
    resolution: int = 10
    points: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise ValueError(
                f"resolution must be at least 1 (steps of 1 / resolution); got {self.resolution}"
            )
        object.__setattr__(self, "points", simplex_lattice(self.num_objectives, self.resolution + 1))

    def __call__(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        return self.points[torch.randint(len(self.points), (rows,), generator=generator)]


@dataclass(frozen=True)
class Corners:
    """With `probability` a single objective (each equally likely), otherwise a draw of `inner`."""

    inner: WeightSampler
    probability: float

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"corner_probability must be in [0, 1]; got {self.probability}")

    def __call__(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        weights = self.inner(rows, generator)
        corners = torch.eye(weights.shape[1])[torch.randint(weights.shape[1], (rows,), generator=generator)]
        chosen = torch.rand(rows, 1, generator=generator) < self.probability
        return torch.where(chosen, corners, weights)


@dataclass(frozen=True)
class Fixed:
    """The same w for every row."""

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(w >= 0 for w in self.weights) or abs(sum(self.weights) - 1) > 1e-3:
            raise ValueError(
                f"fixed_weights must not be negative and must sum to 1; "
                f"got {', '.join(f'{w:g}' for w in self.weights)}"
            )

    def __call__(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return (weights / weights.sum()).float().repeat(rows, 1)


@dataclass(frozen=True)
class FixedKL:
    """The same KL coefficient for every row."""

    value: float

    def __post_init__(self) -> None:
        if not (self.value >= 0 and math.isfinite(self.value)):
            raise ValueError(f"kl must not be negative; got {self.value}")

    @property
    def smallest(self) -> float:
        return float(self.value)

    def __call__(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        return torch.full((rows,), float(self.value))


@dataclass(frozen=True)
class LogUniformKL:
    """log kl uniform between log low and log high: each factor of two is drawn equally often."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (0 < self.low <= self.high and math.isfinite(self.high)):
            raise ValueError(f"a range of kl needs 0 < low <= high; got ({self.low}, {self.high})")

    @property
    def smallest(self) -> float:
        return float(self.low)

    def __call__(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        unit = torch.rand(rows, generator=generator, dtype=torch.float64)
        return (math.log(self.low) + unit * math.log(self.high / self.low)).exp().float()


@dataclass(frozen=True)
class GridKL:
    """kl drawn uniformly from a list."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values or not all(v >= 0 and math.isfinite(v) for v in self.values):
            raise ValueError(
                f"a list of kl needs at least one value and none negative; got {list(self.values)}"
            )

    @property
    def smallest(self) -> float:
        return float(min(self.values))

    def __call__(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        return torch.tensor(self.values)[torch.randint(len(self.values), (rows,), generator=generator)]


class Weighting(Protocol):
    """Which `(w, kl)` training draws for its prompts.

    min_kl: the smallest kl it can draw (what `blend_coefficients` asks for).
    """

    @property
    def min_kl(self) -> float: ...

    def sample(self, rows: int, generator: torch.Generator) -> Conditions:
        """`rows` conditions, on the CPU, drawn from `generator` (a CPU generator of the step) alone."""

    def observe(self, conditions: Conditions, rewards: torch.Tensor) -> None:
        """What a rollout's prompts got: conditions (P rows), rewards (P, group, M), NaN where a reward does not apply. Called
        once for every rollout that is trained on, never for an evaluation."""

    def state_dict(self) -> dict:
        """Plain floats and lists by name; written into checkpoints."""

    def load_state_dict(self, state: dict) -> None: ...


class ConditionSampler:
    """A `Weighting` that draws w and kl independently, one `(w, kl)` per row.

    This class keeps no state; a weighting that adapts derives from it, overrides `observe`, and puts plain
    floats and lists into its state_dict.
    """

    def __init__(self, weights: WeightSampler, kl: KLSampler):
        self.weights, self.kl = weights, kl

    @property
    def min_kl(self) -> float:
        return self.kl.smallest

    def sample(self, rows: int, generator: torch.Generator) -> Conditions:
        """`rows` conditions, on the CPU, drawn from `generator` (a CPU generator) alone."""
        return Conditions(self.weights(rows, generator), self.kl(rows, generator))

    def observe(self, conditions: Conditions, rewards: torch.Tensor) -> None:
        """Nothing: what was rewarded does not change what is drawn."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        if state:
            raise ValueError(
                f"{type(self).__name__} keeps no state; the checkpoint has {', '.join(sorted(state))}"
            )


def build_sampler(
    num_objectives: int,
    kind: str = "dirichlet",
    concentration: float | Sequence[float] = 1.0,
    corner_probability: float = 0.0,
    resolution: int = 10,
    fixed_weights: Sequence[float] | None = None,
    kl: float | tuple[float, float] | list[float] = 0.1,
    stratified: bool = False,
) -> ConditionSampler:
    """The sampler of a run.

    kind: "dirichlet" (concentration: one number or one per objective), "uniform" (optionally `stratified`),
        "grid" (steps of 1 / resolution) or "fixed" (fixed_weights).
    corner_probability: share of the rows that get a single objective instead, in any kind but "fixed".
    kl: a number (fixed), a tuple (low, high) (log-uniform) or a list (drawn uniformly from it).

    Raises ValueError for anything that does not fit, naming what was given and what was expected.
    """
    if num_objectives < 1:
        raise ValueError(f"num_objectives must be at least 1; got {num_objectives}")
    weights = _weight_sampler(num_objectives, kind, concentration, resolution, fixed_weights, stratified)
    if corner_probability:
        if kind == "fixed":
            raise ValueError(f"corner_probability={corner_probability} contradicts kind='fixed'")
        weights = Corners(weights, corner_probability)
    return ConditionSampler(weights, _kl_sampler(kl))


def _weight_sampler(
    num_objectives: int,
    kind: str,
    concentration: float | Sequence[float],
    resolution: int,
    fixed_weights: Sequence[float] | None,
    stratified: bool,
) -> WeightSampler:
    if stratified and kind != "uniform":
        raise ValueError(f"stratified draws exist for kind='uniform'; got kind={kind!r}")
    if kind == "dirichlet":
        if not isinstance(concentration, Sequence):
            concentration = [concentration] * num_objectives
        return Dirichlet(_one_per_objective("concentration", concentration, num_objectives))
    if kind == "uniform":
        return UniformSimplex(num_objectives, stratified)
    if kind == "grid":
        return Grid(num_objectives, resolution)
    if kind == "fixed":
        if fixed_weights is None:
            raise ValueError("kind='fixed' needs fixed_weights, one per objective")
        return Fixed(_one_per_objective("fixed_weights", fixed_weights, num_objectives))
    raise ValueError(f"kind={kind!r}: expected one of dirichlet, uniform, grid, fixed")


def _one_per_objective(name: str, values: Sequence[float], num_objectives: int) -> tuple[float, ...]:
    if len(values) != num_objectives:
        raise ValueError(
            f"{name} has {len(values)} entries; expected one for each of {num_objectives} objectives"
        )
    return tuple(float(v) for v in values)


def _kl_sampler(kl: float | tuple[float, float] | list[float]) -> KLSampler:
    if isinstance(kl, tuple):
        if len(kl) != 2:
            raise ValueError(
                f"kl as a tuple is a range (low, high); got {kl}. For values to choose from give a list"
            )
        return LogUniformKL(float(kl[0]), float(kl[1]))
    if isinstance(kl, list):
        return GridKL(tuple(float(v) for v in kl))
    return FixedKL(float(kl))


def _kronecker_steps(dims: int) -> torch.Tensor:
    """Steps of the R-sequence, (dims,) float64: 1/g, 1/g^2, ... with g > 1 and g^(dims+1) = g + 1."""
    golden = 2.0
    for _ in range(64):
        golden = (1 + golden) ** (1 / (dims + 1))
    return golden ** -torch.arange(1, dims + 1, dtype=torch.float64)
