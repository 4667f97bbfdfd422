"""How long a run lasts, and how it is stopped."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass


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


@contextlib.contextmanager
def finish_step_on_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, so that the step can end; the second raises KeyboardInterrupt at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def handler(signum, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
