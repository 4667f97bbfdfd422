"""A queue of functions: many threads submit them, and one thread runs them in the order of submission."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Full(Exception):
    """The queue holds as many jobs as it may."""


class Jobs:
    """A queue of at most `most` jobs. The thread that calls `work` runs them one after another.

    `clp-engine steer` calls `work` in the main thread, for two reasons. Ctrl-C then interrupts a completion that is being
    written; a completion in another thread would delay the end of the process. And torch keeps a pool of threads for each
    thread that computes.
    """

    def __init__(self, most: int = 16):
        self._waiting: queue.Queue[tuple[Future, Callable] | None] = queue.Queue(most)

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """A future of the function's result or error. Raises Full where `most` jobs are waiting."""
        future: Future[T] = Future()
        try:
            self._waiting.put_nowait((future, function))
        except queue.Full:
            raise Full(f"{self._waiting.maxsize} requests are waiting already") from None
        return future

    def work(self) -> None:
        """Run the submitted jobs until `stop`. A job that was cancelled while it waited is not run."""
        while (job := self._waiting.get()) is not None:
            future, function = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def stop(self) -> None:
        """Make `work` return once the jobs that are waiting now have run."""
        self._waiting.put(None)
