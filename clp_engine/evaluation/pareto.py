"""Metrics of a front of policies with several rewards, in numpy. Larger rewards are better.

`points` is (..., P, M): the mean rewards of P policies, one for each weighting, in M objectives. Leading dimensions hold
independent fronts, such as bootstrap resamples, and are the leading dimensions of the result. `weights` is (P, M): the
weighting that each policy was conditioned on.

The reference point of the hypervolume is fixed before a front is known: the base model's mean rewards minus a margin.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clp_engine.core.statistics import Array, divide


def _front(points: ArrayLike, name: str = "points") -> Array:
    points = np.asarray(points, dtype=np.float64)
    if points.ndim < 2 or 0 in points.shape[-2:]:
        raise ValueError(f"{name} has shape {points.shape}; expected (..., points, objectives), neither zero")
    return points


def hypervolume(points: ArrayLike, reference: ArrayLike) -> Array:
    """Volume of the union over p of the boxes between `reference` and point p: (..., P, M) -> (...).

        HV = | union_p { x : reference <= x <= p } |

    A point below the reference in any objective spans no box. The volume is exact for any M: along the last objective,
    sorted in descending order, `HV_M = sum_i (z_i - z_(i+1)) HV_(M-1)(points 0..i)`, where HV_1 is the running maximum. The
    cost is O(P^(M-2) * P log P), which suits up to five objectives. Raises ValueError where `reference` is not (M,).
    """
    points = _front(points)
    reference = np.asarray(reference, dtype=np.float64)
    if reference.shape != points.shape[-1:]:
        raise ValueError(
            f"reference has shape {reference.shape}; expected ({points.shape[-1]},), one entry per objective"
        )
    return _volume(np.maximum(points - reference, 0.0))


def _volume(boxes: Array) -> Array:
    """Hypervolume of boxes (..., P, M) that start at the origin."""
    if boxes.shape[-1] == 1:
        return boxes[..., 0].max(-1)
    order = np.argsort(-boxes[..., -1], axis=-1)
    boxes = np.take_along_axis(boxes, order[..., None], axis=-2)
    steps = -np.diff(boxes[..., -1], axis=-1, append=0.0)  # (..., P): thickness of the slice below point i
    rest = boxes[..., :-1]
    if rest.shape[-1] == 1:
        slices = np.maximum.accumulate(rest[..., 0], axis=-1)
    else:
        slices = np.stack([_volume(rest[..., : i + 1, :]) for i in range(rest.shape[-2])], axis=-1)
    return (steps * slices).sum(-1)


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point dominates: (..., P, M) -> (..., P) bool.

        q dominates p  iff  q_i >= p_i for all i and q_i > p_i for some i

    Equal points do not dominate each other: both stay.
    """
    points = _front(points)
    q, p = points[..., None, :, :], points[..., :, None, :]  # [..., p, q, objective]
    return ~((q >= p).all(-1) & (q > p).any(-1)).any(-1)


def expected_utility(points: ArrayLike, lattice: ArrayLike) -> Array:
    """Mean utility of users with random weightings who pick the best policy of the front: (..., P, M) -> (...).

        EU = mean over v in lattice of max_p v . R_p

    lattice: (L, M) weightings, usually the simplex lattice. A policy that ignores its weighting loses nothing here as long as
    some point of the front is good; it loses in `realised_utility`.
    """
    return (_front(points) @ np.asarray(lattice, dtype=np.float64).T).max(-2).mean(-1)


def realised_utility(points: ArrayLike, weights: ArrayLike) -> Array:
    """Mean utility of users who take the policy conditioned on their own weighting: (..., P, M) -> (...).

    RU = mean over the grid of w . R(pi_w), which papers also call the mean inner product (MIP)
    """
    return _own_utility(_front(points), _weights(points, weights)).mean(-1)


