"""Importance weights for completions that another program drew, with other kernels or in another dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class Correction:
    """mode: one of CORRECTIONS. low, high: between which a weight is left as it is; None for no bound."""

    mode: str = "token_truncate"
    low: float | None = None
    high: float | None = 3.0


@torch.no_grad()
def importance_weights(
    logprob: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor, correction: Correction
) -> torch.Tensor:
    """The weight of each token, (B, T) in the dtype of logprob, one outside the mask.

        token_*      rho_bt = pi(y_bt) / mu(y_bt)                  of the token alone: biased, with little variance
        sequence_*   rho_b  = prod_t pi(y_bt) / mu(y_bt)           of the completion: unbiased without bounds
        *_truncate   min(max(rho, low), high)
        *_mask       rho between low and high, else 0

    with mu what drew the tokens. Truncation bounds the variance and pulls towards mu; a mask leaves out what mu knows least.

    logprob: (B, T), log pi of the policy at the time of drawing. sampled: (B, T), log mu; NaN where it is unknown, which weighs
    one. mask: (B, T) bool. Raises ValueError for an unknown mode.
    """
    if correction.mode not in CORRECTIONS:
        raise ValueError(f"mode={correction.mode!r}: expected one of {', '.join(CORRECTIONS)}")
    gap = torch.where(mask, (logprob - sampled).nan_to_num(nan=0.0), 0.0)
    if correction.mode.startswith("sequence"):
        gap = gap.sum(-1, keepdim=True).expand_as(gap)
    low = 0.0 if correction.low is None else correction.low
    high = math.inf if correction.high is None else correction.high
    ratio = gap.exp()
    if correction.mode.endswith("truncate"):
        kept = ratio.clamp(low, high)
    else:
        kept = torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)
    return torch.where(mask, kept, 1.0)
