"""How long a run lasts, and how far it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm.auto import tqdm
from transformers.trainer_callback import TrainerState

if TYPE_CHECKING:
    from clp_engine.data.prompts import Prompts
    from clp_engine.training.settings.config import CLPConfig


@dataclass(frozen=True)
class Budget:
    """When a run ends: after `steps` optimiser steps, or with the step in which `tokens` completion tokens have been generated.

    Either may be None, and the first to be reached counts. tokens_per_step: the most that one rollout can generate.
    num_iterations: optimiser steps per rollout; tokens end the run after the last of them.
    """

    steps: int | None
    tokens: int | None
    tokens_per_step: int
    num_iterations: int = 1

    def spent(self, step: int, tokens: int) -> bool:
        by_tokens = self.tokens is not None and tokens >= self.tokens and step % self.num_iterations == 0
        return by_tokens or self.steps is not None and step >= self.steps

    def max_steps(self, step: int, tokens: int) -> int:
        """Steps of the whole run: known where steps alone count, otherwise an estimate from the tokens so far. It is above
        `step` until the budget is spent (transformers' callbacks stop a run at state.max_steps) and `step` from then on."""
        if self.tokens is None:
            return self.steps
        if self.spent(step, tokens):
            return step
        if tokens:
            estimate = math.ceil(step * self.tokens / tokens)
        else:
            estimate = math.ceil(self.tokens / self.tokens_per_step) * self.num_iterations
        return min(max(estimate, step + 1), self.steps or math.inf)


def of_run(a: CLPConfig, prompts: Prompts) -> Budget:
    """The budget that the settings give a run over these prompts: `max_steps`, `max_generated_tokens` or `num_train_epochs`."""
    tokens, steps = a.max_generated_tokens, a.max_steps if a.max_steps > 0 else None
    if steps is None and tokens is None:
        per_rollout = a.rollout_size // a.num_generations
        steps = max(1, math.ceil(a.num_train_epochs * len(prompts) / per_rollout)) * a.steps_per_rollout
    return Budget(steps, tokens, a.rollout_size * a.max_completion_length, a.steps_per_rollout)


@dataclass(frozen=True)
class Epochs:
    """Passes over the prompts of a run, which come from an endless stream of epochs."""

    a: CLPConfig
    prompts: Prompts

    def at(self, step: int, max_steps: int) -> float:
        """Epochs that are over when optimiser step `step`, of about `max_steps`, begins."""
        return self.prompts.epoch(self._position(step), step / max(max_steps, 1))

    def number(self, step: int) -> int:
        """The epoch in which optimiser step `step` begins."""
        return self.prompts.epoch_number(int(self._position(step)))

    def _position(self, step: int) -> float:
        """The place of its first prompt in the stream, at a rollout; in between, a share of the way to the next."""
        return step * (self.a.rollout_size // self.a.num_generations) / self.a.steps_per_rollout


class Progress:
    """The bar that `with` shows: over tokens where they end the run, else over steps."""

    def __init__(self, a: CLPConfig, state: TrainerState, tokens: int):
        self._by_tokens = a.max_generated_tokens is not None
        self._bar = tqdm(
            total=a.max_generated_tokens if self._by_tokens else state.max_steps,
            initial=tokens if self._by_tokens else state.global_step,
            desc="train",
            unit="token" if self._by_tokens else "step",
            unit_scale=self._by_tokens,
            disable=a.disable_tqdm or not state.is_world_process_zero,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, generated: int, reward: float, kl: float | None) -> None:
        """A step is over, for which `generated` tokens were drawn."""
        self._bar.update(generated if self._by_tokens else 1)
        shown = {"reward": f"{reward:.3f}"} | ({} if kl is None else {"kl": f"{kl:.2f}"})
        self._bar.set_postfix(**shown, refresh=False)
