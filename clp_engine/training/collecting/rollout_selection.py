"""The completions of a rollout that are trained on, where not all of them are (formulas in `objectives.selection`).

Rollouts are chosen before the policy's pass, from the log-probs of sampling and of the reference.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from clp_engine.objectives.coefficients import RewardedTokens, Tokens
from clp_engine.objectives.objective import Objective
from clp_engine.objectives.selection import SelectionSettings, max_variance, scheduled
from clp_engine.policy.references import Reference
from clp_engine.rollouts.types import Rollout
from clp_engine.training.collecting.batches import TrainingBatch
from clp_engine.training.collecting.reference_states import reference_logprob
from clp_engine.training.parallel.processes import Parallel
from clp_engine.training.settings.groups import MicroBatching

if TYPE_CHECKING:
    from clp_engine.policy.policy import ConditionedPolicy


@dataclass(frozen=True)
class Selector:
    """Chooses what of a rollout is trained on."""

    policy: ConditionedPolicy
    objective: Objective
    reference: Reference
    settings: SelectionSettings
    batching: MicroBatching
    parallel: Parallel

    def selected(self, batch: TrainingBatch, progress: float) -> TrainingBatch:
        """What is trained on of a batch when `progress` (0 to 1) of training is over."""
        s = self.settings
        if s.rollouts != "none":
            batch = self._of_largest_variance(batch, progress)
        if s.tokens != "none":
            batch.token_share = scheduled(s.token_share, s.schedule, progress)
            batch.metrics["selection/tokens"] = batch.token_share
        return batch

    def _of_largest_variance(self, batch: TrainingBatch, progress: float) -> TrainingBatch:
        """The completions that are trained on, with their advantages in their whole groups."""
        drawn, size = batch.rollout, batch.rollout.group
        count = max(2, round(size * scheduled(self.settings.rollout_share, self.settings.schedule, progress)))
        batch.metrics["selection/rollouts"] = count / size
        if count == size:
            return batch
        hidden = batch.reference or [None] * drawn.completion_ids.shape[0]
        found = self._advantages(batch, hidden)
        wanted = found
        if self.settings.mask_truncated:  # in the baseline, but not in the loss
            wanted = torch.where(drawn.terminated, found, torch.nan)
        rows = max_variance(wanted.view(-1, size), count)
        rows = (rows + size * torch.arange(len(rows), device=rows.device).unsqueeze(-1)).view(-1)
        return dataclasses.replace(
            batch,
            rollout=_taken(drawn, rows),
            rewards=batch.rewards[rows.cpu()],
            scalar=batch.scalar[rows],
            reference=[hidden[i] for i in rows.tolist()],
            advantage=found[rows],
        )

    def _advantages(self, batch: TrainingBatch, hidden: list[torch.Tensor | None]) -> torch.Tensor:
        drawn, device = batch.rollout, batch.rollout.logprobs.device
        scale, kl_coef = self.objective.scales(batch.conditions.repeat(drawn.group).kl.to(device))
        reference = drawn.logprobs
        if kl_coef.any():
            reference = reference_logprob(
                self.policy,
                drawn,
                batch.conditions,
                self.reference,
                hidden,
                self.batching,
                batch.shares and batch.shares.mine,
            )
            self.parallel.sum_([reference])  # each process has those of its own rows, and zeros
        tokens = Tokens(drawn.logprobs, reference, None, drawn.trained)
        return self.objective.advantages(RewardedTokens(tokens, batch.scalar, kl_coef, scale, drawn.group))


def _taken(drawn: Rollout, rows: torch.Tensor) -> Rollout:
    """These completions, as many of each prompt."""
    names = ("completion_ids", "completion_mask", "logprobs", "terminated", "sampled", "written")
    taken = {name: getattr(drawn, name) for name in names}
    taken = {name: None if values is None else values[rows] for name, values in taken.items()}
    return dataclasses.replace(drawn, **taken, columns=drawn.columns_of(rows.tolist()))
