"""No kernel touches memory outside its operands, leaves any of its results unwritten, or does what C++ leaves undefined.

The C++ kernels run once with AddressSanitizer and UndefinedBehaviorSanitizer compiled in, and once, as they are installed,
with every tensor between pages that may not be touched. Both are processes of their own. The sanitised one runs torch
too, with the sanitiser's library preloaded: start-up takes three seconds, and sizes and addresses then come from the
Python that computes them in earnest. Triton's interpreter runs between such pages, and between margins of NaN.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from guarded import Margins

from bench.calls import every_call

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(*command, **environment):
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=HERE)


def sanitized_extension(cache):
    """clp_kernels._native with both sanitisers in it, built anew where its sources have changed."""
    pybind11 = pytest.importorskip("pybind11")
    environment = {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    cmake = shutil.which("cmake", path=environment["PATH"])
    if cmake is None:
        pytest.skip("cmake is not installed")
    sources = [ROOT / "CMakeLists.txt", *sorted((ROOT / "csrc").rglob("*.?pp"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    directory = cache / digest
    if not list(directory.glob("_native*.so")):
        shutil.rmtree(cache)
        generator = ("-G", "Ninja") if shutil.which("ninja", path=environment["PATH"]) else ()
        for command in (
            (cmake, "-S", ROOT, "-B", directory, *generator, "-DCLP_SANITIZE=address,undefined",
             f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
            (cmake, "--build", directory),
        ):  # fmt: skip
            process = run(*command, **environment)
            assert process.returncode == 0, process.stdout + process.stderr
    (extension,) = directory.glob("_native*.so")
    return extension


def assert_passed(process, calls):
    assert process.returncode == 0, process.stderr[-6000:]
    assert int(process.stdout) > calls


@pytest.mark.check
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="preloads the sanitiser's library as Linux does"
)
def test_sanitizers_find_nothing(request):
    # The C++ runtime too: AddressSanitizer looks for __cxa_throw at its start, and without it aborts at the first exception.
    found = [
        run(os.environ.get("CXX", "c++"), f"-print-file-name={name}").stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(map(os.path.isabs, found)):
        pytest.skip("the compiler has no shared AddressSanitizer library")
    extension = sanitized_extension(request.config.cache.mkdir("sanitized"))
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    process = run(sys.executable, "drive.py", "sanitized", extension, LD_PRELOAD=" ".join(found), **options)
    assert_passed(process, 800)


@pytest.mark.check
@pytest.mark.skipif(os.name != "posix", reason="protects pages with mprotect")
def test_pages_around_every_tensor_are_not_touched():
    assert_passed(run(sys.executable, "drive.py", "guarded"), 800)


@pytest.mark.check
@pytest.mark.skipif(os.name != "posix", reason="protects pages with mprotect")
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
def test_pages_around_every_tensor_are_not_touched_by_triton():
    pytest.importorskip("triton")
    assert_passed(run(sys.executable, "drive.py", "guarded-triton", TRITON_INTERPRET="1"), 200)


@pytest.mark.check
@pytest.mark.skipif(os.name != "posix", reason="protects pages with mprotect")
@pytest.mark.parametrize("at_end, offset", [(True, 12), (False, -1)])
def test_a_touched_page_ends_the_process(at_end, offset):
    code = (
        "import ctypes, torch\n"
        "from guarded import Pages\n"
        f"with Pages(at_end={at_end}): t = torch.zeros(3)\n"
        "print(t.sum().item(), flush=True)\n"
        f"ctypes.string_at(t.data_ptr() + {offset}, 1)"
    )
    process = run(sys.executable, "-c", code)
    assert process.stdout == "0.0\n" and process.returncode == -signal.SIGSEGV


@pytest.mark.check
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("op", ["multi_lora_linear", "linear_logprob", "logits_logprob", "sample_tokens"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
def test_margins_around_every_tensor_are_not_touched(backend, op):
    for label, call in every_call(torch.float32, large=False, thin=7):
        if not label.startswith(op):
            continue
        with Margins() as margins:
            results = call()
        assert all(result.isfinite().all() for result in results), label
        margins.check()


def test_margins_show_what_was_read_and_what_was_written():
    with Margins() as margins:
        inside = torch.zeros(3)
    around = inside.as_strided((5,), (1,), inside.storage_offset() - 1)
    assert around.sum().isnan() and inside.sum() == 0
    margins.check()
    around[4] = 0
    with pytest.raises(AssertionError, match="written outside"):
        margins.check()
