"""`make` says in plain words what is missing, and the source distribution holds what a build needs."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools" / "environment.py"


def run(tmp_path, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--venv", str(tmp_path / "venv")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_missing_compiler_is_said_before_anything_is_installed(tmp_path):
    result = run(tmp_path, PATH=str(tmp_path), CXX="")
    assert result.returncode == 1 and not (tmp_path / "venv").exists()
    assert "no C++ compiler was found" in result.stderr and "apt install g++" in result.stderr
    result = run(tmp_path, CXX="no-such-compiler")
    assert "under the name in CXX, no-such-compiler" in result.stderr


def test_an_old_python_is_told_so(monkeypatch, capsys):
    import importlib.util

    spec = importlib.util.spec_from_file_location("environment", SCRIPT)
    environment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(environment)
    monkeypatch.setattr(environment, "OLDEST", (9, 0))
    with pytest.raises(SystemExit):
        environment.check_python()
    assert "Python 9.0 or newer is needed" in capsys.readouterr().err


@pytest.mark.check
def test_an_unreachable_index_is_named_as_the_cause(tmp_path):
    result = run(
        tmp_path,
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_EXTRA_INDEX_URL="",
        PIP_FIND_LINKS="",
        PIP_RETRIES="1",
        PIP_CONFIG_FILE=os.devnull,
        PIP_TIMEOUT="1",
    )
    assert result.returncode == 1, result.stdout
    assert "the package index cannot be reached" in result.stderr


@pytest.mark.check
def test_the_source_distribution_holds_sources_model_and_licence(tmp_path):
    code = f"from scikit_build_core.build import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=120)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    needed = {
        "pyproject.toml",
        "CMakeLists.txt",
        "LICENSE",
        "README.md",
        "csrc/cpu/kernels.hpp",
        "clp_engine/training/trainer.py",
        "kernels/clp_kernels/multi_lora.py",
        "clp_engine/tasks/docsum/checkpoint/model.safetensors",
        "clp_engine/tasks/docsum/checkpoint/tokenizer.json",
    }
    assert needed <= names, needed - names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


def test_the_lowest_versions_that_are_tried_are_those_that_pyproject_allows():
    """constraints-lowest.txt, which `make lowest` installs, pins every library at its floor, and nothing else."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    wanted += [
        line for extra in ("plot", "test") for line in project["project"]["optional-dependencies"][extra]
    ]
    floors = {}
    for requirement in map(Requirement, wanted):
        for bound in requirement.specifier:
            assert bound.operator == ">=", requirement
            assert floors.setdefault(requirement.name, bound.version) == bound.version, requirement
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pins = {
        r.name: r.specifier for r in map(Requirement, [line for line in lines if line[:1] not in ("", "#")])
    }
    for name, floor in floors.items():
        (pin,) = pins.pop(name)
        assert pin.operator == "==" and Version(pin.version) == Version(floor), name
    assert not pins
