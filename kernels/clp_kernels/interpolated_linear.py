"""interpolated_linear: a linear layer whose whole weight is blended per row (full-weight conditioning).

    y_row = x_row (base + sum_i blend[g, i] stack_i)^T + bias,  g the row's row of `blend`

A back-end chooses between two ways to compute it, with the cost model of row_groups.py:

    blended weights     the rows of one blend share one matrix product with the weight blended for them. It takes as many FLOPs
                        as the frozen layer, and one write and read of a weight for each blend. For many rows per blend.
    blended products    y = sum_i blend_i * (x stack_i^T). It takes M times the FLOPs, and reads the stack once for any number
                        of blends. For few rows per blend, above all for decoding with a blend for each sequence.

Only the inputs are kept for the backward pass. Blended weights are made again, since keeping them would take G times the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels.arguments import cast, describe, explain_gate, gate_fits, not_a_view, refuse_wrapped
from clp_kernels.backends import plain_eager, select
from clp_kernels.registration import differentiable, register

_TABLE = {
    "reference": "clp_kernels.reference.interpolated_linear",
    "cpu": "clp_kernels.cpu.interpolated_linear",
    "triton": "clp_kernels.triton_kernels.interpolated_linear",
}
_OP = "interpolated_linear"


def interpolated_linear(
    x: Tensor,
    stack: Tensor,
    blend: Tensor,
    *,
    base: Tensor | None = None,
    bias: Tensor | None = None,
    gate_index: Tensor | None = None,
) -> Tensor:
    """y_row = x_row (base + sum_i blend[g, i] stack_i)^T + bias, with g each row's own row of `blend`.

    x           (..., K); the product of its leading dimensions is `rows`
    stack       (M, N, K): the weights, or the changes to `base`, of M models
    blend       (G, M), in x's dtype or float32; any coefficients
    base        (N, K) or None: a frozen weight with coefficient 1, without a gradient. As one more entry of the stack it would
                have to be copied next to the deltas, and would get an unwanted gradient
    bias        (N,) or None
    gate_index  the blend row of each row of x, int64 or int32, (rows,) or x's leading shape. None if G is 1, `rows`,
                or x's first dimension (a blend row then serves all positions of its sequence), as in multi_lora_linear
    returns     (..., N), contiguous, in x's dtype

    Gradients reach x, stack, blend (summed over the rows that a blend row served) and bias. There are no second derivatives.
    Products are in x's dtype. A blended weight is summed in float32 and rounded to x's dtype once. Blended products are summed
    in float32. Under autocast every floating-point argument but the blend is cast to the autocast dtype.
    With a gate_index on a GPU, blended weights need the number of rows of each blend on the host, which waits for the
    device. Without a gate_index, or with blended products, the host does not wait.

    Raises ValueError (shapes, devices), TypeError (dtypes), IndexError (a gate_index out of range, on a CPU). On a GPU a row
    with such a gate_index becomes NaN.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, stack, base, bias = (cast(tensor, dtype) for tensor in (x, stack, base, bias))
    _check(x, stack, blend, base, bias, gate_index)
    given = (stack, blend) if base is None else (stack, blend, base)
    if not plain_eager(x, *given):
        refuse_wrapped(_OP, x=x, stack=stack, blend=blend, base=base, bias=bias)
        return torch.ops.clp_kernels.interpolated_linear(x, stack, blend, base, bias, gate_index)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or stack.requires_grad
        or blend.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return _Eager.apply(x, stack, blend, base, bias, gate_index)
    return _forward(x, stack, blend, base, bias, gate_index)


