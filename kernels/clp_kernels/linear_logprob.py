"""linear_logprob: statistics of softmax(hidden W^T) per token, without storing the logits.

    u = (hidden W^T + bias [+ ((hidden a^T) * gate) b^T]) * logit_scale
    z = (softcap * tanh(u / softcap)) / temperature            u / temperature without a softcap

`clp_kernels.token_stats` lists the statistics of z. The reference's z' is the same with ref_hidden, ref_weight and ref_bias,
and without LoRA. If policy and reference have the same weight, both use each tile of it that is read.
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
    Head,
    HeadLoRA,
    Keep,
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
    what_to_keep,
)

TABLE = (
    ("reference", "clp_kernels.reference.token_stats"),
    ("cpu", "clp_kernels.cpu.token_stats"),
    ("triton", "clp_kernels.triton_kernels.token_stats"),
)
_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? gate, Tensor? ref_hidden, "
    "Tensor? ref_weight, Tensor? ref_bias, Tensor? targets, Tensor inv_temperature, float? softcap, float logit_scale, "
    "int ignore_index"
)
_HOW = "str asked, str differentiable, SymInt kept_rows, int kept_copies, bool keeps_directions, str backend"
_NEEDS = (
    "hidden",
    "weight",
    "bias",
    "lora_a",
    "lora_b",
    "gate",
)  # the differentiable arguments, in the schema's order


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    lora: HeadLoRA | None = None,
    outputs: Sequence[str] = ("logprob",),
    differentiable: Sequence[str] | None = None,
    ignore_index: int = -100,
    keep_bytes: int | None = None,
) -> TokenStats:
    """Any of logprob, entropy, ref_logprob, kl, reverse_kl, lse and top1 of each token, in one pass over the vocabulary.

    hidden       (..., H); the leading dimensions are the rows
    weight       (V, H), in hidden's dtype;  bias (V,) or None
    targets      hidden's leading shape, int64; may be None unless logprob or ref_logprob is asked for
    temperature  a number, at least 2^-126, or a tensor that broadcasts to the rows; it applies to the policy and the reference
                 and is a constant
    ref_hidden   (..., H') rows of the reference; ref_weight (V, H') and ref_bias (V,) default to weight and
                 to bias, each on its own
    lora         a `HeadLoRA` that conditions the output projection, of the policy only
    outputs      names; kl is KL(policy || reference), reverse_kl KL(reference || policy), both exact over the vocabulary
    differentiable
                 names of the outputs that need gradients; the others are detached, and no work is done for their gradients.
                 None: all that have one
    keep_bytes   the memory that may be kept between forward and backward to save products of the backward pass. Kept are
                 either the logits of as many rows as fit (4 bytes each, twice that for kl or reverse_kl), while the others are
                 recomputed, or the derivative of each differentiable output in hidden (4 H bytes per row and output). 0 keeps
                 nothing; None leaves it to the back-end. `token_stats.what_to_keep` counts the products and chooses
    returns      `TokenStats`: float32 (float64 for float64 inputs), in the rows' shape; None for outputs not asked for

    Each output but ref_logprob and top1 is differentiable in hidden, and in weight, bias and the fields of lora if they
    require gradients (no product is spent on a frozen head), each output with its own incoming gradient. The reference is a
    constant: no gradient reaches ref_hidden, ref_weight, ref_bias, or a shared weight through the reference.
    Rows whose target is ignore_index are 0 in every output, top1 included, and pass no gradient.

    Products accumulate in float32, and neither logits nor the difference z - z' are rounded before the statistics. KL and its
    gradient are therefore accurate near the reference, in bfloat16 too. A logit of -inf (through bias) is a masked token. Under
    autocast hidden, weight, bias and their ref_ counterparts are cast to the autocast dtype, as in torch.nn.functional.linear.

    Raises ValueError (shapes, devices, names, a negative keep_bytes), TypeError (dtypes), and IndexError for a target outside
    the vocabulary on a CPU. On a GPU a check of targets would stall the stream: the log-prob of such a row is NaN.
    """
    op = "linear_logprob"
    names, lead, head, rows = checked_call(
        op, hidden, weight, targets, bias, temperature, softcap, logit_scale, ref_hidden, ref_weight, ref_bias, lora,
        outputs, ignore_index)  # fmt: skip
    if weight.shape[0] == 0:
        raise ValueError(f"{op}: weight is {tuple(weight.shape)}; expected at least one row (token)")
    differentiable = check_differentiable(op, differentiable, names)
    module = backend_module(op, TABLE, head.hidden.device.type, head.hidden.dtype)
    if module == reference.__name__:
        stats = reference.linear_logprob(
            head.hidden,
            head.weight,
            head.bias,
            head.ref_hidden,
            head.ref_weight,
            head.ref_bias,
            head.lora,
            rows.targets,
            rows.inv_temperature,
            softcap,
            logit_scale,
            frozenset(names),
            ignore_index,
        )
        return as_token_stats(stats, names, lead, differentiable)
    keep = kept_for_backward(module, head, differentiable, keep_bytes)
    values = torch.ops.clp_kernels.linear_logprob(
        head.hidden,
        head.weight,
        head.bias,
        *((None, None, None) if head.lora is None else head.lora),
        head.ref_hidden,
        head.ref_weight,
        head.ref_bias,
        rows.targets,
        rows.inv_temperature,
        softcap,
        logit_scale,
        ignore_index,
        ",".join(names),
        ",".join(differentiable),
        keep.rows,
        keep.copies,
        bool(keep.directions),
        module,
    )
    return as_token_stats(values, names, lead)


def checked_call(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    lora: HeadLoRA | None,
    outputs: Sequence[str],
    ignore_index: int,
) -> tuple[tuple[str, ...], torch.Size, Head, Rows]:
    """Check a call's arguments, cast them for autocast, and flatten the rows. Returns outputs, the rows' shape, head, rows."""
    refuse_wrapped(
        op, hidden=hidden, weight=weight, targets=targets, bias=bias, temperature=temperature, ref_hidden=ref_hidden,
        ref_weight=ref_weight, ref_bias=ref_bias, lora=lora)  # fmt: skip
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias = (
            t if t is None or t.dtype is torch.float64 else t.to(dtype)
            for t in (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        )
    names = check_outputs(op, outputs, targets, ref_hidden, "ref_hidden")
    lead = hidden.shape[:-1]
    _check_head(op, "", hidden, weight, bias, hidden)
    if ref_hidden is not None:
        ref_bias = bias if ref_bias is None else ref_bias
        ref_weight = weight if ref_weight is None else ref_weight
        _check_head(op, "ref_", ref_hidden, ref_weight, ref_bias, hidden)
        if ref_hidden.shape[:-1] != lead or ref_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"{op}: ref_hidden is {tuple(ref_hidden.shape)} and ref_weight {tuple(ref_weight.shape)}; expected "
                f"rows {tuple(lead)} and a vocabulary of {weight.shape[0]}, as the policy's"
            )
        ref_hidden = ref_hidden.detach().reshape(math.prod(lead), ref_hidden.shape[-1])
        ref_weight = ref_weight.detach()
        ref_bias = None if ref_bias is None else ref_bias.detach()
    targets, inv_temperature = check_rows(op, lead, hidden.device, targets, temperature, softcap)
    hidden = hidden.reshape(math.prod(lead), hidden.shape[-1])
    if lora is not None:
        lora = _check_lora(op, lora, lead, hidden, weight)
    return (
        names,
        lead,
        Head(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, lora),
        Rows(targets, inv_temperature, softcap, logit_scale, ignore_index),
    )


def kept_for_backward(
    module: str, head: Head, differentiable: Sequence[str], keep_bytes: int | None, *, shard: bool = False
) -> Keep:
    """`what_to_keep` for the gradients that this call's arguments require. Nothing if they require none."""
    if keep_bytes is not None and keep_bytes < 0:
        raise ValueError(f"linear_logprob: keep_bytes is {keep_bytes}; expected 0 or more, or None")
    inputs = (head.hidden, head.weight, head.bias, *(head.lora or (None, None, None)))
    needs = {name for name, t in zip(_NEEDS, inputs) if t is not None and t.requires_grad}
    if not (torch.is_grad_enabled() and needs and differentiable):
        return Keep()
    return what_to_keep(module, head, differentiable, needs, keep_bytes, shard=shard)


