"""The gradient of a step, by micro-batch: statistics of its tokens, the estimator's coefficients, one backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from clp_kernels import TokenStats

from clp_engine.core.conditions import Conditions
from clp_engine.objectives.advantages import rescale_rewards
from clp_engine.objectives.coefficients import (
    DIFFERENTIATED,
    Coefficients,
    RewardedTokens,
    Tokens,
    coefficients,
    needs_reference,
    objective_scales,
    returns_to_go,
)
from clp_engine.objectives.losses import loss_weights
from clp_engine.objectives.selection import select_tokens
from clp_engine.objectives.value_head import ValueHead
from clp_engine.objectives.variance_mix import MixController
from clp_engine.rollouts.scoring import ALL, completion_stats, parts, unpacked
from clp_engine.rollouts.types import Rollout
from clp_engine.training.collecting.reference_states import joined
from clp_engine.training.config import CLPConfig

if TYPE_CHECKING:
    from clp_engine.policy.policy import ConditionedPolicy
    from clp_engine.training.collecting.collector import Generation


@dataclass(frozen=True)
class MicroBatch:
    """Whole groups of completions and what their gradient needs.

    conditions: one row per prompt. rewards: (B,) w.R, scaled as the run scales it.
    weights: (B, T), see `losses.loss_weights`.
    old_logprob: (B, T), what the completions were sampled with, None where that is the policy as it is.
    values: (B, T), from the first pass over these completions; None in that pass, and without a value head.
    ref_hidden, advantage, token_share: see `collector.Generation`; ref_hidden (N, H).
    """

    rollout: Rollout
    conditions: Conditions
    rewards: torch.Tensor
    weights: torch.Tensor
    old_logprob: torch.Tensor | None = None
    values: torch.Tensor | None = None
    ref_hidden: torch.Tensor | None = None
    advantage: torch.Tensor | None = None
    token_share: float = 1.0


def micro_batches(
    generation: Generation, config: CLPConfig
) -> Iterator[tuple[tuple[slice, slice], MicroBatch]]:
    """A step's completions cut into micro-batches of whole groups, each with the part of (B, T) it covers."""
    drawn = generation.rollout
    counted = drawn.completion_mask
    if config.mask_truncated_completions:
        counted = counted & drawn.terminated.unsqueeze(-1)
    weights = loss_weights(counted, config.loss_type, config.max_completion_length)
    rewards = rescale_rewards(generation.scalar, drawn.group, config.scale_rewards)
    for start, stop in parts(drawn, config.per_device_train_batch_size, config.max_tokens_per_microbatch):
        part = drawn.prompts(start, stop)
        here = slice(start * drawn.group, stop * drawn.group), slice(0, part.completion_ids.shape[1])
        old, values = (None if t is None else t[here] for t in (generation.old_logprob, generation.values))
        reference, advantage = (
            None if t is None else t[here[0]] for t in (generation.reference, generation.advantage)
        )
        yield (
            here,
            MicroBatch(
                part,
                generation.conditions[start:stop],
                rewards[here[0]],
                weights[here],
                old,
                values,
                joined(reference),
                advantage,
                generation.token_share,
            ),
        )


@dataclass(frozen=True)
class MicroBatchResult:
    """What a backward pass found; statistics (B, T), detached, zero outside the completion mask; those that need the reference
    are None where it was not computed.

    loss: a scalar; mix_sums: (2,), what `MixController.update` takes; both left on the policy's device, as reading them would
    wait for it. With a value head: values (B, T), those the advantages were taken from; targets, predictions (N,), what the
    head is fitted to and what it said, for the tokens that have a return.
    """

    loss: torch.Tensor
    logprob: torch.Tensor
    ref_logprob: torch.Tensor | None
    kl: torch.Tensor | None
    entropy: torch.Tensor
    coefficients: Coefficients
    mix_sums: torch.Tensor | None
    values: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    predictions: torch.Tensor | None = None


@dataclass(frozen=True)
class Scored:
    """A micro-batch after its forward pass: what every estimator's gradient can be taken from.

    hidden: (N, H) and stats, each (N,), of the N completion tokens, with gradients; tokens: the same statistics, detached,
    (B, T); scale, kl_coef: (B,); predicted: (N,), of the value head, with gradients, or None; values: (B, T) or None.
    with_reference: whether the reference was computed; else the log-ratios and KLs are zeros that nothing depends on.
    """

    batch: MicroBatch
    hidden: torch.Tensor
    stats: TokenStats
    tokens: Tokens
    entropy: torch.Tensor
    scale: torch.Tensor
    kl_coef: torch.Tensor
    predicted: torch.Tensor | None
    values: torch.Tensor | None
    with_reference: bool = True

    def coefficients(self, config: CLPConfig, estimator: str, baseline: str, mix: float) -> Coefficients:
        return coefficients(
            self.rewarded(self.values if baseline == "value" else None),
            estimator=estimator,
            baseline=baseline,
            mix=mix,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            delta=config.delta,
        )

    def rewarded(self, values: torch.Tensor | None = None) -> RewardedTokens:
        return RewardedTokens(
            self.tokens,
            self.batch.rewards,
            self.kl_coef,
            self.scale,
            self.batch.rollout.group,
            values,
            self.batch.old_logprob,
            self.batch.advantage,
        )

    def loss(self, c: Coefficients) -> torch.Tensor:
        weights, places = self.batch.weights, self.batch.rollout.places
        loss = -((weights * c.logprob).flatten()[places] * self.stats.logprob).sum()
        return loss if c.kl is None else loss - ((weights * c.kl).flatten()[places] * self.stats.kl).sum()


