"""Work that many threads ask for and one thread does, in the order of asking."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Full(Exception):
    """So many jobs are waiting that another one would wait too long."""


class Jobs:
    """A queue of at most `most` jobs, done one after another by whoever calls `work`.

    That is the main thread here, for two reasons: Ctrl-C interrupts a completion that is being written, where a thread of its
    own would hold up the end of the process; and torch keeps a pool of threads for each thread that computes.
    """

    def __init__(self, most: int = 16):
        self._waiting: queue.Queue[tuple[Future, Callable] | None] = queue.Queue(most)

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """The function's result, or its error, in time. Raises Full where `most` jobs are waiting."""
        future: Future[T] = Future()
        try:
            self._waiting.put_nowait((future, function))
        except queue.Full:
            raise Full(f"{self._waiting.maxsize} requests are waiting already") from None
        return future

    def work(self) -> None:
        """Do what is submitted, until `stop`. A job that was cancelled while it waited is left out."""
        while (job := self._waiting.get()) is not None:
            future, function = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def stop(self) -> None:
        """`work` returns after the jobs that are waiting now."""
        self._waiting.put(None)
