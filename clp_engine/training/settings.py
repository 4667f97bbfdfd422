"""What parts of the trainer need to know of a run's settings: small frozen records, built by `CLPConfig`."""

from __future__ import annotations

from dataclasses import dataclass

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
