"""multi_lora_linear in plain torch, forward and backward: the specification.

h = x A^T            y = x W^T + bias + (h * g) B^T
dS = dY B            dX = dY W + (dS * g) A
dA = (dS * g)^T X    dB = dY^T (h * g)    d_gate[group] = sum over the group's rows of dS * h
dW = dY^T X          d_bias = sum of dY

Operands are rounded to x's dtype: x, the weights, h * g and dS * g. Products and their sums are in float32 or wider, and a
result is rounded once. h is kept for backward in x's dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unsupported(**call) -> str | None:
    return None


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 or wider."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)


def rows_of_gate(gate: Tensor, gate_index: Tensor | None, rows: int) -> Tensor:
    """The gate row of every row of x: (rows, R)."""
    if gate_index is not None:
        return gate[gate_index.reshape(-1)]
    return gate if gate.shape[0] == rows else gate.repeat_interleave(rows // max(gate.shape[0], 1), 0)


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
    """-> y (..., N), h = x A^T (rows, R). Where keep_h is false, a back-end may return anything for h."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # not -1: K may be 0
    h = _times(flat, lora_a.t())
    gated = (h * rows_of_gate(gate, gate_index, flat.shape[0])).to(x.dtype)
    y = _times(flat, weight.t())
    if bias is not None:
        y = y + bias
    y = (y + _times(gated, lora_b.t())).to(x.dtype)
    return y.reshape(*x.shape[:-1], weight.shape[0]), h.to(x.dtype)


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
    """The gradients that `needs` asks for, of (x, weight, bias, lora_a, lora_b, gate), in this order.

    weight may be None where x's gradient is not asked for; x where neither weight's nor lora_a's is.
    """
    lead = dy.shape[:-1]
    rows = math.prod(lead)
    dy = dy.reshape(rows, dy.shape[-1])
    flat = None if x is None else x.reshape(rows, x.shape[-1])
    gate_rows = rows_of_gate(gate, gate_index, rows)
    ds = _times(dy, lora_b)
    scaled = (ds * gate_rows).to(dy.dtype)
    need_x, need_weight, need_bias, need_a, need_b, need_gate = needs
    grads = []
    if need_x:
        dx = (_times(dy, weight) + _times(scaled, lora_a)).to(dy.dtype)
        grads.append(dx.reshape(*lead, lora_a.shape[1]))
    if need_weight:
        grads.append(_times(dy.t(), flat).to(dy.dtype))
    if need_bias:
        grads.append(dy.sum(0))
    if need_a:
        grads.append(_times(scaled.t(), flat).to(dy.dtype))
    if need_b:
        grads.append(_times(dy.t(), (h * gate_rows).to(h.dtype)).to(dy.dtype))
    if need_gate:
        grads.append(sum_over_rows(ds, h, gate, gate_index))
    return grads


def sum_over_rows(ds: Tensor, h: Tensor, gate: Tensor, gate_index: Tensor | None) -> Tensor:
    """d_gate (G, R): dS * h summed over the rows that each gate row served, in float32 or wider."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    product = ds.to(wide) * h.to(wide)
    if gate_index is not None:
        total = product.new_zeros(gate.shape).index_add_(0, gate_index.reshape(-1), product)
    elif gate.shape[0] == 0:
        total = product.new_zeros(gate.shape)
    else:
        total = (
            product.reshape(gate.shape[0], -1, gate.shape[1]).sum(1)
            if product.numel()
            else product.new_zeros(gate.shape)
        )
    return total.to(gate.dtype)
