"""interpolate, slerp, ema_, sparsify, merge_sign_consensus: arithmetic over weight-sized tensors and lists of them.

    interpolate             base + sum_i w_i stack_i
    slerp                   the same for two, along the arc between their directions
    ema_                    average <- decay * average + (1 - decay) * params
    sparsify                delta * mask (/ density)
    merge_sign_consensus    base + sum_i w_i stack_i over the i that agree with the sign of the whole sum

All of them are limited by memory: the floor of a blend of M tensors is one read of each and one write, (M + 1) x size. A
list of tensors (all parameters of a model) is one call over a table of addresses, whose pieces are shared out evenly
whatever the tensors' sizes; G blends at once read the stack once.

Two operators carry the gradients, and each one's derivative is made of the two, so that there are derivatives of any order:

    Y_g = sum_i w_gi S_i       dS_i = sum_g w_gi dY_g (a blend)         dw_gi = <dY_g, S_i> (inner products)
    c_lr = <L_l, R_r>          dL_l = sum_r dc_lr R_r                   dR_r = sum_l dc_lr L_l
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clp_kernels.arguments import describe, refuse_wrapped
from clp_kernels.backends import plain_eager, select
from clp_kernels.tensor_lists import Blends, Pairs, Sparse, models_of, on_device

_TABLE = {
    "reference": "clp_kernels.reference.interpolation",
    "cpu": "clp_kernels.cpu.interpolation",
    "triton": "clp_kernels.triton_kernels.interpolation",
}
_LIBRARY = torch.library.Library("clp_kernels", "FRAGMENT")
for _schema in (
    # stack: `parts` tensors per item, each with a leading dimension of models; weights (items or 1, G, M)
    "interpolate(Tensor[] stack, int parts, Tensor weights, Tensor[] base) -> Tensor[]",
    "merge_sign_consensus(Tensor[] stack, int parts, Tensor weights, Tensor[] base, bool normalize) -> Tensor[]",
    "inner_products(Tensor[] left, int left_parts, Tensor[] right, int right_parts) -> Tensor",
    "ema_(Tensor(a!)[] average, Tensor[] params, float decay) -> ()",
    "sparsify(Tensor[] delta, float density, bool magnitude, float scale, int seed) -> Tensor[]",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

# Where 1 - abs(cos) is less, slerp is linear. The angle is then under 1e-3 (or that close to pi), and the two differ by less
# than its square over 6, a rounding of float32.
PARALLEL = 5e-7


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
    weights  (M,), a tensor or numbers; or (G, M) for G blends, between which the stack is read once
    base     (...), coefficient 1, or None
    returns  (...), or (G, ...) for weights (G, M); in base's dtype, or the stack's

    A list of P tensors, whose shapes and dtypes may differ (each combination of dtypes is a launch):
    stack    P stacks, each as above: [[deltas of parameter 1], [deltas of parameter 2], ...]
    weights  (M,) for all; (P, M), coefficients of its own for each (per layer); (P, G, M) or (1, G, M) for G blends
    base     P tensors, or None
    returns  P tensors

    Any weights: negative ones and those above 1 extrapolate. Sums are in float32 (float64 for float64), rounded once.
    out (as what is returned, P tensors for a list) takes the result and is returned; it may be base, or with one blend also
    one of the stack, and must not overlap them otherwise. It is for use without gradients.
    Gradients reach stack, weights and base, of any order.

    Raises ValueError (shapes, lengths, devices, an out that is given twice), TypeError (dtypes), RuntimeError (out where a
    gradient is asked for).
    """
    call = _blend_call("interpolate", stack, weights, base, out)
    if call.eager and not call.needs_grad:
        return call.returned(_blend(call.stack, call.parts, call.weights, call.base, "sum", call.outputs()))
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

    For every element by itself: the sign with the larger total is elected, and those that disagree are left out (TIES-Merging,
    Yadav et al. 2023; there w_i = 1, after `sparsify(..., method="magnitude")`). 0 where the sum is 0.

    normalize  divide by the abs(w_i) that took part, which makes it a mean; False leaves the sum
    stack, weights, base, out and what is returned are as in `interpolate`, in all its forms. Not differentiable.

    Raises as interpolate does, and RuntimeError where a gradient is asked for.
    """
    call = _blend_call("merge_sign_consensus", stack, weights, base, out)
    if call.needs_grad:
        raise RuntimeError(_not_differentiable("merge_sign_consensus"))
    if call.eager:
        merge = "consensus_mean" if normalize else "consensus"
        return call.returned(_blend(call.stack, call.parts, call.weights, call.base, merge, call.outputs()))
    return call.returned(
        torch.ops.clp_kernels.merge_sign_consensus(
            call.stack, call.parts, call.weights, call.base, normalize
        ),
        functional=True,
    )


def slerp(
    a: Tensor | Sequence[Tensor],
    b: Tensor | Sequence[Tensor],
    t: float | Tensor,
    *,
    base: Tensor | Sequence[Tensor] | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """base + sin((1 - t) O) / sin O * a + sin(t O) / sin O * b, with O the angle between a and b: cos O = <a, b> / |a| |b|.

    a, b     two deltas, or two lists of P deltas; the angle is that of each tensor, flattened, as in WARP (Ramé et al. 2024,
             where base is the weights that the deltas are taken from)
    t        a number, or a tensor: () or, for a list, (P,); 0 is a, 1 is b, outside [0, 1] extrapolates
    base, out and what is returned are as in `interpolate`: out may be a, b or base

    Linear, (1 - t) a + t b, where 1 - abs(cos O) < 5e-7 (nearly parallel, where the two agree to float32; nearly opposite,
    where the arc is not defined) or either is zero (|a|, |b| under about 1e-19 count as zero). Inner products are summed
    in float64 (on a GPU in float32 within pieces of 16384 elements), and nothing waits for the device: a fixed number of
    launches, whatever the number of tensors. Differentiable.

    More than two deltas are merged by iteration, as WARP does: the running slerp of the first k with the next at
    t = 1 / (k + 1); the result depends on their order.

    Raises as interpolate does; ValueError where the lists differ in length.
    """
    refuse_wrapped("slerp", a=a, b=b, t=t, base=base, out=out)
    single = isinstance(a, Tensor)
    if single is not isinstance(b, Tensor):
        raise ValueError(
            "slerp: one of a and b is a tensor and the other a list; expected two tensors or two lists"
        )
    first, second = ([a], [b]) if single else (list(a), list(b))
    if len(first) != len(second):
        raise ValueError(f"slerp: a has {len(first)} tensors and b {len(second)}; expected as many")
    pairs = [[x, y] for x, y in zip(first, second)]
    if not pairs:
        return interpolate(pairs, [0.0, 0.0], base=base, out=out)
    checked = _stacks("slerp", pairs)
    parts = [part for stack in checked.items for part in stack]
    if plain_eager(*parts) and not _asks_for_gradient(parts):
        dots = _inner_products(parts, 2, parts, 2)
    else:
        dots = torch.ops.clp_kernels.inner_products(parts, 2, parts, 2)
    weights = _slerp_weights(dots, _per_item("slerp", "t", t, len(pairs), dots))
    if single:
        return interpolate(pairs[0], weights[0], base=base, out=out)
    return interpolate(pairs, weights, base=base, out=out)


def _slerp_weights(dots: Tensor, t: Tensor) -> Tensor:
    """(P, 2, 2) inner products of a and b, t (P,) -> (P, 2), float64."""
    squares = dots[:, 0, 0] * dots[:, 1, 1]
    zero = ~(squares > 0)
    cos = dots[:, 0, 1] / squares.masked_fill(zero, 1.0).sqrt()
    linear = zero | ~(1 - cos.abs() >= PARALLEL)
    angle = cos.masked_fill(linear, 0.0).acos()  # what is not used must not give NaN gradients either
    sin = angle.sin()
    weights = torch.stack([((1 - t) * angle).sin() / sin, (t * angle).sin() / sin], 1)
    return torch.where(linear[:, None], torch.stack([1 - t, t], 1), weights)


def ema_(
    average: Tensor | Sequence[Tensor], params: Tensor | Sequence[Tensor], decay: float
) -> Tensor | list[Tensor]:
    """average <- decay * average + (1 - decay) * params, in place, for a tensor or, in one launch, for a list of them.

    average  the tensors to change; their dtypes may differ from those of params, and should be float32 where decay is near
             1: a bfloat16 average stands still once a step changes it by less than 1 part in 512
    params   as many, of the same shapes; they may ask for gradients, none flow here
    decay    in [0, 1]
    returns  average

    Raises ValueError (shapes, lengths, devices, decay, a tensor given twice: keep tied weights once) and TypeError (dtypes).
    """
    refuse_wrapped("ema_", average=average, params=params)
    if not 0 <= decay <= 1:
        raise ValueError(f"ema_: decay is {decay}; expected 0 <= decay <= 1")
    single = isinstance(average, Tensor)
    if single is not isinstance(params, Tensor):
        raise ValueError(
            "ema_: one of average and params is a tensor and the other a list; expected two of a kind"
        )
    own, new = ([average], [params]) if single else (list(average), list(params))
    if len(own) != len(new):
        raise ValueError(f"ema_: average has {len(own)} tensors and params {len(new)}; expected as many")
    for p, (x, y) in enumerate(zip(own, new)):
        for name, tensor in (("average", x), ("params", y)):
            if not tensor.dtype.is_floating_point:
                raise TypeError(
                    f"ema_: {name}[{p}] is {tensor.dtype}; expected a floating-point dtype: copy integer buffers instead"
                )
        if x.shape != y.shape or x.device != y.device or x.device != own[0].device:
            raise ValueError(
                f"ema_: average[{p}] is {describe(x)} and params[{p}] {describe(y)}; expected one shape, and all "
                f"tensors on one device ({own[0].device})"
            )
    if plain_eager(*own, *new):
        _unlike("ema_", own, "average")
        _ema(own, new, decay)
        for tensor in own:
            torch.autograd.graph.increment_version(tensor)
    else:
        torch.ops.clp_kernels.ema_([t.detach() for t in own], [t.detach() for t in new], decay)
    return average


def sparsify(
    delta: Tensor | Sequence[Tensor],
    density: float,
    *,
    method: str = "random",
    rescale: bool | None = None,
    seed: int | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """delta with only a share `density` of its elements kept and the others 0; for a tensor or a list of P tensors.

    density  in (0, 1]
    method   "random": each element is kept with probability density (DARE, Yu et al. 2024)
             "magnitude": the ceil(density * elements) largest abs(delta) of each tensor are kept, and all that equal the
             smallest of them (TIES' trim)
    rescale  divide what is kept by density. None: for random, whose expectation is then delta, and not for magnitude
    seed     for random, any integer of 64 bits. The mask is a function of (seed, place in the list, index in the flattened
             tensor) alone: element j of tensor p, counted from 0, is kept where u(s_p, j) < density, u(s, j) being the 53 upper
             bits of output j of SplitMix64 started at s, as a fraction of 1; s_p = mix(mix(seed) + p), and mix(x) is output 0
             of SplitMix64 started at x. Hence it is the same with every back-end, device and dtype
    out      takes the result and is returned; it may be delta
    returns  as delta, in its dtype

    Not differentiable. For magnitude the tensors' thresholds are found one after the other, on a GPU by torch's kthvalue;
    the rest is one launch.

    Raises ValueError (density, method, a seed missing or not used, shapes, devices), TypeError (dtypes), RuntimeError where a
    gradient is asked for.
    """
    refuse_wrapped("sparsify", delta=delta, out=out)
    if not 0 < density <= 1:
        raise ValueError(f"sparsify: density is {density}; expected 0 < density <= 1")
    if method not in ("random", "magnitude"):
        raise ValueError(f"sparsify: method is {method!r}; expected 'random' or 'magnitude'")
    if (seed is None) is (method == "random"):
        raise ValueError(
            "sparsify: method 'random' needs a seed, an integer: the same seed gives the same mask"
            if seed is None
            else "sparsify: method 'magnitude' draws nothing; leave seed out"
        )
    single = isinstance(delta, Tensor)
    tensors = [delta] if single else list(delta)
    for p, tensor in enumerate(tensors):
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"sparsify: delta[{p}] is {tensor.dtype}; expected a floating-point dtype")
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"sparsify: delta[{p}] is on {tensor.device} and delta[0] on {tensors[0].device}; expected one device"
            )
    if _asks_for_gradient(tensors):
        raise RuntimeError(_not_differentiable("sparsify"))
    if rescale is None:
        rescale = method == "random"
    scale = 1 / density if rescale else 1.0
    outs = None if out is None else [out] if single else list(out)
    eager = plain_eager(*tensors)
    if outs is not None:
        device = tensors[0].device if tensors else None
        _check_out("sparsify", outs, [(t.shape, t.dtype) for t in tensors], device, eager)
    seed = _int64((seed or 0) & _MASK)
    arguments = density, method == "magnitude", scale, seed
    if not eager:
        results = torch.ops.clp_kernels.sparsify(tensors, *arguments)
        results = results if outs is None else [o.copy_(r) for o, r in zip(outs, results)]
    elif outs is None:
        results = _sparsify(tensors, *arguments)
    else:
        targets = [o if o.is_contiguous() else o.new_empty(o.shape) for o in outs]
        _sparsify(tensors, *arguments, outs=targets)
        results = _put_back(outs, targets)
    if out is not None:
        return out
    return results[0] if single else list(results)


@dataclass(frozen=True)
class _Stacks:
    """items[p] is the parts of the p-th stack, all with as many; shapes[p] its shape without the models."""

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
        """What the back-end writes to: out where that is contiguous."""
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
                _put_back(self.outs, results)
            return self.given
        return results[0] if self.single else list(results)


def _put_back(outs: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor]:
    """What was written for `outs`, in them; autograd is told that they changed."""
    for out, result in zip(outs, results):
        if out is result:
            torch.autograd.graph.increment_version(out)
        else:
            out.copy_(result)
    return list(outs)


def _stacks(op: str, stack) -> _Stacks:
    """The stack in parts, checked."""
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
    stacks = _stacks(op, stack)
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
    needs_grad = _asks_for_gradient([*parts, weights, *bases])
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
        _check_out(op, outs, list(zip(shapes, dtypes)), device, eager)
    return _BlendCall(
        parts, len(stacks.items[0]) if count else 1, weights, bases, shapes, dtypes, out, outs, stacks.single, squeezed,
        eager, needs_grad,
    )  # fmt: skip


def _weights(op: str, weights, stacks: _Stacks, wide: torch.dtype, device) -> tuple[Tensor, bool]:
    """(items or 1, G, M) in `wide`; and whether G is not a dimension of the results."""
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


def _check_out(op, outs, expected, device, eager) -> None:
    if len(outs) != len(expected):
        raise ValueError(f"{op}: out holds {len(outs)} tensors; expected {len(expected)}")
    for p, (tensor, (shape, dtype)) in enumerate(zip(outs, expected)):
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype is not dtype or tensor.device != device:
            raise ValueError(
                f"{op}: out[{p}] is {describe(tensor)}; expected {tuple(shape)} {str(dtype).removeprefix('torch.')} on {device}"
            )
    if _asks_for_gradient(outs):
        raise RuntimeError(f"{op}: out asks for a gradient; use torch.no_grad(), or give out.detach()")
    if eager:
        _unlike(op, outs, "out")


def _unlike(op: str, tensors: Sequence[Tensor], name: str) -> None:
    filled = [tensor.data_ptr() for tensor in tensors if tensor.numel()]
    if len({*filled}) != len(filled) and all(tensor.device.type != "meta" for tensor in tensors):
        raise ValueError(
            f"{op}: {name} holds a tensor twice, which would be written twice at once; keep tied weights once"
        )


def _per_item(op: str, name: str, value: float | Tensor, count: int, like: Tensor) -> Tensor:
    """A number or a tensor, () or (count,), as (count,) in float64."""
    if not isinstance(value, Tensor):
        return torch.full((count,), float(value), dtype=torch.float64, device=like.device)
    if tuple(value.shape) not in ((), (count,)):
        raise ValueError(f"{op}: {name} is {tuple(value.shape)}; expected a number, () or ({count},)")
    return value.to(like.device, torch.float64).expand(count)


def _asks_for_gradient(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _not_differentiable(op: str) -> str:
    return f"{op}: not differentiable, and a gradient is asked for; use torch.no_grad() or .detach()"


_MASK = (1 << 64) - 1


def _int64(unsigned: int) -> int:
    return unsigned - (1 << 64) if unsigned >> 63 else unsigned


def _mix(x: int) -> int:
    """The first output of SplitMix64 started at x."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _by_item(flat: Sequence[Tensor], parts: int) -> list[list[Tensor]]:
    return [list(flat[at : at + parts]) for at in range(0, len(flat), parts)]


def _by_kind(kinds: Sequence[tuple]) -> dict[tuple, list[int]]:
    """The items of each combination of dtypes: a launch takes one."""
    found: dict[tuple, list[int]] = {}
    for p, kind in enumerate(kinds):
        found.setdefault(kind, []).append(p)
    return found


def _blend(stack, parts, weights, base, merge, outs, base_scale=1.0) -> list[Tensor]:
    stacks = _by_item(stack, parts)
    for (dtype, out_dtype), chosen in _by_kind([(s[0].dtype, o.dtype) for s, o in zip(stacks, outs)]).items():
        module = select("interpolate", _TABLE, outs[0].device, dtype=dtype, other=out_dtype)
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


def _inner_products(left, left_parts, right, right_parts) -> Tensor:
    lefts, rights = _by_item(left, left_parts), _by_item(right, right_parts)
    counts = (models_of(lefts[0]), models_of(rights[0]))
    result = torch.zeros((len(lefts), *counts), dtype=torch.float64, device=left[0].device)
    for (dtype, other), chosen in _by_kind([(a[0].dtype, b[0].dtype) for a, b in zip(lefts, rights)]).items():
        module = select("inner_products", _TABLE, left[0].device, dtype=dtype, other=other)
        chosen = [p for p in chosen if lefts[p][0].numel() and rights[p][0].numel()]
        if chosen:
            found = module.inner_products(Pairs([lefts[p] for p in chosen], [rights[p] for p in chosen]))
            if len(chosen) == len(lefts):
                return found
            result[on_device(chosen, torch.int64, result.device)] = found
    return result


@torch.no_grad()
def _ema(average, params, decay) -> None:
    if not average:
        return
    wide = torch.float64 if any(t.dtype is torch.float64 for t in (*average, *params)) else torch.float32
    weights = torch.full((1, 1, 1), 1 - decay, dtype=wide, device=average[0].device)
    dense = [t if t.is_contiguous() else t.contiguous() for t in average]
    _blend([t.unsqueeze(0) for t in params], 1, weights, dense, "sum", dense, base_scale=decay)
    for tensor, copy in zip(average, dense):
        if copy is not tensor:
            tensor.copy_(copy)


def _sparsify(delta, density, magnitude, scale, seed, outs=None) -> list[Tensor]:
    if outs is None:
        outs = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in delta]
    key = _mix(seed & _MASK)
    for (dtype,), chosen in _by_kind([(tensor.dtype,) for tensor in delta]).items():
        module = select("sparsify", _TABLE, delta[0].device, dtype=dtype, other=dtype)
        chosen = [p for p in chosen if delta[p].numel()]
        if not chosen:
            continue
        tensors, targets = [delta[p].detach() for p in chosen], [outs[p] for p in chosen]
        if magnitude:
            kept = [min(t.numel(), math.ceil(density * t.numel())) for t in tensors]
            module.sparsify(Sparse(tensors, targets, scale, thresholds=module.thresholds(tensors, kept)))
        else:
            states = [_int64(_mix((key + p) & _MASK)) for p in chosen]
            module.sparsify(Sparse(tensors, targets, scale, states, math.ceil(density * 2**53)))
    return outs


