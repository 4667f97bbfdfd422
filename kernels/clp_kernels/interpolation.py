"""interpolate and merge_sign_consensus: sums of weight-sized tensors, and of lists of them.

    interpolate             base + sum_i w_i stack_i
    merge_sign_consensus    base + sum_i w_i stack_i over the i that agree with the sign of the whole sum

Both are limited by memory bandwidth, as are slerp and ema_ (averaging.py) and sparsify (sparsify.py). The floor of a blend of M
tensors is one read of each and one write, (M + 1) x size. A list of tensors (all parameters of a model) is one call over a
table of addresses, which is split evenly whatever the tensors' sizes. A call for G blends reads the stack once.

Two operators carry the gradients. The derivative of each is made of the two, so that derivatives of any order exist:

    Y_g = sum_i w_gi S_i       dS_i = sum_g w_gi dY_g (a blend)         dw_gi = <dY_g, S_i> (inner products)
    c_lr = <L_l, R_r>          dL_l = sum_r dc_lr R_r                   dR_r = sum_l dc_lr L_l
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clp_kernels.arguments import describe, refuse_wrapped
from clp_kernels.backends import plain_eager, select
from clp_kernels.registration import differentiable, register
from clp_kernels.tensor_lists import (
    TABLE,
    Blends,
    Pairs,
    asks_for_gradient,
    by_item,
    by_kind,
    check_out,
    models_of,
    not_differentiable,
    on_device,
    put_back,
)


def interpolate(
    stack: Tensor | Sequence[Tensor] | Sequence[Tensor | Sequence[Tensor]],
    weights: Tensor | Sequence[float],
    *,
    base: Tensor | Sequence[Tensor] | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """base + sum_i weights_i * stack_i, for one tensor or, in one launch, for a list of them.

    One tensor:
    stack    (M, ...), or M tensors of one shape and dtype
    weights  (M,), a tensor or numbers; or (G, M) for G blends, for all of which the stack is read once
    base     (...), coefficient 1, or None
    returns  (...), or (G, ...) for weights (G, M); in base's dtype, or the stack's

    A list of P tensors, whose shapes and dtypes may differ (each combination of dtypes is a launch):
    stack    P stacks, each as above: [[deltas of parameter 1], [deltas of parameter 2], ...]
    weights  (M,) for all; (P, M) for separate coefficients per tensor (per layer); (P, G, M) or (1, G, M) for G blends
    base     P tensors, or None
    returns  P tensors

    Weights may have any values: negative ones and those above 1 extrapolate. Sums are in float32 (float64 for float64) and are
    rounded once. out (in the form of the result, P tensors for a list) takes the result and is returned. It may be base, or
    with one blend also one of the stack, and must not overlap them otherwise. out cannot be used with gradients.
    Gradients of any order reach stack, weights and base.

    Raises ValueError (shapes, lengths, devices, an out that is given twice), TypeError (dtypes), and RuntimeError (out together
    with a gradient).
    """
    call = _blend_call("interpolate", stack, weights, base, out)
    if call.eager and not call.needs_grad:
        return call.returned(
            run_blend(call.stack, call.parts, call.weights, call.base, "sum", call.outputs())
        )
    return call.returned(
        torch.ops.clp_kernels.interpolate(call.stack, call.parts, call.weights, call.base), functional=True
    )


def merge_sign_consensus(
    stack: Tensor | Sequence[Tensor] | Sequence[Tensor | Sequence[Tensor]],
    weights: Tensor | Sequence[float],
    *,
    normalize: bool = True,
    base: Tensor | Sequence[Tensor] | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """base + sum over A of v_i / sum over A of abs(w_i), v_i = w_i * stack_i, A = {i: sign(v_i) = sign(sum_j v_j)}.

    Each element is treated separately: the sign with the larger total is elected, and the terms of the other sign are left out
    (TIES-Merging, Yadav et al. 2023, with w_i = 1 and after `sparsify(..., method="magnitude")`). A sum of 0 gives 0.

    normalize  divide by the abs(w_i) of the terms that took part, which gives a mean; False leaves the sum
    stack, weights, base, out and the result are as in `interpolate`, in all its forms. Not differentiable.

    Raises as interpolate does, and RuntimeError if a gradient is asked for.
    """
    call = _blend_call("merge_sign_consensus", stack, weights, base, out)
    if call.needs_grad:
        raise RuntimeError(not_differentiable("merge_sign_consensus"))
    if call.eager:
        merge = "consensus_mean" if normalize else "consensus"
        return call.returned(
            run_blend(call.stack, call.parts, call.weights, call.base, merge, call.outputs())
        )
    return call.returned(
        torch.ops.clp_kernels.merge_sign_consensus(
            call.stack, call.parts, call.weights, call.base, normalize
        ),
        functional=True,
    )


@dataclass(frozen=True)
class _Stacks:
    """items[p] has the parts of the p-th stack, equally many for each p. shapes[p] is its shape without the models."""

    items: list[list[Tensor]]
    shapes: list[torch.Size]
    models: int
    single: bool


@dataclass(frozen=True)
class _BlendCall:
    """The checked arguments of a blend, as the operators take them."""

    stack: list[Tensor]
    parts: int
    weights: Tensor
    base: list[Tensor]
    shapes: list[tuple[int, ...]]  # of the results
    dtypes: list[torch.dtype]
    given: Tensor | Sequence[Tensor] | None  # out, as the caller gave it
    outs: list[Tensor] | None
    single: bool
    squeezed: bool
    eager: bool
    needs_grad: bool

    def outputs(self) -> list[Tensor]:
        """The tensors that the back-end writes to: out itself if it is contiguous."""
        if self.outs is None:
            device = self.weights.device
            return [torch.empty(s, dtype=d, device=device) for s, d in zip(self.shapes, self.dtypes)]
        return [out if out.is_contiguous() else out.new_empty(out.shape) for out in self.outs]

    def returned(self, results: Sequence[Tensor], functional: bool = False) -> Tensor | list[Tensor]:
        if functional and self.squeezed:
            results = [result[0] for result in results]
        if self.outs is not None:
            if functional:
                for out, result in zip(self.outs, results):
                    out.copy_(result)
            else:
                put_back(self.outs, results)
            return self.given
        return results[0] if self.single else list(results)


def checked_stacks(op: str, stack) -> _Stacks:
    """The checked stack, split into parts."""
    single = isinstance(stack, Tensor) or (len(stack) > 0 and isinstance(stack[0], Tensor))
    items = []
    for p, item in enumerate([stack] if single else stack):
        where = "stack" if single else f"stack[{p}]"
        if isinstance(item, Tensor):
            if not single:
                raise ValueError(
                    f"{op}: {where} is a tensor and stack[0] a list; expected lists of M tensors: use tensor.unbind(0)"
                )
            if item.dim() == 0 or item.shape[0] == 0:
                raise ValueError(f"{op}: {where} is {describe(item)}; expected (M, ...) with M > 0")
            items.append([item])
        else:
            if not all(isinstance(tensor, Tensor) for tensor in item):
                raise TypeError(
                    f"{op}: {where} holds {[type(t).__name__ for t in item]}; expected tensors only"
                )
            if len(item) == 0 or len(item) != len(items[0] if items else item):
                raise ValueError(
                    f"{op}: {where} holds {len(item)} tensors; expected "
                    + (f"{len(items[0])} (M) like stack[0]" if items else "at least one")
                    + ": one for every model that is blended"
                )
            items.append([tensor.unsqueeze(0) for tensor in item])
        first = items[-1][0]
        if not first.dtype.is_floating_point:
            raise TypeError(f"{op}: {where} is {first.dtype}; expected a floating-point dtype")
        shape, dtype, device = first.shape, first.dtype, items[0][0].device
        for i, part in enumerate(items[-1]):
            if part.shape == shape and part.dtype is dtype and part.device == device:
                continue
            if part.shape != first.shape:
                raise ValueError(
                    f"{op}: {where}[{i}] is {describe(part[0])} and {where}[0] {describe(first[0])}; expected "
                    "tensors of one shape"
                )
            if part.dtype is not first.dtype:
                raise TypeError(
                    f"{op}: {where}[{i}] is {part.dtype} and {where}[0] {first.dtype}; expected one dtype: "
                    f"cast with .to({first.dtype})"
                )
            raise ValueError(
                f"{op}: {where}[{i}] is on {part.device} and the first tensor on {device}; expected one device"
            )
    models = models_of(items[0]) if items else 0
    return _Stacks(items, [parts[0].shape[1:] for parts in items], models, single)


def _blend_call(op, stack, weights, base, out) -> _BlendCall:
    refuse_wrapped(op, stack=stack, weights=weights, base=base, out=out)
    stacks = checked_stacks(op, stack)
    count = len(stacks.items)
    parts = [part for item in stacks.items for part in item]
    device = parts[0].device if parts else torch.device("cpu")
    wide = torch.float64 if any(part.dtype is torch.float64 for part in parts) else torch.float32
    weights, squeezed = _weights(op, weights, stacks, wide, device)
    bases = [] if base is None else [base] if isinstance(base, Tensor) else list(base)
    if base is not None and (len(bases) != count or isinstance(base, Tensor) is not stacks.single):
        raise ValueError(
            f"{op}: base is {'one tensor' if isinstance(base, Tensor) else f'{len(bases)} tensors'}; expected "
            + (
                "one tensor, as there is one stack"
                if stacks.single
                else f"a list of {count}, one for each stack"
            )
        )
    for p, (tensor, shape) in enumerate(zip(bases, stacks.shapes)):
        if tensor.shape != shape or tensor.device != device:
            raise ValueError(
                f"{op}: base[{p}] is {describe(tensor)}; expected {tuple(shape)} on {device}, as its stack"
            )
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{op}: base[{p}] is {tensor.dtype}; expected a floating-point dtype")
    blends = () if squeezed else (weights.shape[1],)
    shapes = [(*blends, *shape) for shape in stacks.shapes]
    dtypes = [tensor.dtype for tensor in bases or [item[0] for item in stacks.items]]
    eager = plain_eager(*parts, weights, *bases)
    needs_grad = asks_for_gradient([*parts, weights, *bases])
    outs = None
    if out is not None:
        if needs_grad:
            raise RuntimeError(
                f"{op}: out is given and a gradient is asked for; leave out away, or use torch.no_grad() or .detach()"
            )
        if isinstance(out, Tensor) is not stacks.single:
            raise ValueError(
                f"{op}: out is {type(out).__name__}; expected what is returned: a tensor for one stack, else a list"
            )
        outs = [out] if stacks.single else list(out)
        check_out(op, outs, list(zip(shapes, dtypes)), device, eager)
    return _BlendCall(
        parts,
        len(stacks.items[0]) if count else 1,
        weights,
        bases,
        shapes,
        dtypes,
        out,
        outs,
        stacks.single,
        squeezed,
        eager,
        needs_grad,
    )


def _weights(op: str, weights, stacks: _Stacks, wide: torch.dtype, device) -> tuple[Tensor, bool]:
    """The weights (items or 1, G, M) in `wide`, and whether the results lack the dimension G."""
    if isinstance(weights, Tensor):
        if not weights.dtype.is_floating_point:
            raise TypeError(
                f"{op}: weights is {weights.dtype}; expected a floating-point dtype: use weights.float()"
            )
        weights = weights.to(device, wide)
    else:
        weights = on_device(weights, wide, device)
    shape, count, models = tuple(weights.shape), len(stacks.items), stacks.models
    fits = len(shape) in ((1, 2) if stacks.single else (1, 2, 3)) and (shape[-1] == models or count == 0)
    if not stacks.single and len(shape) > 1:
        fits = fits and (shape[0] == count or (len(shape) == 3 and shape[0] == 1))
    if not fits:
        raise ValueError(
            f"{op}: weights is {shape}; expected "
            + (f"({models},) or (G, {models}), a number for each of the {models} tensors of the stack" if stacks.single
               else f"({models},), ({count}, {models}) or ({count} or 1, G, {models}) for {count} stacks of {models} tensors")
        )  # fmt: skip
    if len(shape) == 1:
        return weights[None, None], True
    if stacks.single:
        return weights[None], False
    return (weights[:, None], True) if len(shape) == 2 else (weights, False)


def run_blend(stack, parts, weights, base, merge, outs, base_scale=1.0) -> list[Tensor]:
    stacks = by_item(stack, parts)
    for (dtype, out_dtype), chosen in by_kind([(s[0].dtype, o.dtype) for s, o in zip(stacks, outs)]).items():
        module = select("interpolate", TABLE, outs[0].device, dtype=dtype, other=out_dtype)
        rows = [p if weights.shape[0] > 1 else 0 for p in chosen if outs[p].numel()]
        chosen = [p for p in chosen if outs[p].numel()]
        if chosen:
            module.blend(
                Blends(
                    stacks=[stacks[p] for p in chosen],
                    weights=weights.detach(),
                    rows=rows,
                    bases=[base[p] for p in chosen] if base else None,
                    outs=[outs[p] for p in chosen],
                    base_scale=base_scale,
                    merge=merge,
                )
            )
    return outs


def _new_outputs(stack, parts, weights, base) -> list[Tensor]:
    like = base if base else stack[::parts]
    return [
        tensor.new_empty((weights.shape[1], *part.shape[1:])) for tensor, part in zip(like, stack[::parts])
    ]


def run_inner_products(left, left_parts, right, right_parts) -> Tensor:
    lefts, rights = by_item(left, left_parts), by_item(right, right_parts)
    counts = (models_of(lefts[0]), models_of(rights[0]))
    result = torch.zeros((len(lefts), *counts), dtype=torch.float64, device=left[0].device)
    for (dtype, other), chosen in by_kind([(a[0].dtype, b[0].dtype) for a, b in zip(lefts, rights)]).items():
        module = select("inner_products", TABLE, left[0].device, dtype=dtype, other=other)
        chosen = [p for p in chosen if lefts[p][0].numel() and rights[p][0].numel()]
        if chosen:
            found = module.inner_products(Pairs([lefts[p] for p in chosen], [rights[p] for p in chosen]))
            if len(chosen) == len(lefts):
                return found
            result[on_device(chosen, torch.int64, result.device)] = found
    return result


def _interpolate_impl(stack, parts, weights, base):
    return run_blend(stack, parts, weights, base, "sum", _new_outputs(stack, parts, weights, base))


def _consensus_impl(stack, parts, weights, base, normalize):
    merge = "consensus_mean" if normalize else "consensus"
    return run_blend(stack, parts, weights, base, merge, _new_outputs(stack, parts, weights, base))


def _fake_blend(stack, parts, weights, base, *_):
    return _new_outputs(stack, parts, weights, base)


def _fake_inner_products(left, left_parts, right, right_parts):
    counts = models_of(left[:left_parts]), models_of(right[:right_parts])
    return left[0].new_empty((len(left) // left_parts, *counts), dtype=torch.float64)


def _blended_parts(
    sources: Sequence[Tensor],
    source_parts: int,
    weights: Tensor,
    dtypes: Sequence[torch.dtype],
    parts: int,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the parts of each item as blends of `sources`, in `dtypes`. `needs` says which are wanted.

    parts    the number of parts per item
    weights  (items or 1, M, sources per item), with M the models that the parts of an item hold
    """
    if not any(needs):
        return [None] * len(dtypes)
    if parts == 1:
        results = torch.ops.clp_kernels.interpolate(sources, source_parts, weights, [])
        return [result.to(dtype) for result, dtype in zip(results, dtypes)]
    # With one model per part, only the parts that some item wants are computed.
    wanted = [i for i in range(parts) if any(needs[i::parts])]
    chosen = weights if len(wanted) == parts else weights[:, wanted]
    results = torch.ops.clp_kernels.interpolate(sources, source_parts, chosen, [])
    grads: list[Tensor | None] = [None] * len(dtypes)
    for p, result in enumerate(results):
        for row, i in zip(result.split(1), wanted):
            at = p * parts + i
            grads[at] = row.to(dtypes[at]) if needs[at] else None
    return grads


