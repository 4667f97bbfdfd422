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
from clp_engine.rollouts.scoring import parts, unpacked
from clp_engine.rollouts.types import Rollout

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
) -> list[torch.Tensor | None]:
    """Of each completion (n_b, H), the reference's hidden states that predict its tokens; None from where MAX_BYTES
    are spent."""
    found: list[torch.Tensor | None] = []
    tokens = of_a_token = 0
    for prompts, part in _parts(drawn, batching):
        tokens += part.tokens
        if found and tokens * of_a_token > MAX_BYTES:
            break
        hidden = states_of(reference, policy, part, conditions[prompts])
        of_a_token = hidden.shape[-1] * hidden.element_size()
        found += hidden.split(part.counts[1].tolist())
    return found + [None] * (drawn.completion_ids.shape[0] - len(found))


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
) -> torch.Tensor:
    """(B, T) float32, the reference's log-prob of every completion token, zero elsewhere. hidden: what is there of it."""
    found = []
    for prompts, part in _parts(drawn, batching):
        states = joined(hidden[prompts.start * drawn.group : prompts.stop * drawn.group])
        if states is None:
            states = states_of(reference, policy, part, conditions[prompts])
        stats = policy.token_stats(
            states,
            part.completion_ids.flatten()[part.places],
            temperature=batching.temperature,
            outputs=("logprob",),
        )
        found.append(stats.logprob)
    return unpacked(torch.cat(found), drawn.completion_mask)


def _parts(drawn: Rollout, batching: MicroBatching) -> Iterator[tuple[slice, Rollout]]:
    """(prompts, their completions) of each part that goes through the model at once."""
    for start, stop in parts(drawn, batching.completions, batching.max_tokens):
        yield slice(start, stop), drawn.prompts(start, stop)
