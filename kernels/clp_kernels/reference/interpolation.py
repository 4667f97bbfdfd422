"""The ops of interpolation.py in plain torch: the specification. Sums in float32, or float64 for float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clp_kernels.reference.sampling import uniforms_of
from clp_kernels.tensor_lists import Blends, Pairs, Sparse

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def unsupported(**call) -> str | None:
    return None


def _models(parts: list[Tensor]) -> list[Tensor]:
    return [model for part in parts for model in part.unbind(0)]


def blend(call: Blends) -> None:
    for p, (parts, out) in enumerate(zip(call.stacks, call.outs)):
        models = _models(parts)
        wide = torch.promote_types(torch.promote_types(models[0].dtype, out.dtype), torch.float32)
        weights = call.weights[call.rows[p]].to(wide)
        for g, target in enumerate(out.view(weights.shape[0], *models[0].shape)):
            terms = [w * model.to(wide) for w, model in zip(weights[g], models)]
            total = sum(terms)
            if call.merge != "sum":
                agree = [(term.sign() == total.sign()) & (term != 0) for term in terms]
                chosen = sum(term.where(yes, 0) for term, yes in zip(terms, agree))
                if call.merge == "consensus_mean":
                    taken = sum(w.abs() * yes for w, yes in zip(weights[g], agree))
                    chosen = chosen / taken.where(taken > 0, 1)
                total = chosen.where(total.sign() != 0, total * 0)
            if call.bases is not None:
                total = call.base_scale * call.bases[p].to(wide) + total
            target.copy_(total)


def inner_products(call: Pairs) -> Tensor:
    """(items, left, right) float64, summed in float64."""
    found = []
    for left, right in zip(call.left, call.right):
        a, b = (torch.stack([model.flatten().double() for model in _models(side)]) for side in (left, right))
        found.append(a @ b.t())
    return torch.stack(found)


def thresholds(tensors: Sequence[Tensor], kept: Sequence[int]) -> Tensor:
    """The kept-th largest abs(x) of each tensor: (items,) float32, or float64; a NaN counts as the largest of all."""
    found = [t.abs().flatten().kthvalue(t.numel() - count + 1).values for t, count in zip(tensors, kept)]
    return torch.stack([value if value.dtype is torch.float64 else value.float() for value in found])


def sparsify(call: Sparse) -> None:
    for p, (tensor, out) in enumerate(zip(call.tensors, call.outs)):
        if call.states is not None:
            place = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
            keep = uniforms_of(call.states[p] + place * _GOLDEN) < call.kept * 2.0**-53
        else:
            keep = ~(tensor.abs() < call.thresholds[p])
        wide = tensor if tensor.dtype is torch.float64 else tensor.float()
        out.copy_((wide * call.scale).where(keep, 0))
