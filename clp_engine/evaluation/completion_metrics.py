"""Metrics of completions beside their rewards: diversity, calibration, and which of two completions a judge prefers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from clp_engine.core.statistics import Array, divide
from clp_engine.data.rewards import RewardSet

BINS = 10


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[i:] for i in range(n))))


def distinct(group: Sequence[Sequence[int]], n: int = 2) -> float:
    """Distinct n-grams of the completions of one prompt by all of their n-grams, 0 to 1; NaN where there is none.

    It falls with the number of completions and with their length: compare it at equal numbers of both. Source: Li et al., "A
    diversity-promoting objective function for neural conversation models", 2016.
    """
    every = [gram for ids in group for gram in ngrams(ids, n)]
    return len(set(every)) / len(every) if every else float("nan")


def self_similarity(group: Sequence[Sequence[int]], n: int = 2) -> float:
    """Mean overlap of two completions of one prompt, 0 to 1; NaN for fewer than two completions with an n-gram.

    mean over pairs of |A & B| / |A | B|,    A, B: their sets of n-grams (Jaccard's index)
    """
    sets = [found for ids in group if (found := set(ngrams(ids, n)))]
    pairs = [(a, b) for i, a in enumerate(sets) for b in sets[:i]]
    return float(np.mean([len(a & b) / len(a | b) for a, b in pairs])) if pairs else float("nan")


def calibration_error(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Expected calibration error of completions with a reward from 0 to 1, such as one for a right answer; 0 to 1.

        ECE = sum_b n_b / n |mean reward in bin b - mean confidence in bin b|,    10 bins of equal width

    confidence: a probability for each completion, such as the geometric mean of its tokens' probabilities. correct: its reward,
    or NaN where none applies. NaN where a reward lies outside 0 to 1, or there is none. Source: Guo et al., "On calibration of
    modern neural networks", 2017.
    """
    confidence, correct = (np.asarray(v, dtype=np.float64).ravel() for v in (confidence, correct))
    confidence, correct = confidence[~np.isnan(correct)], correct[~np.isnan(correct)]
    if not len(correct) or correct.min() < 0 or correct.max() > 1:
        return float("nan")
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, correct - confidence, minlength=BINS)  # n_b (mean reward - mean confidence)
    return float(np.abs(gaps).sum() / len(correct))


def preferences(
    judge: RewardSet,
    prompts: list,
    completions: Sequence[list],
    completion_ids: Sequence[list],
    columns: Mapping[str, list],
) -> Array:
    """Which of two completions a judge prefers, a number for each row: 1 the first, 0 the second, 1/2 neither.

    completions, completion_ids: of both sides.
    judge: one reward function. It is called twice, with either side as `completions` and the other as `others`, and scores the
        former. The side with the higher score is preferred. A reward that ignores `others` thus compares two rewards; a judge
        that looks at both and favours one place takes that back in the other order, and the row is a tie.
    NaN where the judge returns None in either order.
    """
    scores = [
        judge(prompts, mine, ids, columns, others=theirs)[:, 0].double().numpy()
        for mine, theirs, ids in zip(completions, completions[::-1], completion_ids)
    ]
    return np.where(np.isnan(scores[0] + scores[1]), np.nan, (np.sign(scores[0] - scores[1]) + 1) / 2)


def mean_of(values: Array) -> Array:
    """Means over the last axis without NaNs; NaN where nothing else is there."""
    return divide(np.nansum(values, -1), (~np.isnan(values)).sum(-1).astype(np.float64))
