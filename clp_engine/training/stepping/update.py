"""The gradient of a step, by micro-batch: statistics of its tokens, the objective's coefficients, one backward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from clp_kernels import TokenStats

from clp_engine.core.conditions import Conditions
from clp_engine.objectives.coefficients import Coefficients, RewardedTokens, Tokens
from clp_engine.objectives.objective import Objective
from clp_engine.objectives.selection import select_tokens
from clp_engine.policy.references import FrozenReference, Reference
from clp_engine.rollouts.scoring import ALL, completion_stats, unpacked
from clp_engine.rollouts.types import Rollout
from clp_engine.training.collecting.batches import TrainingBatch
from clp_engine.training.collecting.reference_states import joined, micro_parts, parts_of_ranks
from clp_engine.training.parallel.dealing import Shares
from clp_engine.training.settings.groups import MicroBatching

if TYPE_CHECKING:
    from clp_engine.policy.policy import ConditionedPolicy


@dataclass(frozen=True)
class MicroBatch:
    """Whole groups of completions and what their gradient needs.

    conditions: one row per prompt. rewards: (B,) w.R, scaled as the run scales it.
    weights: (B, T), see `Objective.prepared`.
    old_logprob: (B, T), what the completions were sampled with, None where that is the policy as it is.
    values: (B, T), from the first pass over these completions; None in that pass, and where nothing is predicted.
    ref_hidden, advantage, token_share: see `TrainingBatch`; ref_hidden (N, H).
    temperature: of the log-probs. uses_reference: whether the reference is run; None: as the objective says of these rows.
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
    temperature: float = 1.0
    uses_reference: bool | None = None


def micro_batches(
    batch: TrainingBatch, objective: Objective, batching: MicroBatching
) -> Iterator[tuple[tuple[slice | torch.Tensor, slice], MicroBatch]]:
    """A step's completions, or this process's of them, cut into micro-batches of whole groups, each with the part of (B, T) it
    covers."""
    drawn = batch.rollout
    rewards, weights = objective.prepared(batch.scalar, drawn.group, drawn.trained, drawn.terminated)
    shares = batch.shares
    uses_reference = None
    if shares is not None and shares.in_step:
        uses_reference = objective.uses_reference(batch.conditions.kl)
    for prompts, completions, part in micro_parts(drawn, batching, shares and shares.mine):
        rows = (
            slice(completions.start, completions.stop)
            if isinstance(completions, range)
            else torch.tensor(completions, device=rewards.device)
        )
        here = rows, slice(0, part.completion_ids.shape[1])
        old, values = (None if t is None else t[here] for t in (batch.old_logprob, batch.values))
        advantage = None if batch.advantage is None else batch.advantage[rows]
        reference = None if batch.reference is None else joined([batch.reference[i] for i in completions])
        yield (
            here,
            MicroBatch(
                part,
                batch.conditions[prompts],
                rewards[rows],
                weights[here],
                old,
                values,
                reference,
                advantage,
                batch.token_share,
                batching.temperature,
                uses_reference,
            ),
        )


@dataclass(frozen=True)
class MicroBatchResult:
    """What a backward pass found; statistics (B, T), detached, zero outside the completion mask; those that need the reference
    are None where it was not computed.

    loss: a scalar; learned: what `Objective.metrics` takes; both left on the policy's device, as reading them would wait for
    it. values: (B, T), what the objective predicted of each token, those the advantages were taken from; None without.
    """

    loss: torch.Tensor
    logprob: torch.Tensor
    ref_logprob: torch.Tensor | None
    kl: torch.Tensor | None
    entropy: torch.Tensor
    coefficients: Coefficients
    learned: Any
    values: torch.Tensor | None = None


@dataclass(frozen=True)
class Scored:
    """A micro-batch after its forward pass, an `objectives.objective.ForwardPass`: any gradient can be taken from it.

    hidden: (N, H) and stats, each (N,), of the N completion tokens, with gradients; rewarded.tokens: the same statistics,
    detached, (B, T), of the tokens that the policy wrote. predicted: of these tokens, with gradients, or None.
    with_reference: whether the reference was computed; else the log-ratios and KLs are zeros that nothing depends on.
    """

    batch: MicroBatch
    hidden: torch.Tensor
    stats: TokenStats
    rewarded: RewardedTokens
    entropy: torch.Tensor
    predicted: torch.Tensor | None
    with_reference: bool = True

    @property
    def values(self) -> torch.Tensor | None:
        return self.rewarded.values

    @property
    def counted(self) -> torch.Tensor:
        return self.batch.weights > 0

    def loss(self, c: Coefficients) -> torch.Tensor:
        weights, places = self.batch.weights, self.batch.rollout.places
        loss = -((weights * c.logprob).flatten()[places] * self.stats.logprob).sum()
        return loss if c.kl is None else loss - ((weights * c.kl).flatten()[places] * self.stats.kl).sum()


