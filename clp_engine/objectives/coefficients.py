"""Rewards and log-probs to the coefficients of a gradient: pure functions over tensors, no model.

The objective of one row (one completion of one prompt), with its own `w`, `reward_scale` and `kl_coef`:

    J = reward_scale * w.R - kl_coef * KL(pi || pi_ref),     KL = E_pi sum_t (log pi - log pi_ref)(y_t | y_<t)

and every estimator here is linear in two statistics of each token, with coefficients that are constants:

    loss = - sum_bt loss_weights[b, t] * (c_logprob[b, t] * logprob[b, t] + c_kl[b, t] * kl[b, t])

The coefficients point uphill: with weights of one, the gradient of the bracket estimates the gradient of the
sum of J over rows. `-loss_weights * c` are the incoming gradients of the fused log-prob op, so no token needs
a graph of its own.

The estimators. `A` is `reward_scale * r - kl_coef * penalty` minus its baseline over the group, one number
per row:

    return  c_logprob = A, penalty = sum_t (logprob - ref_logprob)        unbiased
    exact   c_logprob = A, penalty = sum_t KL_t,  c_kl = -kl_coef         unbiased
    mixed   mix * exact + (1 - mix) * return                              unbiased for a mix fixed beforehand
    k2      c_logprob = A - kl_coef * (p - q), penalty = 0                biased: see below
    k3      c_logprob = A - kl_coef * (1 - exp(q - p)), penalty = 0       biased, and more so

with p = logprob, q = ref_logprob and KL_t the exact KL of step t over the whole vocabulary.

Why the penalty is the sum over all steps. Token t influences only the steps to come: from t on in `return`,
after t in `exact`. The steps before t are a function of the prefix, so any multiple of their sum is a valid
baseline. Two choices were compared by the variance of the gradient, on policies small enough to enumerate
(4 tokens x 3 steps, 2 x 7, 3 x 6; groups of 4):

    whole      the sum over all steps, less the group's sums over all steps (used here)
    to come    the sum over the steps to come, less the group's sums from the same position

    `return`, alpha 0.2     4 x 3     2 x 7     3 x 6
    half-way    whole       0.047     0.061     0.089
                to come     0.079     0.112     0.179
    optimum     whole       0         0         0
                to come     0.005 to 0.016

On the way from the reference to the optimum the whole sum was never worse in `return`; in `exact` the two are
within 12 % of each other on that way. At the optimum reward and log-ratio cancel in every completion, not
merely on average. The price: where no reward explains the log-ratio (random logits, rewards of size 0.1), the
whole sum has up to 1.8 times the variance of the sum to come in `return`. `exact` has less than either there,
by up to a factor of ten, and `mixed` finds it.

With baseline="value" A is one number per token instead: the part of the return that is still to come, less
a prediction of it from the prefix (and prompt, w, kl):

    A_t = G_t - V(y_<t)        G_t = reward_scale * r - kl_coef * penalty_t
    return  penalty_t = sum_{t' >= t} (logprob - ref_logprob)
    exact   penalty_t = sum_{t' > t} KL_t'           (KL_t itself is differentiated, with c_kl = -kl_coef)
    mixed   mix * exact + (1 - mix) * return         k2, k3   penalty_t = 0

The gradient's expectation does not change, because grad log pi(y_t | y_<t) has mean zero given the prefix:
E[V(y_<t) grad log pi(y_t | y_<t)] = E[V(y_<t) E[grad log pi(y_t | y_<t) | y_<t]] = 0. The same argument
allows leaving out the steps before t. The sum over all steps would give the same A_t: a V that predicts it
contains the part before t exactly. One completion per prompt is enough: V compares it with no other.

What is biased in k2 and k3: the sampled estimate of the KL is differentiated as if the samples were fixed,
token by token. For k2 the expectation over token t is the gradient of KL_t, but the effect of token t on
the KL of later steps is missing (as in `exact` without its penalty); with one step k2 is unbiased. For k3
the expectation is the gradient of the other direction, KL(pi_ref || pi) of step t, and later steps are
missing as well. As *values* both estimate the KL (k3 without bias), which is how they came to be used: J.
Schulman, "Approximating KL Divergence" (2020). k3 in the loss is what GRPO does (Shao et al.,
"DeepSeekMath", 2024), and TRL's GRPOTrainer with use_bias_correction_kl=False; its default multiplies k3 by the
ratio, whose gradient is k2's where the ratio is one (r' k3 + r k3' = s k3 + s (1 - e^{q-p}) = s (p - q), s = grad log pi).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from clp_engine.objectives.advantages import BASELINES, baselined, check_groups
from clp_engine.objectives.importance import Correction, importance_weights

ESTIMATORS = ("return", "exact", "mixed", "k2", "k3")


# Which statistics of a token the loss of each estimator is differentiated through; the others are constants in it.
DIFFERENTIATED = {
    "return": ("logprob",),
    "exact": ("logprob", "kl"),
    "mixed": ("logprob", "kl"),
    "k2": ("logprob",),
    "k3": ("logprob",),
}


@dataclass(frozen=True)
class Tokens:
    """What is known of each token of a batch of completions, all (B, T), float32 (float64 works too).

    logprob: of the token under the policy. ref_logprob: under the reference.
    kl: exact KL(policy || reference) of the step over the vocabulary; None where no estimator asks for it.
    mask: bool, True for the completion tokens that count; the other entries are never read.
    """

    logprob: torch.Tensor
    ref_logprob: torch.Tensor
    kl: torch.Tensor | None
    mask: torch.Tensor


@dataclass(frozen=True)
class RewardedTokens:
    """Whole groups of completions with their rewards: what coefficients, advantages and returns are taken from.

    rewards, kl_coef, reward_scale: (B,), see `objective_scales`. rewards may be NaN (`advantages.scalarise`) and are scaled
        already where the run scales them (`advantages.rescale_rewards`). A row without a reward, and with a baseline of the
        group one that has nobody to be compared with, gets coefficients of zero, its KL included: it has no objective.
    group_size: consecutive rows that share prompt and condition; B must be a multiple of it.
    values: (B, T), for baseline "value": what the return from each token on was expected to be, before that token was known.
        It may depend on the prompt, w, kl and the tokens before, on earlier batches, and on nothing else; not on this batch's
        rewards either.
    old_logprob: (B, T), the log-probs the completions were sampled with, where the policy has moved since.
    advantage: (B,), see `advantages`, where the rows are a part of their groups: rewards, group_size and baseline are then not
        looked at.
    sampled_logprob: (B, T), what another program drew the tokens with, see `importance.importance_weights`.
    """

    tokens: Tokens
    rewards: torch.Tensor
    kl_coef: torch.Tensor
    reward_scale: torch.Tensor
    group_size: int
    values: torch.Tensor | None = None
    old_logprob: torch.Tensor | None = None
    advantage: torch.Tensor | None = None
    sampled_logprob: torch.Tensor | None = None


@dataclass(frozen=True)
class Coefficients:
    """The constants of the objective: loss = -sum weights * (c.logprob * logprob + c.kl * kl).

    logprob: (B, T), zero outside the mask.
    kl: (B, T), or None where the estimator does not differentiate the KL.
    advantage: (B,), the baselined return; zero for rows that have none. With baseline "value" (B, T), by
        token, zero outside the mask.
    clip_low, clip_high: scalars, the fraction of the counted tokens whose ratio was clipped from below and
        from above; None without old_logprob. clip_low_min, clip_high_max: the least and the largest such
        fraction of any row.
    importance: (B, T), what the term in A was multiplied by because another program drew the tokens; None without.
    """

    logprob: torch.Tensor
    kl: torch.Tensor | None
    advantage: torch.Tensor
    clip_low: torch.Tensor | None = None
    clip_high: torch.Tensor | None = None
    clip_low_min: torch.Tensor | None = None
    clip_high_max: torch.Tensor | None = None
    importance: torch.Tensor | None = None


def objective_scales(kl: torch.Tensor, kl_is_beta: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(reward_scale, kl_coef) of rows with KL coefficient `kl` (B,).

        alpha   J = (1 - alpha) * w.R - alpha * KL
        beta    J = w.R - beta * KL

    They are one family: beta = alpha / (1 - alpha), up to the factor 1 - alpha in front of J.
    """
    return (torch.ones_like(kl), kl) if kl_is_beta else (1 - kl, kl)


