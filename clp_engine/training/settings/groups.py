"""Small frozen groups of a run's settings, one for each part of the trainer that needs them, built by `CLPConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clp_engine.rollouts.types import SamplingParams


@dataclass(frozen=True)
class MicroBatching:
    """The cut of completions into parts for passes through the model (see `scoring.parts`), and the log-probs' temperature.

    completions: the most completions of a part, in whole groups. max_tokens: the most tokens of a part; replaces `completions`.
    """

    completions: int
    max_tokens: int | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class RolloutSettings:
    """The settings of a run's rollouts.

    prompts: prompts of a rollout, each with `group` completions. prompts_per_step: the prompts of one optimiser step.
    steps: optimiser steps from one rollout to the next. evaluation_group: completions per prompt in an evaluation.
    tokens_per_phase: the most tokens of a completion per phase, for partial rollouts.
    max_rows: completions decoded at once.
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
    """The settings of AdamW and its schedule.

    own_learning_rate: for the parameters of an objective itself (a value head).
    schedule: a name of transformers.get_scheduler, with schedule_options.
    warmup_steps: steps of linear warm-up. If it is 0, warmup_ratio applies, a share of the whole run.
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
