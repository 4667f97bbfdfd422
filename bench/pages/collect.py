"""A GPU round's results into the repository: python -m bench collect OUTDIR [--to bench/results]

OUTDIR is what bench/gpu.sh wrote, or its all.tgz. Each file is checked, all must be of one device and one commit, and are put
under --to by the device's short name (NVIDIA H200: h200):

    GROUP.json              h200_GROUP.json                 a group's cases
    docsum_demo.json        h200_docsum_demo.json           the demo's report
    fronts.json             fronts/h200.json                that report beside the CPU's, and the picture of both for the docs
    figures.json            h200_figures.json               the cases of the short round, of several groups
    figures.tokens.json     tokens/h200.json                where the time of some tokens of a rollout goes
    counters.json           counters/h200.json
    MODEL.profile.json      profiles/h200_MODEL.json
    tune.json               tune_h200.json                  from which `python -m bench tune --write` makes a table
    STAGE.rc, STAGE.log     rounds/h200.json                exit code, seconds and last line of each stage

Then the figures of README.md and docs/ are made anew. What an earlier round of the same device left there is replaced. A tree
that differed from its commit (-dirty) is refused without --dirty: nobody could measure it again.
"""

from __future__ import annotations

import json
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.core import schema
from bench.pages import readme
from clp_engine.core.errors import ConfigError
from clp_engine.evaluation.report import ParetoReport

SKIPPED = ("ceilings.json",)  # each group's file has its own


@dataclass(frozen=True)
class Found:
    """A result of the round: where it is, where it goes (below --to), and the device and commit it names (None: neither)."""

    path: Path
    target: Callable[[str], str]
    environment: dict | None = None


def short_name(device: str) -> str:
    """'NVIDIA H100 80GB HBM3' is h100, 'NVIDIA GeForce RTX 4090' rtx-4090, any processor cpu-...'s words."""
    words = [
        word
        for word in re.findall(r"[A-Za-z0-9]+", device)
        if word not in ("NVIDIA", "GeForce", "Tesla", "AMD", "PCIe")
    ]
    if words and re.fullmatch(r"[A-Z]+\d+[A-Za-z]*", words[0]):
        return words[0].lower()
    return "-".join(words[:2]).lower() or "device"


def collect(given: str | Path, to: Path | None = None, dirty: bool = False) -> int:
    """Prints what went where; 1 where a stage of the round failed or something is missing, else 0. Raises SystemExit for
    results that do not fit their form or each other."""
    root = readme.ROOT if to is None else to.parents[1]
    to = to or readme.RESULTS
    with tempfile.TemporaryDirectory() as scratch:
        folder = _unpacked(Path(given), Path(scratch))
        results = list(_results(folder))
        environments = [found.environment for found in results if found.environment is not None]
        if not environments:
            raise SystemExit(
                f"{given} holds no result of a round; give a folder that bench/gpu.sh wrote, or its all.tgz"
            )
        _alike(results, dirty)
        name = short_name(environments[0]["device"])
        for found in results:
            _copy(found.path, to / found.target(name))
        stages = _stages(folder)
        _write(to / "rounds" / f"{name}.json", {"environment": environments[0], "stages": stages})
        picture = folder / "fronts.png"
        if picture.exists():
            _copy(picture, root / "docs" / f"{name}_front.png")
    readme.update(root=root)
    return _complaints(stages, [to / found.target(name) for found in results])


def _unpacked(given: Path, scratch: Path) -> Path:
    archive = given if given.is_file() else given / "all.tgz"
    if given.is_dir() and (any(given.glob("*.rc")) or not archive.exists()):
        return given
    if not archive.is_file():
        raise SystemExit(f"there is no {given}")
    with tarfile.open(archive) as tar:
        tar.extractall(scratch, filter="data")
    return scratch


def _results(folder: Path):
    """Every JSON file of the round that is kept. Raises SystemExit for one that has not its form."""
    for path in sorted(folder.glob("*.json")):
        aside = path.name.endswith((".manifest.json", ".record.json")) or path.name.startswith("smoke.")
        if path.name in SKIPPED or aside:
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            yield _classified(path, data)
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            raise SystemExit(f"{path.name} is no result of a round: {error}") from error


def _classified(path: Path, data: dict) -> Found:
    stem, environment = path.name.partition(".")[0], data.get("environment")
    if path.name.endswith(".profile.json"):
        model = path.name.removesuffix(".profile.json")
        float(data["engine_share"])
        return Found(path, lambda device: f"profiles/{device}_{model}.json", environment)
    if path.name.endswith(".tokens.json"):
        [float(kernel["seconds"]) for kernel in data["kernels"]]
        return Found(path, lambda device: f"tokens/{device}.json", environment)
    if "hypervolume" in data:
        ParetoReport.from_dict(data)
        return Found(path, lambda device: f"{device}_{stem}.json")
    if stem == "tune":
        return Found(path, lambda device: f"tune_{device}.json", environment)
    if "comparisons" in data:
        return Found(path, lambda device: f"{stem}/{device}.json", environment)
    if stem == "counters":
        [kernel for case in data["cases"] for kernel in case["kernels"]]
        return Found(path, lambda device: f"counters/{device}.json", environment)
    result = schema.load(path)
    return Found(path, lambda device: f"{device}_{stem}.json", result.environment)


def _alike(results: list[Found], dirty: bool) -> None:
    for name in ("device", "commit"):
        values = {f.path.name: f.environment.get(name) for f in results if f.environment is not None}
        if len(set(values.values())) > 1:
            listed = "\n".join(f"  {file}: {value}" for file, value in values.items())
            raise SystemExit(
                f"the results are not of one {name}; measure those of the other again:\n{listed}"
            )
    commit = next(iter(values.values()))
    if not commit:
        raise SystemExit(
            "the results name no commit; give it to bench/gpu.sh as CLP_SOURCE_COMMIT where git is not there"
        )
    if commit.endswith("-dirty") and not dirty:
        raise SystemExit(
            f"measured at {commit}, a tree that nobody else has; commit it and measure again, or give --dirty"
        )


def _stages(folder: Path) -> dict[str, dict]:
    stages = {}
    for path in sorted(folder.glob("*.rc"), key=lambda p: p.stat().st_mtime_ns):
        code, seconds = path.read_text(encoding="utf-8").split()
        log = path.with_suffix(".log")
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        stages[path.stem] = {"exit": int(code), "seconds": float(seconds), "last": last[:200]}
    return stages


def _complaints(stages: dict[str, dict], files: list[Path]) -> int:
    complaints = [
        f"stage {name} ended with {s['exit']}: {s['last']}" for name, s in stages.items() if s["exit"]
    ]
    for path in files:
        print(path)
        data = json.loads(path.read_text(encoding="utf-8"))
        left_out = (data.get("settings") or {}).get("left_out") or {}
        if left_out:
            complaints.append(f"{path.name}: {len(left_out)} cases were not measured")
    for line in complaints:
        print(f"note: {line}")
    return 1 if complaints else 0


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
