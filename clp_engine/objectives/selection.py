"""Selecting completions and tokens to train on: the two choices of D3S, and its schedule.

    rollouts   of each group, the k completions whose advantages A have the largest variance        ("max_variance")
    tokens     of each group, the share of tokens with the largest |A_b| * H_bt                     ("advantage_entropy")
    schedule   share(progress) = share + (1 - share) * progress                                     ("linear")

H_bt is the policy's entropy at the token. progress goes from 0 to 1 over training, so that early steps train on few
completions and tokens, and the last steps on all. C. Wang et al., "Learning More with Less: A Dynamic Dual-Level
Down-Sampling Framework for Efficient Policy Optimization" (arXiv 2509.22115, 2025).

Rollouts are chosen before the policy's training pass, from the log-probs of sampling and of the reference. The others never
run through the policy, which saves time. Advantages and their baseline are those of the whole group, in later passes too.
Tokens are chosen after the policy's pass, which computes their entropy; this saves no time, and changes what is learned.

Bias. The mean over the chosen completions is an average over the extremes of each group: larger than the gradient of J, and
in general of another direction. A token that is left out loses its whole term, including the KL's (exact, k2, k3). Both
choices are biased, with one exception. At the optimum, reward and log-ratio cancel in every completion, so `return` has A = 0
in each of them, and the gradient vanishes whatever is chosen. On policies small enough to enumerate, runs with `return` do
end at the optimum (tests/engine/test_selection.py); `exact` with a selection of tokens stops elsewhere.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from clp_engine.objectives.coefficients import Coefficients

ROLLOUT_SELECTIONS = ("none", "max_variance")
TOKEN_SELECTIONS = ("none", "advantage_entropy")
SCHEDULES = ("constant", "linear")


@dataclass(frozen=True)
class SelectionSettings:
    """Which completions and tokens of a rollout are trained on.

    rollouts: one of ROLLOUT_SELECTIONS; rollout_share: of each group, kept by it. tokens: one of TOKEN_SELECTIONS; token_share:
    of each group's tokens, kept by it. schedule: of both shares, one of SCHEDULES. mask_truncated: completions that never ended
    are in the baseline of their group but not in the loss, so they are not chosen.
    """

    rollouts: str = "none"
    rollout_share: float = 1.0
    tokens: str = "none"
    token_share: float = 1.0
    schedule: str = "constant"
    mask_truncated: bool = False

    @property
    def selects(self) -> bool:
        return self.rollouts != "none" or self.tokens != "none"


def scheduled(share: float, schedule: str, progress: float) -> float:
    """The share that is kept when `progress` (0 to 1) of training is over."""
    if schedule not in SCHEDULES:
        raise ValueError(f"selection_schedule={schedule!r}: expected one of {', '.join(SCHEDULES)}")
    if schedule == "constant":
        return share
    return share + (1 - share) * min(max(progress, 0.0), 1.0)


def max_variance(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices (G, count) of the subset of each row of values (G, n) that has the largest variance, ascending.

    The variance of a subset is convex in each of its members, the others fixed. A member that lies between two values that
    were not chosen can therefore be exchanged for one of them without loss, until the subset is a prefix and a suffix of the
    sorted values: count + 1 candidates, each from prefix sums. O(n log n). NaN is chosen only where too few values are there.
    """
    groups, size = values.shape
    if not 1 <= count <= size:
        raise ValueError(f"cannot choose {count} of {size} values")
    values = values.double()
    present = (~values.isnan()).sum(1, keepdim=True)  # NaN sorts last
    ordered, order = values.sort(dim=1, stable=True)
    # Measured from the mean, so that squares of large values do not cancel.
    known = torch.where(ordered.isnan(), 0.0, ordered - values.nanmean(1, keepdim=True))
    sums, squares = (torch.cat([t.new_zeros(groups, 1), t.cumsum(1)], 1) for t in (known, known.square()))
    prefix = torch.arange(count + 1, device=values.device).expand(groups, -1)
    suffix_start = present - (count - prefix)

    def chosen(total: torch.Tensor) -> torch.Tensor:
        of_suffix = total.gather(1, present) - total.gather(1, suffix_start.clamp_min(0))
        return total.gather(1, prefix) + of_suffix

    variance = chosen(squares) - chosen(sums).square() / count
    # Where fewer are there than are asked for, all of them and then NaN: the first `count`.
    variance = torch.where(present >= count, variance, (prefix == count).double())
    best = variance.argmax(1, keepdim=True)
    places = torch.arange(count, device=values.device).expand(groups, -1)
    places = torch.where(places < best, places, places - count + present)
    return order.gather(1, places).sort(1).values


def largest_in_group(
    scores: torch.Tensor, candidates: torch.Tensor, groups: torch.Tensor, share: float
) -> torch.Tensor:
    """Which tokens (B, T) bool to keep: in each group the ceil(share * n) with the largest scores of its n candidates.

    scores, candidates: (B, T); groups: (B,), the group of each row, 0 to G - 1. Of equal scores the first are kept.
    """
    of_token = groups.unsqueeze(-1).expand_as(candidates)[candidates]
    order = scores[candidates].argsort(descending=True, stable=True)
    order = order[of_token[order].argsort(stable=True)]  # by group, and by score in each
    counts = torch.bincount(of_token, minlength=int(groups.max()) + 1 if len(groups) else 0)
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[of_token[order]]
    # Slightly less than share * n, so that 0.1 * 30 = 3.0000000000000004 is three.
    limit = (counts.double() * share - 1e-9).ceil()
    kept = torch.zeros_like(of_token, dtype=torch.bool)
    kept[order] = rank < limit[of_token[order]]
    return torch.zeros_like(candidates).masked_scatter(candidates, kept)


@torch.no_grad()
def select_tokens(
    c: Coefficients, entropy: torch.Tensor, candidates: torch.Tensor, groups: torch.Tensor, share: float
) -> Coefficients:
    """The coefficients with those of the tokens that are not kept set to zero.

    entropy, candidates: (B, T), the latter the tokens that are in the loss at all; groups: (B,), of each row.
    """
    if share >= 1:
        return c
    size = c.advantage.abs()
    scores = entropy * (size if size.dim() == 2 else size.unsqueeze(-1))
    kept = largest_in_group(scores, candidates, groups, share)
    return dataclasses.replace(c, logprob=c.logprob * kept, kl=None if c.kl is None else c.kl * kept)