def forward(
    policy: ConditionedPolicy,
    batch: MicroBatch,
    objective: Objective,
    differentiable: Sequence[str] | None = None,
    reference: Reference | None = None,
) -> Scored:
    """Statistics of the micro-batch's tokens under policy and reference, and their values.

    differentiable: the statistics whose gradients will be asked for; None: any. reference: by default the frozen one.
    """
    mask = batch.rollout.completion_mask
    with_reference = batch.uses_reference
    if with_reference is None:
        with_reference = objective.uses_reference(batch.conditions.kl)
    outputs = ALL if with_reference else ("logprob", "entropy")
    hidden, stats = completion_stats(
        policy,
        batch.rollout,
        batch.conditions,
        outputs=outputs,
        differentiable=None if differentiable is None else [n for n in differentiable if n in outputs],
        temperature=batch.temperature,
        hidden_grad=objective.needs.hidden_gradient,
        ref_hidden=_reference_hidden(policy, batch, with_reference, reference or FrozenReference()),
    )
    if not with_reference:
        stats = stats._replace(ref_logprob=stats.logprob.detach(), kl=torch.zeros_like(stats.logprob))
    trained = batch.rollout.trained
    full = {name: unpacked(getattr(stats, name).detach(), mask) for name in ALL}
    if batch.rollout.written is not None:
        full = {name: torch.where(trained, values, 0.0) for name, values in full.items()}
    conditions = batch.conditions.repeat(batch.rollout.group).to(mask.device)
    scale, kl_coef = (
        t.repeat_interleave(batch.rollout.group).to(mask.device)
        for t in objective.scales(batch.conditions.kl)
    )
    values = batch.values
    predicted = objective.predictions(
        hidden, batch.rollout.rows.to(mask.device), conditions.weights, scale, kl_coef
    )
    if predicted is not None and values is None:
        values = unpacked(predicted.detach(), mask)
    if predicted is not None and batch.rollout.written is not None:
        predicted = predicted[trained[mask]]
    rewarded = RewardedTokens(
        Tokens(full["logprob"], full["ref_logprob"], full["kl"], trained),
        batch.rewards,
        kl_coef,
        scale,
        batch.rollout.group,
        values,
        batch.old_logprob,
        batch.advantage,
        batch.rollout.sampled,
    )
    return Scored(batch, hidden, stats, rewarded, full["entropy"], predicted, with_reference)


def _reference_hidden(
    policy: ConditionedPolicy, batch: MicroBatch, needed: bool, reference: Reference
) -> torch.Tensor | None:
    """The reference's hidden states where they are there, or are not the base model's; else `completion_stats` has them."""
    if batch.ref_hidden is not None or not needed:
        return batch.ref_hidden
    with torch.no_grad():
        return reference.hidden(policy, batch.rollout, batch.conditions)


def backward(
    policy: ConditionedPolicy,
    batch: MicroBatch,
    objective: Objective,
    step_tokens: int | torch.Tensor = 1,
    reference: Reference | None = None,
) -> MicroBatchResult:
    """Add the gradient of the micro-batch's loss to the adapters' `.grad`, and the objective's to its own parameters' `.grad`.

    step_tokens: completion tokens of the whole optimiser step.
    """
    scored = forward(policy, batch, objective, objective.needs.differentiated, reference)
    tokens, chosen = scored.rewarded.tokens, objective.coefficients(scored.rewarded)
    learned = objective.learn(scored, step_tokens)
    if batch.token_share < 1:
        group = torch.arange(len(batch.conditions), device=tokens.mask.device)
        groups = group.repeat_interleave(batch.rollout.group)
        chosen = select_tokens(chosen, scored.entropy, scored.counted, groups, batch.token_share)
    loss = scored.loss(chosen)
    loss.backward()
    return MicroBatchResult(
        loss.detach(),
        tokens.logprob,
        tokens.ref_logprob if scored.with_reference else None,
        tokens.kl if scored.with_reference else None,
        scored.entropy,
        chosen,
        learned,
        scored.values,
    )


def keep_pace(
    policy: ConditionedPolicy,
    batch: TrainingBatch,
    objective: Objective,
    batching: MicroBatching,
    reference: Reference | None = None,
) -> None:
    """Where all processes have to run as many passes (`parallel.sharding`): those that this one has fewer than the one with
    most, with gradients of zero."""
    shares, drawn = batch.shares, batch.rollout
    if shares is None or not shares.in_step:
        return
    of_ranks = parts_of_ranks(drawn, batching, shares)
    if missing := max(of_ranks) - of_ranks[shares.rank]:
        least = dataclasses.replace(batch, shares=Shares([shares.mine[:1] or [0]], 0, True), values=None)
        ((_, part),) = micro_batches(least, objective, batching)
        if batch.reference is not None and part.ref_hidden is None:  # another process has them
            width = policy.backbone.head.module.weight.shape[-1]
            part = dataclasses.replace(part, ref_hidden=part.rewards.new_zeros(len(part.rollout.rows), width))
        part = dataclasses.replace(part, weights=torch.zeros_like(part.weights), token_share=1.0)
        for _ in range(missing):
            backward(policy, part, objective, reference=reference)
