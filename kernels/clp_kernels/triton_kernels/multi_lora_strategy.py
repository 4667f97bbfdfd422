"""How multi_lora_linear's products are done on a GPU, decided by shape: whose matrix product, how often dY is read, and on
which stream.

    product  "fused": one Triton kernel, the rank as further columns of the contraction; y is written once
             "blas":  torch's own product, then y += s B^T in place; never slower than the frozen layer's product but by
                      the second pass, which reads and writes y once more
    dy       "once":  one kernel feeds dS = dY B and dB = dY^T (h * gate) from each tile of dY; both leave float32
                      partial sums, 8 R (1 / columns + 1 / rows of a program) bytes an element of dY
             "twice": a kernel each, 2 bytes an element more
    stream   "side": dA, d_gate and a dB that reads dY for itself run on a stream beside dX; x A^T runs beside x W^T where
                     product is "blas"
             "same": one after another

    merge    "merged": the blend is added to the weight first, where all rows share one gate row and no gradient is asked for
             "factored": it is not

On a device that was measured (`tuned.py`) the nearest shape's winner is taken. Elsewhere the costs below decide: counts of
FLOPs and bytes, which assume how many FLOPs a device does in the time it moves a byte, and which part of the BLAS's rate the
Triton product reaches (clp_kernels.multi_lora has those of merging). Inside `batch_invariant()` the product is always fused,
as a BLAS chooses its order of summation by the number of rows.

The costs are close where it matters: at 4096 x 4096 with 8192 rows and a rank of 48, fused and blas differ by 0.2 % of a
product, once and twice by 3 % of the bytes. CLP_KERNELS_MULTI_LORA in the environment forces any of the words above for a
process ("blas,twice"), `force` inside a block, which comes first.

What "side" is worth, by count, at that shape: dX has 1024 tiles of 128 x 256 for 132 multiprocessors, whose last wave leaves a
quarter of them idle for an eighth of its 348 us. The rank gradients read 67 MB (once) or 134 MB (twice), 16 or 31 us at
4.3 TB/s, of which the idle multiprocessors take up to 69 MB. Forward and backward were 1.083 times the two products by bytes
and are predicted to be 1.06 times. Of a product below 50 us the two events cost the host as much as they save; it has one
stream.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping

import torch

from clp_kernels.backends import interpreting, is_batch_invariant
from clp_kernels.triton_kernels.tuning import Tunable

_WAYS = ("fused", "blas")
_LAYER = ("rows", "columns", "depth", "rank")
# By what base_product.family and launch.family say of the operands; from one device to another only by the costs below.
PRODUCT = Tunable(
    "multi_lora_product", _LAYER, {f: _WAYS for f in ("tma", "half", "plain", "ampere", "hip")}, shared=False
)
DY = Tunable(
    "multi_lora_dy",
    ("rows", "columns", "rank"),
    {f: ("once", "twice") for f in ("half", "plain")},
    shared=False,
)
MERGE = Tunable("multi_lora_merge", _LAYER, {"shared gate": ("merged", "factored")}, shared=False)

# FLOPs per byte in 16 bits: measured on an H200 (9); else of the vendors' data sheets (A100, B200, MI300X).
_INTENSITY = {"8": 153, "9": 184, "10": 281, "hip": 247}
_FLOAT32 = 1 / 13  # of a device's 16-bit rate that it reaches in float32
# Assumed; see above.
_EFFICIENCY = {"tma": 0.92, "half": 0.75, "ampere": 0.88, "hip": 0.75, "plain": 0.5}
_DECODE = 64  # rows up to which the product is a question of bandwidth and launches, and fused is best by construction

_SIDE_FROM = 4e10  # FLOPs of a product in 16 bits, about 50 us of an H200
SWITCH = "CLP_KERNELS_MULTI_LORA"
_KNOWN = {"product": _WAYS, "dy": ("once", "twice"), "stream": ("side", "same")}
_forced: list[dict[str, str]] = []


@contextlib.contextmanager
def force(*, product: str | None = None, dy: str | None = None, stream: str | None = None) -> Iterator[None]:
    """In the block "fused" or "blas", "once" or "twice", "side" or "same"; None leaves the choice as it is."""
    asked = {name: v for name, v in (("product", product), ("dy", dy), ("stream", stream)) if v is not None}
    for name, value in asked.items():
        if value not in _KNOWN[name]:
            raise ValueError(f"force: {name} is {value!r}; expected one of {_KNOWN[name]} or None")
    _forced.append((_forced[-1] if _forced else {}) | asked)
    try:
        yield
    finally:
        _forced.pop()


@functools.cache
def _switched(value: str) -> Mapping[str, str]:
    words = {word: name for name, known in _KNOWN.items() for word in known}
    asked = {}
    for word in filter(None, (part.strip() for part in value.split(","))):
        if word not in words or words[word] in asked:
            pairs = ", ".join(" or ".join(known) for known in _KNOWN.values())
            raise ValueError(
                f"{SWITCH}={value}: expected one of each pair at most, with commas between them: {pairs}"
            )
        asked[words[word]] = word
    return asked


def _asked(name: str) -> str | None:
    if _forced and name in _forced[-1]:
        return _forced[-1][name]
    return _switched(os.environ[SWITCH]).get(name) if SWITCH in os.environ else None


def stream(rows: int, columns: int, depth: int, dtype: torch.dtype, on_gpu: bool) -> str:
    """Whether what a product of (rows, depth) by (depth, columns) does not need runs beside it: "side", or "same"."""
    if not on_gpu:
        return "same"
    if (asked := _asked("stream")) is not None:
        return asked
    flops = 2.0 * rows * columns * depth / (_FLOAT32 if dtype is torch.float32 else 1.0)
    return "side" if flops >= _SIDE_FROM else "same"


def _intensity(major: int) -> float:
    return _INTENSITY["hip"] if torch.version.hip else _INTENSITY[str(min(max(major, 8), 10))]


def product(
    rows: int, depth: int, rank: int, dtype: torch.dtype, major: int, family: str, measured: str | None = None
) -> str:
    """How to do x W (rows, depth) with `rank` further columns, "fused" or "blas"; family as base_product.family has it.

    measured: what PRODUCT has for the shape. Otherwise, per output element: fused 2 (depth + rank) FLOPs at the kernel's rate,
    blas the same at full rate and two passes over it. The number of rows and columns cancels.
    """
    if (asked := _asked("product")) is not None:
        return asked
    if is_batch_invariant():
        return "fused"
    if measured is not None:
        return measured
    if interpreting() or rows <= _DECODE:
        return "fused"
    scale, size = (_FLOAT32, 4) if dtype is torch.float32 else (1.0, 2)
    flops = 2 * (depth + rank)
    fused = flops / _EFFICIENCY[family]
    blas = flops + (2 * size * _intensity(major) * scale if rank else 0)
    return "fused" if fused <= blas else "blas"


def dy(
    rank: int,
    possible: bool,
    blocks: int,
    pieces: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    measured: str | None = None,
) -> str:
    """How often to read dY (rows, columns), "once" or "twice": which was faster, or where `measured` is None moves fewer bytes.

    possible        whether there is a tile for "once"
    blocks, pieces  of the columns and of the rows that its programs have; each block leaves a (rows, rank) partial sum
                    of dS, each piece a (columns, rank) one of dB, written and read in float32
    """
    if (asked := _asked("dy")) is not None:
        return asked
    if is_batch_invariant() or not possible or dtype is torch.float32:
        return "twice"
    if measured is not None:
        return measured
    once = 2 * rows * columns + 8 * rank * (blocks * rows + pieces * columns)
    return "once" if once < 4 * rows * columns else "twice"
