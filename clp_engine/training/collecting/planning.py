"""Which prompts a rollout answers, under which conditions, with which random numbers.

Every draw comes from (seed, step, purpose): anyone who knows the number of a step can plan it again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clp_engine.core import seeds
from clp_engine.core.conditions import Conditions
from clp_engine.core.seeds import Stream
from clp_engine.data.prompts import PromptBatch, Prompts
from clp_engine.objectives.weightings import Weighting
from clp_engine.training.settings.groups import RolloutSettings


@dataclass(frozen=True)
class Planned:
    """P prompts, their conditions (P rows), and the seed of each completion, (P, group)."""

    batch: PromptBatch
    conditions: Conditions
    row_seeds: torch.Tensor

    def taken(self, order: list[int]) -> Planned:
        return Planned(self.batch.taken(order), self.conditions[order], self.row_seeds[order])


class Planner:
    """Plans the rollouts of a run, as its settings say."""

    def __init__(self, weighting: Weighting, settings: RolloutSettings):
        self.weighting, self.settings = weighting, settings

    def rollout(self, dataset: Prompts, step: int) -> Planned:
        """The rollout that optimiser step `step` starts with, its prompts in the order of the data."""
        s = self.settings
        position = step // s.steps * s.prompts
        batch = dataset.batch(dataset.indices(position, s.prompts, s.seed, s.shuffle))
        conditions = self.weighting.sample(s.prompts, seeds.generator(s.seed, Stream.CONDITIONS, step))
        row_seeds = seeds.derive(s.seed, Stream.TOKENS, step, torch.arange(s.prompts * s.group))
        return Planned(batch, conditions, row_seeds.view(s.prompts, -1))

    def evaluation(self, batch: PromptBatch, start: int) -> Planned:
        """Rows of an evaluation set from row `start` on: the same conditions and random numbers every time."""
        s, rows = self.settings, len(batch.prompts)
        conditions = self.weighting.sample(rows, seeds.generator(s.seed, Stream.EVALUATION, start))
        row_seeds = seeds.derive(s.seed, Stream.EVALUATION, start, torch.arange(rows * s.evaluation_group))
        return Planned(batch, conditions, row_seeds.view(rows, -1))

    def arranged(self, token_ids: list[list[int]]) -> list[int]:
        """An order in which prompts of like length share a micro-batch, within the part of each optimiser step. It changes
        nothing else, since every prompt draws for itself."""
        per_step = self.settings.prompts_per_step
        return sorted(range(len(token_ids)), key=lambda i: (i // per_step, len(token_ids[i])))
