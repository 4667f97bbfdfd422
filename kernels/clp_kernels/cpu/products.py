"""Matrix products that end in float32, whatever the operands' dtype, through the BLAS that torch has.

torch.mm of bfloat16 rounds its result to bfloat16: 2^-9 of a logit, which is tens of percent of a KL gradient near the
reference. Where oneDNN has bfloat16 kernels (AVX-512 or AMX; float32 accumulators inside) the product is done twice,
hi = bf16(ab) and lo = bf16(ab - hi) with the subtraction before the rounding, and hi + lo is right to 2^-17: on AMX
2.3 times faster than float32, which is what the operands are widened to elsewhere. (oneDNN's reduced-precision float32
mode is faster still, but it is one switch for the whole process, and would catch other threads' products.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def splits_bfloat16() -> bool:
    """Whether a bfloat16 product here is done as hi + lo; otherwise its operands are widened to float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Products:
    """out = a b, or out += a b, in float32; a and b both float32, or both bfloat16 where `splits_bfloat16()`."""

    def __init__(self) -> None:
        self._scratch: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def multiply(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        if a.dtype is torch.float32:
            torch.mm(a, b, out=out)
        else:
            hi, lo = self._hi_lo(a, b)
            out.copy_(hi).add_(lo)

    def accumulate(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        if a.dtype is torch.float32:
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