def regret(points: ArrayLike, weights: ArrayLike) -> Array:
    """Utility that each weighting loses against the best point of the front, >= 0: (..., P, M) -> (..., P).

    regret_w = max_w' w . R(pi_w') - w . R(pi_w)
    """
    points, weights = _front(points), _weights(points, weights)
    return (points @ weights.T).max(-2) - _own_utility(points, weights)


def _own_utility(points: Array, weights: Array) -> Array:
    return (points * weights).sum(-1)


def _weights(points: ArrayLike, weights: ArrayLike) -> Array:
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != np.shape(points)[-2:]:
        raise ValueError(
            f"weights has shape {weights.shape}; expected {np.shape(points)[-2:]}, one weighting per point"
        )
    return weights


def ranks(values: ArrayLike) -> Array:
    """Ranks along the last axis, from 0. Tied values share the mean of their ranks.

    rank_i = #{j : x_j < x_i} + (#{j : x_j = x_i} - 1) / 2
    """
    values = np.asarray(values, dtype=np.float64)
    mine, other = values[..., :, None], values[..., None, :]
    return (other < mine).sum(-1) + ((other == mine).sum(-1) - 1) / 2


def steerability(points: ArrayLike, weights: ArrayLike) -> Array:
    """Spearman rank correlation of w_i with R_i over the front, per objective: (..., P, M) -> (..., M).

        rho_i = Pearson(ranks(w_i), ranks(R_i))

    NaN where w_i or R_i takes one value only (one objective, one point), so that nothing is steered. With three or more
    objectives many weightings tie in w_i, so that rho_i is below 1 even where R_i follows w_i as it should.
    """
    points, weights = _front(points), _weights(points, weights)
    return _rank_correlation(weights.T, np.swapaxes(points, -1, -2))


def _rank_correlation(x: Array, y: Array) -> Array:
    """Spearman's rank correlation along the last axis. NaN where either argument is constant."""
    x, y = ranks(x), ranks(y)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    spread = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.divide((x * y).sum(-1), spread, out=np.full(spread.shape, np.nan), where=spread > 0)


def kendall_tau(points: ArrayLike, weights: ArrayLike) -> Array:
    """Kendall's tau-b of w_i with R_i over the front, per objective: (..., P, M) -> (..., M).

        tau_i = sum_{p<q} sign(w_i(p) - w_i(q)) sign(R_i(p) - R_i(q)) / sqrt(n_w n_R)

    n_w and n_R count the pairs that do not tie in w_i and in R_i. NaN where all of them do. Of untied pairs, (1 + tau) / 2 are
    in order. Source: Kendall, "The treatment of ties in ranking problems", 1945.
    """
    points, weights = _front(points), _weights(points, weights)
    first, second = np.triu_indices(points.shape[-2], 1)
    of_weights = np.sign(weights[first] - weights[second])
    of_rewards = np.sign(points[..., first, :] - points[..., second, :])
    untied = np.sqrt(np.abs(of_weights).sum(-2) * np.abs(of_rewards).sum(-2))
    return divide((of_weights * of_rewards).sum(-2), untied)


def sparsity(points: ArrayLike) -> float:
    """Mean squared gap between neighbours on the front; less is better: (P, M) -> number.

        S = 1 / (K - 1) sum_i sum_{k<K} (R_i[k + 1] - R_i[k])^2,    R_i sorted, over the K points that no other dominates

    Zero for K = 1: a front that is a single point. Compare it beside the hypervolume and at equal P alone. Source: Xu et al.,
    "Prediction-guided multi-objective reinforcement learning for continuous robot control", 2020.
    """
    points = _front(points)
    front = np.sort(points[non_dominated(points)], axis=0)
    return float((np.diff(front, axis=0) ** 2).sum() / max(len(front) - 1, 1))


