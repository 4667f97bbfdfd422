"""logits_logprob: the statistics of `linear_logprob` for callers that already hold the logits.

    u = logits * logit_scale;  z = (softcap * tanh(u / softcap)) / temperature      u / temperature without a softcap

The logits are read in place, once forward and once backward. Beyond them and their gradient the op needs O(rows) numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clp_kernels.arguments import refuse_wrapped
from clp_kernels.reference import token_stats as reference
from clp_kernels.registration import differentiable, register
from clp_kernels.token_stats import (
    DIFFERENTIABLE,
    OUTPUTS,
    Rows,
    TokenStats,
    as_token_stats,
    backend_module,
    check_differentiable,
    check_outputs,
    check_rows,
    constant_outputs,
    empty_outputs,
    implementation,
)

_TABLE = (
    ("reference", "clp_kernels.reference.token_stats"),
    ("cpu", "clp_kernels.cpu.token_stats"),
    ("triton", "clp_kernels.triton_kernels.token_stats"),
)
_ARGUMENTS = (
    "Tensor logits, Tensor? ref_logits, Tensor? targets, Tensor inv_temperature, float? softcap, float logit_scale, "
    "int ignore_index"
)


def logits_logprob(
    logits: Tensor,
    targets: Tensor | None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logits: Tensor | None = None,
    outputs: Sequence[str] = ("logprob",),
    differentiable: Sequence[str] | None = None,
    ignore_index: int = -100,
) -> TokenStats:
    """Any of logprob, entropy, ref_logprob, kl, reverse_kl, lse and top1 of each row of logits, in one pass.

    logits       (..., V); the leading dimensions are the rows; -inf masks a token
    targets      logits' leading shape, int64; may be None unless logprob or ref_logprob is asked for
    temperature  a number, at least 2^-126, or a tensor that broadcasts to the rows; it applies to the policy and the reference
                 and is a constant
    ref_logits   logits' shape and dtype, a constant: no gradient reaches it
    outputs      names; kl is KL(policy || reference), reverse_kl KL(reference || policy), both exact over the vocabulary
    differentiable
                 names of the outputs that need gradients; the others are detached. None: all that have one
    returns      `TokenStats`: float32 (float64 for float64 inputs), in the rows' shape; None for outputs not asked for

    Each output but ref_logprob and top1 is differentiable in logits, each with its own incoming gradient. The gradient is
    in logits' dtype. Rows whose target is ignore_index are 0 in every output, top1 included, and pass no gradient.
    Logits stored in bfloat16 have a relative error of 2^-9, which a KL near the reference inherits. `linear_logprob` does not
    have this error.

    Raises ValueError (shapes, devices, names), TypeError (dtypes), and IndexError for a target outside the vocabulary on a CPU.
    On a GPU a check of targets would stall the stream: the log-prob of such a row is NaN.
    """
    op = "logits_logprob"
    refuse_wrapped(op, logits=logits, targets=targets, temperature=temperature, ref_logits=ref_logits)
    names = check_outputs(op, outputs, targets, ref_logits, "ref_logits")
    differentiable = check_differentiable(op, differentiable, names)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(
            f"{op}: logits is {tuple(logits.shape)}; expected (..., V) with at least one column (token)"
        )
    if not logits.dtype.is_floating_point:
        raise TypeError(f"{op}: logits is {logits.dtype}; expected a floating-point dtype")
    if ref_logits is not None:
        if ref_logits.shape != logits.shape:
            raise ValueError(
                f"{op}: ref_logits is {tuple(ref_logits.shape)}; expected logits' shape {tuple(logits.shape)}"
            )
        if ref_logits.dtype is not logits.dtype:
            raise TypeError(f"{op}: ref_logits is {ref_logits.dtype}; expected logits' dtype {logits.dtype}")
        if ref_logits.device != logits.device:
            raise ValueError(
                f"{op}: ref_logits is on {ref_logits.device}; expected logits' device {logits.device}"
            )
    lead, vocabulary = logits.shape[:-1], logits.shape[-1]
    targets, inv_temperature = check_rows(op, lead, logits.device, targets, temperature, softcap)
    flat = logits.reshape(math.prod(lead), vocabulary)
    ref_flat = None if ref_logits is None else ref_logits.detach().reshape(math.prod(lead), vocabulary)

    module = backend_module(op, _TABLE, logits.device.type, logits.dtype)
    if module == reference.__name__:
        stats = reference.logits_logprob(
            flat, targets, ref_flat, inv_temperature, softcap, logit_scale, frozenset(names), ignore_index
        )
        return as_token_stats(stats, names, lead, differentiable)
    values = torch.ops.clp_kernels.logits_logprob(
        flat, ref_flat, targets, inv_temperature, softcap, logit_scale, ignore_index, ",".join(names),
        ",".join(differentiable), module)  # fmt: skip
    return as_token_stats(values, names, lead)


def _columns_contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _forward(
    logits, ref_logits, targets, inv_temperature, softcap, logit_scale, ignore_index, asked, _, backend
):
    module = implementation(backend, logits.device)
    rows = Rows(targets, inv_temperature, softcap, logit_scale, ignore_index)
    outputs, saved = module.logits_forward(
        _columns_contiguous(logits), _columns_contiguous(ref_logits), rows, frozenset(asked.split(","))
    )
    return *outputs, saved


def _fake_forward(
    logits, ref_logits, targets, inv_temperature, softcap, logit_scale, ignore_index, asked, _, backend
):
    return tuple(empty_outputs(asked, logits, logits.shape[0]))


def _backward(*arguments):
    count = len(DIFFERENTIABLE)
    grads = dict(zip(DIFFERENTIABLE, arguments[:count]))
    logits, ref_logits, targets, inv_temperature, softcap, logit_scale, ignore_index, saved, backend = (
        arguments[count:]
    )
    module = implementation(backend, logits.device)
    rows = Rows(targets, inv_temperature, softcap, logit_scale, ignore_index)
    return module.logits_backward(
        _columns_contiguous(logits), _columns_contiguous(ref_logits), rows, grads, saved
    )


def _fake_backward(*arguments):
    return torch.empty_like(arguments[len(DIFFERENTIABLE)], memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    *tensors, softcap, logit_scale, ignore_index, _, differentiable, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*constant_outputs(differentiable, output), output[-1])
    ctx.save_for_backward(*tensors, output[-1])
    ctx.options = (softcap, logit_scale, ignore_index)
    ctx.backend = backend


def _autograd_backward(ctx, *grads):
    *tensors, saved = ctx.saved_tensors
    grads = dict(zip(OUTPUTS, grads))
    incoming = [grads[name] for name in DIFFERENTIABLE]
    others = (None,) * (len(tensors) + len(ctx.options) + 2)
    if all(g is None for g in incoming) or not ctx.needs_input_grad[0]:
        return None, *others
    return torch.ops.clp_kernels.logits_logprob_backward(
        *incoming, *tensors, *ctx.options, saved, ctx.backend
    ), *others


register(
    f"logits_logprob({_ARGUMENTS}, str asked, str differentiable, str backend) -> "
    f"({', '.join(f'Tensor {name}' for name in OUTPUTS)}, Tensor saved)",
    _forward,
    _fake_forward,
)
register(
    f"logits_logprob_backward({', '.join(f'Tensor? d_{name}' for name in DIFFERENTIABLE)}, {_ARGUMENTS}, Tensor saved, "
    "str backend) -> Tensor",
    _backward,
    _fake_backward,
)
differentiable(
    "logits_logprob",
    _autograd_backward,
    _setup_context,
    instead="the plain-torch formula with clp_kernels.use_backend('reference')",
)
