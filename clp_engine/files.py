"""Files that are there whole or not at all: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clp_engine.errors import ConfigError, shown

if TYPE_CHECKING:
    import torch


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


def _exists(path: Path) -> bool:
    """Whether anything is at `path`; OSError for a path that nothing can be at."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def check_folder(name: str, path: str | Path) -> None:
    """Raises ConfigError where no file could be written into the folder `path`, which need not be there yet. name: of the
    setting or flag, for the message."""
    try:
        folder = Path(path)
        while not _exists(folder):
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{name}={shown(str(path))}: cannot write there ({reason}); give a folder that can be made and written to"
        ) from error


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError naming the file where it holds something else."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged or no JSON ({error}); write or copy it again") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {shown(raw)}; expected names and values. Write or copy it again")
    return raw


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file, all of them finite floating-point numbers. Raises ConfigError naming the file where it
    holds something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged or no safetensors file ({error}); write or copy it again") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
            raise ConfigError(
                f"{path}: {name} has {tensor.dtype} numbers, not all of them finite; write or copy it again"
                if tensor.is_floating_point()
                else f"{path}: {name} has {tensor.dtype} numbers; expected floating-point ones"
            )
    return tensors


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
