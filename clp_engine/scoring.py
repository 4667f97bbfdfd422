"""Token statistics of completions under policy and reference: log-probs, entropy, exact KL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from clp_kernels import TokenStats

from clp_engine.conditions import Conditions
from clp_engine.rollout import Rollout

if TYPE_CHECKING:
    from clp_engine.policy import ConditionedPolicy

ALL = ("logprob", "ref_logprob", "kl", "entropy")
_NEEDS_REFERENCE = {"ref_logprob", "kl", "reverse_kl"}


def completion_hidden(
    policy: ConditionedPolicy, batch: Rollout, coefficients: torch.Tensor | None
) -> torch.Tensor:
    """(B, T, H): the hidden state that predicts each completion token; the prompt of a group is computed once.

    coefficients: the blend (P, D) of each prompt, or None for the base model. Differentiable in the adapters.
    """
    backbone, group = policy.backbone, batch.group
    prompts = batch.prompt_ids, batch.prompt_mask
    if coefficients is None and batch.plain_ids is not None:
        prompts = batch.plain_ids, batch.plain_mask
    with policy.blend.use(coefficients):
        before, context = backbone.prefill(*prompts)
    before = before.repeat_interleave(group, 0)
    if batch.completion_ids.shape[1] == 1:
        return before
    context.repeat(group)
    with policy.blend.use(None if coefficients is None else coefficients.repeat_interleave(group, 0)):
        after = backbone.extend(context, batch.completion_ids[:, :-1], batch.completion_mask[:, :-1])
    return torch.cat([before, after], 1)


def completion_stats(
    policy: ConditionedPolicy,
    batch: Rollout,
    conditions: Conditions | None,
    *,
    outputs: Sequence[str] = ALL,
    differentiable: Sequence[str] | None = None,
    temperature: float = 1.0,
    hidden_grad: bool = False,
) -> tuple[torch.Tensor, TokenStats]:
    """(hidden, stats) of the N completion tokens of `batch`, in the order of batch.completion_mask.nonzero().

    hidden: (N, H), with gradients where they are enabled; each statistic (N,) float32, with gradients if `differentiable` names
    it (None: all that have one). The reference runs without gradients.
    hidden_grad: hidden is to have a gradient of its own, even where no parameter behind it asks for one.
    """
    mask = batch.completion_mask
    needs_reference = bool(_NEEDS_REFERENCE & set(outputs))
    ref_hidden = None
    if needs_reference or not policy.moves_hidden:
        with torch.no_grad():
            ref_hidden = policy.completion_hidden(batch, None)[mask]
    if not policy.moves_hidden:
        # The policy's hidden states are the reference's.
        hidden = ref_hidden.clone().requires_grad_(hidden_grad and torch.is_grad_enabled())
    else:
        hidden = policy.completion_hidden(batch, conditions)[mask]
    row_conditions = (
        None if conditions is None else conditions.repeat(batch.group)[mask.nonzero()[:, 0].cpu()]
    )
    return hidden, policy.token_stats(
        hidden,
        batch.completion_ids[mask],
        ref_hidden=ref_hidden if needs_reference else None,
        conditions=row_conditions,
        temperature=temperature,
        outputs=outputs,
        differentiable=differentiable,
    )


def unpacked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N,) values of the tokens in mask (B, T) as (B, T), zero elsewhere; differentiable."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


@torch.no_grad()
def score(
    policy: ConditionedPolicy,
    batch: Rollout,
    conditions: Conditions | None,
    *,
    outputs: Sequence[str] = ALL,
    temperature: float = 1.0,
    max_tokens: int = 16384,
) -> TokenStats:
    """Statistics of every completion token, each (B, T) float32 and zero outside batch.completion_mask, without gradients.

    conditions: one row per prompt, None for the base model. max_tokens: prompts are taken together up to this many tokens.
    """
    prompts = batch.prompt_ids.shape[0]
    per_prompt = batch.prompt_ids.shape[1] + batch.group * batch.completion_ids.shape[1]
    step = max(1, max_tokens // per_prompt)
    parts = []
    for start in range(0, prompts, step):
        stop = min(start + step, prompts)
        part = batch.prompts(start, stop)
        parts.append(
            completion_stats(
                policy,
                part,
                None if conditions is None else conditions[start:stop],
                outputs=outputs,
                temperature=temperature,
            )[1]
        )
    joined = {}
    for name in TokenStats._fields:
        values = [getattr(part, name) for part in parts]
        joined[name] = None if values[0] is None else unpacked(torch.cat(values), batch.completion_mask)
    return TokenStats(**joined)
