"""The completions of a rollout that are trained on, where not all of them are (formulas in `objectives.selection`).

Rollouts are chosen before the policy's pass, from the log-probs of sampling and of the reference.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from clp_engine.objectives.advantages import rescale_rewards
from clp_engine.objectives.coefficients import RewardedTokens, Tokens, advantages, objective_scales
from clp_engine.objectives.selection import max_variance, scheduled
from clp_engine.rollouts.types import Rollout
from clp_engine.training.collecting.reference_states import reference_logprob

if TYPE_CHECKING:
    from clp_engine.policy.policy import ConditionedPolicy
    from clp_engine.training.collecting.collector import Generation
    from clp_engine.training.config import CLPConfig


def select_rollouts(
    policy: ConditionedPolicy, generation: Generation, config: CLPConfig, progress: float
) -> Generation:
    """The part of a generation that is trained on, with the advantages of its rows in their whole groups."""
    drawn, size = generation.rollout, config.num_generations
    share = scheduled(config.rollout_share, config.selection_schedule, progress)
    count = max(2, round(size * share))
    generation.metrics["selection/rollouts"] = count / size
    if count == size:
        return generation
    hidden = generation.reference or [None] * drawn.completion_ids.shape[0]
    conditions = generation.conditions.repeat(size).to(drawn.logprobs.device)
    scale, kl_coef = objective_scales(conditions.kl, config.kl_is_beta)
    tokens = Tokens(
        drawn.logprobs,
        reference_logprob(policy, drawn, hidden, config) if kl_coef.any() else drawn.logprobs,
        None,
        drawn.completion_mask,
    )
    rewards = rescale_rewards(generation.scalar, size, config.scale_rewards)
    found = advantages(
        RewardedTokens(tokens, rewards, kl_coef, scale, size),
        estimator=config.kl_estimator,
        baseline=config.baseline,
    )
    wanted = found
    if config.mask_truncated_completions:  # in the baseline, but not in the loss
        wanted = torch.where(drawn.terminated, found, torch.nan)
    rows = max_variance(wanted.view(-1, size), count)
    rows = (rows + size * torch.arange(len(rows), device=rows.device).unsqueeze(-1)).view(-1)
    return dataclasses.replace(
        generation,
        rollout=_taken(drawn, rows),
        rewards=generation.rewards[rows.cpu()],
        scalar=generation.scalar[rows],
        reference=[hidden[i] for i in rows.tolist()],
        advantage=found[rows],
    )


def _taken(drawn: Rollout, rows: torch.Tensor) -> Rollout:
    """These completions, as many of each prompt."""
    names = ("completion_ids", "completion_mask", "logprobs", "terminated")
    return dataclasses.replace(drawn, **{name: getattr(drawn, name)[rows] for name in names})


def select(
    policy: ConditionedPolicy, generation: Generation, config: CLPConfig, progress: float
) -> Generation:
    """What `config` wants trained of a generation when `progress` (0 to 1) of training is over."""
    if config.rollout_selection != "none":
        generation = select_rollouts(policy, generation, config, progress)
    if config.token_selection != "none":
        generation.token_share = scheduled(config.selected_tokens, config.selection_schedule, progress)
        generation.metrics["selection/tokens"] = generation.token_share
    return generation
