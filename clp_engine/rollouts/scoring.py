"""Token statistics of completions under policy and reference: log-probs, entropy, exact KL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from clp_kernels import TokenStats

from clp_engine.core.conditions import Conditions
from clp_engine.models.backbones.packing import Packed, join, pack
from clp_engine.models.conditioned import ConditionedModel
from clp_engine.rollouts.types import Rollout, Samplable

ALL = ("logprob", "ref_logprob", "kl", "entropy")
_NEEDS_REFERENCE = {"ref_logprob", "kl", "reverse_kl"}


def pack_rollout(batch: Rollout, mask: torch.Tensor | None = None, plain: bool = False) -> Packed:
    """`pack` for a rollout; mask: by default all completion tokens; plain: prompts as the reference reads them."""
    prompts = batch.prompt_ids, batch.counts[0]
    if plain and batch.plain_ids is not None:
        prompts = batch.plain_ids, batch.plain_mask.sum(-1).cpu()
    elif mask is None:
        return batch.packed
    return pack(*prompts, batch.completion_ids, batch.counts[1] if mask is None else mask.sum(-1).cpu())


def hidden_states(
    model: ConditionedModel,
    batch: Rollout,
    coefficients: torch.Tensor | None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """(N, H): the hidden state that predicts each completion token of `mask`, in the order of mask.nonzero().

    coefficients: the blend (P, D) of each prompt, or None for the base model. mask: (B, T) bool, tokens from the first one of a
    row on; by default all. Every prompt is computed once for its group where the model can, packed where it takes packed
    tokens. Differentiable in the adapters.
    """
    backbone = model.backbone
    plain = coefficients is None
    if backbone.packing_fault is None:
        packed = pack_rollout(batch, mask, plain)
        with model.blend.use(coefficients, None if plain else packed.prompts):
            return backbone.packed(packed)[packed.predictors]
    prompts = batch.prompt_ids, batch.prompt_mask
    if plain and batch.plain_ids is not None:
        prompts = batch.plain_ids, batch.plain_mask
    valid = batch.completion_mask if mask is None else mask
    if not backbone.shares_prompts:
        with model.blend.use(None if plain else coefficients.repeat_interleave(batch.group, 0)):
            prompts = (t.repeat_interleave(batch.group, 0) for t in prompts)
            return backbone.whole(*prompts, batch.completion_ids, valid)[valid]
    with model.blend.use(coefficients):
        before, context = backbone.prefill(*prompts)
    before = before.repeat_interleave(batch.group, 0)
    if batch.completion_ids.shape[1] == 1:
        return before[valid]
    context.repeat(batch.group)
    with model.blend.use(None if plain else coefficients.repeat_interleave(batch.group, 0)):
        after = backbone.extend(context, batch.completion_ids[:, :-1], valid[:, :-1])
    return torch.cat([before, after], 1)[valid]


def joint_hidden_states(
    model: ConditionedModel,
    batch: Rollout,
    coefficients: torch.Tensor | None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden, ref_hidden), each (N, H) as `hidden_states` has it, of policy and reference in one pass through the model:
    the reference is the rows whose blend is zero. For a model that takes packed tokens."""
    own, reference = pack_rollout(batch, mask), pack_rollout(batch, mask, plain=True)
    both = join(own, reference)
    blend = None
    if coefficients is not None:
        blend = torch.cat([coefficients, torch.zeros_like(coefficients)])
    with model.blend.use(blend, None if blend is None else both.prompts):
        hidden = model.backbone.packed(both)[both.predictors]
    return hidden.split([len(own.predictors), len(reference.predictors)])


def completion_stats(
    source: Samplable,
    batch: Rollout,
    conditions: Conditions | None,
    *,
    outputs: Sequence[str] = ALL,
    differentiable: Sequence[str] | None = None,
    temperature: float = 1.0,
    hidden_grad: bool = False,
    mask: torch.Tensor | None = None,
    ref_hidden: torch.Tensor | None = None,
) -> tuple[torch.Tensor, TokenStats]:
    """(hidden, stats) of the N completion tokens of `mask`, in the order of mask.nonzero(); by default all of `batch`.

    hidden: (N, H), with gradients where they are enabled; each statistic (N,) float32, with gradients if `differentiable` names
    it (None: all that have one). The reference runs without gradients, and only where `outputs` need it.
    hidden_grad: hidden is to have a gradient of its own, even where no parameter behind it asks for one.
    ref_hidden: (N, H), the reference's hidden states, where they are there already (`reference_states`).
    """
    needs_reference = bool(_NEEDS_REFERENCE & set(outputs))
    grad = torch.is_grad_enabled()
    if needs_reference and source.moves_hidden and source.joins_reference and ref_hidden is None and not grad:
        hidden, ref_hidden = joint_hidden_states(
            source.conditioned, batch, source.coefficients(conditions), mask
        )
    else:
        if ref_hidden is None and (needs_reference or not source.moves_hidden):
            with torch.no_grad():
                ref_hidden = source.completion_hidden(batch, None, mask)
        if not source.moves_hidden:
            # The policy's hidden states are the reference's.
            hidden = ref_hidden.clone().requires_grad_(hidden_grad and grad)
        else:
            hidden = source.completion_hidden(batch, conditions, mask)
    if mask is None:
        rows, places = batch.rows, batch.places
    else:
        rows, places = mask.nonzero()[:, 0].cpu(), mask.flatten().nonzero().squeeze(-1)
    return hidden, source.token_stats(
        hidden,
        batch.completion_ids.flatten()[places],
        ref_hidden=ref_hidden if needs_reference else None,
        conditions=None if conditions is None else conditions.repeat(batch.group)[rows],
        temperature=temperature,
        outputs=outputs,
        differentiable=differentiable,
    )


def parts(batch: Rollout, max_rows: int, max_tokens: int | None) -> Iterator[tuple[int, int]]:
    """Prompts [start, stop) of each micro-batch: whole groups of at most `max_rows` completions, or, where it is given, of at
    most `max_tokens` tokens."""
    if max_tokens is not None:
        yield from within_budget(batch, max_tokens)
        return
    prompts, step = batch.prompt_ids.shape[0], max(1, max_rows // batch.group)
    yield from ((start, min(start + step, prompts)) for start in range(0, prompts, step))


def within_budget(batch: Rollout, max_tokens: int) -> Iterator[tuple[int, int]]:
    """Prompts [start, stop) with their completions, cut so that each part has at most `max_tokens` tokens, prompts counted
    once; a group that has more is a part of its own."""
    tokens = (batch.counts[0] + batch.counts[1].view(-1, batch.group).sum(-1)).tolist()
    start = total = 0
    for i, count in enumerate(tokens):
        if total and total + count > max_tokens:
            yield start, i
            start, total = i, 0
        total += count
    if total:
        yield start, len(tokens)


def unpacked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N,) values of the tokens in mask (B, T) as (B, T), zero elsewhere; differentiable."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


@torch.no_grad()
def score(
    source: Samplable,
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
    parts = [
        completion_stats(
            source,
            batch.prompts(start, stop),
            None if conditions is None else conditions[start:stop],
            outputs=outputs,
            temperature=temperature,
        )[1]
        for start, stop in within_budget(batch, max_tokens)
    ]
    joined = {}
    for name in TokenStats._fields:
        values = [getattr(part, name) for part in parts]
        joined[name] = None if values[0] is None else unpacked(torch.cat(values), batch.completion_mask)
    return TokenStats(**joined)
