"""csrc/cuda compiles for every GPU generation it is built for, within its registers, to the instructions meant."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).resolve().parents[2] / "csrc" / "cuda").glob("*.cu"))
TARGETS = ("80", "90a", "100")
NVCC = shutil.which("nvcc")
THREADS, REGISTERS = 256, 65536


def disassembler():
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton")
        found = triton.knobs.nvidia.cuobjdump.path
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(source, target) -> what ptxas says, and the machine code's file; each compiled once."""
    directory, made = tmp_path_factory.mktemp("cubin"), {}

    def compile(source, target):
        if NVCC is None:
            pytest.skip("there is no nvcc on the PATH")
        if (source, target) not in made:
            cubin = directory / f"{source.stem}.{target}.cubin"
            command = [
                NVCC,
                "-std=c++17",
                "-O3",
                f"-gencode=arch=compute_{target},code=sm_{target}",
                "-Xptxas",
                "-v",
            ]
            process = subprocess.run(
                [*command, "-cubin", source, "-o", cubin], capture_output=True, text=True
            )
            assert process.returncode == 0, process.stderr
            made[source, target] = process.stderr, cubin
        return made[source, target]

    return compile


def resources(report):
    """Kernel -> (registers, bytes of stack frame, of spill stores, of spill loads, of static shared memory)."""
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        numbers = [
            re.search(pattern, part)
            for pattern in (
                r"Used (\d+) registers",
                r"(\d+) bytes stack frame",
                r"(\d+) bytes spill stores",
                r"(\d+) bytes spill loads",
                r"(\d+) bytes smem",
            )
        ]
        found[part.split("'")[0]] = tuple(0 if n is None else int(n[1]) for n in numbers)
    return found


def test_a_report_with_spills_is_read_as_such():
    report = (
        "ptxas info    : Compiling entry function '_Z1kv' for 'sm_90a'\nptxas info    : Function properties for _Z1kv\n"
        "    24 bytes stack frame, 28 bytes spill stores, 76 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 64 bytes smem\n"
    )
    assert resources(report) == {"_Z1kv": (255, 24, 28, 76, 64)}


@pytest.mark.check
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_spills_no_stack_and_a_block_fits(compiled, source, target):
    report, _ = compiled(source, target)
    kernels = resources(report)
    assert len(kernels) == (0 if source.stem == "multi_lora_decode" else 9)
    assert "C7508" not in report and "warning" not in report
    for name, (registers, *local, shared) in kernels.items():
        assert registers * THREADS <= REGISTERS, f"{name}: {registers} registers"
        assert local == [0, 0, 0], f"{name}: stack frame, spill stores, spill loads of {local} bytes"
        # All of it is dynamic: its limit is tested with the emulation, and unsupported() compares it with the device's.
        assert shared == 0, f"{name}: {shared} bytes of static shared memory"


@pytest.mark.check
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "source", [s for s in SOURCES if s.stem != "multi_lora_decode"], ids=lambda path: path.stem
)
def test_tensor_cores_and_wide_copies(compiled, source, target):
    _, cubin = compiled(source, target)
    listing = subprocess.run(
        [disassembler(), "-sass", cubin], check=True, capture_output=True, text=True
    ).stdout
    functions = listing.split("Function : ")[1:]
    assert len(functions) == 9
    for text in functions:
        name = text.split()[0]
        assert re.search(r"\bHMMA\.16816\.F32", text), f"{name}: no tensor core instructions"
        assert "LDSM.16.M88" in text, f"{name}: no ldmatrix"
        assert not re.search(r"\b(LDL|STL)\b", text), f"{name}: local memory"
        if name.split("EEv")[0].endswith("ELb1E"):  # aligned
            assert re.search(r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128", text), (
                f"{name}: no 16-byte asynchronous copies"
            )
        # The sums of shared tiles.
        assert re.search(r"LDG\.E\.128", text), f"{name}: no 16-byte loads"
        assert re.search(r"STG\.E\.128", text), f"{name}: no 16-byte stores"
