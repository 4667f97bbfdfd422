"""Cross-compiles the C++ kernels for aarch64 and runs their tests there, emulated: in an aarch64 Python, under qemu-user.

    python tools/aarch64.py               the tests of HALVES
    python tools/aarch64.py --or-skip     the same; where the compiler or qemu is missing, says so and succeeds
    python tools/aarch64.py -k TEXT       those of them that TEXT names
    python tools/aarch64.py --run FILE    a program of one's own in that Python, with further arguments

It needs Debian, whose servers keep every architecture side by side: apt-get fetches an aarch64 Python of the same release and
unpacks it into build/aarch64, where pip puts an aarch64 torch. Both are fetched once; nothing outside that folder changes.
The compiler and qemu have to be installed (PACKAGES). Emulation says nothing about speed.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "build" / "aarch64"
SYSROOT, SITE, PACKAGE = HOME / "sysroot", HOME / "site", HOME / "package"
PACKAGES = "g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user cmake"
COMMANDS = ("aarch64-linux-gnu-g++", "qemu-aarch64", "cmake", "apt-get", "dpkg-deb")
PYTHON = ("python3", "libpython3-dev", "libstdc++6", "libgomp1")
# The last torch whose aarch64 wheel is for CPUs alone: 150 MB; later ones bring CUDA, 430 MB. pip evaluates the markers of
# torch's requirements for the machine that it runs on, so what torch needs is listed here.
TORCH = "torch==2.10.0"
NEEDED = ("pytest pluggy iniconfig packaging pygments hypothesis sortedcontainers pybind11 sympy mpmath networkx jinja2 "
          "markupsafe filelock fsspec typing-extensions setuptools").split()  # fmt: skip
# The core of Graviton 2. It has no bfloat16 instructions, and the kernels use none.
PROCESSOR = "neoverse-n1"

# The C++ kernels' tests, and of those that run with every back-end the case of the C++.
CHOSEN = "cpu or instruction_set or test_matmul or test_decoder"
# Run at the same time, one process each; they take about as long as each other.
HALVES = (
    ("matmul", "multi_lora", "interpolated_linear", "sampling", "logits_logprob", "breaking_inputs"),
    ("prefix_attention", "linear_logprob", "interpolation", "decoder"),
)
# What is left out, and why. Emulation is slow, and all of it should take four minutes on two cores.
LEFT_OUT = {
    # Large operands. Smaller cases of the same tests run, with every remainder of a panel, a tile and a vector.
    "large": "300-600 or 700-2500 or 65-1100-33 or many_rows or 1937-1500 or few_chunks_of_memory or too_large or "
    "past-a-panel-and-a-chunk or batch_invariant_rows",
    # Memory beyond 4 GiB; and the addresses are 64-bit in the same C++ that x86 runs.
    "much memory": "more_than_32_bits",
    # They compare instruction sets, and aarch64 has one; or are about AMX's tiles.
    "other processors": "test_instruction_sets_agree or users_of_the_tiles",
    # torch.compile and opcheck look at the Python alone.
    "not about C++": "compile or opcheck or registered",
    # Needs Triton beside the C++.
    "Triton": "out_of_range_is_nan",
}


def fail(message):
    sys.exit("\nclp-engine: " + message)


def run(command, **options):
    if subprocess.run([str(part) for part in command], **options).returncode:
        fail(f"this failed; the reason is in the lines above: {' '.join(map(str, command))}")


def once(folder, key, make):
    """make() unless `folder` is there and was made of the same `key`."""
    stamp = folder.with_name(folder.name + ".made-of")
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    stamp.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make()
    stamp.write_text(digest)


def unpack_python():
    print("fetching an aarch64 Python", flush=True)
    apt = HOME / "apt"
    shutil.rmtree(apt, ignore_errors=True)
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "conf").write_text(
        'APT::Architecture "arm64"; APT::Architectures { "arm64"; }; APT::Install-Recommends "false";\n'
        f'Dir::State "{apt}/state"; Dir::State::status "{apt}/status"; Dir::Cache "{apt}/cache"; APT::Sandbox::User "";\n'
    )
    environment = {**os.environ, "APT_CONFIG": str(apt / "conf")}
    run(["apt-get", "-qq", "update"], env=environment)
    run(
        ["apt-get", "-qq", "-y", "--download-only", "install", *PYTHON],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    for archive in sorted((apt / "cache/archives").glob("*.deb")):
        run(["dpkg-deb", "-x", archive, SYSROOT])
    shutil.rmtree(apt)
    (python,) = SYSROOT.glob("usr/bin/python3.[0-9]*[0-9]")
    launcher = SYSROOT / "python"  # a command like any other, for CMake and for us
    launcher.write_text(f'#!/bin/sh\nexec qemu-aarch64 -cpu {PROCESSOR} -L {SYSROOT} {python} "$@"\n')
    launcher.chmod(0o755)


def version():
    (python,) = SYSROOT.glob("usr/bin/python3.[0-9]*[0-9]")
    return python.name.removeprefix("python")


def install_torch(constraints):
    print(f"fetching {TORCH} for aarch64", flush=True)
    pinned = HOME / "constraints.txt"
    pinned.write_text("".join(constraints))
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27, 17)]
    run([sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--root-user-action=ignore",
         "--progress-bar=off", "--target", SITE, "--no-deps", "--only-binary=:all:", *platforms,
         "--python-version", version(), "-c", pinned, TORCH, *NEEDED])  # fmt: skip


def build():
    native = HOME / "native"
    # Python's own configuration (pyconfig.h), without the C library's headers, which are beside it.
    includes = HOME / "include" / "aarch64-linux-gnu"
    includes.mkdir(parents=True, exist_ok=True)
    link = includes / f"python{version()}"
    if not link.is_symlink():
        link.symlink_to(SYSROOT / "usr/include/aarch64-linux-gnu" / link.name)
    run(["cmake", "-S", ROOT, "-B", native, "-Wno-dev", "-DCMAKE_BUILD_TYPE=Release", "-DCLP_CUDA=OFF",
         "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
         f"-DCMAKE_CXX_FLAGS=-isystem {includes.parent}", f"-DPython_EXECUTABLE={SYSROOT}/python",
         f"-DPython_INCLUDE_DIR={SYSROOT}/usr/include/python{version()}",
         f"-Dpybind11_DIR={SITE}/pybind11/share/cmake/pybind11"], stdout=subprocess.DEVNULL)  # fmt: skip
    print("compiling for aarch64", flush=True)
    run(["cmake", "--build", native, "--parallel", str(os.cpu_count())], stdout=subprocess.DEVNULL)
    (extension,) = native.glob("_native*aarch64*.so")
    shutil.rmtree(PACKAGE, ignore_errors=True)
    shutil.copytree(
        ROOT / "kernels/clp_kernels",
        PACKAGE / "clp_kernels",
        ignore=shutil.ignore_patterns("_native*", "__pycache__"),
    )
    shutil.copy(extension, PACKAGE / "clp_kernels")
    # Tests of kernels that cannot be loaded would be skipped.
    run([SYSROOT / "python", "-c", "import _native; _native.isa()"], cwd=PACKAGE / "clp_kernels")


def environment():
    paths = os.pathsep.join(map(str, (PACKAGE, SITE, ROOT)))
    ours = {
        "PYTHONPATH": paths,
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "CLP_KERNELS_ISA": "",
    }
    return {**os.environ, **ours}


def python(*arguments, **options):
    return subprocess.Popen([SYSROOT / "python", *arguments], cwd=ROOT, env=environment(), **options)


def test(arguments):
    """Both halves at once. pytest-xdist starts Python by sys.executable, which only qemu can run."""
    chosen = f"({CHOSEN}) and not ({' or '.join(LEFT_OUT.values())})"
    if arguments.k:
        chosen += f" and ({arguments.k})"
    options = (
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--durations=5",
        "-m",
        "not check and not traced",
        "-k",
        chosen,
    )
    halves = [
        python(
            *options,
            *(f"tests/kernels/test_{name}.py" for name in half),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for half in HALVES
    ]
    print("testing, emulated", flush=True)
    results = []
    for half in halves:
        print(half.communicate()[0], flush=True)
        results.append(half.returncode)
    # 5: no test of this half has the name that was asked for. Of both halves that is a mistake.
    return int(any(code not in (0, 5) for code in results) or set(results) == {5})


def why_not():
    """What keeps this machine from emulating aarch64, and the remedy; None where nothing does."""
    if platform.machine() == "aarch64":
        return "this machine is aarch64 itself: make test runs the kernels on it"
    missing = [name for name in COMMANDS if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} not found; on Debian: apt install {PACKAGES}"
    system = Path("/etc/os-release").read_text().splitlines()
    if "ID=debian" not in system:
        return "an aarch64 Python is fetched from Debian's servers, and this system is not Debian"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--or-skip", action="store_true")
    parser.add_argument("-k", metavar="TEXT")
    parser.add_argument("--run", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    reason = why_not()
    if reason and arguments.or_skip:
        print("clp-engine: the kernels are not tested for aarch64: " + reason)
        return 0
    if reason:
        fail(reason)
    constraints = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
        if not line.startswith(("torch", "triton", "#"))
    ]
    once(SYSROOT, (PYTHON, PROCESSOR, str(HOME)), unpack_python)
    once(SITE, (TORCH, NEEDED, constraints, version()), lambda: install_torch(constraints))
    build()
    return python(*arguments.run).wait() if arguments.run else test(arguments)


if __name__ == "__main__":
    sys.exit(main())
