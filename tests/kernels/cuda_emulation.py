"""Builds and calls the CUDA decode kernel's emulation on the CPU (cuda_on_cpu): the kernel as written, run by g++.

The compiled library is kept in the temporary directory under a name that holds what it was made from.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
HERE = Path(__file__).parent / "cuda_on_cpu"
DTYPES = {torch.bfloat16: 0, torch.float16: 1}
GUARD = 256  # elements around every buffer, NaN


class Call(ctypes.Structure):
    """clp::cuda::MultiLoraDecode."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "weight", "lora_a", "lora_b", "bias", "gate", "gate_index", "y", "workspace")
        ),
        *((name, ctypes.c_int64) for name in ("stride_x", "stride_weight", "stride_a", "stride_b")),
        *((name, ctypes.c_int) for name in ("rows", "n", "k", "rank", "groups")),
        ("gate_is_float", ctypes.c_bool),
        ("index_is_64", ctypes.c_bool),
    ]


def build(*flags: str, patch: dict[str, str] | None = None) -> Path:
    """The compiled emulation. patch: text of the kernel -> its replacement, to see that a mistake is noticed."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the emulation")
    kernel = (SOURCES / "multi_lora_decode.cuh").read_text()
    for old, new in (patch or {}).items():
        assert kernel.count(old) == 1, f"{old!r} is {kernel.count(old)} times in the kernel"
        kernel = kernel.replace(old, new)
    texts = [
        kernel,
        *(p.read_text() for p in sorted([*SOURCES.glob("*.*h*"), *HERE.iterdir()])),
        *flags,
        compiler,
    ]
    name = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    directory = Path(tempfile.gettempdir()) / f"clp-cuda-on-cpu-{os.getuid()}"
    binary = directory / name / "emulation"
    if binary.exists():
        return binary
    binary.parent.mkdir(parents=True, exist_ok=True)
    for source in SOURCES.glob("*.*h*"):
        shutil.copy(source, binary.parent)
    (binary.parent / "multi_lora_decode.cuh").write_text(kernel)
    made = binary.with_suffix(f".{os.getpid()}")
    command = [compiler, "-std=c++17", "-DCLP_CUDA_ON_CPU", *flags, f"-I{binary.parent}", f"-I{HERE}"]
    command += [str(HERE / "multi_lora_decode.cpp"), "-o", str(made)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    made.rename(binary)
    return binary


def library(**patch) -> ctypes.CDLL:
    native = ctypes.CDLL(str(build("-O2", "-fPIC", "-shared", **patch)))
    native.workspace.restype = ctypes.c_int64
    native.narrowed.restype = ctypes.c_uint16
    native.narrowed.argtypes = (ctypes.c_int, ctypes.c_float)
    return native


def guarded(tensor: torch.Tensor, row: int = 0, shift: int = 0) -> torch.Tensor:
    """A copy with NaN around it, and NaN between its rows where `row`, their distance, is more than their length."""
    rows, columns = (tensor.shape[0] if tensor.dim() > 1 else 1), tensor.shape[-1]
    row = max(row, columns)
    space = torch.full((rows * row + 2 * GUARD,), torch.nan, dtype=tensor.dtype)
    inside = space.as_strided((rows, columns), (row, 1), GUARD + shift)
    inside.copy_(tensor.reshape(rows, columns))
    return inside if tensor.dim() > 1 else inside[0]


def decode(
    native,
    x,
    weight,
    lora_a,
    lora_b,
    gate,
    bias=None,
    gate_index=None,
    *,
    sms=3,
    order=0,
    aligned=True,
    groups=None,
) -> torch.Tensor:
    """y.

    groups   the rows that gate is said to have, if fewer than it has
    aligned  the rows of x, weight and lora_a start at multiples of 16 bytes; otherwise where they fall
    """
    (rows, k), (n, rank) = x.shape, lora_b.shape
    groups = gate.shape[0] if groups is None else groups

    def placed(tensor):
        # 16 bytes are 8 elements; the allocator's memory is aligned to 64.
        return guarded(tensor, -(-k // 8) * 8) if aligned else guarded(tensor, shift=1)

    x, weight, lora_a = (placed(t) for t in (x, weight, lora_a))
    lora_b, gate = guarded(lora_b), guarded(gate)
    bias = None if bias is None else guarded(bias)
    y = torch.full((rows * n + 2 * GUARD,), torch.nan, dtype=x.dtype)
    size = native.workspace(rows, n, k, rank, sms)
    workspace = torch.full((size + 512 + 256,), 0xFF, dtype=torch.uint8)  # NaN in any format
    start = -workspace.data_ptr() % 256
    call = Call(
        *(0 if t is None else t.data_ptr() for t in (x, weight, lora_a, lora_b, bias, gate, gate_index)),
        y.data_ptr() + GUARD * 2,
        workspace.data_ptr() + start,
        *(t.stride(0) for t in (x, weight, lora_a, lora_b)),
        rows,
        n,
        k,
        rank,
        groups,
        gate.dtype is torch.float32,
        gate_index is not None and gate_index.dtype is torch.int64,
    )
    native.decode(ctypes.byref(call), DTYPES[x.dtype], sms, order)
    assert y[:GUARD].isnan().all() and y[-GUARD:].isnan().all(), "written outside of y"
    assert (workspace[:start] == 0xFF).all() and (workspace[start + size :] == 0xFF).all(), (
        "written outside of the workspace"
    )
    return y[GUARD:-GUARD].reshape(rows, n)
