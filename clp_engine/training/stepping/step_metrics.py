"""Numbers of the update of a step: loss, KL, and how far the policy is from the one that sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from clp_engine.objectives.coefficients import Coefficients
from clp_engine.rollouts.types import Rollout

if TYPE_CHECKING:
    from clp_engine.training.stepping.update import MicroBatchResult


CLIP_RATIOS = tuple(
    f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")
)


def clip_ratios(parts: Sequence[Coefficients]) -> dict[str, torch.Tensor]:
    """Shares of tokens whose ratio was clipped, of a step's micro-batches: from below, from above, either; and the least share
    from below and the largest from above of any completion."""
    low, high = (torch.stack([getattr(c, f"clip_{end}") for c in parts]).mean() for end in ("low", "high"))
    least = torch.stack([c.clip_low_min for c in parts]).amin()
    largest = torch.stack([c.clip_high_max for c in parts]).amax()
    return dict(zip(CLIP_RATIOS, (low, least, high, largest, low + high)))


def update_metrics(
    passes: Sequence[tuple[Rollout, MicroBatchResult]], tokens: int, on_policy: bool
) -> dict[str, torch.Tensor | float]:
    """Means over a step's micro-batches, which have `tokens` completion tokens. on_policy: the policy is the one that sampled
    them; then also how far training is from what rollout said, otherwise what was clipped.

    Scalars that are still where they were computed, for the caller to read at once.
    """
    rows = sum(part.completion_ids.shape[0] for part, _ in passes)
    found = {
        "loss": sum(r.loss for _, r in passes),
        "entropy": sum(r.entropy.sum(dtype=torch.float64) for _, r in passes) / tokens,
    }
    if all(r.kl is not None for _, r in passes):
        kl = sum(r.kl.sum(dtype=torch.float64) for _, r in passes)
        found |= {"kl": kl / tokens, "kl_sequence": kl / max(rows, 1)}
    if not on_policy:
        return found | clip_ratios([r.coefficients for _, r in passes])
    gaps = [torch.where(p.completion_mask, (r.logprob - p.logprobs).abs(), 0.0) for p, r in passes]
    return found | {
        **dict.fromkeys(CLIP_RATIOS, 0.0),  # the ratio is one by construction: TRL logs as much
        "sampling/sampling_logp_difference/mean": sum(gap.sum(dtype=torch.float64) for gap in gaps) / tokens,
        "sampling/sampling_logp_difference/max": torch.stack([gap.amax() for gap in gaps]).amax(),
    }
