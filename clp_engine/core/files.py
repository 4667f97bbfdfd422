"""Atomic writes: a file or folder appears whole or not at all, however the process ends. Other files in a folder stay.

The content for NAME is first written beside it, under the name `.NAME.new-HOST-PID`. A finished folder is flushed and renamed
to `.NAME.ready-HOST-PID`. It then replaces the folder NAME as a whole; if NAME holds other files as well, it is moved there
file by file. A killed process may leave one of the temporary names behind. `finish` removes a `.new` and moves a `.ready` into
place.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from clp_engine.core.errors import ConfigError, shown

if TYPE_CHECKING:
    import torch

# The errors of safetensors' load_file for a damaged or foreign file (SafetensorError derives from Exception directly).
UNREADABLE = (SafetensorError, OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError)
# The host may be missing, because earlier versions did not write it.
_LEFT = re.compile(r"\.(?P<name>.+)\.(?P<kind>new|ready|old)-(?:(?P<host>.+)-)?(?P<pid>\d+)")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{socket.gethostname()}-{os.getpid()}")


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Turn system errors inside the block into OSErrors that name the file.

    Python's own error for a full disk names no file. Libraries in Rust (safetensors, tokenizers) raise other classes.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


@contextlib.contextmanager
def write_directory(path: str | Path) -> Iterator[Path]:
    """A temporary directory whose content moves to `path` when the block ends without an error.

    New files replace files of the same names; other files in `path` stay. If `path` has no other files, the old directory is
    moved aside first and removed last, so that one of the two is always whole. Raises ConfigError if `path` is a file.
    """
    path = Path(path).resolve()  # a symbolic link stays, and the content of its target changes
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; expected a folder to write into: give another, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    finish(path)
    temporary, ready = _beside(path, "new"), _beside(path, "ready")
    temporary.mkdir()
    try:
        with naming(path):
            yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            _flush(entry)
        temporary.rename(ready)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _place(ready, path)


def _place(ready: Path, path: Path) -> None:
    """Move the written directory into place. After a kill at any point, a second call completes the move."""
    if path.is_dir() and _holds_more(path, ready):
        _move_files(ready, path)
    else:
        old = _beside(path, "old")
        if path.exists():
            path.rename(old)
        ready.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    _flush(path.parent)


def _holds_more(path: Path, new: Path) -> bool:
    """Whether `path` holds an entry that the files in `new` would not replace."""
    return any(
        entry.is_symlink()
        or not (new / entry.name).exists()
        or (entry.is_dir() and _holds_more(entry, new / entry.name))
        for entry in path.iterdir()
    )


def _move_files(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            _move_files(entry, target / entry.name)
        else:
            entry.replace(target / entry.name)
    source.rmdir()


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "new")
    try:
        with naming(path):
            temporary.write_bytes(content)
            _flush(temporary)
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _exists(path: Path) -> bool:
    """Whether `path` exists, also as a broken link. Raises OSError for a path that no file can have."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def nameable(path: str) -> bool:
    """Whether a file system could hold a file of this path.

    Text from elsewhere may hold a NUL, half of a surrogate pair, or a name of thousands of characters.
    """
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return (
        b"\0" not in encoded and len(encoded) < 4000 and all(len(part) < 256 for part in encoded.split(b"/"))
    )


def check_folder(name: str, path: str | Path) -> None:
    """Raises ConfigError if no file can be written into the folder `path`. The folder itself may still be missing.

    name: the setting or flag that the message names.
    """
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


def _integer(text: str) -> int:
    if len(text) > sys.float_info.max_10_exp:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError naming the file for other content, and for an integer beyond all floats."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"), parse_int=_integer)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged or no JSON ({error}); write or copy it again") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {shown(raw)}; expected names and values. Write or copy it again")
    return raw


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file, all with finite floating-point numbers.

    Raises ConfigError naming the file for any other content.
    """
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except UNREADABLE as error:
        raise ConfigError(
            f"{path} is damaged or no safetensors file ({error}); write or copy it again"
        ) from error
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
    write_bytes(path, text.encode("utf-8"))


def append_text(path: str | Path, text: str) -> None:
    """Append to a text file, creating it if needed. On a full disk none of the text is added."""
    with naming(path), open(path, "ab", buffering=0) as file:
        before, left = file.tell(), memoryview(text.encode("utf-8"))
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(before)
            raise


def finish(path: str | Path, alone: bool = False) -> None:
    """Complete or undo the writes to `path` that killed processes left unfinished.

    alone: no other process can be writing `path` now. By default, only leftovers of ended processes on this host are handled.
    On a read-only file system, or without permission to write, the leftovers stay.
    """
    try:
        _finish(Path(path).resolve(), alone)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise


def _finish(path: Path, alone: bool) -> None:
    left: dict[str, list[Path]] = {"ready": [], "old": [], "new": []}
    for entry in path.parent.glob(f".{_literally(path.name)}.*-*"):
        found = _LEFT.fullmatch(entry.name)
        if found and found["name"] == path.name and (alone or _has_ended(found["host"], int(found["pid"]))):
            left[found["kind"]].append(entry)
    for ready in sorted(left["ready"], key=lambda entry: entry.stat().st_mtime):
        _place(ready, path)
    for old in left["old"]:  # left by a version without .ready, whose new directory may be lost
        if path.exists():
            shutil.rmtree(old)
        else:
            old.rename(path)
    for new in left["new"]:
        shutil.rmtree(new) if new.is_dir() else new.unlink(missing_ok=True)


def unfinished(folder: str | Path) -> set[str]:
    """The names in a folder for which `finish` may have work."""
    found = (_LEFT.fullmatch(entry.name) for entry in Path(folder).glob(".*"))
    return {match["name"] for match in found if match}


def _literally(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _has_ended(host: str | None, pid: int) -> bool:
    if host not in (None, socket.gethostname()):
        return False
    if pid == os.getpid():  # an earlier process had our pid: this process has written nothing yet
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def refuse_overlap(target: str | Path, read: Iterable[str | Path]) -> None:
    """Raises ConfigError if `target` equals, contains or lies inside one of the folders that are being read."""
    place = Path(target).resolve()
    for source in read:
        source = Path(source).resolve()
        if source.is_relative_to(place) or place.is_relative_to(source):
            how = "is" if source == place else "holds" if source.is_relative_to(place) else "lies in"
            raise ConfigError(
                f"{target} {how} {source}, which is being read; give another folder to write to"
            )


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()
