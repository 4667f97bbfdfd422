"""sparsify: deltas * mask (/ density), at random or by magnitude, in one launch for a list of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clp_kernels.arguments import refuse_wrapped
from clp_kernels.backends import plain_eager, select
from clp_kernels.registration import register
from clp_kernels.tensor_lists import (
    TABLE,
    Sparse,
    asks_for_gradient,
    by_kind,
    check_out,
    not_differentiable,
    put_back,
)


def sparsify(
    delta: Tensor | Sequence[Tensor],
    density: float,
    *,
    method: str = "random",
    rescale: bool | None = None,
    seed: int | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """delta with a share `density` of its elements kept and the others 0, for a tensor or a list of P tensors.

    density  in (0, 1]
    method   "random": each element is kept with probability density (DARE, Yu et al. 2024)
             "magnitude": the ceil(density * elements) largest abs(delta) of each tensor are kept, with all ties of the
             smallest of them (TIES' trim)
    rescale  divide the kept elements by density. None: yes for random, which makes delta the expectation, no for magnitude
    seed     for random, any integer of 64 bits. The mask is a function of (seed, place in the list, index in the flattened
             tensor) alone: element j of tensor p, counted from 0, is kept if u(s_p, j) < density. u(s, j) is the 53 upper
             bits of output j of SplitMix64 started at s, as a fraction of 1. s_p = mix(mix(seed) + p), and mix(x) is output 0
             of SplitMix64 started at x. The mask is therefore the same with every back-end, device and dtype
    out      takes the result and is returned; it may be delta
    returns  as delta, in its dtype

    Not differentiable. For magnitude the tensors' thresholds are found one after the other, on a GPU by torch's kthvalue.
    All other work is one launch.

    Raises ValueError (density, method, a seed missing or not used, shapes, devices), TypeError (dtypes), and RuntimeError if a
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
    if asks_for_gradient(tensors):
        raise RuntimeError(not_differentiable("sparsify"))
    if rescale is None:
        rescale = method == "random"
    scale = 1 / density if rescale else 1.0
    outs = None if out is None else [out] if single else list(out)
    eager = plain_eager(*tensors)
    if outs is not None:
        device = tensors[0].device if tensors else None
        check_out("sparsify", outs, [(t.shape, t.dtype) for t in tensors], device, eager)
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
        results = put_back(outs, targets)
    if out is not None:
        return out
    return results[0] if single else list(results)


_MASK = (1 << 64) - 1


def _int64(unsigned: int) -> int:
    return unsigned - (1 << 64) if unsigned >> 63 else unsigned


def _mix(x: int) -> int:
    """The first output of SplitMix64 started at x."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _sparsify(delta, density, magnitude, scale, seed, outs=None) -> list[Tensor]:
    if outs is None:
        outs = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in delta]
    key = _mix(seed & _MASK)
    for (dtype,), chosen in by_kind([(tensor.dtype,) for tensor in delta]).items():
        module = select("sparsify", TABLE, delta[0].device, dtype=dtype, other=dtype)
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


def _fake_sparsify(delta, density, magnitude, scale, seed):
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in delta]


register(
    "sparsify(Tensor[] delta, float density, bool magnitude, float scale, int seed) -> Tensor[]",
    _sparsify,
    _fake_sparsify,
)