def needs_reference(kl: torch.Tensor, log_kl: bool) -> bool:
    """Whether the reference is run for rows with KL coefficients `kl` (B,): where none is above 0 it changes no gradient, and
    is run for the log alone."""
    return log_kl or bool(kl.any())


@torch.no_grad()
def coefficients(
    batch: RewardedTokens,
    *,
    estimator: str = "return",
    baseline: str = "leave_one_out",
    mix: float = 0.5,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    correction: Correction | None = None,
) -> Coefficients:
    """The coefficients that estimate the gradient of J (formulas at the top of the module).

    baseline: "leave_one_out", "group_mean" (see `advantages`), "none", or "value", which needs batch.values.
    mix: share of `exact` in `mixed`, in [0, 1]; it may depend on earlier batches only (MixController).
    epsilon, epsilon_high, delta: with batch.old_logprob the term in A becomes the clipped surrogate min(ratio * A, clip(ratio,
        1 - epsilon, 1 + epsilon_high) * A) with ratio = exp(logprob - old_logprob), hence c_logprob = A * ratio, or 0 where it
        is clipped. epsilon_high defaults to epsilon. delta (above 1 + epsilon_high) caps the ratio in the unclipped term as
        well, min(min(ratio, delta) * A, ...): beyond it c_logprob is 0 whatever the sign of A. The KL terms use the current
        log-probs; the loss terms (exact's kl, k2, k3) carry no ratio, as in TRL. Ratio by token and clipping are biased both,
        towards the policy that sampled.
    correction: with batch.sampled_logprob the term in A is multiplied by the weights of `importance_weights`, from what drew
        the tokens to the policy at that time: old_logprob, or logprob where the policy has not moved since. None: by one.

    Returns Coefficients in the dtype of tokens.logprob, detached. Raises ValueError for an unknown name, a shape that does not
    fit, or a missing tokens.kl.
    """
    tokens, values, advantage, group_size = batch.tokens, batch.values, batch.advantage, batch.group_size
    if advantage is not None:
        group_size, baseline = 1, "none"
    _check(batch, group_size, estimator, baseline, mix, values)
    dtype, mask = tokens.logprob.dtype, tokens.mask
    rewards, kl_coef, reward_scale = (t.to(dtype) for t in (batch.rewards, batch.kl_coef, batch.reward_scale))
    log_ratio = torch.where(mask, tokens.logprob - tokens.ref_logprob, 0.0)

    exact = _share_of_exact(estimator, mix)
    if advantage is not None:
        if advantage.shape != rewards.shape:
            raise ValueError(
                f"advantage must be ({len(rewards)},), one per row; got {tuple(advantage.shape)}"
            )
        counts = ~advantage.isnan()
        advantage = torch.where(counts, advantage.to(dtype), 0.0)
        score = advantage.unsqueeze(-1) * mask
    elif baseline == "value":
        assert values is not None  # see `_check`
        returns = _returns_to_go(tokens, log_ratio, rewards, kl_coef, reward_scale, estimator, exact)
        counts = ~returns.isnan().any(-1)
        advantage = torch.where(mask & counts.unsqueeze(-1), returns - values.to(dtype), 0.0)
        score = advantage
    else:
        penalty = _penalty(tokens, log_ratio, estimator, exact).sum(-1)
        advantage, counts = baselined(reward_scale * rewards - kl_coef * penalty, group_size, baseline)
        score = advantage.unsqueeze(-1) * mask
    clipped: tuple[torch.Tensor, ...] = ()
    if batch.old_logprob is not None:
        score, *shares = _clipped(score, tokens, batch.old_logprob, epsilon, epsilon_high, delta)
        clipped = tuple(shares)

    importance = None
    if batch.sampled_logprob is not None and correction is not None:
        drawing = tokens.logprob if batch.old_logprob is None else batch.old_logprob
        importance = importance_weights(drawing, batch.sampled_logprob, mask, correction)
        score = score * importance

    loss_coef = (kl_coef * counts).unsqueeze(-1) * mask
    if estimator == "k2":
        score = score - loss_coef * log_ratio
    elif estimator == "k3":
        score = score + loss_coef * torch.expm1(-log_ratio)
    found = Coefficients(score, -exact * loss_coef if exact else None, advantage, *clipped)
    return found if importance is None else replace(found, importance=importance)


