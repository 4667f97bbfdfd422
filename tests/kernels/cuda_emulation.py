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


class Layer(ctypes.Structure):
    """clp::cuda::Layer."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "lora_a", "lora_b", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("stride_weight", "stride_a", "stride_b", "n")),
    ]


class Call(ctypes.Structure):
    """clp::cuda::MultiLoraDecode."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "gate", "gate_index", "workspace")),
        ("stride_x", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("rows", "k", "rank", "groups", "layers")),
        ("gate_is_float", ctypes.c_bool),
        ("index_is_64", ctypes.c_bool),
        ("layer", Layer * 3),
    ]

    @classmethod
    def of(cls, *fields):
        """From the fields in order, the number of layers left out and the fields of each layer at the end."""
        *first, gate_is_float, index_is_64, layers = fields
        return cls(
            *first, len(layers), gate_is_float, index_is_64, (Layer * 3)(*(Layer(*of) for of in layers))
        )


def workspace_bytes(native, rows, columns, k, rank, sms) -> int:
    return native.workspace(rows, (ctypes.c_int64 * len(columns))(*columns), len(columns), k, rank, sms)


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


def decode(native, x, weight, lora_a, lora_b, gate, bias=None, gate_index=None, **options) -> torch.Tensor:
    """y of one layer; options as for `decode_layers`."""
    return decode_layers(native, x, [(weight, lora_a, lora_b, bias)], gate, gate_index, **options)[0]


def decode_layers(
    native, x, layers, gate, gate_index=None, *, sms=3, order=0, aligned=True, groups=None
) -> list[torch.Tensor]:
    """y of each layer (weight, lora_a, lora_b, bias).

    groups   the rows that gate is said to have, if fewer than it has
    aligned  the rows of x, weight and lora_a start at multiples of 16 bytes; otherwise where they fall
    """
    (rows, k), rank = x.shape, layers[0][1].shape[0]
    groups = gate.shape[0] if groups is None else groups

    def placed(tensor):
        # 16 bytes are 8 elements; the allocator's memory is aligned to 64.
        return guarded(tensor, -(-k // 8) * 8) if aligned else guarded(tensor, shift=1)

    x, gate = placed(x), guarded(gate)
    layers = [
        (placed(w), placed(a), guarded(b), None if bias is None else guarded(bias))
        for w, a, b, bias in layers
    ]
    columns = [w.shape[0] for w, *_ in layers]
    ys = [torch.full((rows * n + 2 * GUARD,), torch.nan, dtype=x.dtype) for n in columns]
    size = workspace_bytes(native, rows, columns, k, rank, sms)
    workspace = torch.full((size + 512 + 256,), 0xFF, dtype=torch.uint8)  # NaN in any format
    start = -workspace.data_ptr() % 256

    def address(tensor):
        return 0 if tensor is None else tensor.data_ptr()

    call = Call.of(
        *map(address, (x, gate, gate_index)),
        workspace.data_ptr() + start,
        x.stride(0),
        rows,
        k,
        rank,
        groups,
        gate.dtype is torch.float32,
        gate_index is not None and gate_index.dtype is torch.int64,
        [
            (
                *map(address, (w, a, b, bias)),
                y.data_ptr() + GUARD * 2,
                w.stride(0),
                a.stride(0),
                b.stride(0),
                len(w),
            )
            for (w, a, b, bias), y in zip(layers, ys)
        ],
    )
    native.decode(ctypes.byref(call), DTYPES[x.dtype], sms, order)
    for y in ys:
        assert y[:GUARD].isnan().all() and y[-GUARD:].isnan().all(), "written outside of y"
    assert (workspace[:start] == 0xFF).all() and (workspace[start + size :] == 0xFF).all(), (
        "written outside of the workspace"
    )
    return [y[GUARD:-GUARD].reshape(rows, n) for y, n in zip(ys, columns)]
