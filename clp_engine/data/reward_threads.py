"""Threads beside the training thread. They are daemon threads, so that a hanging one does not keep the interpreter alive."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Coroutine


class Workers:
    """At most `count` threads, started on demand, which start calls in the order of `submit`.

    A call must store its own result and error. The threads end when the pool is garbage-collected.
    """

    def __init__(self, count: int):
        self.count = count
        self._started = 0
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        weakref.finalize(self, _dismiss, self._calls, count)

    def submit(self, call: Callable[[], None]) -> None:
        if self._started < self.count:
            self._started += 1
            name = f"clp-worker-{self._started}"
            # The thread gets no reference to the pool, which would keep the pool alive.
            threading.Thread(target=_work, args=(self._calls,), name=name, daemon=True).start()
        self._calls.put(call)


def _work(calls: queue.SimpleQueue) -> None:
    while (call := calls.get()) is not None:
        with contextlib.suppress(BaseException):  # the call has stored its error
            call()
        del call  # release its data before waiting for the next call


def _dismiss(calls: queue.SimpleQueue, count: int) -> None:
    for _ in range(count):
        calls.put(None)


class EventLoop:
    """An event loop on its own thread, started on demand. It ends when this object is garbage-collected."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting = threading.Lock()

    def submit(self, coroutine: Coroutine) -> None:
        """Run a coroutine concurrently with the others on the loop. Callable from any thread."""
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run_loop, args=(self._loop,), name="clp-loop", daemon=True).start()
                weakref.finalize(self, _stop_loop, self._loop)
        asyncio.run_coroutine_threadsafe(coroutine, self._loop)


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


def _stop_loop(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)