def _interpolate_impl(stack, parts, weights, base):
    return _blend(stack, parts, weights, base, "sum", _new_outputs(stack, parts, weights, base))


def _consensus_impl(stack, parts, weights, base, normalize):
    merge = "consensus_mean" if normalize else "consensus"
    return _blend(stack, parts, weights, base, merge, _new_outputs(stack, parts, weights, base))


def _fake_blend(stack, parts, weights, base, *_):
    return _new_outputs(stack, parts, weights, base)


def _fake_inner_products(left, left_parts, right, right_parts):
    counts = models_of(left[:left_parts]), models_of(right[:right_parts])
    return left[0].new_empty((len(left) // left_parts, *counts), dtype=torch.float64)


def _fake_sparsify(delta, density, magnitude, scale, seed):
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in delta]


_LIBRARY.impl("interpolate", _interpolate_impl, "CompositeExplicitAutograd")
_LIBRARY.impl("merge_sign_consensus", _consensus_impl, "CompositeExplicitAutograd")
_LIBRARY.impl("inner_products", _inner_products, "CompositeExplicitAutograd")
_LIBRARY.impl("ema_", _ema, "CompositeExplicitAutograd")
_LIBRARY.impl("sparsify", _sparsify, "CompositeExplicitAutograd")
for _op, _fake in (
    ("interpolate", _fake_blend),
    ("merge_sign_consensus", _fake_blend),
    ("inner_products", _fake_inner_products),
    ("ema_", lambda average, params, decay: None),
    ("sparsify", _fake_sparsify),
):
    torch.library.register_fake(f"clp_kernels::{_op}", _fake, lib=_LIBRARY)


def _blended_parts(
    sources: Sequence[Tensor],
    source_parts: int,
    weights: Tensor,
    dtypes: Sequence[torch.dtype],
    parts: int,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of parts, of `dtypes`, `parts` an item, of which `needs` says which are wanted, as blends of `sources`.

    weights  (items or 1, M, sources per item), M the models that the parts of an item hold
    """
    if not any(needs):
        return [None] * len(dtypes)
    if parts == 1:
        results = torch.ops.clp_kernels.interpolate(sources, source_parts, weights, [])
        return [result.to(dtype) for result, dtype in zip(results, dtypes)]
    # One model a part: only those that some item wants.
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
    # The stack is what the weights' gradient is made of, and nothing else is.
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


torch.library.register_autograd(
    "clp_kernels::interpolate", _interpolate_backward, setup_context=_interpolate_setup, lib=_LIBRARY
)
torch.library.register_autograd(
    "clp_kernels::inner_products", _inner_products_backward, setup_context=_inner_products_setup, lib=_LIBRARY
)
