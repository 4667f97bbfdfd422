"""A tabular task on which policies that interpolate specialists must fail, and a conditioned policy need not.

A completion has two tokens, each from a vocabulary of V = M. The first token is *commit* (token 0) or a compromise (any other).
After a compromise every objective gets the same reward, whatever the second token. After commit, the second token j gives
objective j the reward 1 and all others -1:

    commit, j     R_j = 1, R_i = -1 for i != j          w.R = 2 w_j - 1
    otherwise     R_i = compromise for all i            w.R = compromise

Each specialist commits, since 1 > compromise. For the uniform weighting, committing is worth 2 / M - 1 at most, and the
compromise is better: the optimum for the mixed reward does not lie between the optima for the single rewards. The cause is the
soft value `V_w = beta log E_ref exp(w.R / beta)`, which is convex in w. After commit, a blend of the specialists' values is
higher than the value that one policy can reach for all objectives at once.

Two lower bounds on the shortfall follow. Notation: p(pi) is the probability that pi commits; p_i is that of the optimum for
objective i alone (the same for all i, by symmetry); p_u is that of the optimum for the uniform weighting u, and p_u < p_i;
kl(p, q) is the divergence of two Bernoulli distributions. A policy falls short of the optimum's objective by
alpha * KL(pi || pi*) >= alpha * kl(p(pi), p*), because KL is a sum of non-negative terms over the steps, and kl is at most the
first step's term. The log-odds of commit,

    l = log p / (1 - p) = - log sum_{v != 0} exp(z_v - z_0),        z the logits of the first step,

are concave in z, hence in any quantity in which z is affine.

1. *Interpolated specialists*: the first step has the logits `sum_i c_i z_i` with any c on the simplex (mixed at decode time, or
   interpolated tables). Then l >= sum_i c_i l_i >= min_i l_i: for all coefficients, the mixture commits at least as often as
   the least committed specialist. At u it falls short by at least `interpolation_shortfall`, alpha * kl(min_i p_i, p_u).
2. *Any policy with logits affine in w*, trained in any way (tables, logit-CLP): l(u) is at least the mean of l at the corners,
   so p(u) >= p(e_i) for some i. Suppose the policy falls short by less than s at u and at every corner. Then p(u) lies below
   the p~ that has alpha * kl(p~, p_u) = s, and p(e_i) lies above the p~ that has alpha * kl(p~, p_i) = s. At the s for which
   these two p~ are equal, that is a contradiction. kl(p~, p_u) = kl(p~, p_i) is the Chernoff information of the two
   distributions, and `affine_shortfall` is alpha times it.

Neither bound holds for deltas of two layers or more: the product of two deltas is quadratic in w, and this curvature is enough.
Soups of such weights are not bound by 1 either. Their failure is measured (docs/results/closed_form.md), not proved.
"""

from __future__ import annotations

import math

import torch

from clp_engine.tasks.closed_form.task import TabularTask


def dilemma(num_objectives: int = 2, compromise: float = 0.5) -> TabularTask:
    """The dilemma for `num_objectives` objectives, with a uniform reference over as many tokens.

    Raises ValueError for fewer than two objectives, or for a compromise outside the open interval between 2 / M - 1 (the most
    that committing is worth under the uniform weighting) and 1 (its worth to a specialist).
    """
    if num_objectives < 2 or not 2 / num_objectives - 1 < compromise < 1:
        raise ValueError(
            f"a dilemma needs at least 2 objectives and a compromise between 2 / objectives - 1 and 1; "
            f"got {num_objectives} and {compromise:g}"
        )
    rewards = torch.full((num_objectives, num_objectives**2), compromise)
    rewards[:, :num_objectives] = 2 * torch.eye(num_objectives) - 1
    return TabularTask(torch.zeros(1 + num_objectives, num_objectives), rewards)


def commit_probability(logits: torch.Tensor) -> float:
    """The probability of commit under the policy with logits (P, V)."""
    return logits[0].double().softmax(-1)[0].item()


def optimal_commit_probability(task: TabularTask, weights: torch.Tensor, alpha: float) -> float:
    """The probability of commit under the optimum for (w, alpha)."""
    return task.optimum(weights, alpha)[: task.vocabulary].exp().sum().item()


def interpolation_shortfall(task: TabularTask, alpha: float, least_commit: float | None = None) -> float:
    """A lower bound on the shortfall of interpolated specialists at the uniform weighting (bound 1 of the module docstring).

    least_commit: min_i p_i of the specialists; None takes the optimal specialists. The bound is zero unless it exceeds p_u.
    """
    p_i, p_u = _commit_probabilities(task, alpha)
    least = p_i if least_commit is None else least_commit
    return alpha * _bernoulli_kl(least, p_u) if least > p_u else 0.0


def affine_shortfall(task: TabularTask, alpha: float) -> float:
    """A lower bound on the largest shortfall, over the corners and u, of any policy affine in w (bound 2 of the module)."""
    p_i, p_u = _commit_probabilities(task, alpha)
    # kl(p, p_u) = kl(p, p_i) is linear in p.
    up, down = math.log(p_i / p_u), math.log((1 - p_u) / (1 - p_i))
    return alpha * _bernoulli_kl(down / (up + down), p_u)


def _commit_probabilities(task: TabularTask, alpha: float) -> tuple[float, float]:
    count = len(task.rewards)
    corner, uniform = torch.eye(count)[0], torch.full((count,), 1 / count)
    return tuple(optimal_commit_probability(task, w, alpha) for w in (corner, uniform))


def _bernoulli_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
