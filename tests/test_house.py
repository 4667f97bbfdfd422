"""The rules of the house (docs/architecture.md): which room may import which, and how much a room and a file hold."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "clp_engine"
LINES = 500
# Files that are longer, and why.
LONGER = {
    "tasks/docsum/corpus.py": "one recipe, from a docstring to a pair, read from top to bottom",
}
# import-linter in a process of its own, in which nothing but the working folder says where the packages are.
LINT = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Scikit" not in type(finder).__name__]
sys.path[:0] = [".", "kernels"]
from importlinter.cli import lint_imports
sys.exit(lint_imports(config_filename="pyproject.toml", cache_dir=None))
"""


def lint(folder):
    done = subprocess.run([sys.executable, "-c", LINT], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def folders():
    return [path for path in PACKAGE.rglob("*") if (path / "__init__.py").is_file()]


def entries(folder):
    """Modules and packages in a folder, but for its own __init__.py."""
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    return modules | {path.name for path in folder.iterdir() if (path / "__init__.py").is_file()}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    pytest.importorskip("importlinter")
    place = tmp_path_factory.mktemp("house")
    for name in ("clp_engine", "bench", "kernels/clp_kernels"):
        aside = shutil.ignore_patterns("__pycache__", "results", "*.so", "checkpoint")
        shutil.copytree(ROOT / name, place / name, ignore=aside)
    shutil.copy(ROOT / "pyproject.toml", place)
    return place


def test_rooms_import_one_way_and_without_circles(copy):
    status, said = lint(copy)
    assert status == 0, said


@pytest.mark.parametrize(
    "file, line, broken",
    [
        ("core/planted.py", "from clp_engine.policy.policy import ConditionedPolicy", "rooms import one way"),
        # An annotation is an import, and so is one inside a function.
        (
            "rollouts/planted.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from clp_engine.training import config",
            "rooms import one way",
        ),
        ("models/planted.py", "def f():\n    from clp_engine.cli import main", "rooms import one way"),
        ("objectives/planted.py", "import transformers", "objectives may be read"),
        ("models/planted.py", "import bench.core.measure", "packages import one way"),
        ("models/planted.py", "import clp_kernels.triton_kernels.launch", "kernels are reached"),
        ("planted/__init__.py", "", "rooms import one way"),  # a room that is on no floor
    ],
)
def test_a_planted_import_breaks_a_rule(copy, file, line, broken):
    path = copy / "clp_engine" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(line + "\n")
    try:
        status, said = lint(copy)
    finally:
        path.unlink()
        if path.name == "__init__.py":
            path.parent.rmdir()
    assert status != 0 and broken in said, said


def test_a_planted_circle_breaks_a_rule(copy):
    pair = [copy / "clp_engine" / "data" / f"planted_{name}.py" for name in "ab"]
    for path, other in zip(pair, "ba"):
        path.write_text(f"def f():\n    from clp_engine.data import planted_{other}\n")
    try:
        status, said = lint(copy)
    finally:
        for path in pair:
            path.unlink()
    assert status != 0 and "planted_a" in said, said


def test_the_package_has_at_most_fourteen_entries():
    assert len(entries(PACKAGE)) <= 14


@pytest.mark.parametrize("folder", folders(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_has_three_to_thirteen_files(folder):
    assert 3 <= len(entries(folder)) <= 13, sorted(entries(folder))


def test_no_file_is_long_without_a_reason():
    lengths = {
        path.relative_to(PACKAGE).as_posix(): path.read_text().count("\n") for path in PACKAGE.rglob("*.py")
    }
    assert {name for name, count in lengths.items() if count > LINES} == set(LONGER)


def test_processes_are_asked_for_in_one_place():
    """Everything else asks `training.parallel.processes.Parallel`."""
    aside = PACKAGE / "training" / "parallel"
    found = [p for p in PACKAGE.rglob("*.py") if "torch.distributed" in p.read_text(encoding="utf-8")]
    assert found and all(aside in p.parents for p in found), found
