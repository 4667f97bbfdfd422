"""Rewards to advantages: one number per completion, less what the other completions of its prompt got.

scalar     w.R over the rewards that apply                                  `scalarise`
scaled     divided by a standard deviation, where that is asked for         `rescale_rewards`
advantage  less a baseline over the group                                   `baselined`
"""

from __future__ import annotations

import math

import torch

BASELINES = ("leave_one_out", "group_mean", "none", "value")
SCALE_REWARDS = ("none", "group", "batch")

# TRL's: keeps a group whose rewards are all equal from dividing zero by zero.
STD_EPSILON = 1e-4


def scalarise(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One number per row: sum_i w_i R_i / sum_i w_i over the rewards that apply.

    rewards: (B, M), NaN where a reward does not apply to the row. weights: (B, M), not negative. Returns
    (B,); NaN where no reward with a positive weight applies. A reward that does not apply is not a reward
    of zero: the weights of the others are renormalised.
    """
    if rewards.shape != weights.shape or rewards.dim() != 2:
        raise ValueError(
            f"scalarise needs rewards and weights of one shape (B, M); "
            f"got {tuple(rewards.shape)} and {tuple(weights.shape)}"
        )
    applies = ~rewards.isnan()
    weights = weights.to(rewards.dtype) * applies
    return (weights * torch.where(applies, rewards, 0.0)).sum(-1) / weights.sum(-1)


def leave_one_out(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """Each value minus the mean of the *other* members of its group: (B, ...) like `values`.

    Rows of a group are consecutive. A baseline made of the others does not depend on the row's own sample,
    so it leaves the expected gradient as it is. A NaN (a member without a reward) does not count in the
    others' mean; its own result, and that of a member with nobody to be compared with, is 0.
    """
    centred, present, count = _centred(values, group_size)
    return (centred * (count / (count - 1).clamp_min(1)) * (present & (count > 1))).flatten(0, 1)


def group_mean(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """Each value minus the mean of its group, itself included (GRPO): (B, ...) like `values`; 0 for NaN.

    This is (n - 1) / n times the leave-one-out advantage, n the members that count: the gradient through
    the log-probs is too short by that factor, while a KL term with a coefficient of its own is not.
    """
    return _centred(values, group_size)[0].flatten(0, 1)


def rescale_rewards(rewards: torch.Tensor, group_size: int, scale_rewards: str) -> torch.Tensor:
    """Rewards (B,) divided by their standard deviation plus 1e-4, as TRL does; NaN stays NaN.

        none    as they are
        group   std of the group (n - 1 in the denominator)
        batch   std of all rows

    Anything but "none" changes what the KL coefficient means: dividing the reward by s is multiplying
    kl_coef / reward_scale by s, so the policy heads for the optimum of another alpha: with "group" a
    different one in every group (the weaker a group's contrast, the weaker its KL penalty), with "batch" in
    every batch.
    """
    if scale_rewards not in SCALE_REWARDS:
        raise ValueError(f"scale_rewards={scale_rewards!r}: expected one of {', '.join(SCALE_REWARDS)}")
    if scale_rewards == "none":
        return rewards
    size = group_size if scale_rewards == "group" else rewards.shape[0]
    centred, _, count = _centred(rewards, size)
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    return (rewards.view(-1, size) / (std + STD_EPSILON)).view(-1)


def baselined(returns: torch.Tensor, group_size: int, baseline: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantage (B,), counts (B,) bool) of the returns (B,), which are NaN in rows without a reward.

    A row counts where it has a reward and, with a baseline of the group, somebody to be compared with; the advantage of the
    others is 0.
    """
    present = ~returns.isnan()
    if baseline == "none":
        return torch.where(present, returns, 0.0), present
    compared = present.view(-1, group_size).sum(1, keepdim=True).gt(1).expand(-1, group_size).reshape(-1)
    subtract = leave_one_out if baseline == "leave_one_out" else group_mean
    return subtract(returns, group_size), present & compared


def _centred(values: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups minus their mean (G, n, ...), 0 for NaN; which members are there; how many (G, 1, ...)."""
    check_groups(values, group_size)
    groups = values.unflatten(0, (-1, group_size))
    present = ~groups.isnan()
    count = present.sum(1, keepdim=True)
    # The mean of equal values need not be that value in floating point. Measured from the least of the
    # group it is, so that a group without contrast has an advantage of exactly zero.
    least = torch.where(present, groups, math.inf).amin(1, keepdim=True)
    known = torch.where(present, groups - least, 0.0)
    centred = known - known.sum(1, keepdim=True) / count.clamp_min(1)
    return torch.where(present, centred, 0.0), present, count


def check_groups(values: torch.Tensor, group_size: int) -> None:
    if group_size < 1 or values.shape[0] % group_size:
        raise ValueError(f"{values.shape[0]} rows do not divide into groups of {group_size}")