def _check_head(
    op: str, prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor
) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: {prefix}hidden is {tuple(hidden.shape)} and {prefix}weight {tuple(weight.shape)}; expected "
            "(..., H) and (V, H)"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"{op}: {prefix}bias is {tuple(bias.shape)}; expected ({weight.shape[0]},) for {prefix}weight "
            f"{tuple(weight.shape)}"
        )
    if not first.dtype.is_floating_point:
        raise TypeError(f"{op}: hidden is {first.dtype}; expected a floating-point dtype")
    for name, tensor in ((f"{prefix}hidden", hidden), (f"{prefix}weight", weight), (f"{prefix}bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype is not first.dtype and not (name.endswith("bias") and tensor.dtype is torch.float32):
            raise TypeError(
                f"{op}: {name} is {tensor.dtype} and hidden {first.dtype}; expected one dtype: cast with "
                f".to({first.dtype}), or run under torch.autocast"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} and hidden on {first.device}; expected one device"
            )


def _check_lora(op: str, lora: HeadLoRA, lead: Sequence[int], hidden: Tensor, weight: Tensor) -> HeadLoRA:
    """lora with its gate expanded to (T, R)."""
    a, b, gate = lora
    rank = a.shape[0]
    if a.dim() != 2 or a.shape[1] != hidden.shape[1] or tuple(b.shape) != (weight.shape[0], rank):
        raise ValueError(
            f"{op}: lora.a is {tuple(a.shape)} and lora.b {tuple(b.shape)}; expected (R, {hidden.shape[1]}) and "
            f"({weight.shape[0]}, R)"
        )
    for name, tensor in (("a", a), ("b", b), ("gate", gate)):
        if tensor.dtype not in (hidden.dtype, torch.float32):
            raise TypeError(
                f"{op}: lora.{name} is {tensor.dtype}; expected hidden's dtype {hidden.dtype} or torch.float32"
            )
        if tensor.device != hidden.device:
            raise ValueError(
                f"{op}: lora.{name} is on {tensor.device} and hidden on {hidden.device}; expected one device"
            )
    try:
        gate = gate.expand(*lead, rank)
    except RuntimeError:
        raise ValueError(
            f"{op}: lora.gate is {tuple(gate.shape)}; expected {(*lead, rank)}, or what broadcasts to it"
        ) from None
    return HeadLoRA(a, b, gate.reshape(math.prod(lead), rank))


def _problem(
    hidden,
    weight,
    bias,
    lora_a,
    lora_b,
    gate,
    ref_hidden,
    ref_weight,
    ref_bias,
    targets,
    inv_temperature,
    softcap,
    logit_scale,
    ignore_index,
):
    lora = None if lora_a is None else HeadLoRA(lora_a, lora_b, gate)
    bias, ref_bias = (None if each is None else each.contiguous() for each in (bias, ref_bias))
    return (
        Head(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, lora),
        Rows(targets, inv_temperature, softcap, logit_scale, ignore_index),
    )


def _forward(*arguments):
    *inputs, asked, differentiable, kept_rows, kept_copies, keeps_directions, backend = arguments
    head, rows = _problem(*inputs)
    module = implementation(backend, head.hidden.device)
    keep = _keep(differentiable, kept_rows, kept_copies, keeps_directions)
    kept = head.hidden.new_empty(keep.shape(head), dtype=torch.float32)
    options = {"directions": keep.directions} if keeps_directions else {}
    outputs, saved = module.linear_forward(head, rows, frozenset(asked.split(",")), kept, **options)
    return *outputs, saved, kept


def _fake_forward(*arguments):
    *inputs, asked, differentiable, kept_rows, kept_copies, keeps_directions, _ = arguments
    head, _ = _problem(*inputs)
    hidden, keep = head.hidden, _keep(differentiable, kept_rows, kept_copies, keeps_directions)
    kept = hidden.new_empty(keep.shape(head), dtype=torch.float32)
    return *empty_outputs(asked, hidden, hidden.shape[0]), kept


def _keep(differentiable: str, rows: int, copies: int, keeps_directions: bool) -> Keep:
    return Keep(rows, copies, tuple(differentiable.split(",")) if keeps_directions else ())


def _backward(*arguments):
    count = len(DIFFERENTIABLE)
    grads, (*inputs, saved, kept, directions, needs, backend) = (
        dict(zip(DIFFERENTIABLE, arguments[:count])),
        arguments[count:],
    )
    head, rows = _problem(*inputs)
    module = implementation(backend, head.hidden.device)
    needed = frozenset(n for n, need in zip(_NEEDS, needs) if need)
    if directions:
        result = module.linear_backward_along(head, rows, grads, kept, directions.split(","), needed)
    else:
        result = module.linear_backward(head, rows, grads, saved, kept, needed)
    return [getattr(result, name).to(t.dtype) for name, t, need in zip(_NEEDS, inputs, needs) if need]


def _fake_backward(*arguments):
    inputs, needs = arguments[len(DIFFERENTIABLE) :], arguments[-2]
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) for t, need in zip(inputs, needs) if need
    ]


