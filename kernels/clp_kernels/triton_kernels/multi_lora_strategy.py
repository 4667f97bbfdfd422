"""How multi_lora_linear's products are done on a GPU, decided by shape: whose matrix product, and how often dY is read.

    product  "fused": one Triton kernel, the rank as further columns of the contraction; y is written once
             "blas":  torch's own product, then y += s B^T in place; never slower than the frozen layer's product but by
                      the second pass, which reads and writes y once more
    dy       "once":  one kernel feeds dS = dY B and dB = dY^T (h * gate) from each tile of dY; both leave float32
                      partial sums, 8 R (1 / columns + 1 / rows of a program) bytes an element of dY
             "twice": a kernel each, 2 bytes an element more

    merge    "merged": the blend is added to the weight first, where all rows share one gate row and no gradient is asked for
             "factored": it is not

On a device that was measured (`tuned.py`) the nearest shape's winner is taken. Elsewhere the costs below decide: counts of
FLOPs and bytes, which assume how many FLOPs a device does in the time it moves a byte, and which part of the BLAS's rate the
Triton product reaches (clp_kernels.multi_lora has those of merging). Inside `batch_invariant()` the product is always fused,
as a BLAS chooses its order of summation by the number of rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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

_forced: list[dict[str, str | None]] = []


@contextlib.contextmanager
def force(*, product: str | None = None, dy: str | None = None) -> Iterator[None]:
    """For tests and benchmarks: "fused" or "blas", "once" or "twice", in the block; None leaves the choice as it is."""
    for name, value, known in (("product", product, ("fused", "blas")), ("dy", dy, ("once", "twice"))):
        if value is not None and value not in known:
            raise ValueError(f"force: {name} is {value!r}; expected one of {known} or None")
    outer = _forced[-1] if _forced else {}
    _forced.append({"product": product or outer.get("product"), "dy": dy or outer.get("dy")})
    try:
        yield
    finally:
        _forced.pop()


def _asked(name: str) -> str | None:
    return _forced[-1][name] if _forced else None


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
