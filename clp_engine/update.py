"""The gradient of a step, by micro-batch: statistics of its tokens, the estimator's coefficients, one backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from clp_kernels import TokenStats

from clp_engine.conditions import Conditions
from clp_engine.config import CLPConfig
from clp_engine.estimators import (
    DIFFERENTIATED,
    Coefficients,
    MixController,
    Tokens,
    coefficients,
    loss_weights,
    objective_scales,
    rescale_rewards,
    returns_to_go,
)
from clp_engine.rollout import Rollout
from clp_engine.scoring import ALL, completion_stats, unpacked
from clp_engine.value import ValueHead

if TYPE_CHECKING:
    from clp_engine.generation import Generation
    from clp_engine.policy import ConditionedPolicy


@dataclass(frozen=True)
class MicroBatch:
    """Whole groups of completions and what their gradient needs.

    conditions: one row per prompt. rewards: (B,) w.R, scaled as the run scales it.
    weights: (B, T), see `estimators.loss_weights`.
    old_logprob, values: (B, T), from the first pass over these completions; None in that pass, and values
        without a value head.
    """

    rollout: Rollout
    conditions: Conditions
    rewards: torch.Tensor
    weights: torch.Tensor
    old_logprob: torch.Tensor | None = None
    values: torch.Tensor | None = None


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
    prompts = drawn.prompt_ids.shape[0]
    per_micro_batch = max(1, config.per_device_train_batch_size // config.num_generations)
    for start in range(0, prompts, per_micro_batch):
        stop = min(start + per_micro_batch, prompts)
        part = drawn.prompts(start, stop)
        here = slice(start * drawn.group, stop * drawn.group), slice(0, part.completion_ids.shape[1])
        old, values = (None if t is None else t[here] for t in (generation.old_logprob, generation.values))
        yield (
            here,
            MicroBatch(part, generation.conditions[start:stop], rewards[here[0]], weights[here], old, values),
        )


@dataclass(frozen=True)
class MicroBatchResult:
    """What a backward pass found; statistics (B, T), detached, zero outside the completion mask.

    loss: a scalar; mix_sums: (2,), what `MixController.update` takes; both left on the policy's device, as reading them would
    wait for it. With a value head: values (B, T), those the advantages were taken from; targets, predictions (N,), what the
    head is fitted to and what it said, for the tokens that have a return.
    """

    loss: torch.Tensor
    logprob: torch.Tensor
    ref_logprob: torch.Tensor
    kl: torch.Tensor
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

    def coefficients(self, config: CLPConfig, estimator: str, baseline: str, mix: float) -> Coefficients:
        return coefficients(
            self.tokens,
            self.batch.rewards,
            self.kl_coef,
            self.scale,
            self.batch.rollout.group,
            estimator=estimator,
            baseline=baseline,
            mix=mix,
            values=self.values if baseline == "value" else None,
            old_logprob=self.batch.old_logprob,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
        )

    def loss(self, c: Coefficients) -> torch.Tensor:
        weights, mask = self.batch.weights, self.tokens.mask
        loss = -((weights * c.logprob)[mask] * self.stats.logprob).sum()
        return loss if c.kl is None else loss - ((weights * c.kl)[mask] * self.stats.kl).sum()


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
    hidden, stats = completion_stats(
        policy,
        batch.rollout,
        batch.conditions,
        outputs=ALL,
        differentiable=differentiable,
        temperature=config.temperature,
        hidden_grad=config.kl_estimator == "mixed",
    )
    full = {name: unpacked(getattr(stats, name).detach(), mask) for name in ALL}
    conditions = batch.conditions.repeat(batch.rollout.group).to(mask.device)
    scale, kl_coef = objective_scales(conditions.kl, config.kl_is_beta)
    predicted, values = None, batch.values
    if value_head is not None:
        features = value_head.features(conditions.weights, scale, kl_coef)
        predicted = value_head(hidden, features[mask.nonzero()[:, 0]])
        if values is None:
            values = unpacked(predicted.detach(), mask)
    tokens = Tokens(full["logprob"], full["ref_logprob"], full["kl"], mask)
    return Scored(batch, hidden, stats, tokens, full["entropy"], scale, kl_coef, predicted, values)


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
    loss = scored.loss(chosen)
    loss.backward()
    targets = predictions = None
    if value_head is not None:
        returns = returns_to_go(
            tokens,
            batch.rewards,
            scored.kl_coef,
            scored.scale,
            batch.rollout.group,
            estimator=config.kl_estimator,
            mix=mix,
        )
        fitted = ((batch.weights > 0) & ~returns.isnan())[tokens.mask]
        targets, predicted = returns[tokens.mask][fitted], scored.predicted[fitted]
        (value_head.loss(predicted, targets) / step_tokens).backward()
        predictions = predicted.detach()
    return MicroBatchResult(
        loss.detach(),
        tokens.logprob,
        tokens.ref_logprob,
        tokens.kl,
        scored.entropy,
        chosen,
        mix_sums,
        scored.values,
        targets,
        predictions,
    )