@torch.no_grad()
def advantages(
    batch: RewardedTokens, *, estimator: str = "return", baseline: str = "leave_one_out"
) -> torch.Tensor:
    """A of each row alone, (B,), as `coefficients` has it; NaN for a row without an objective.

    Not for baseline "value", whose A is by token.
    """
    found = coefficients(batch, estimator=estimator, baseline=baseline).advantage
    _, counts = baselined(batch.rewards, batch.group_size, baseline)
    return torch.where(counts, found, math.nan)


@torch.no_grad()
def returns_to_go(batch: RewardedTokens, *, estimator: str = "return", mix: float = 0.5) -> torch.Tensor:
    """G_t of each token, what a value function predicts (formula at the top of the module): (B, T).

    NaN in rows without a reward; zero outside the mask.
    """
    _check(batch, batch.group_size, estimator, "none", mix, None)
    tokens, dtype = batch.tokens, batch.tokens.logprob.dtype
    rewards, kl_coef, reward_scale = (t.to(dtype) for t in (batch.rewards, batch.kl_coef, batch.reward_scale))
    log_ratio = torch.where(tokens.mask, tokens.logprob - tokens.ref_logprob, 0.0)
    exact = _share_of_exact(estimator, mix)
    returns = _returns_to_go(tokens, log_ratio, rewards, kl_coef, reward_scale, estimator, exact)
    return torch.where(tokens.mask, returns, 0.0)


