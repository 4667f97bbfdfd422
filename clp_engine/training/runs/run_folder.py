"""The folder of a training run: the run's identity, the files that the engine wrote, and the lock of the process that writes.

RUN/clp_manifest.json  the identity of the run, and every file that the engine wrote for it; no other file is ever removed
RUN/checkpoint-N/      its trainer_state.json holds the identity of the run that wrote it, and the time
RUN/.lock              process and host of a training in progress

A resumed run keeps its identity. Checkpoints and manifests of earlier versions have none: their identity is None.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from clp_engine.core import files, records
from clp_engine.core.errors import ConfigError, shown
from clp_engine.core.locking import Busy, exclusive

if TYPE_CHECKING:
    from clp_engine.policy.policy import ConditionedPolicy

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"  # in a checkpoint; transformers' file of this name has no `step`
_MANIFEST = "clp_manifest.json"
_RECORDS = frozenset({"log.jsonl", "run.json", "completions.jsonl"})  # a new run may replace these unasked
_OF_TRAINING = re.compile(r"checkpoint-\d+|policy|run\.json|log\.jsonl|clp_manifest\.json")


@dataclass(frozen=True)
class _Written:
    """The content of clp_manifest.json."""

    run: str | None
    files: list[str]


@dataclass(frozen=True)
class _Saved:
    """The fields of trainer_state.json that identify its checkpoint. written: time of writing, in seconds since 1970."""

    step: int | None = None
    written: float = 0.0
    run: str | None = None


@dataclass(frozen=True)
class Manifest:
    """run: the identity of the run. files: the files written for it, relative to the folder."""

    run: str | None
    files: frozenset[str] = frozenset()

    @classmethod
    def read(cls, folder: str | Path) -> Manifest | None:
        """The manifest of a run folder, or None if it has none. Raises ConfigError for a damaged one."""
        path = Path(folder) / _MANIFEST
        if not path.is_file():
            return None
        remedy = "expected what a training wrote: remove it to keep every file in the folder"
        written = records.read(path, _Written, remedy)
        if odd := next((name for name in written.files if not files.nameable(name)), None):
            raise ConfigError(f"{path} is damaged or another's ({shown(odd)} can be no file); {remedy}")
        return cls(written.run, frozenset(written.files))

    def write(self, folder: str | Path) -> None:
        content = {"run": self.run, "files": sorted(self.files)}
        files.write_text(Path(folder) / _MANIFEST, json.dumps(content, indent=1) + "\n")


# -- the manifest ---------------------------------------------------------------------------------------------------------


def note(folder: str | Path, written: Iterable[str | Path]) -> None:
    """Add files to the manifest before they are put in place, so that a kill leaves no file outside the manifest.

    A folder without a manifest is left unchanged.
    """
    if (known := Manifest.read(folder)) is not None:
        names = {Path(path).relative_to(folder).as_posix() for path in written}
        if not names <= known.files:
            Manifest(known.run, known.files | names).write(folder)


@contextlib.contextmanager
def writing(folder: str | Path, name: str | Path) -> Iterator[Path]:
    """`files.write_directory` for <folder>/<name>, with the new files noted in the manifest."""
    target = Path(folder) / name
    with files.write_directory(target) as temporary:
        yield temporary
        note(folder, [target / p.relative_to(temporary) for p in temporary.rglob("*") if p.is_file()])


def remove(folder: str | Path, names: Iterable[str]) -> None:
    """Remove files of a run, and the directories left empty. A symbolic link is removed, and never the files behind it."""
    folder = Path(folder)
    emptied = set()
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or parts[0] == "/":
            continue  # no path that the engine wrote
        steps = [folder.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)]
        path = next((step for step in steps if step.is_symlink()), steps[-1])
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            path.unlink()
        emptied.update(step for step in steps[:-1] if step != path)
    for directory in sorted(emptied, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):  # the directory holds other files
            directory.rmdir()


# -- checkpoints ----------------------------------------------------------------------------------------------------------


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of the folder's run, in the order of writing. Those of every run if the folder has no manifest."""
    known = Manifest.read(folder)
    return [path for path, run in _all_checkpoints(folder) if known is None or run == known.run]


def rotate(folder: str | Path, keep: int | None, newest: Path) -> None:
    """Remove the run's oldest checkpoints until `keep` are left, `newest` included.

    As in transformers, None and values up to 0 remove nothing.
    """
    if keep is None or keep <= 0:
        return
    older = [path for path in checkpoints(folder) if path.name != newest.name]
    for path in older[: max(0, len(older) + 1 - keep)]:
        remove_checkpoint(folder, path)


