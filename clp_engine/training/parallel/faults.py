"""How several processes fail: the first that does says why, once, and the others end quietly and soon.

A process that fails leaves a mark in the store through which the processes met, and dies. The others notice at their next
collective, which cannot end, or are stopped by the launcher (torchrun stops all when one has failed). A process that was killed
leaves no mark; the launcher says which it was.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

import torch
from transformers.trainer_callback import TrainerControl

from clp_engine.core.errors import ConfigError, DrawingFailed
from clp_engine.training.parallel.processes import Lost, Parallel

_MARK = "clp_engine/failed"
_PATIENCE = 5.0  # seconds: for the launcher to stop this process, or the one that failed to say why
# A launcher passes Ctrl-C on to processes that the terminal has told already.
_ECHO = 2.0


class ProcessFailed(RuntimeError):
    """An error of one process of several, which the message names."""


@contextlib.contextmanager
def one_voice(parallel: Parallel) -> Iterator[None]:
    """Around what several processes do together. Of several that fail, one raises, naming its rank; SystemExit ends the others.

    KeyboardInterrupt and DrawingFailed are the main process's.
    """
    if parallel.count == 1:
        yield
        return
    try:
        with parallel.waiting():
            yield
    except SystemExit:
        raise
    except KeyboardInterrupt:
        if parallel.is_main:
            raise
        raise SystemExit(130) from None
    except DrawingFailed:  # every process was told, and has ended its part
        if parallel.is_main:
            raise
        time.sleep(_PATIENCE)
        raise SystemExit(1) from None
    except Lost as lost:
        time.sleep(_PATIENCE)
        if not _first():
            raise SystemExit(1) from None
        raise ProcessFailed(
            f"process {parallel.rank} of {parallel.count}: {lost}; another process has ended without a word (killed, out of "
            "memory?): the launcher says which. Go on from the last checkpoint"
        ) from lost
    except BaseException as error:
        if not _first():
            raise SystemExit(1) from None
        kind = ConfigError if isinstance(error, ConfigError) else ProcessFailed
        said = f"{error}" if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        told = kind(f"process {parallel.rank} of {parallel.count}: {said}")
        told.of_one_process = True  # the command line need not ask whether others say it, too
        raise told from None if isinstance(error, ConfigError) else error


def _first() -> bool:
    """Leave the mark of a failure; whether there was none yet."""
    from torch.distributed import distributed_c10d

    try:
        return distributed_c10d._get_default_store().add(_MARK, 1) == 1
    except (RuntimeError, ValueError):  # the process that held the store has gone
        return False


def agree(parallel: Parallel, control: TrainerControl, interrupted: threading.Event) -> bool:
    """What one process's callbacks ask for is asked of all: they save, evaluate and stop together. Returns whether any of them
    was interrupted."""
    if parallel.count == 1:
        return interrupted.is_set()
    asked = [name for name in vars(control) if name.startswith("should_")]
    wishes = parallel.any([*(getattr(control, name) for name in asked), interrupted.is_set()])
    for name, wish in zip(asked, wishes):
        setattr(control, name, wish)
    return wishes[-1]


@contextlib.contextmanager
def finish_step_on_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, so that the step can end; the second raises KeyboardInterrupt at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before, first = signal.getsignal(signal.SIGINT), [0.0]
    launched = torch.distributed.is_available() and torch.distributed.is_initialized()

    def handler(signum, frame):
        if asked.is_set() and not (launched and time.monotonic() - first[0] < _ECHO):
            raise KeyboardInterrupt
        first[0] = time.monotonic()
        asked.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