def _interpolate_setup(ctx, inputs, output):
    stack, parts, weights, base = inputs
    ctx.parts, ctx.dtypes = parts, [part.dtype for part in stack]
    # Only the weights' gradient needs the stack.
    ctx.save_for_backward(weights, *(stack if weights.requires_grad else ()))


def _interpolate_backward(ctx, dys):
    dys = [dy.contiguous() for dy in dys]
    weights, *stack = ctx.saved_tensors
    need_stack, _, need_weights, need_base = ctx.needs_input_grad
    d_stack = _blended_parts(dys, 1, weights.transpose(1, 2), ctx.dtypes, ctx.parts, need_stack)
    d_weights = None
    if need_weights:
        d_weights = torch.ops.clp_kernels.inner_products(dys, 1, stack, ctx.parts).to(weights.dtype)
        if weights.shape[0] == 1:
            d_weights = d_weights.sum(0, keepdim=True)
    d_base = [dy.sum(0) if need else None for dy, need in zip(dys, need_base)]
    return d_stack, None, d_weights, d_base


def _inner_products_setup(ctx, inputs, output):
    left, left_parts, right, right_parts = inputs
    ctx.left_parts, ctx.right_parts, ctx.count = left_parts, right_parts, len(left)
    ctx.save_for_backward(*left, *right)


