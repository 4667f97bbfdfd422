"""interpolated_linear in plain torch, forward and backward, as blended products: the specification.

y = sum_i b_i * (x S_i^T) + x base^T + bias       with b_i (rows, 1), each row's coefficient of the i-th weight
dx = sum_i b_i * (dy S_i) + dy base               dS_i = (b_i * dy)^T x               d_bias = sum of dy
d_blend[g, i] = sum over the rows of g of  dy . (x S_i^T)  =  sum of  (dy S_i) . x

Products and their sums in float32 or wider; `in_dtype` is for back-ends that take their products from here, in x's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clp_kernels.arguments import rows_of
from clp_kernels.reference.multi_lora import rows_of_gate, sum_over_rows


def unsupported(**call) -> str | None:
    return None


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 or wider."""
    wide = torch.promote_types(b.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)


def in_dtype(a: Tensor, b: Tensor) -> Tensor:
    """a b as torch multiplies in b's dtype."""
    return a.to(b.dtype) @ b


def forward(
    x: Tensor,
    stack: Tensor,
    blend: Tensor,
    base: Tensor | None,
    bias: Tensor | None,
    gate_index: Tensor | None,
    times: Callable[[Tensor, Tensor], Tensor] = _times,
) -> Tensor:
    flat = rows_of(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    coefficients = rows_of_gate(blend, gate_index, flat.shape[0]).to(wide)
    y = torch.zeros(flat.shape[0], stack.shape[1], dtype=wide, device=x.device)
    if base is not None:
        y += times(flat, base.t())
    for i, weight in enumerate(stack):
        y.addcmul_(coefficients[:, i : i + 1], times(flat, weight.t()).to(wide))
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
    times: Callable[[Tensor, Tensor], Tensor] = _times,
) -> list[Tensor]:
    """The gradients that `needs` asks for, of (x, stack, blend, bias), in this order."""
    need_x, need_stack, need_blend, need_bias = needs
    flat, dy = rows_of(x), rows_of(dy)
    wide = torch.promote_types(x.dtype, torch.float32)
    coefficients = rows_of_gate(blend, gate_index, flat.shape[0]).to(wide)
    dx = torch.zeros(flat.shape, dtype=wide, device=x.device)
    if base is not None and need_x:
        dx += times(dy, base)
    dots = torch.zeros(coefficients.shape, dtype=wide, device=x.device)
    d_stack = torch.empty_like(stack, memory_format=torch.contiguous_format) if need_stack else None
    for i, weight in enumerate(stack):
        column = coefficients[:, i : i + 1]
        if need_x or need_blend:
            product = times(dy, weight).to(wide)
            dx.addcmul_(column, product)
            dots[:, i] = (product * flat).sum(-1)
        if need_stack:
            d_stack[i] = times((dy * column).t(), flat)
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
