"""Matrix products that end in float32, whatever the operands' dtype: by the C++ kernels or the BLAS that torch has.

csrc/cpu/matmul.cpp has two versions. On AMX tiles a float32 product is six bfloat16 products of exact parts, 1.6 times as fast
as float32 BLAS with half its error (measured at 2048 x 1024 x 1024), and a bfloat16 product keeps its float32 sums, which
torch.mm rounds: 2^-9 of a logit is tens of percent of a KL gradient near the reference. `torch.set_float32_matmul_precision`
"high" and "medium" take fewer parts, as they do elsewhere in torch. The other version, plain float32, is for
`batch_invariant()` alone, as BLAS sums in an order that depends on the number of rows.

Without tiles, bfloat16 products are done twice where oneDNN has kernels for them (AVX-512 BF16), hi = bf16(ab) and
lo = bf16(ab - hi) with the subtraction before the rounding, and hi + lo is right to 2^-17; elsewhere the operands are widened.
(oneDNN's reduced-precision float32 mode is one switch for the whole process, and would catch other threads' products.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels import _native
from clp_kernels.backends import is_batch_invariant
from clp_kernels.cpu.dtypes import DTYPES

_PARTS = {"highest": 3, "high": 2, "medium": 1}
# Both operands are packed before they are multiplied, which takes rows and columns to pay: measured against MKL at a depth of
# 512, 64 rows of float32 break even at 4096 columns, 128 at 256. A bfloat16 product replaces two of oneDNN's.
_WORTH_PACKING = {torch.float32: 160, torch.bfloat16: 16}


def matmul_serves(dtype: torch.dtype, rows: int, columns: int) -> bool:
    """Whether a product of operands of this dtype goes to the C++ kernels, and not to torch's BLAS."""
    # The sizes first: asking the extension takes longer, and decoding asks often.
    return is_batch_invariant() or (min(rows, columns) >= _WORTH_PACKING[dtype] and _native.has_tiles())


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


def splits_bfloat16() -> bool:
    """Whether torch's bfloat16 product here is done as hi + lo; otherwise its operands are widened to float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Products:
    """out = a b, or out += a b, in float32; a and b both float32, or both bfloat16 where `takes(bfloat16)`."""

    def __init__(self) -> None:
        self._scratch: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @staticmethod
    def takes(dtype: torch.dtype) -> bool:
        """Whether operands of the dtype are multiplied as they are."""
        return dtype is torch.float32 or _native.has_tiles() or is_batch_invariant() or splits_bfloat16()

    def multiply(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        if matmul_serves(a.dtype, a.shape[0], b.shape[1]):
            matmul(a, b, out)
        elif a.dtype is torch.float32:
            torch.mm(a, b, out=out)
        else:
            hi, lo = self._hi_lo(a, b)
            out.copy_(hi).add_(lo)

    def accumulate(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        if matmul_serves(a.dtype, a.shape[0], b.shape[1]):
            matmul(a, b, out, accumulate=True)
        elif a.dtype is torch.float32:
            torch.addmm(out, a, b, out=out)
        else:
            hi, lo = self._hi_lo(a, b)
            out.add_(hi).add_(lo)

    def _hi_lo(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        shape = (a.shape[0], b.shape[1])
        if shape not in self._scratch:
            self._scratch[shape] = (a.new_empty(shape), a.new_empty(shape))
        hi, lo = self._scratch[shape]
        torch.mm(a, b, out=hi)
        torch.addmm(hi, a, b, beta=-1, out=lo)
        return hi, lo
