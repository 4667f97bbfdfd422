"""Collector: what a run's batches come from. Whole rollouts here; completions that take several steps in `partial_rollouts`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers.trainer_callback import TrainerState

from clp_engine.data.prompts import Prompts
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.types import Rollout
from clp_engine.training.collecting.batches import TrainingBatch
from clp_engine.training.collecting.dealt import drawn_by_all
from clp_engine.training.collecting.planning import Planned, Planner
from clp_engine.training.collecting.rewarding import Rewarding
from clp_engine.training.metrics import PhaseTimer
from clp_engine.training.parallel.processes import Parallel


class Collector(Protocol):
    def training_batch(self, dataset: Prompts, step: int, state: TrainerState) -> TrainingBatch:
        """Prompts, conditions, completions and rewards of the rollout that optimiser step `step` starts with. state: what the
        reward functions receive as `trainer_state`."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Completions that wait for a later step, as tensors."""

    def load_state_dict(self, state: Mapping[str, torch.Tensor], dataset: Prompts) -> None:
        """Raises ConfigError where the dataset has other prompts than it had."""


@dataclass(frozen=True)
class CollectorParts:
    """What every collector works with. `timer` counts the phases "rollout", and those of `Rewarding`."""

    policy: ConditionedPolicy
    planner: Planner
    rewarding: Rewarding
    timer: PhaseTimer
    parallel: Parallel = field(default_factory=Parallel)

    def draw(self, planned: Planned) -> Rollout:
        """The completions that were planned, whole, drawn by all processes."""
        with self.timer("rollout"):
            return drawn_by_all(
                self.parallel,
                planned.batch.token_ids,
                lambda prompts: self._drawn(planned.taken(prompts)),
                self.policy.pad_token_id,
                self.policy.device,
            )

    def _drawn(self, planned: Planned) -> Rollout:
        settings = self.planner.settings
        return rollout(
            self.policy,
            planned.batch.token_ids,
            planned.conditions,
            num_generations=planned.row_seeds.shape[1],
            sampling=settings.sampling,
            row_seeds=planned.row_seeds.view(-1),
            prompts=planned.batch.prompts,
            max_rows=settings.max_rows,
        )


class WholeRollouts:
    """A `Collector` whose rollouts end before the step that draws them."""

    def __init__(self, parts: CollectorParts):
        self._parts = parts

    def training_batch(self, dataset: Prompts, step: int, state: TrainerState) -> TrainingBatch:
        parts = self._parts
        planned = parts.planner.rollout(dataset, step)
        planned = planned.taken(parts.planner.arranged(planned.batch.token_ids))
        return parts.rewarding.training_batch(
            planned.batch, planned.conditions, parts.draw(planned), step, state
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor], dataset: Prompts) -> None:
        """Nothing waits between steps."""
