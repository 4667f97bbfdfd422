"""Merging a blend into an ordinary transformers model."""

from __future__ import annotations

import torch
from clp_kernels import interpolate
from transformers import PreTrainedModel

from clp_engine.models.targets import untie
from clp_engine.policy.steerable import SteerableModel


@torch.no_grad()
def merged(policy: SteerableModel, coefficients: torch.Tensor) -> PreTrainedModel:
    """A copy of the base model with the weights theta_ref + sum_i c_i Delta_i, for coefficients c (D,)."""
    model = policy.plain_copy()
    if policy.splits_tied_head:
        untie(model)
    parameters, stacks, done = [], [], set()
    for name, layer in policy.layers.items():
        base = model.get_submodule(name)
        for part, stack in layer.targets():
            target = getattr(base, part)
            if id(target) not in done:
                done.add(id(target))
                parameters.append(target)
                stacks.append(list(stack.to(target.dtype).contiguous()))
    if parameters:
        for target, value in zip(parameters, interpolate(stacks, coefficients.float(), base=parameters)):
            target.copy_(value)
    for name, layer in policy.layers.items():
        if not layer.targets():
            weight, delta = model.get_submodule(name).weight, layer.weight_delta(coefficients)
            exact = weight.to(torch.promote_types(weight.dtype, delta.dtype))
            weight.copy_(exact + (delta.t() if layer.transposed else delta))
    return model
