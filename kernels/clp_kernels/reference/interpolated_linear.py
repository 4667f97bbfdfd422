"""interpolated_linear in plain torch, forward and backward, as blended products: the specification.

y = sum_i b_i * (x S_i^T) + x base^T + bias       with b_i (rows, 1), each row's coefficient of the i-th weight
dx = sum_i b_i * (dy S_i) + dy base               dS_i = (b_i * dy)^T x               d_bias = sum of dy
d_blend[g, i] = sum over the rows of g of  dy . (x S_i^T)  =  sum of  (dy S_i) . x

Products in x's dtype, their sums in float32 or wider.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clp_kernels.arguments import rows_of
from clp_kernels.reference.multi_lora import rows_of_gate, sum_over_rows


def unsupported(**call) -> str | None:
    return None


def forward(
    x: Tensor,
    stack: Tensor,
    blend: Tensor,
    base: Tensor | None,
    bias: Tensor | None,
    gate_index: Tensor | None,
) -> Tensor:
    flat = rows_of(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    coefficients = rows_of_gate(blend, gate_index, flat.shape[0]).to(wide)
    y = torch.zeros(flat.shape[0], stack.shape[1], dtype=wide, device=x.device)
    if base is not None:
        y += F.linear(flat, base)
    for i, weight in enumerate(stack):
        y.addcmul_(coefficients[:, i : i + 1], F.linear(flat, weight).to(wide))
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], stack.shape[1])


def backward(
    dy: Tensor,
    x: Tensor,
    stack: Tensor,
    blend: Tensor,
    base: Tensor | None,
    gate_index: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that `needs` asks for, of (x, stack, blend, bias), in this order."""
    need_x, need_stack, need_blend, need_bias = needs
    flat, dy = rows_of(x), rows_of(dy)
    wide = torch.promote_types(x.dtype, torch.float32)
    coefficients = rows_of_gate(blend, gate_index, flat.shape[0]).to(wide)
    dx = torch.zeros(flat.shape, dtype=wide, device=x.device)
    if base is not None and need_x:
        dx += dy @ base
    dots = torch.zeros(coefficients.shape, dtype=wide, device=x.device)
    d_stack = torch.empty_like(stack, memory_format=torch.contiguous_format) if need_stack else None
    for i, weight in enumerate(stack):
        column = coefficients[:, i : i + 1]
        if need_x or need_blend:
            product = (dy @ weight).to(wide)
            dx.addcmul_(column, product)
            dots[:, i] = (product * flat).sum(-1)
        if need_stack:
            torch.mm((dy * column).to(dy.dtype).t(), flat, out=d_stack[i])
    grads = []
    if need_x:
        grads.append(dx.to(x.dtype).view(x.shape))
    if need_stack:
        grads.append(d_stack)
    if need_blend:
        grads.append(sum_over_rows(dots, torch.ones_like(dots), blend, gate_index))
    if need_bias:
        grads.append(dy.sum(0))
    return grads
