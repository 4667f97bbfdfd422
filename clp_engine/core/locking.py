"""A lock file that one process holds at a time, and that names its holder.

The operating system releases the lock (flock) when the holder ends, even by a kill. A leftover file therefore locks nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_held: set[int] = set()


class Busy(Exception):
    """Another process holds the lock. The message names that process if it is known."""


@contextlib.contextmanager
def exclusive(path: str | Path) -> Iterator[None]:
    """Hold the lock file `path` and remove it afterwards. Raises Busy if any process, this one included, holds it."""
    descriptor = _acquire(Path(path))
    _held.add(descriptor)
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)
        yield
    finally:
        if descriptor in _held:  # false in a process forked inside the block
            _held.remove(descriptor)
            with contextlib.suppress(OSError):  # the folder may have been removed
                if _is_at(descriptor, path):
                    os.unlink(path)
            os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                holder = _holder(descriptor)
                os.close(descriptor)
                raise Busy(holder) if isinstance(error, BlockingIOError) else error from None
            logger.warning(
                "%s: this file system has no locks; see that no other process writes here", path.parent
            )
        if _is_at(descriptor, path):  # otherwise the previous holder removed the file after we opened it
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: str | Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):  # the holder has not written its name yet
        return "another process"


def _let_go() -> None:
    """Close the inherited descriptors in a forked process: the lock must end with the parent."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
