"""The reference's hidden states of the completions, computed while the reward functions run.

The policy's pass needs them for log-ratio and exact KL. They depend on no reward, so the device can compute them while it would
otherwise wait. Every pass over the completions then uses them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from clp_engine.core.conditions import Conditions
from clp_engine.policy.references import reference_states as states_of
from clp_engine.rollouts.scoring import parts, parts_of, tokens_of_groups, unpacked
from clp_engine.rollouts.types import Rollout
from clp_engine.training.parallel.dealing import Shares

if TYPE_CHECKING:
    from clp_engine.policy.policy import ConditionedPolicy
    from clp_engine.policy.references import Reference
    from clp_engine.training.settings.groups import MicroBatching

# Of completions whose states are not there (yet).
Hidden = Sequence[torch.Tensor | None]

# What is kept of a step at most; the micro-batches beyond it compute the reference when it is their turn. A limit in bytes
# and not in time: how long the reward functions take must not decide what is computed together, and so how it rounds.
MAX_BYTES = 1 << 30


@torch.no_grad()
def reference_hidden(
    policy: ConditionedPolicy,
    drawn: Rollout,
    conditions: Conditions,
    reference: Reference,
    batching: MicroBatching,
    shares: Shares | None = None,
) -> list[torch.Tensor | None] | None:
    """Of each completion (n_b, H), the reference's hidden states that predict its tokens; None from where MAX_BYTES
    are spent, and for prompts that are not this process's. Where all processes run as many passes: all states or none."""
    if shares is not None and shares.in_step and _most_tokens(drawn, shares) * _width(policy) > MAX_BYTES:
        return None
    mine = None if shares is None else shares.mine
    found: list[torch.Tensor | None] = [None] * drawn.completion_ids.shape[0]
    tokens = of_a_token = 0
    for prompts, rows, part in micro_parts(drawn, batching, mine):
        tokens += len(part.rows)
        if of_a_token and tokens * of_a_token > MAX_BYTES:
            break
        hidden = states_of(reference, policy, part, conditions[prompts])
        of_a_token = hidden.shape[-1] * hidden.element_size()
        for row, states in zip(rows, hidden.split(part.counts[1].tolist())):
            found[row] = states
    return found


def joined(hidden: Hidden | None) -> torch.Tensor | None:
    """(N, H) of several completions; None where one of them has not been computed."""
    if hidden is None or any(h is None for h in hidden):
        return None
    return torch.cat(list(hidden))


@torch.no_grad()
def reference_logprob(
    policy: ConditionedPolicy,
    drawn: Rollout,
    conditions: Conditions,
    reference: Reference,
    hidden: Hidden,
    batching: MicroBatching,
    mine: Sequence[int] | None = None,
) -> torch.Tensor:
    """(B, T) float32, the reference's log-prob of every completion token, zero elsewhere and for prompts that are not `mine`.
    hidden: what is there of it."""
    found = torch.zeros_like(drawn.logprobs)
    for prompts, rows, part in micro_parts(drawn, batching, mine):
        states = joined([hidden[row] for row in rows])
        if states is None:
            states = states_of(reference, policy, part, conditions[prompts])
        stats = policy.token_stats(
            states,
            part.completion_ids.flatten()[part.places],
            temperature=batching.temperature,
            outputs=("logprob",),
        )
        values = unpacked(stats.logprob, part.completion_mask)
        found[torch.tensor(rows, device=found.device), : values.shape[1]] = values
    return found


def micro_parts(
    drawn: Rollout, batching: MicroBatching, mine: Sequence[int] | None = None
) -> Iterator[tuple[slice | list[int], range | list[int], Rollout]]:
    """(prompts, completions, the rollout of them) of each part that goes through the model at once; of all prompts, or of
    `mine`."""
    group = drawn.group
    if mine is None:
        for start, stop in parts(drawn, batching.completions, batching.max_tokens):
            yield slice(start, stop), range(start * group, stop * group), drawn.prompts(start, stop)
    elif mine:
        own = drawn.taken(mine)
        for start, stop in parts(own, batching.completions, batching.max_tokens):
            prompts = list(mine[start:stop])
            yield prompts, [p * group + i for p in prompts for i in range(group)], own.prompts(start, stop)


def parts_of_ranks(drawn: Rollout, batching: MicroBatching, shares: Shares) -> list[int]:
    """How many parts `micro_parts` makes of each process's share."""
    tokens = tokens_of_groups(drawn)
    cuts = (
        parts_of([tokens[p] for p in share], drawn.group, batching.completions, batching.max_tokens)
        for share in shares.of_ranks
    )
    return [sum(1 for _ in cut) for cut in cuts]


def _most_tokens(drawn: Rollout, shares: Shares) -> int:
    of_prompts = drawn.counts[1].view(-1, drawn.group).sum(-1)
    return max(int(of_prompts[share].sum()) for share in shares.of_ranks)


def _width(policy: ConditionedPolicy) -> int:
    """Bytes of a hidden state."""
    return policy.backbone.head.module.weight.shape[-1] * policy.model.dtype.itemsize
