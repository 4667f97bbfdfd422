"""What parts of the trainer need to know of a run's settings: small frozen records, built by `CLPConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clp_engine.rollouts.types import SamplingParams


@dataclass(frozen=True)
class MicroBatching:
    """How completions are cut into parts for a pass through the model (see `scoring.parts`), and the temperature at which their
    log-probs are taken.

    completions: of a part, in whole groups. max_tokens: instead of that, where it is given.
    """

    completions: int
    max_tokens: int | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class RolloutSettings:
    """What one rollout of a run draws.

    prompts: of a rollout, each with `group` completions. prompts_per_step: of those, how many an optimiser step takes.
    steps: optimiser steps from one rollout to the next. evaluation_group: completions per prompt in an evaluation.
    tokens_per_phase: most tokens of a completion at one go, where rollouts are partial. max_rows: completions decoded at once.
    """

    prompts: int
    group: int
    prompts_per_step: int
    steps: int
    evaluation_group: int
    sampling: SamplingParams
    seed: int
    shuffle: bool = True
    tokens_per_phase: int | None = None
    max_rows: int | None = None


@dataclass(frozen=True)
class OptimiserSettings:
    """AdamW and its schedule.

    own_learning_rate: of an objective's own parameters. schedule: a name of transformers.get_scheduler, with schedule_options.
    warmup_steps: of linear warm-up; where it is 0, warmup_ratio, a share of the whole run.
    """

    learning_rate: float
    own_learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "linear"
    schedule_options: Mapping[str, Any] | None = None
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
