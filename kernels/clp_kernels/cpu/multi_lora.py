"""multi_lora_linear on the CPU: the products of `cpu.products`, and C++ for everything between them.

The low rank is R more columns of the base product's contraction where that product is csrc/cpu/matmul.cpp's (float32 on AMX
tiles, and everything in batch-invariant mode), and accumulates into it (`addmm_`) where it is BLAS's: no further pass over
(rows, N) either way. Products whose result is skinny are BLAS's, which does not copy its operands for them. The gate is
applied, or the backward's three row-wise results are made, in one pass over (rows, R).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clp_kernels import _native
from clp_kernels.backends import is_batch_invariant
from clp_kernels.cpu.dtypes import DTYPES
from clp_kernels.cpu.dtypes import unsupported as unsupported
from clp_kernels.cpu.products import along, matmul, matmul_serves

_SERIAL = 1 << 15  # elements of (rows, R) that one thread handles sooner than two would start


def _gate_arguments(
    gate: Tensor, gate_index: Tensor | None, rows: int
) -> tuple[tuple[int, ...], tuple[Tensor | None, ...]]:
    """The native call's last arguments, and the tensors to keep alive while it runs."""
    gate = gate.contiguous()
    if gate_index is not None:
        gate_index = gate_index.reshape(-1).to(torch.int64).contiguous()
    groups, rank = gate.shape
    threads = torch.get_num_threads() if rows * rank > _SERIAL else 1
    address = 0 if gate_index is None else gate_index.data_ptr()
    return (gate.data_ptr(), DTYPES[gate.dtype], address, groups, rows, rank, threads), (gate, gate_index)


def _own_product(dtype: torch.dtype, rows: int, columns: int) -> bool:
    """Whether the large products are matmul.cpp's. Those of bfloat16 end in bfloat16, which oneDNN does in one pass."""
    return matmul_serves(dtype, rows, columns) if dtype is torch.float32 else is_batch_invariant()


def _product(
    a: Tensor, b: Tensor, more: tuple[Tensor, Tensor] | None = None, bias: Tensor | None = None
) -> Tensor:
    """a b [+ a' b'] [+ bias] in a's dtype, by matmul.cpp."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32)
    if more is not None:
        more = along(more[0]), along(more[1])
    matmul(along(a), along(b), out, more=more, bias=None if bias is None else bias.float().contiguous())
    return out.to(a.dtype)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    gate_index: Tensor | None,
    keep_h: bool = True,
) -> tuple[Tensor, Tensor]:
    """As reference.multi_lora.forward; without keep_h, h is overwritten by h * gate."""
    flat = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    own = _own_product(x.dtype, flat.shape[0], weight.shape[0])
    if not own:
        y = F.linear(flat, weight, bias)
    h = _product(flat, lora_a.t()) if is_batch_invariant() else F.linear(flat, lora_a)
    gated = None
    if h.numel():
        gated = torch.empty_like(h) if keep_h else h
        arguments, alive = _gate_arguments(gate, gate_index, h.shape[0])
        _native.apply_gate(h.data_ptr(), gated.data_ptr(), DTYPES[h.dtype], *arguments)
        del alive
    if own:
        y = _product(flat, weight.t(), None if gated is None else (gated, lora_b.t()), bias)
    elif gated is not None:
        y.addmm_(gated, lora_b.t())
    return (y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])), h


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    gate_index: Tensor | None,
    h: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """As reference.multi_lora.backward."""
    lead = dy.shape[:-1]
    rows = math.prod(lead)  # not -1 in the reshape: N may be 0
    dy = dy.reshape(rows, dy.shape[-1])
    flat = None if x is None else x.reshape(rows, x.shape[-1])
    need_x, need_weight, need_bias, need_a, need_b, need_gate = needs
    scaled = _product(dy, lora_b) if is_batch_invariant() else torch.mm(dy, lora_b)
    gated = torch.empty_like(h) if need_b else None
    d_gate = torch.zeros(gate.shape, dtype=torch.float32) if need_gate else None
    if scaled.numel():
        arguments, alive = _gate_arguments(gate, gate_index, rows)
        _native.gate_backward(
            h.data_ptr(),
            scaled.data_ptr(),
            gated.data_ptr() if need_b else 0,
            scaled.data_ptr(),
            d_gate.data_ptr() if need_gate else 0,
            DTYPES[h.dtype],
            *arguments,
        )
        del alive
    grads = []
    if need_x:
        if _own_product(dy.dtype, rows, lora_a.shape[1]):
            dx = _product(dy, weight, (scaled, lora_a))
        else:
            dx = torch.mm(dy, weight).addmm_(scaled, lora_a)
        grads.append(dx.view(*lead, lora_a.shape[1]))
    if need_weight:
        own = _own_product(dy.dtype, dy.shape[1], flat.shape[1])
        grads.append(_product(dy.t(), flat) if own else torch.mm(dy.t(), flat))
    if need_bias:
        grads.append(dy.sum(0))
    if need_a:
        grads.append(torch.mm(scaled.t(), flat))
    if need_b:
        grads.append(torch.mm(dy.t(), gated))
    if need_gate:
        grads.append(d_gate.to(gate.dtype))
    return grads
