"""slerp and ema_: two sets of weights averaged, along the arc between their directions or in place with a decay.

    slerp    base + sin((1 - t) O) / sin O * a + sin(t O) / sin O * b, with O the angle between a and b
    ema_     average <- decay * average + (1 - decay) * params

slerp is an `interpolate` with weights made of inner products, and has its gradients. ema_ is a blend in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clp_kernels.arguments import describe, refuse_wrapped
from clp_kernels.backends import plain_eager
from clp_kernels.interpolation import checked_stacks, interpolate, run_blend, run_inner_products
from clp_kernels.registration import register
from clp_kernels.tensor_lists import asks_for_gradient, refuse_twice

# If 1 - abs(cos) is less than this, slerp is linear. The angle is then below 1e-3 (or that close to pi), and the two results
# differ by less than the angle's square over 6, which is a rounding of float32.
PARALLEL = 5e-7


def slerp(
    a: Tensor | Sequence[Tensor],
    b: Tensor | Sequence[Tensor],
    t: float | Tensor,
    *,
    base: Tensor | Sequence[Tensor] | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """base + sin((1 - t) O) / sin O * a + sin(t O) / sin O * b, with O the angle between a and b: cos O = <a, b> / |a| |b|.

    a, b     two deltas, or two lists of P deltas. Each tensor, flattened, has its own angle, as in WARP (Ramé et al. 2024,
             where base holds the weights that the deltas are taken from)
    t        a number, or a tensor: () or, for a list, (P,). 0 gives a, 1 gives b, and values outside [0, 1] extrapolate
    base, out and the result are as in `interpolate`: out may be a, b or base

    The result is linear, (1 - t) a + t b, in two cases: 1 - abs(cos O) < 5e-7 (nearly parallel, where the two agree to float32;
    or nearly opposite, where the arc is not defined), or a or b is zero (|a|, |b| under about 1e-19 count as zero). Inner
    products are summed in float64 (on a GPU in float32 within pieces of 16384 elements). The host does not wait for the device,
    and the number of launches does not depend on the number of tensors. Differentiable.

    More than two deltas are merged by iteration, as in WARP: the running slerp of the first k with the next at
    t = 1 / (k + 1). The result depends on their order.

    Raises as interpolate does, and ValueError if the lists differ in length.
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
    checked = checked_stacks("slerp", pairs)
    parts = [part for stack in checked.items for part in stack]
    if plain_eager(*parts) and not asks_for_gradient(parts):
        dots = run_inner_products(parts, 2, parts, 2)
    else:
        dots = torch.ops.clp_kernels.inner_products(parts, 2, parts, 2)
    weights = _slerp_weights(dots, _per_item("slerp", "t", t, len(pairs), dots))
    if single:
        return interpolate(pairs[0], weights[0], base=base, out=out)
    return interpolate(pairs, weights, base=base, out=out)


def _slerp_weights(dots: Tensor, t: Tensor) -> Tensor:
    """Weights (P, 2), float64, from the inner products of a and b (P, 2, 2) and t (P,)."""
    squares = dots[:, 0, 0] * dots[:, 1, 1]
    zero = ~(squares > 0)
    cos = dots[:, 0, 1] / squares.masked_fill(zero, 1.0).sqrt()
    linear = zero | ~(1 - cos.abs() >= PARALLEL)
    angle = cos.masked_fill(linear, 0.0).acos()  # entries that are not used must not give NaN gradients
    sin = angle.sin()
    weights = torch.stack([((1 - t) * angle).sin() / sin, (t * angle).sin() / sin], 1)
    return torch.where(linear[:, None], torch.stack([1 - t, t], 1), weights)


def _per_item(op: str, name: str, value: float | Tensor, count: int, like: Tensor) -> Tensor:
    """A number or a tensor, () or (count,), as (count,) in float64."""
    if not isinstance(value, Tensor):
        return torch.full((count,), float(value), dtype=torch.float64, device=like.device)
    if tuple(value.shape) not in ((), (count,)):
        raise ValueError(f"{op}: {name} is {tuple(value.shape)}; expected a number, () or ({count},)")
    return value.to(like.device, torch.float64).expand(count)


def ema_(
    average: Tensor | Sequence[Tensor], params: Tensor | Sequence[Tensor], decay: float
) -> Tensor | list[Tensor]:
    """average <- decay * average + (1 - decay) * params, in place, for a tensor or, in one launch, for a list of them.

    average  the tensors to change. Their dtypes may differ from those of params, and should be float32 if decay is near
             1: a bfloat16 average no longer moves once a step changes it by less than 1 part in 512
    params   as many tensors, of the same shapes. They may require gradients, but get none from this call
    decay    in [0, 1]
    returns  average

    Raises ValueError (shapes, lengths, devices, decay, a tensor given twice: give tied weights once) and TypeError (dtypes).
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
        refuse_twice("ema_", own, "average")
        _ema(own, new, decay)
        for tensor in own:
            torch.autograd.graph.increment_version(tensor)
    else:
        torch.ops.clp_kernels.ema_([t.detach() for t in own], [t.detach() for t in new], decay)
    return average


@torch.no_grad()
def _ema(average, params, decay) -> None:
    if not average:
        return
    wide = torch.float64 if any(t.dtype is torch.float64 for t in (*average, *params)) else torch.float32
    weights = torch.full((1, 1, 1), 1 - decay, dtype=wide, device=average[0].device)
    dense = [t if t.is_contiguous() else t.contiguous() for t in average]
    run_blend([t.unsqueeze(0) for t in params], 1, weights, dense, "sum", dense, base_scale=decay)
    for tensor, copy in zip(average, dense):
        if copy is not tensor:
            tensor.copy_(copy)


register(
    "ema_(Tensor(a!)[] average, Tensor[] params, float decay) -> ()",
    _ema,
    lambda average, params, decay: None,
)