def igd_plus(points: ArrayLike, target: ArrayLike) -> Array:
    """How far the points of a target front lie beyond the nearest of `points`, at least 0: (..., P, M) -> (...).

        IGD+ = mean over z in target of min_p || max(z - R_p, 0) ||

    target: (Z, M), usually the non-dominated points of all compared fronts together. 0 where each of its points is reached in
    every objective. Source: Ishibuchi et al., "Modified distance calculation in generational distance and inverted generational
    distance", 2015.
    """
    points, target = _front(points), _front(target, "target")
    beyond = np.maximum(target[:, None, :] - points[..., None, :, :], 0.0)  # [..., z, p, objective]
    return np.sqrt((beyond**2).sum(-1)).min(-1).mean(-1)


def kl_steerability(kl: ArrayLike, kl_coefs: ArrayLike) -> Array:
    """Spearman rank correlation of the KL coefficient with the KL it leads to: (..., W, K) -> (...).

        rho = mean over w of Pearson(ranks(kl_coefs), ranks(KL(pi_w)))

    kl: of W weightings at K coefficients each. kl_coefs: (K,). The result is -1 if a larger coefficient always leads to less
    KL. Weightings whose KL takes one value only are left out. NaN where this leaves none, or K is 1.
    """
    rho = _rank_correlation(np.asarray(kl_coefs, dtype=np.float64), _front(kl, "kl"))
    defined = ~np.isnan(rho)
    return divide(np.where(defined, rho, 0.0).sum(-1), defined.sum(-1))


def kl_hypervolume(utility: ArrayLike, kl: ArrayLike, base: ArrayLike, limit: float) -> Array:
    """Hypervolume in (utility, -KL) of the front that the KL coefficient spans: (..., W, K) -> (...).

        HV_w = | union_k { (u, x) : base_w <= u <= w . R_k,  KL_k <= x <= limit } |,    mean over w
             = integral_0^limit max(0, max_{k : KL_k <= x} w . R_k - base_w) dx

    utility, kl: of W weightings at K coefficients (or runs) each. base: (..., W), the base model's utility. The reference
    point is the base model's utility at a KL of `limit`. The volume divided by `limit` is the mean gain over the base model of
    a user who may spend x nats, with x uniform up to the limit. Fronts can be compared at one limit only, which is chosen
    before they are known.
    """
    utility, kl = _front(utility, "utility"), _front(kl, "kl")
    if utility.shape != kl.shape or not limit >= 0:
        raise ValueError(
            f"kl_hypervolume needs utility and kl of one shape and a limit of 0 or more; "
            f"got {utility.shape}, {kl.shape} and {limit}"
        )
    boxes = np.stack([utility - np.asarray(base, dtype=np.float64)[..., None], limit - kl], -1)
    return _volume(np.maximum(boxes, 0.0)).mean(-1)


def mean_rewards(rewards: ArrayLike) -> Array:
    """Mean over prompts of the rewards that apply (are not NaN): (P, N, M) -> (P, M). NaN where no reward applies."""
    rewards = np.asarray(rewards, dtype=np.float64)
    return divide(np.nansum(rewards, axis=1), (~np.isnan(rewards)).sum(axis=1))


def chance_hypervolume(
    resampled_gains: ArrayLike, gains: ArrayLike, base: ArrayLike, reference: ArrayLike
) -> Array:
    """Hypervolumes of fronts that are no better than the base model, measured with the same noise.

        HV_b = HV( { base + resampled_gains[b, p] - gains[p] : p } )

    gains: (P, M), the mean reward of each point minus that of the base model. resampled_gains: (resamples, P, M), the same in
    each resample. base, reference: (M,). Returns (resamples,).

    A front is the best of many noisy means. By luck alone its hypervolume exceeds that of the base model's one point, and
    pairing does not change that. A hypervolume below a high quantile of the returned ones is therefore no evidence.
    """
    centred = _front(resampled_gains, "resampled_gains") - np.asarray(gains) + np.asarray(base)
    return hypervolume(centred, reference)
