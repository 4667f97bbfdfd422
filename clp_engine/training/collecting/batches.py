"""TrainingBatch: completions with their rewards, and the state that later passes over them share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clp_engine.core.conditions import Conditions
from clp_engine.rollouts.types import Rollout
from clp_engine.training.parallel.dealing import Shares


@dataclass
class TrainingBatch:
    """The completions of one rollout, or of one optimiser step of it, with their rewards.

    rewards: (B, M); scalar: (B,) w.R, times the sum of reward_weights where they are given. metrics: of everything that was
        drawn.
    new_tokens: completion tokens drawn for it. With partial rollouts it is trained on others, too (`partial_rollouts`).
    reference: of each completion (n_b, H) or None, the reference's hidden states, where `reference_states` had them computed.
    advantage: (B,), taken from whole groups where `rollout` has a part of them alone (`rollout_selection`), or None.
    token_share: of each group's tokens that stay in the loss (`objectives.selection`).
    old_logprob: (B, T), what the tokens were sampled with, where the policy has moved since (`rollout.logprobs`); None in
        the pass of the policy that sampled them, whose ratio is one by construction.
    stale: some tokens were sampled by an older policy than that of the first pass, which has a ratio then, too.
    shares: which process computes which prompts, where there are several. But for `reference` and `values`, everything here
        is of all processes, and the same in each.
    passes: over these completions so far. values: (B, T), what the objective predicted of each token in the first pass.
    """

    rollout: Rollout
    conditions: Conditions
    rewards: torch.Tensor
    scalar: torch.Tensor
    metrics: dict[str, float]
    new_tokens: int
    reference: list[torch.Tensor | None] | None = None
    advantage: torch.Tensor | None = None
    token_share: float = 1.0
    old_logprob: torch.Tensor | None = None
    stale: bool = False
    shares: Shares | None = None
    passes: int = 0
    values: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens read and written: each prompt once per completion, and the completions."""
        return int(self.rollout.counts[0].sum()) * self.rollout.group + self.num_generated_tokens

    @property
    def num_generated_tokens(self) -> int:
        return self.rollout.tokens

    def split(self, count: int) -> list[TrainingBatch]:
        """`count` parts of as many prompts each, one for each optimiser step; before any pass."""
        if count == 1:
            return [self]
        prompts, group = len(self.conditions) // count, self.rollout.group
        parts = []
        for start in range(0, count * prompts, prompts):
            rows = slice(start * group, (start + prompts) * group)
            reference, advantage = (None if t is None else t[rows] for t in (self.reference, self.advantage))
            parts.append(
                TrainingBatch(
                    self.rollout.prompts(start, start + prompts),
                    self.conditions[start : start + prompts],
                    self.rewards[rows],
                    self.scalar[rows],
                    self.metrics,
                    self.new_tokens,
                    reference,
                    advantage,
                    self.token_share,
                    stale=self.stale,
                    shares=self.shares and self.shares.within(start, start + prompts),
                )
            )
        return parts
