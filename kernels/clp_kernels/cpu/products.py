"""Matrix products that end in float32, whatever the operands' dtype: by the C++ kernels or the BLAS that torch has.

csrc/cpu/matmul.cpp multiplies as the instruction set does best. On AMX tiles a float32 product is six bfloat16 products of
exact parts, 1.6 times as fast as float32 BLAS with half its error (measured at 2048 x 1024 x 1024). With AMX or AVX-512 BF16 a
bfloat16 product keeps its float32 sums, which torch.mm rounds: 2^-9 of a logit is tens of percent of a KL gradient near the
reference. `torch.set_float32_matmul_precision` "high" and "medium" take fewer parts on tiles, as they do elsewhere in torch.
Without such instructions the float32 version is for `batch_invariant()` alone, as BLAS sums in an order that depends on the
number of rows; bfloat16 operands are then widened, and the product is float32's.

Tried and rejected: bfloat16 products by oneDNN, hi = bf16(ab) and lo = bf16(ab - hi). Where oneDNN rounds before it subtracts,
which depends on the processor, lo is lost with one to two digits of the KL. (Its reduced-precision float32 mode is one switch
for the whole process, and would catch other threads' products.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels import _native
from clp_kernels.backends import is_batch_invariant
from clp_kernels.cpu.dtypes import DTYPES

_PARTS = {"highest": 3, "high": 2, "medium": 1}
# Both operands are packed before they are multiplied, which takes rows and columns to pay: measured against MKL at a depth of
# 512, 64 rows of float32 break even at 4096 columns, 128 at 256. No BLAS gives float32 sums of bfloat16 operands.
_WORTH_PACKING = {torch.float32: 160, torch.bfloat16: 0}


def matmul_serves(dtype: torch.dtype, rows: int, columns: int) -> bool:
    """Whether a product of operands of this dtype goes to the C++ kernels, and not to torch's BLAS."""
    # The sizes first: asking the extension takes longer, and decoding asks often.
    return is_batch_invariant() or (
        min(rows, columns) >= _WORTH_PACKING[dtype] and _native.outruns_blas(DTYPES[dtype])
    )


def matmul(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    accumulate: bool = False,
    more: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """out = a b [+ a' b'] [+ bias], or out += that: a (m, k), b (k, n), more = (a', b'), bias (n,) and out (m, n) float32.

    Each operand contiguous along one of its dimensions; all of a and a' float32 or all bfloat16, and so b and b'.
    """
    count = 0 if more is None else more[0].shape[1]
    second = None if more is None or count == 0 else (_operand(more[0]), _operand(more[1].t()), count)
    parts = _PARTS[torch.get_float32_matmul_precision()]
    rows, columns = out.shape
    _native.matmul(_operand(a), _operand(b.t()), a.shape[1], second, rows, columns, 0 if bias is None else bias.data_ptr(),
                   out.data_ptr(), out.stride(0), accumulate, parts, torch.get_num_threads())  # fmt: skip
    return out


def _operand(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), DTYPES[x.dtype], x.stride(0), x.stride(1)


def along(x: Tensor) -> Tensor:
    """x, or a copy of it where neither of its two dimensions is contiguous (or one of them is repeated)."""
    row, column = x.stride()
    return x if (column == 1 and row > 0) or (row == 1 and column > 0) else x.contiguous()


def takes(dtype: torch.dtype) -> bool:
    """Whether `multiply` and `accumulate` take operands of the dtype as they are; those of others are widened to float32."""
    return dtype is torch.float32 or is_batch_invariant() or _native.outruns_blas(DTYPES[dtype])


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b in float32, by what is quickest: a (m, k) and b (k, n) of one dtype that `takes` names."""
    if matmul_serves(a.dtype, a.shape[0], b.shape[1]):
        matmul(a, b, out)
    else:
        torch.mm(a, b, out=out)


def accumulate(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a b, as `multiply`."""
    if matmul_serves(a.dtype, a.shape[0], b.shape[1]):
        matmul(a, b, out, accumulate=True)
    else:
        torch.addmm(out, a, b, out=out)
