"""Seconds of a training step by phase, from clocks around the methods of a trainer."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Phases:
    """Seconds of a step by phase; a phase inside another is not counted in the outer one."""

    def __init__(self, synchronise: Callable[[], None]):
        self.seconds: dict[str, float] = defaultdict(float)
        self._synchronise, self._open = synchronise, []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self.now()
        self._open.append(0.0)
        try:
            yield
        finally:
            spent = self.now() - start
            self.seconds[phase] += spent - self._open.pop()
            if self._open:
                self._open[-1] += spent

    def now(self) -> float:
        self._synchronise()
        return time.perf_counter()

    def time_methods(self, owner: object, methods: Mapping[str, str]) -> None:
        """Methods of `owner` by name, and the phase that each is. Raises AttributeError where one is not there."""
        for name, phase in methods.items():
            setattr(owner, name, self._timed(getattr(owner, name), phase))

    def _timed(self, method: Callable, phase: str) -> Callable:
        @functools.wraps(method)
        def timed(*arguments, **options):
            with self(phase):
                return method(*arguments, **options)

        return timed

    def drain(self) -> dict[str, float]:
        found, self.seconds = dict(self.seconds), defaultdict(float)
        return found