def _setup_context(ctx, inputs, output):
    *tensors, softcap, logit_scale, ignore_index, _, differentiable, _, _, keeps_directions, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*constant_outputs(differentiable, output), *output[-2:])
    ctx.directions = differentiable if keeps_directions else ""  # names, with commas
    ctx.save_for_backward(*tensors, *output[-2:])
    ctx.options = (softcap, logit_scale, ignore_index)
    ctx.backend = backend


def _autograd_backward(ctx, *grads):
    *tensors, saved, kept = ctx.saved_tensors
    grads = dict(zip(OUTPUTS, grads))
    incoming = [grads[name] for name in DIFFERENTIABLE]
    arguments = len(tensors) + len(ctx.options) + len(_HOW.split(", "))
    needs = list(ctx.needs_input_grad[: len(_NEEDS)])
    if all(g is None for g in incoming) or not any(needs):
        return (None,) * arguments
    result = iter(
        torch.ops.clp_kernels.linear_logprob_backward(
            *incoming, *tensors, *ctx.options, saved, kept, ctx.directions, needs, ctx.backend
        )
    )
    return *(next(result) if need else None for need in needs), *(None,) * (arguments - len(needs))


register(
    f"linear_logprob({_ARGUMENTS}, {_HOW}) -> ({', '.join(f'Tensor {name}' for name in OUTPUTS)}, Tensor saved, Tensor kept)",
    _forward,
    _fake_forward,
)
register(
    f"linear_logprob_backward({', '.join(f'Tensor? d_{name}' for name in DIFFERENTIABLE)}, {_ARGUMENTS}, Tensor saved, "
    "Tensor kept, str directions, bool[6] needs, str backend) -> Tensor[]",
    _backward,
    _fake_backward,
)
differentiable(
    "linear_logprob",
    _autograd_backward,
    _setup_context,
    instead="the plain-torch formula with clp_kernels.use_backend('reference')",
)
