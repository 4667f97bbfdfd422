"""The folder of a training run: whose it is, which files in it the engine wrote, and who is writing now.

RUN/clp_manifest.json  the identity of the run, and every file that the engine wrote for it: nothing else is ever removed
RUN/checkpoint-N/      its trainer_state.json holds the identity of the run that wrote it, and when
RUN/.lock              while a training is going on: its process and host

A run keeps its identity when it is resumed. Checkpoints and manifests of earlier versions have none: their identity is None.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from clp_engine.core import files, records
from clp_engine.core.errors import ConfigError, shown
from clp_engine.core.locking import Busy, exclusive

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"  # of a checkpoint; transformers has one, too, without a `step`
_MANIFEST = "clp_manifest.json"
_RECORDS = frozenset({"log.jsonl", "run.json", "completions.jsonl"})  # a new run may replace them unasked
_OF_TRAINING = re.compile(r"checkpoint-\d+|policy|run\.json|log\.jsonl|clp_manifest\.json")


@dataclass(frozen=True)
class _Written:
    """The content of clp_manifest.json."""

    run: str | None
    files: list[str]


@dataclass(frozen=True)
class _Saved:
    """What trainer_state.json says of its checkpoint. written: when, in seconds since 1970."""

    step: int | None = None
    written: float = 0.0
    run: str | None = None


@dataclass(frozen=True)
class Manifest:
    """run: the identity of the run. files: what was written for it, relative to the folder."""

    run: str | None
    files: frozenset[str] = frozenset()

    @classmethod
    def read(cls, folder: str | Path) -> Manifest | None:
        """That of a run folder; None where there is none."""
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


# -- what was written -----------------------------------------------------------------------------------------------------


def note(folder: str | Path, written: Iterable[str | Path]) -> None:
    """Add files to the manifest, before they are in place: a kill leaves none that is not in it. Nothing happens in a folder
    that has none."""
    if (known := Manifest.read(folder)) is not None:
        names = {Path(path).relative_to(folder).as_posix() for path in written}
        if not names <= known.files:
            Manifest(known.run, known.files | names).write(folder)


@contextlib.contextmanager
def writing(folder: str | Path, name: str | Path) -> Iterator[Path]:
    """`files.write_directory` of <folder>/<name>, with its files in the manifest."""
    target = Path(folder) / name
    with files.write_directory(target) as temporary:
        yield temporary
        note(folder, [target / p.relative_to(temporary) for p in temporary.rglob("*") if p.is_file()])


def remove(folder: str | Path, names: Iterable[str]) -> None:
    """Remove files of a run, and the directories that are empty then. Of what lies behind a link only the link goes."""
    folder = Path(folder)
    emptied = set()
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or parts[0] == "/":
            continue  # nothing that the engine wrote
        steps = [folder.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)]
        path = next((step for step in steps if step.is_symlink()), steps[-1])
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            path.unlink()
        emptied.update(step for step in steps[:-1] if step != path)
    for directory in sorted(emptied, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):  # somebody else's files are in it
            directory.rmdir()


# -- checkpoints ----------------------------------------------------------------------------------------------------------


def checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints of the run in a folder, in the order in which they were written; of every run, where none has a manifest."""
    known = Manifest.read(folder)
    return [path for path, run in _all_checkpoints(folder) if known is None or run == known.run]


def rotate(folder: str | Path, keep: int | None, newest: Path) -> None:
    """Remove the run's oldest checkpoints until `keep` are left, of which `newest` is one; none for None, 0 and less, as in
    transformers."""
    if keep is None or keep <= 0:
        return
    older = [path for path in checkpoints(folder) if path.name != newest.name]
    for path in older[: max(0, len(older) + 1 - keep)]:
        remove_checkpoint(folder, path)


def remove_checkpoint(folder: str | Path, path: Path) -> None:
    """Remove what the manifest says was written into a checkpoint."""
    known = Manifest.read(folder)
    gone = {name for name in known.files if name.startswith(f"{path.name}/")} if known else set()
    # The state goes last: what a kill leaves is still a checkpoint of this run, whose removal is done again.
    remove(folder, sorted(gone, key=lambda name: name == f"{path.name}/{STATE_FILE}"))
    if known is not None:
        Manifest(known.run, known.files - gone).write(folder)


def _all_checkpoints(folder: str | Path) -> list[tuple[Path, str | None]]:
    """(path, identity of the run) of every checkpoint in a folder, by time; of earlier versions, which noted none, by step."""
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
    """Hold the folder for one training, made if need be; what a killed one had begun to write is finished or undone first.

    Raises ConfigError where another process trains in it, or it cannot be written to.
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
    """Raise ConfigError where the folder holds a policy, a checkpoint or a report of another run, unless that is to be
    overwritten and none of its files lies in what is being read."""
    folder, known = Path(folder), Manifest.read(folder)
    runs = {path: of for path, of in _all_checkpoints(folder)}
    here = set(runs.values()) if known is None else {known.run}
    kept = (set() if known is None else known.files - _RECORDS) | {"policy/clp_config.json"}
    # Those of transformers count: they would be replaced at a step of the same number.
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


def begin(folder: str | Path, run: str | None) -> None:
    """Make the folder that of `run`: what the manifest says an earlier run wrote is removed."""
    known = Manifest.read(folder)
    if known is not None and known.run != run:
        remove(folder, known.files)
        known = None
    listed = frozenset() if known is None else known.files
    copied = [  # from elsewhere, or written by a version that had no manifest: to be rotated like the run's other ones
        file.relative_to(folder).as_posix()
        for path, of in _all_checkpoints(folder)
        if of == run and not path.is_symlink() and f"{path.name}/{STATE_FILE}" not in listed
        for file in path.rglob("*")
        if file.is_file()
    ]
    Manifest(run, listed | {"log.jsonl", *copied}).write(folder)
