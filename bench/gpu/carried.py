"""What a GPU machine needs beside the sources: made where there are a network and nvcc, carried in bench/wheels, used there.

    *.whl         packages that this project and its peers need, and a machine with torch and transformers has not
    _native*.so   clp_kernels._native for that machine's Python, with the CUDA kernels for its GPU generation
    SOURCES.json  the commit, and digests of the sources and of what _native is built from

git ignores the folder: what copies the working tree to the machine has to be given its name. `prepare` fills it. `install` puts
the packages into a folder, and the extension beside clp_kernels; without an extension for the running Python it builds one. A
build without the CUDA kernels fails in both: a round would measure Triton in their place.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import importlib.machinery
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "bench" / "wheels"
MOST = 55 << 20  # bytes, with the sources beside them
_PEERS = (
    "trl==1.16.0",
    "peft",
    "datasets",
    "dill<0.4.2",
    "multiprocess<0.70.20",
    "liger-kernel",
    "cut-cross-entropy",
)
_OWN = (
    "msgspec",
)  # of this project's own needs, those that no machine with torch and transformers has by itself
_PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)
# Known to be installed beside torch and transformers.
_THERE = frozenset(
    """torch triton transformers accelerate pandas pyarrow xxhash filelock numpy tqdm fsspec huggingface-hub packaging pyyaml
    psutil safetensors jinja2""".split()
)
_BUILT_FROM = ("CMakeLists.txt", "csrc")
_SOURCES = (*_BUILT_FROM, "bench", "clp_engine", "kernels", "tests", "pyproject.toml")


def digest(names: Iterable[str], root: Path = ROOT) -> str:
    """One number for the files under these names, so that a copy without history can be compared."""
    found = hashlib.sha256()
    for name in names:
        place = root / name
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            aside = {"__pycache__", "wheels"}.intersection(path.parts) or path.suffix in (
                ".so",
                ".pyc",
                ".json",
            )
            if path.is_file() and not aside:
                found.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return found.hexdigest()


def prepare(python: str = "python3.12", architectures: str = "90a") -> None:
    """Fill bench/wheels for a machine whose Python is `python`'s version and whose GPUs are of `architectures`.

    Raises SystemExit where a package is missing that another needs, or where all of it is too large to travel.
    """
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    version = _asked(python, "import sys; print('%d.%d' % sys.version_info[:2])")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", version, "--implementation", "cp", "-d", str(FOLDER)]
    command += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    _run([*command, *_PEERS, *_OWN])
    build(_asked(python, "import sys; print(sys.executable)"), FOLDER, architectures)
    if missing := missing_needs(FOLDER):
        raise SystemExit("\n".join([*missing, "name it in _PEERS or _OWN of bench/gpu/carried.py"]))
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    if size > MOST:
        raise SystemExit(f"{FOLDER} has {size >> 20} MiB; expected at most {MOST >> 20}")
    from clp_engine.core.provenance import source_commit

    noted = {"commit": source_commit(), "sources": digest(_SOURCES), "built_from": digest(_BUILT_FROM)}
    (FOLDER / "SOURCES.json").write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")
    print(
        *(f"{path.stat().st_size >> 10:7d} KiB  {path.name}" for path in sorted(FOLDER.iterdir())), sep="\n"
    )


def missing_needs(folder: Path) -> list[str]:
    """What a wheel in the folder, or this project, needs that is neither another wheel nor known to be installed."""
    there, needs = set(_THERE), {"this project": _own_needs()}
    for path in folder.glob("*.whl"):
        with zipfile.ZipFile(path) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
            metadata = email.message_from_string(wheel.read(name).decode())
        there.add(_plain(metadata["Name"]))
        needs[path.name] = [n for n in metadata.get_all("Requires-Dist", []) if "extra ==" not in n]
    return [
        f"{who} needs {line}"
        for who, lines in needs.items()
        for line in lines
        if _plain(re.match(r"[\w.-]+", line)[0]) not in there
    ]


def _own_needs() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(
        r'^ +"(.+?)"', text.partition("\ndependencies = [")[2].partition("\n]")[0], re.MULTILINE
    )


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def build(python: str, into: Path, architectures: str, folder: Path | None = None) -> Path:
    """Builds _native for this interpreter, CUDA kernels included or an error, and copies it into a folder. folder: of the
    build, kept for the next one."""
    import pybind11

    folder = folder or ROOT / "build" / f"carried-{Path(python).name}"
    shutil.rmtree(folder, ignore_errors=True)
    defined = {
        "CMAKE_BUILD_TYPE": "Release",
        "Python_EXECUTABLE": python,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CLP_CUDA": "ON",
        "CLP_CUDA_ARCHITECTURES": architectures,
        "CMAKE_CUDA_FLAGS": "--threads=4",
    }
    cmake = shutil.which(
        "cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    if cmake is None:
        raise SystemExit("cmake is not on the PATH; pip install cmake")
    _run([cmake, "-S", str(ROOT), "-B", str(folder), *ninja, *(f"-D{n}={v}" for n, v in defined.items())])
    _run([cmake, "--build", str(folder), "--parallel", str(os.cpu_count())])
    (built,) = folder.glob("_native*.so")
    return Path(shutil.copy(built, into))


def install(scratch: Path, architectures: str = "90a") -> None:
    """Makes this machine ready: packages into scratch/site, _native beside clp_kernels. Raises SystemExit where it cannot."""
    if wheels := sorted(map(str, FOLDER.glob("*.whl"))):
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--upgrade",
        ]
        _run([*command, "--target", str(scratch / "site"), *wheels])
    place = ROOT / "kernels" / "clp_kernels"
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES[:1])
    fitting = [path for path in FOLDER.glob("_native*.so") if path.name.endswith(suffixes)]
    if not fitting:
        build(sys.executable, place, architectures, scratch / "build")
        return
    if noted().get("built_from") != digest(_BUILT_FROM):
        raise SystemExit(
            f"{fitting[0]} was built from other sources than these; make it anew: bench/gpu.sh prepare"
        )
    shutil.copy(fitting[0], place)


def environment(scratch: Path) -> Mapping[str, str]:
    """Variables of every process of a round: where packages are imported from, caches of compilers, the commit."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(scratch / "site"), os.environ.get("PYTHONPATH", "")]
    found = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "PYTHONUNBUFFERED": "1",
    }
    commit = noted().get("commit")
    if commit and "CLP_SOURCE_COMMIT" not in os.environ:
        same = noted()["sources"] == digest(_SOURCES)
        found["CLP_SOURCE_COMMIT"] = commit if same else commit.removesuffix("-dirty") + "-dirty"
    return found


def noted() -> dict:
    path = FOLDER / "SOURCES.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _asked(python: str, code: str) -> str:
    try:
        return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"{python} does not run ({error}); give --python the GPU machine's version of Python"
        ) from None


def _run(command: list[str]) -> None:
    print("+", *command, flush=True)
    if code := subprocess.run(command).returncode:
        raise SystemExit(f"{command[0]} ended with {code}: {' '.join(command)[:300]}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh prepare", description=prepare.__doc__.splitlines()[0])
    parser.add_argument(
        "--python", default="python3.12", help="of the GPU machine's version (default %(default)s)"
    )
    parser.add_argument(
        "--architectures", default="90a", help="GPU generations, as nvcc names them (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    prepare(options.python, options.architectures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