def _inner_products_backward(ctx, d):
    saved = ctx.saved_tensors
    left, right = saved[: ctx.count], saved[ctx.count :]
    left_dtypes, right_dtypes = ([part.dtype for part in side] for side in (left, right))
    need_left, _, need_right, _ = ctx.needs_input_grad
    d_left = _blended_parts(right, ctx.right_parts, d, left_dtypes, ctx.left_parts, need_left)
    d_right = _blended_parts(
        left, ctx.left_parts, d.transpose(1, 2), right_dtypes, ctx.right_parts, need_right
    )
    return d_left, None, d_right, None


# stack: `parts` tensors per item, each with a leading dimension of models; weights (items or 1, G, M)
register(
    "interpolate(Tensor[] stack, int parts, Tensor weights, Tensor[] base) -> Tensor[]",
    _interpolate_impl,
    _fake_blend,
)
register(
    "merge_sign_consensus(Tensor[] stack, int parts, Tensor weights, Tensor[] base, bool normalize) -> Tensor[]",
    _consensus_impl,
    _fake_blend,
)
register(
    "inner_products(Tensor[] left, int left_parts, Tensor[] right, int right_parts) -> Tensor",
    run_inner_products,
    _fake_inner_products,
)
differentiable("interpolate", _interpolate_backward, _interpolate_setup)
differentiable("inner_products", _inner_products_backward, _inner_products_setup)
