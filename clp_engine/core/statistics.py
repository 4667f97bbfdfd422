"""Means with 95 % intervals, by the bootstrap over prompts or batches and by Student's t over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap percentile interval over prompts."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float, samples: ArrayLike) -> Interval:
        """The interval of a mean. samples: the mean in each resample; NaNs are left out."""
        return cls(float(mean), *map(float, interval(samples, CONFIDENCE)))

    def __format__(self, spec: str) -> str:
        """`mean [low, high]`, each number in the format `spec`."""
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def resample_counts(count: int, resamples: int, seed: int = 0) -> Array:
    """How often each of `count` elements occurs in each of `resamples` draws with replacement: (resamples, count).

    counts[b] ~ Multinomial(count, 1 / count)
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)


def bootstrap_means(rewards: ArrayLike, resamples: int, seed: int = 0) -> Array:
    """Mean rewards in draws of N prompts with replacement: (P, N, M) -> (resamples, P, M).

        mean[b, p, i] = sum_n count[b, n] R[p, n, i] / sum_n count[b, n],    count = resample_counts(N, resamples)

    The draws are paired: every policy sees the same draw of prompts, so that the ease of a prompt cancels in the
    difference of two policies. Both sums leave out NaN rewards (an objective that does not apply to a prompt).
    Raises ValueError unless `rewards` has three dimensions, none of size zero.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 3 or 0 in rewards.shape:
        raise ValueError(
            f"rewards has shape {rewards.shape}; expected (policies, prompts, objectives), none of them zero"
        )
    policies, prompts, objectives = rewards.shape
    counts = resample_counts(prompts, resamples, seed)
    by_prompt = np.swapaxes(rewards, 0, 1).reshape(prompts, policies * objectives)
    applies = ~np.isnan(by_prompt)
    means = divide(counts @ np.where(applies, by_prompt, 0.0), counts @ applies.astype(np.float64))
    return means.reshape(resamples, policies, objectives)


def interval(samples: ArrayLike, confidence: float = 0.95) -> tuple[Array, Array]:
    """Percentile interval over the first axis, without NaN: (resamples, ...) -> low (...), high (...)."""
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(np.asarray(samples, dtype=np.float64), [tail, 1 - tail], axis=0)
    return low, high


def divide(total: Array, count: Array) -> Array:
    """total / count, elementwise. NaN for a count of zero."""
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, its 95 % interval, and the value of each seed. low, high: None with fewer than two values."""

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        values = tuple(float(v) for v in values)
        mean = math.fsum(values) / len(values)
        if len(values) < 2:
            return cls(mean, None, None, values)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
        half = t_quantile(CONFIDENCE, len(values) - 1) * deviation / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half, values)

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval, or None with fewer than two values."""
        return None if self.high is None else self.high - self.mean


def t_quantile(confidence: float, df: int) -> float:
    """The t with P(|T| <= t) = confidence, for Student's T with `df` degrees of freedom (a whole number), by bisection."""
    low, high = 0.0, 1.0
    while t_probability(high, df) < confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, df) < confidence else (low, middle)
    return (low + high) / 2


def t_probability(t: float, df: int) -> float:
    """P(|T| <= t) for Student's T with `df` degrees of freedom.

    For a whole df it is a finite sum (Abramowitz and Stegun 26.7.3 and 26.7.4), with theta = atan(t / sqrt(df)):

        odd df    2/pi (theta + sin cos (1 + 2/3 cos^2 + 2*4/(3*5) cos^4 + ... up to cos^(df-3)))
        even df   sin (1 + 1/2 cos^2 + 1*3/(2*4) cos^4 + ... up to cos^(df-2))
    """
    theta = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = df % 2
    term, total = 1.0, 0.0
    for k in range((df - odd) // 2):
        if k:
            term *= (2 * k - 1 + odd) / (2 * k + odd) * cosine**2
        total += term
    return 2 / math.pi * (theta + sine * cosine * total) if odd else sine * total