def remove_checkpoint(folder: str | Path, path: Path) -> None:
    """Remove the files that the manifest lists for a checkpoint."""
    known = Manifest.read(folder)
    gone = {name for name in known.files if name.startswith(f"{path.name}/")} if known else set()
    # The state is removed last: after a kill, the rest is still a checkpoint of this run, which is removed later.
    remove(folder, sorted(gone, key=lambda name: name == f"{path.name}/{STATE_FILE}"))
    if known is not None:
        Manifest(known.run, known.files - gone).write(folder)


def _all_checkpoints(folder: str | Path) -> list[tuple[Path, str | None]]:
    """(path, identity of the run) of every checkpoint in a folder, by time; by step for earlier versions, without times."""
    for name in files.unfinished(folder):
        if name.startswith("checkpoint-"):
            files.finish(Path(folder) / name)
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if not step.isdecimal() or not (path / STATE_FILE).is_file():
            continue
        try:
            state = records.read(path / STATE_FILE, _Saved)
        except ConfigError as error:
            logger.warning("%s; its checkpoint is left alone", error)
            continue
        if state.step is not None:
            found.append((state.written, int(step), path, state.run))
    return [(path, run) for _, _, path, run in sorted(found, key=lambda entry: entry[:2])]


# -- the beginning of a training ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def training_in(folder: str | Path) -> Iterator[None]:
    """Lock the folder for one training, creating it if needed. Writes that a killed training left unfinished are completed or
    undone first.

    Raises ConfigError if another process trains in the folder, or if it cannot be written to.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(folder / ".lock"))
            for place in (folder, folder / "best"):
                for name in files.unfinished(place):
                    files.finish(place / name, alone=_OF_TRAINING.fullmatch(name) is not None)
        except Busy as holder:
            raise ConfigError(
                f"{folder}: {holder} is training in this folder; wait until it has ended, or give another output_dir"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be written to ({error.strerror}); give another output_dir, or make room in it"
            ) from error
        yield


def check_free(
    folder: str | Path, run: str | None, overwrite: bool, read: Collection[str | Path] = ()
) -> None:
    """Raises ConfigError if the folder holds a policy, a checkpoint or a report of another run, which would be overwritten.

    overwrite: overwriting is allowed, unless a file of the earlier run lies inside a path in `read`.
    """
    folder, known = Path(folder), Manifest.read(folder)
    runs = {path: of for path, of in _all_checkpoints(folder)}
    here = set(runs.values()) if known is None else {known.run}
    kept = (set() if known is None else known.files - _RECORDS) | {"policy/clp_config.json"}
    # Checkpoints of transformers count too: a checkpoint of the same step would replace them.
    saved = runs or any(folder.glob(f"checkpoint-*/{STATE_FILE}"))
    if run in here or not (saved or any((folder / name).exists() for name in kept)):
        return
    if not overwrite:
        raise ConfigError(
            f"{folder} holds an earlier run; resume it (resume_from_checkpoint=True, --resume), give another output_dir, or "
            "have it replaced (overwrite_output_dir=True, --overwrite)"
        )
    if known is None:
        logger.warning(
            "%s has no %s: what the earlier run wrote there stays, unless it is replaced", folder, _MANIFEST
        )
        return
    sources = [Path(source).resolve() for source in read]
    for name in known.files:
        if any((folder / name).resolve().is_relative_to(source) for source in sources):
            raise ConfigError(
                f"{folder / name} is a file of the run that is to be overwritten, and is being read; give another output_dir"
            )


def start_log(folder: str | Path, history: Iterable[Mapping[str, Any]]) -> None:
    """Start log.jsonl anew with these entries: the history up to the checkpoint from which a run continues."""
    files.write_text(Path(folder) / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in history))


def append_log(folder: str | Path, entry: Mapping[str, Any]) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    files.append_text(Path(folder) / "log.jsonl", json.dumps(entry) + "\n")


def write_policy(folder: str | Path, path: Path, policy: ConditionedPolicy) -> None:
    """Write the policy to `path`, and note its files in the manifest if `path` lies inside the run's folder."""
    run, path_in_full = Path(folder).resolve(), path.resolve()
    if path_in_full.is_relative_to(run):
        with writing(folder, path_in_full.relative_to(run)) as temporary:
            policy.write_files(temporary)
    else:
        policy.save_pretrained(path)


def begin(folder: str | Path, run: str | None) -> None:
    """Make `run` the folder's run, and remove the files that the manifest lists for another run."""
    known = Manifest.read(folder)
    if known is not None and known.run != run:
        remove(folder, known.files)
        known = None
    listed = frozenset() if known is None else known.files
    copied = [  # checkpoints of this run from elsewhere, or from a version without manifests; `rotate` includes them
        file.relative_to(folder).as_posix()
        for path, of in _all_checkpoints(folder)
        if of == run and not path.is_symlink() and f"{path.name}/{STATE_FILE}" not in listed
        for file in path.rglob("*")
        if file.is_file()
    ]
    Manifest(run, listed | {"log.jsonl", *copied}).write(folder)
