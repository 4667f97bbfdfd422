"""Collector: what a run's batches come from. Whole rollouts here; completions that take several steps in `partial_rollouts`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from transformers.trainer_callback import TrainerState

from clp_engine.data.prompts import Prompts
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.scoring import score
from clp_engine.rollouts.types import Rollout, RolloutEngine
from clp_engine.training.collecting.batches import TrainingBatch
from clp_engine.training.collecting.dealt import drawn_by_all
from clp_engine.training.collecting.other_engines import Publishing
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
    """What every collector works with. `timer` counts the phases "rollout", and those of `Rewarding`.

    engine: that draws instead of the policy's own. scores_again: its completions get the policy's own log-probs before they are
        trained on.
    """

    policy: ConditionedPolicy
    planner: Planner
    rewarding: Rewarding
    timer: PhaseTimer
    parallel: Parallel = field(default_factory=Parallel)
    engine: RolloutEngine | None = None
    scores_again: bool = False

    def draw(self, planned: Planned) -> Rollout:
        """The completions that were planned, whole, drawn by all processes."""
        with self.timer("rollout"):
            return self.drawn_by_all(
                planned.batch.token_ids, lambda prompts: self._drawn(planned.taken(prompts))
            )

    def drawn_by_all(
        self, token_ids: Sequence[Sequence[int]], draw: Callable[[list[int]], Rollout]
    ) -> Rollout:
        """See `dealt.drawn_by_all`. Of several processes one sends the policy to an engine that draws elsewhere first."""
        if self.parallel.count > 1 and isinstance(self.engine, Publishing):
            self.engine.publish()
        return drawn_by_all(self.parallel, token_ids, draw, self.policy.pad_token_id, self.policy.device)

    def _drawn(self, planned: Planned) -> Rollout:
        settings = self.planner.settings
        drawn = rollout(
            self.policy,
            planned.batch.token_ids,
            planned.conditions,
            num_generations=planned.row_seeds.shape[1],
            sampling=settings.sampling,
            row_seeds=planned.row_seeds.view(-1),
            prompts=planned.batch.prompts,
            max_rows=settings.max_rows,
            engine=self.engine,
        )
        if drawn.sampled is None or not self.scores_again:
            return drawn
        own = score(
            self.policy,
            drawn,
            planned.conditions,
            outputs=("logprob",),
            temperature=settings.sampling.temperature,
        )
        return replace(drawn, logprobs=own.logprob)


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
