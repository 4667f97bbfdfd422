"""Makes the checkout's virtual environment and installs clp-engine into it, once; says in plain words what is missing.

    python3 tools/environment.py [--venv .venv] [--constraints constraints.txt] [--own-torch] [--extras plot,test] [--peers]
    python3 tools/environment.py --venv .venv-vllm --vllm

Only the standard library, and syntax that old interpreters can read far enough to be told that they are too old.
--constraints: the file of the versions that are installed.
--own-torch: use the packages this interpreter already has (a GPU build of torch, say) instead of the pinned CPU ones.
--peers: also the libraries that tests/peers compares with.
--vllm: vLLM's CPU build and this package without its C++ kernels, which the plug-in does not use: nothing is compiled.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST = (3, 10)
# What the installed package depends on: a change of any of these installs again. Python sources are used in place.
INPUTS = ("pyproject.toml", "CMakeLists.txt", "csrc")
# So does another set of packages: the finder of an editable installation lists those that there were.
PACKAGES = ("clp_engine", "kernels")
VLLM = "tests/in_vllm/requirements.txt"
# What vLLM asks for and its CPU build does not load: their builds are for CUDA's torch.
NOT_FOR_CPUS = ("torchvision", "torchaudio", "torchcodec")
PEERS, PEERS_ALONE = "tests/peers/requirements.txt", "tests/peers/requirements-alone.txt"


def fail(message):
    sys.stderr.write("\nclp-engine: " + message + "\n")
    sys.exit(1)


def check_python():
    if sys.version_info < OLDEST:
        fail(
            "Python %d.%d or newer is needed, but %s is %d.%d. Run make with another one: make PYTHON=python3.11 ..."
            % (OLDEST + (sys.executable,) + tuple(sys.version_info[:2]))
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        fail(
            "this Python cannot make virtual environments. Install the missing part (Debian and Ubuntu: "
            "apt install python%d.%d-venv), or run make with another Python." % tuple(sys.version_info[:2])
        )


def check_compiler():
    wanted = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([wanted] if wanted else ["c++", "g++", "clang++"])):
        fail(
            "no C++ compiler was found%s. The CPU kernels are built from source here: install one (Debian and Ubuntu: "
            "apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or set CXX."
            % (" under the name in CXX, " + wanted if wanted else "")
        )


def fingerprint(options, inputs):
    digest = hashlib.sha256(repr((options, sys.version_info[:3], ROOT)).encode())
    for name in inputs:
        path = os.path.join(ROOT, name)
        files = (
            [path]
            if os.path.isfile(path)
            else sorted(os.path.join(folder, f) for folder, _, names in os.walk(path) for f in names)
        )
        for file in files:
            with open(file, "rb") as stream:
                digest.update(file.encode() + stream.read())
    return digest.hexdigest()


def packages():
    tops = [os.path.join(ROOT, top) for top in PACKAGES]
    found = [folder for top in tops for folder, _, names in os.walk(top) if "__init__.py" in names]
    return sorted(os.path.relpath(folder, ROOT) for folder in found)


def pip(python, constraints, arguments, verb="install"):
    # The output goes through as it comes, and is kept so that the cause of a failure can be told.
    environment = dict(os.environ)
    if constraints:
        # Of what is installed, and of what builds it: older versions of pip read the one name for both.
        environment.update(PIP_CONSTRAINT=constraints, PIP_BUILD_CONSTRAINT=constraints)
    command = [python, "-m", "pip", "--disable-pip-version-check", verb]
    command += (["--progress-bar", "off"] if verb == "install" else []) + arguments
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    kept = []
    for line in process.stdout:
        text = line.decode(errors="replace")
        kept.append(text)
        if (
            not text.startswith("Requirement already satisfied")
            and "is ignored: it is neither a file" not in text
        ):
            sys.stdout.write(text)
            sys.stdout.flush()
    if process.wait():
        explain("".join(kept))


def explain(output):
    if any(
        sign in output
        for sign in (
            "NewConnectionError",
            "Temporary failure in name resolution",
            "ConnectTimeout",
            "Failed to establish a new connection",
            "ProxyError",
            "Read timed out",
            "MaxRetryError",
        )
    ):
        fail(
            "the package index cannot be reached. Installing needs it once; check the network or pip's settings "
            "(pip config list), then run make again."
        )
    if "No matching distribution found" in output or "No space left on device" in output:
        wanted = [
            line
            for line in output.splitlines()
            if "No matching distribution" in line or "No space left" in line
        ][-1]
        fail(
            "installing failed: "
            + wanted.replace("ERROR: ", "")
            + ". Pinned versions are in constraints.txt; they are for CPython 3.11 and newer on Linux."
        )
    fail("installing failed; the reason is in the lines above.")


def once(folder, stamp, expected, install):
    # `install`, unless the environment says that this very thing was installed before.
    stamp = os.path.join(folder, stamp)
    if os.path.exists(stamp):
        with open(stamp) as stream:
            if stream.read() == expected:
                return
    install()
    with open(stamp, "w") as stream:
        stream.write(expected)


def main():
    check_python()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", default=".venv")
    parser.add_argument("--constraints", default="constraints.txt")
    parser.add_argument("--extras", default="plot,test")
    parser.add_argument("--own-torch", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--vllm", action="store_true")
    options = parser.parse_args()
    folder = os.path.join(ROOT, options.venv)
    python = os.path.join(folder, "bin", "python")
    constraints = None if options.own_torch else os.path.join(ROOT, options.constraints)

    def make():
        if not os.path.exists(python):
            print("making a virtual environment in %s" % options.venv)
            flags = ["--system-site-packages"] if options.own_torch else []
            if subprocess.call([sys.executable, "-m", "venv"] + flags + [folder]):
                fail("making the virtual environment failed; the reason is in the lines above.")

    def install_vllm():
        make()
        print("installing vLLM's CPU build (3.5 GB), and clp-engine without its kernels")
        pip(python, os.path.join(ROOT, VLLM), ["-r", VLLM])
        pip(python, None, ["--yes"] + list(NOT_FOR_CPUS), "uninstall")
        pip(python, os.path.join(ROOT, VLLM), ["--config-settings", "wheel.cmake=false", "-e", "."])

    def install():
        check_compiler()
        make()
        print("installing clp-engine and what it needs (a few minutes the first time)")
        pip(python, constraints, ["-e", ".[%s]" % options.extras])

    def install_peers():
        print("installing the libraries that clp-engine is compared with")
        pip(python, constraints, ["-r", PEERS])
        pip(python, constraints, ["--no-deps", "-r", PEERS_ALONE])

    chosen = [options.extras, options.own_torch, options.venv]
    inputs = INPUTS + (() if options.own_torch else (options.constraints,))
    if not os.path.exists(python):
        for stamp in ("clp-engine.installed", "clp-engine.peers", "clp-engine.vllm"):
            if os.path.exists(os.path.join(folder, stamp)):
                os.remove(os.path.join(folder, stamp))
    if options.vllm:
        once(
            folder,
            "clp-engine.vllm",
            fingerprint((chosen, packages()), ("pyproject.toml", VLLM)),
            install_vllm,
        )
        return
    once(folder, "clp-engine.installed", fingerprint((chosen, packages()), inputs), install)
    if options.peers:
        once(folder, "clp-engine.peers", fingerprint(chosen, (PEERS, PEERS_ALONE)), install_peers)


if __name__ == "__main__":
    main()
