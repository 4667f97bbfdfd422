"""Files that are there whole or not at all: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def write_directory(path: str | Path, keep: bool = False) -> Iterator[Path]:
    """A temporary directory that takes the place of `path` when the block ends without an error.

    An older directory at `path` is moved aside first and removed last, so that one of the two is always whole. keep: where
    that one holds anything else (a run's folder, somebody's home), it stays, and the new files are moved into it one by one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        new = {entry.name for entry in temporary.iterdir()}
        if keep and path.is_dir() and any(entry.name not in new for entry in path.iterdir()):
            for name in sorted(new):
                if (temporary / name).is_dir():
                    shutil.copytree(temporary / name, path / name, dirs_exist_ok=True)
                else:
                    (temporary / name).replace(path / name)
        else:
            if path.exists():
                path.rename(old)
            temporary.rename(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    temporary.replace(path)


def checkpoints(directory: str | Path) -> list[Path]:
    """Checkpoints of a run folder, oldest first."""
    found = [
        (int(p.name.removeprefix("checkpoint-")), p)
        for p in Path(directory).glob("checkpoint-*")
        if p.name.removeprefix("checkpoint-").isdigit()
    ]
    return [path for _, path in sorted(found)]
