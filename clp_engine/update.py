"""The gradient of one micro-batch: statistics of its tokens, the estimator's coefficients, one backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from clp_engine.conditions import Conditions
from clp_engine.config import CLPConfig
from clp_engine.estimators import Coefficients, MixController, Tokens, coefficients, objective_scales
from clp_engine.rollout import Rollout
from clp_engine.scoring import ALL, completion_stats, unpacked

if TYPE_CHECKING:
    from clp_engine.policy import ConditionedPolicy


@dataclass(frozen=True)
class MicroBatch:
    """Whole groups of completions and what their gradient needs.

    conditions: one row per prompt. rewards: (B,) w.R, scaled as the run scales it.
    weights: (B, T), see `estimators.loss_weights`.
    old_logprob: (B, T), from the first pass over these completions; None in that pass.
    """

    rollout: Rollout
    conditions: Conditions
    rewards: torch.Tensor
    weights: torch.Tensor
    old_logprob: torch.Tensor | None = None


@dataclass(frozen=True)
class MicroBatchResult:
    """What a backward pass found; statistics (B, T), detached, zero outside the completion mask."""

    loss: float
    logprob: torch.Tensor
    ref_logprob: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    coefficients: Coefficients
    mix_sums: tuple[float, float] | None


def backward(
    policy: ConditionedPolicy, batch: MicroBatch, config: CLPConfig, controller: MixController
) -> MicroBatchResult:
    """Add the gradient of the micro-batch's loss to the adapters' `.grad`."""
    mask = batch.rollout.completion_mask
    hidden, stats = completion_stats(
        policy, batch.rollout, batch.conditions, outputs=ALL, temperature=config.temperature
    )
    full = {name: unpacked(getattr(stats, name).detach(), mask) for name in ALL}
    tokens = Tokens(full["logprob"], full["ref_logprob"], full["kl"], mask)
    scale, kl_coef = objective_scales(
        batch.conditions.repeat(batch.rollout.group).kl.to(mask.device), config.kl_is_beta
    )

    def estimate(estimator: str) -> Coefficients:
        return coefficients(
            tokens,
            batch.rewards,
            kl_coef,
            scale,
            batch.rollout.group,
            estimator=estimator,
            baseline=config.baseline,
            mix=controller.mix,
            old_logprob=batch.old_logprob,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
        )

    def loss_of(c: Coefficients) -> torch.Tensor:
        loss = -((batch.weights * c.logprob)[mask] * stats.logprob).sum()
        return loss if c.kl is None else loss - ((batch.weights * c.kl)[mask] * stats.kl).sum()

    chosen = estimate(config.kl_estimator)
    mix_sums = None
    if config.kl_estimator == "mixed":
        by_return, by_exact = (
            torch.autograd.grad(loss_of(estimate(name)), hidden, retain_graph=True)[0]
            for name in ("return", "exact")
        )
        gap = by_return - by_exact
        mix_sums = (by_return * gap).sum().item(), gap.square().sum().item()
    loss = loss_of(chosen)
    loss.backward()
    return MicroBatchResult(
        loss.item(), full["logprob"], full["ref_logprob"], full["kl"], full["entropy"], chosen, mix_sums
    )