def forward(
    policy: ConditionedPolicy,
    batch: MicroBatch,
    config: CLPConfig,
    value_head: ValueHead | None = None,
    differentiable: Sequence[str] | None = None,
) -> Scored:
    """Statistics of the micro-batch's tokens under policy and reference, and their values.

    differentiable: the statistics whose gradients will be asked for; None: any.
    """
    mask = batch.rollout.completion_mask
    scale, kl_coef = objective_scales(batch.conditions.kl, config.kl_is_beta)
    with_reference = needs_reference(batch.conditions.kl, config.log_kl)
    outputs = ALL if with_reference else ("logprob", "entropy")
    hidden, stats = completion_stats(
        policy,
        batch.rollout,
        batch.conditions,
        outputs=outputs,
        differentiable=None if differentiable is None else [n for n in differentiable if n in outputs],
        temperature=config.temperature,
        hidden_grad=config.kl_estimator == "mixed",
        ref_hidden=batch.ref_hidden,
    )
    if not with_reference:
        stats = stats._replace(ref_logprob=stats.logprob.detach(), kl=torch.zeros_like(stats.logprob))
    full = {name: unpacked(getattr(stats, name).detach(), mask) for name in ALL}
    conditions = batch.conditions.repeat(batch.rollout.group).to(mask.device)
    scale, kl_coef = (t.repeat_interleave(batch.rollout.group).to(mask.device) for t in (scale, kl_coef))
    predicted, values = None, batch.values
    if value_head is not None:
        features = value_head.features(conditions.weights, scale, kl_coef)
        predicted = value_head(hidden, features[batch.rollout.rows.to(mask.device)])
        if values is None:
            values = unpacked(predicted.detach(), mask)
    tokens = Tokens(full["logprob"], full["ref_logprob"], full["kl"], mask)
    return Scored(
        batch, hidden, stats, tokens, full["entropy"], scale, kl_coef, predicted, values, with_reference
    )


def backward(
    policy: ConditionedPolicy,
    batch: MicroBatch,
    config: CLPConfig,
    controller: MixController,
    value_head: ValueHead | None = None,
    step_tokens: int | torch.Tensor = 1,
) -> MicroBatchResult:
    """Add the gradient of the micro-batch's loss to the adapters' `.grad`, and that of the value head's to the head's.

    step_tokens: completion tokens of the whole optimiser step, over which the head's loss is a mean.
    """
    scored = forward(policy, batch, config, value_head, DIFFERENTIATED[config.kl_estimator])
    mix, tokens = controller.mix, scored.tokens
    chosen = scored.coefficients(config, config.kl_estimator, config.baseline, mix)
    mix_sums = None
    if config.kl_estimator == "mixed":
        by_return, by_exact = (
            torch.autograd.grad(
                scored.loss(scored.coefficients(config, name, config.baseline, mix)),
                scored.hidden,
                retain_graph=True,
            )[0]
            for name in ("return", "exact")
        )
        gap = by_return - by_exact
        mix_sums = torch.stack(((by_return * gap).sum(), gap.square().sum()))
    if batch.token_share < 1:
        group = torch.arange(len(batch.conditions), device=tokens.mask.device)
        groups = group.repeat_interleave(batch.rollout.group)
        chosen = select_tokens(chosen, scored.entropy, batch.weights > 0, groups, batch.token_share)
    loss = scored.loss(chosen)
    loss.backward()
    targets = predictions = None
    if value_head is not None:
        returns = returns_to_go(scored.rewarded(), estimator=config.kl_estimator, mix=mix)
        fitted = ((batch.weights > 0) & ~returns.isnan())[tokens.mask]
        targets, predicted = returns[tokens.mask][fitted], scored.predicted[fitted]
        (value_head.loss(predicted, targets) / step_tokens).backward()
        predictions = predicted.detach()
    return MicroBatchResult(
        loss.detach(),
        tokens.logprob,
        tokens.ref_logprob if scored.with_reference else None,
        tokens.kl if scored.with_reference else None,
        scored.entropy,
        chosen,
        mix_sums,
        scored.values,
        targets,
        predictions,
    )
