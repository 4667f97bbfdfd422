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
    """`pack` for a rollout. mask: all completion tokens by default. plain: pack the prompts that the reference reads."""
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

    coefficients: the blend (P, D) of each prompt, or None for the base model.
    mask: (B, T) bool, a prefix of each row's tokens; by default all of them.

    Each prompt is computed once for its group if the model allows that, and in packed form if the model takes packed tokens.
    Differentiable in the adapters.
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
    """(hidden, ref_hidden) of policy and reference, each (N, H) as from `hidden_states`, in one pass through the model.

    The reference runs as rows with a blend of zero. For a model that takes packed tokens.
    """
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
    """(hidden, stats) of the N completion tokens of `mask`, in the order of mask.nonzero(). By default all of `batch`.

    hidden is (N, H), with gradients if they are enabled. Each statistic is (N,) float32.
    outputs: the statistics to compute. The reference runs without gradients, and only if `outputs` needs it.
    differentiable: names of the statistics that have gradients; None means all that can have them.
    hidden_grad: hidden gets a gradient of its own, even if no parameter behind it requires one.
    ref_hidden: (N, H), the reference's hidden states, if they are known (`reference_states`).
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
            # The policy has the reference's hidden states.
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
    """Prompts [start, stop) of each micro-batch. A part holds whole groups.

    A part has at most `max_rows` completions or, if it is given, at most `max_tokens` tokens.
    """
    if max_tokens is not None:
        yield from within_budget(batch, max_tokens)
    else:
        yield from _by_rows(batch.prompt_ids.shape[0], batch.group, max_rows)


def parts_of(
    tokens: Sequence[int], group: int, max_rows: int, max_tokens: int | None
) -> Iterator[tuple[int, int]]:
    """The same for groups of `group` completions with these numbers of tokens."""
    return _by_rows(len(tokens), group, max_rows) if max_tokens is None else _within(tokens, max_tokens)


def _by_rows(prompts: int, group: int, max_rows: int) -> Iterator[tuple[int, int]]:
    step = max(1, max_rows // group)
    yield from ((start, min(start + step, prompts)) for start in range(0, prompts, step))


def tokens_of_groups(batch: Rollout) -> list[int]:
    """Of each prompt the tokens of its group, its own counted once."""
    return (batch.counts[0] + batch.counts[1].view(-1, batch.group).sum(-1)).tolist()


def within_budget(batch: Rollout, max_tokens: int) -> Iterator[tuple[int, int]]:
    """Prompts [start, stop) of parts with at most `max_tokens` tokens each. A prompt's tokens count once for its group.

    A larger group is a part of its own.
    """
    yield from _within(tokens_of_groups(batch), max_tokens)


def _within(tokens: Sequence[int], max_tokens: int) -> Iterator[tuple[int, int]]:
    start = total = 0
    for i, count in enumerate(tokens):
        if total and total + count > max_tokens:
            yield start, i
            start, total = i, 0
        total += count
    if total:
        yield start, len(tokens)


def unpacked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The (N,) values of the tokens in mask (B, T) as a (B, T) tensor, zero elsewhere. Differentiable."""
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
    """Statistics of every completion token, each (B, T) float32, zero outside batch.completion_mask. Without gradients.

    conditions: one row per prompt, None for the base model. max_tokens: the most tokens of prompts computed together.
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