def _share_of_exact(estimator: str, mix: float) -> float:
    return {"exact": 1.0, "mixed": float(mix)}.get(estimator, 0.0)


def _penalty(tokens: Tokens, log_ratio: torch.Tensor, estimator: str, exact: float) -> torch.Tensor:
    """What each token adds to the penalty of its completion: (B, T), zero outside the mask."""
    if estimator in ("k2", "k3"):
        return torch.zeros_like(log_ratio)
    penalty = (1 - exact) * log_ratio
    return penalty + exact * _exact_kl(tokens) if exact else penalty


def _exact_kl(tokens: Tokens) -> torch.Tensor:
    assert tokens.kl is not None  # see `_check`
    return torch.where(tokens.mask, tokens.kl, 0.0)


def _returns_to_go(
    tokens: Tokens,
    log_ratio: torch.Tensor,
    rewards: torch.Tensor,
    kl_coef: torch.Tensor,
    reward_scale: torch.Tensor,
    estimator: str,
    exact: float,
) -> torch.Tensor:
    """G_t at every position: (B, T), NaN in rows without a reward."""
    penalty = _penalty(tokens, log_ratio, estimator, exact)
    to_come = penalty.flip(-1).cumsum(-1).flip(-1)
    if exact:  # the KL of step t does not depend on token t
        to_come = to_come - exact * _exact_kl(tokens)
    return (reward_scale * rewards).unsqueeze(-1) - kl_coef.unsqueeze(-1) * to_come


def _clipped(
    score: torch.Tensor,
    tokens: Tokens,
    old_logprob: torch.Tensor,
    epsilon: float,
    epsilon_high: float | None,
    delta: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of the clipped surrogate with respect to logprob; the fractions clipped low and high, of all tokens; the least
    fraction clipped low and the largest clipped high of a row that has tokens."""
    if old_logprob.shape != tokens.logprob.shape:
        raise ValueError(
            f"old_logprob must have the shape of logprob, {tuple(tokens.logprob.shape)}; "
            f"got {tuple(old_logprob.shape)}"
        )
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    ratio = torch.where(tokens.mask, tokens.logprob - old_logprob, 0.0).exp()
    low = (ratio < 1 - epsilon) & (score < 0)
    high = (ratio > 1 + epsilon_high) & (score > 0)
    left_out = low | high
    if delta is not None:
        left_out = left_out | (ratio > delta)
    lengths = tokens.mask.sum(-1)
    counted = lengths.sum().clamp_min(1)
    low_shares, high_shares = (clipped.sum(-1) / lengths.clamp_min(1) for clipped in (low, high))
    return (
        torch.where(left_out, 0.0, score * ratio),
        low.sum() / counted,
        high.sum() / counted,
        torch.where(lengths > 0, low_shares, math.inf).amin().nan_to_num(posinf=0.0),
        high_shares.amax(),
    )


def _check(
    batch: RewardedTokens,
    group_size: int,
    estimator: str,
    baseline: str,
    mix: float,
    values: torch.Tensor | None,
) -> None:
    tokens = batch.tokens
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}: expected one of {', '.join(ESTIMATORS)}")
    if baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r}: expected one of {', '.join(BASELINES)}")
    if baseline in ("leave_one_out", "group_mean") and group_size < 2:
        raise ValueError(
            f"baseline={baseline!r} compares the completions of a prompt and needs a group_size "
            f"of at least 2; got {group_size}. Use more completions, or baseline='none' or 'value'"
        )
    if (values is None) == (baseline == "value"):
        raise ValueError(
            f"values belong to baseline='value' and it needs them; got baseline={baseline!r} "
            f"{'without' if values is None else 'with'} values"
        )
    if values is not None and values.shape != tokens.logprob.shape:
        raise ValueError(
            f"values must have the shape of tokens.logprob, {tuple(tokens.logprob.shape)}; "
            f"got {tuple(values.shape)}"
        )
    if not 0 <= mix <= 1:
        raise ValueError(f"mix must be in [0, 1]; got {mix}")
    if estimator in ("exact", "mixed") and tokens.kl is None:
        raise ValueError(f"estimator={estimator!r} needs tokens.kl, the exact KL of each step; got None")
    shape = tokens.logprob.shape
    for name in ("ref_logprob", "kl", "mask"):
        value = getattr(tokens, name)
        if value is not None and value.shape != shape:
            raise ValueError(
                f"tokens.{name} must have the shape of tokens.logprob, {tuple(shape)}; "
                f"got {tuple(value.shape)}"
            )
    for name in ("rewards", "kl_coef", "reward_scale"):
        value = getattr(batch, name)
        if value.shape != shape[:1]:
            raise ValueError(f"{name} must be ({shape[0]},), one per row; got {tuple(value.shape)}")
    check_groups(batch.rewards, group_size)
