"""prefix_attention: causal attention over packed sequences. Several sequences may continue one: completions, their prompt.

    z_ij = scale * q_i . k_j                    [ -> softcap * tanh(z_ij / softcap) ]
    out_i = sum_j softmax_j(z_ij) v_j           over the tokens j of i's sequence up to i itself, and all of its parent's

Attention usually gets a padded group of completions of one prompt, each with a copy of the prompt's keys and values. Here the
row contains a prompt's tokens once. They attend once, and their keys and values are read, and get their gradient, once for all
completions. With Hq heads of size D and e bytes an element, the least work is 4 D Hq FLOPs for each pair (i, j) forward and
8 D Hq backward (10 D Hq if z is recomputed), and 2 e N D (Hq + Hkv) bytes forward and twice that backward.

Beside inputs and output, only the log of the sum of exponentials, (N, Hq), is kept for the backward pass. On CUDA devices
torch's flex_attention serves, which has an autograd of its own: `triton_kernels/prefix_attention.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels.arguments import cast, describe, refuse_wrapped
from clp_kernels.backends import plain_eager, select
from clp_kernels.prefix_layout import PrefixLayout
from clp_kernels.registration import differentiable, register

_TABLE = {
    "reference": "clp_kernels.reference.prefix_attention",
    "cpu": "clp_kernels.cpu.prefix_attention",
    "triton": "clp_kernels.triton_kernels.prefix_attention",
}
_OP = "prefix_attention"


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """out_i = sum_j softmax_j(scale q_i . k_j) v_j, j over i's own sequence up to i and the whole of its parent.

    q        (N, Hq, D), in any strides (a transposed (1, Hq, N, D) view costs nothing if D is dense)
    k, v     (N, Hkv, D), Hq a multiple of Hkv: query head h attends to head h // (Hq / Hkv)
    layout   the sequence of each token, and the sequence that each sequence continues
    scale    None means D ** -0.5
    softcap  scores become softcap * tanh(score / softcap); None leaves them unchanged
    window   a query sees only keys at positions above its own minus window. Positions continue from the parent: a completion's
             first token has the position len(parent). None: all
    returns  (N, Hq, D), contiguous, in q's dtype

    Gradients reach q, k and v. There are no second derivatives. Scores, softmax and sums are in float32 (float64 for float64).
    Under autocast q, k and v are cast to the autocast dtype.

    On a CPU a sequence and its continuations have the same bits whatever else is in the row, and for any number of threads.

    Raises ValueError (shapes, devices, options), TypeError (dtypes).
    """
    refuse_wrapped(_OP, q=q, k=k, v=v)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = cast(q, dtype), cast(k, dtype), cast(v, dtype)
    _check(q, k, v, layout, softcap, window)
    scale = float(q.shape[2]) ** -0.5 if scale is None else float(scale)
    if q.device.type == "cuda":
        module = select(_OP, _TABLE, q.device, dtype=q.dtype, head_dim=q.shape[2])
        if hasattr(module, "attention"):
            return module.attention(q, k, v, layout, scale, softcap, window)
    arguments = (q, k, v, layout.starts, layout.parents, scale, softcap, window)
    if not plain_eager(q, k, v):
        return torch.ops.clp_kernels.prefix_attention(*arguments)[0]
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Eager.apply(*arguments)[0]
    return _forward(*arguments)[0]


def _check(q, k, v, layout, softcap, window) -> None:
    if q.dim() != 3 or q.shape[2] == 0:
        raise ValueError(f"{_OP}: q is {describe(q)}; expected (N, Hq, D) with D > 0")
    tokens, heads, dim = q.shape
    if k.dim() != 3 or k.shape[0] != tokens or k.shape[2] != dim:
        raise ValueError(
            f"{_OP}: k is {describe(k)}; expected ({tokens}, Hkv, {dim}) to go with q {tuple(q.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"{_OP}: v is {describe(v)}; expected {tuple(k.shape)}, as k is")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(
            f"{_OP}: q has {heads} heads and k {k.shape[1]}; expected a multiple: query heads share key heads evenly"
        )
    if not q.dtype.is_floating_point:
        raise TypeError(f"{_OP}: q is {q.dtype}; expected a floating-point dtype")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype is not q.dtype:
            raise TypeError(
                f"{_OP}: {name} is {tensor.dtype} and q is {q.dtype}; expected one dtype: "
                f"cast with .to({q.dtype}) (gradients flow through it), or run under torch.autocast"
            )
        if tensor.device != q.device:
            raise ValueError(f"{_OP}: {name} is on {tensor.device} and q on {q.device}; expected one device")
    if not isinstance(layout, PrefixLayout):
        raise TypeError(f"{_OP}: layout is {type(layout).__name__}; expected a clp_kernels.PrefixLayout")
    if layout.tokens != tokens:
        raise ValueError(
            f"{_OP}: layout has {layout.tokens} tokens and q is {tuple(q.shape)}; expected as many tokens as q has rows"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{_OP}: softcap is {softcap}; expected a positive number, or None for no cap")
    if window is not None and not window >= 1:
        raise ValueError(
            f"{_OP}: window is {window}; expected at least 1 (the token itself), or None for no window"
        )


def _forward(q, k, v, starts, parents, scale, softcap, window):
    module = select(_OP, _TABLE, q.device, dtype=q.dtype, head_dim=q.shape[2])
    return module.forward(q, k, v, starts, parents, scale, softcap, window)


def _backward(d_out, q, k, v, out, lse, starts, parents, scale, softcap, window, needs):
    module = select(_OP, _TABLE, q.device, dtype=q.dtype, head_dim=q.shape[2])
    return module.backward(d_out, q, k, v, out, lse, starts, parents, scale, softcap, window, needs)


def _fake_forward(q, k, v, starts, parents, scale, softcap, window):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide)


def _fake_backward(d_out, q, k, v, out, lse, starts, parents, scale, softcap, window, needs):
    return [tensor.new_empty(tensor.shape) for tensor, need in zip((q, k, v), needs) if need]


def _setup_context(ctx, inputs, output):
    q, k, v, starts, parents, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, starts, parents)


def _autograd_backward(ctx, d_out, _):
    if d_out is None:
        return (None,) * 8
    needs = list(ctx.needs_input_grad[:3])
    grads = iter(
        torch.ops.clp_kernels.prefix_attention_backward(d_out, *ctx.saved_tensors, *ctx.options, needs)
    )
    return *(next(grads) if need else None for need in needs), *(None,) * 5


# starts and parents are on the host, on whatever device the other tensors are.
register(
    "prefix_attention(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor parents, float scale, float? softcap, "
    "SymInt? window) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
register(
    "prefix_attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor starts, "
    "Tensor parents, float scale, float? softcap, SymInt? window, bool[3] needs) -> Tensor[]",
    _backward,
    _fake_backward,
)
differentiable(
    "prefix_attention",
    _autograd_backward,
    _setup_context,
    instead="torch.nn.functional.scaled_dot_product_attention with a mask",
)


class _Eager(torch.autograd.Function):
    """The registered op's autograd without the dispatcher."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_autograd_backward)