def _check(x, stack, blend, base, bias, gate_index) -> None:
    if stack.dim() != 3 or stack.shape[0] == 0:
        raise ValueError(f"{_OP}: stack is {describe(stack)}; expected (M, N, K) with M > 0")
    models, out_features, in_features = stack.shape
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(
            f"{_OP}: x is {describe(x)}; expected (..., {in_features}) to go with stack {tuple(stack.shape)}"
        )
    if blend.dim() != 2 or blend.shape[1] != models:
        raise ValueError(
            f"{_OP}: blend is {describe(blend)}; expected (G, {models}), a column for each weight of the stack"
        )
    for name, tensor, shape in (("base", base, (out_features, in_features)), ("bias", bias, (out_features,))):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{_OP}: {name} is {describe(tensor)}; expected {shape} to go with stack {tuple(stack.shape)}"
            )
    if not x.dtype.is_floating_point:
        raise TypeError(f"{_OP}: x is {x.dtype}; expected a floating-point dtype")
    for name, tensor in (("stack", stack), ("base", base), ("bias", bias)):
        if tensor is not None and tensor.dtype is not x.dtype:
            raise TypeError(
                f"{_OP}: {name} is {tensor.dtype} and x is {x.dtype}; expected one dtype: "
                f"cast with .to({x.dtype}) (gradients flow through it), or run under torch.autocast"
            )
    if blend.dtype is not x.dtype and blend.dtype is not torch.float32:
        raise TypeError(f"{_OP}: blend is {blend.dtype}; expected x's dtype {x.dtype} or torch.float32")
    for name, tensor in (
        ("stack", stack),
        ("blend", blend),
        ("base", base),
        ("bias", bias),
        ("gate_index", gate_index),
    ):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{_OP}: {name} is on {tensor.device} and x on {x.device}; expected one device")
    if base is not None and base.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{_OP}: base asks for a gradient and gets none; give base.detach(), or make it one of the stack"
        )
    if not gate_fits(x.shape, blend.shape[0], gate_index):
        explain_gate(_OP, "blend", x, blend, gate_index)


def _forward(x, stack, blend, base, bias, gate_index):
    module = select(_OP, _TABLE, x.device, dtype=x.dtype)
    return module.forward(x, stack, blend, base, bias, gate_index)


def _backward(dy, x, stack, blend, base, gate_index, needs):
    module = select(_OP, _TABLE, dy.device, dtype=dy.dtype)
    return module.backward(dy, x, stack, blend, base, gate_index, needs)


def _fake_forward(x, stack, blend, base, bias, gate_index):
    return x.new_empty(*x.shape[:-1], stack.shape[1])


def _fake_backward(dy, x, stack, blend, base, gate_index, needs):
    wanted = [tensor for tensor, need in zip((x, stack, blend), needs) if need]
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in wanted]
    return grads + [dy.new_empty(dy.shape[-1])] if needs[3] else grads


def _setup_context(ctx, inputs, output):
    x, stack, blend, base, bias, gate_index = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, stack, blend, base, gate_index)


def _autograd_backward(ctx, dy):
    if dy is None:
        return (None,) * 6
    need_x, need_stack, need_blend, _, need_bias, _ = ctx.needs_input_grad
    needs = [need_x, need_stack, need_blend, need_bias]
    grads = iter(torch.ops.clp_kernels.interpolated_linear_backward(dy, *ctx.saved_tensors, needs))
    dx, d_stack, d_blend, d_bias = (next(grads) if need else None for need in needs)
    return dx, d_stack, d_blend, None, d_bias, None


register(
    "interpolated_linear(Tensor x, Tensor stack, Tensor blend, Tensor? base, Tensor? bias, Tensor? gate_index) "
    "-> Tensor",
    _forward,
    _fake_forward,
)
register(
    "interpolated_linear_backward(Tensor dy, Tensor x, Tensor stack, Tensor blend, Tensor? base, "
    "Tensor? gate_index, bool[4] needs) -> Tensor[]",
    _backward,
    _fake_backward,
)
differentiable(
    "interpolated_linear",
    _autograd_backward,
    _setup_context,
    instead="torch.nn.functional.linear with the weight that clp_kernels.interpolate makes, which has them",
)


class _Eager(torch.autograd.Function):
    """The registered op's autograd without the dispatcher."""

    @staticmethod
    def forward(*arguments):
        return not_a_view(_forward(*arguments))

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_autograd_backward)
