"""Linear layers that are blended per row: their common base class, and LoRA conditioning.

    y = x W^T + b + ((x A^T) * gate) B^T,      gate = blend coefficients, each repeated r_i times and scaled by s_i

A (R, K) stacks the factors of all objectives, and B (N, R) has them side by side; see `clp_kernels.multi_lora_linear`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from clp_kernels import expand_gate, multi_lora_linear
from clp_kernels.multi_lora import multi_lora_linears
from torch import nn
from transformers.pytorch_utils import Conv1D

from clp_engine.models.blend import Blend, ConditionedLayer


class ConditionedProjection(ConditionedLayer):
    """A frozen linear layer, nn.Linear or GPT-2's Conv1D, with its weight in one layout for both."""

    def __init__(self, base: nn.Linear | Conv1D, blend: Blend):
        super().__init__(base, blend)
        self.transposed = isinstance(base, Conv1D)  # Conv1D keeps its weight as (K, N)
        self.out_features, self.in_features = (
            base.weight.shape[::-1] if self.transposed else base.weight.shape
        )

    @property
    def weight(self) -> torch.Tensor:
        """(N, K), in whichever layout the base layer stores it."""
        return self.base.weight.t() if self.transposed else self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias


class ConditionedLinear(ConditionedProjection):
    """A frozen linear layer (nn.Linear or GPT-2's Conv1D) with D blended low-rank adapters.

    lora_a (R, K) and lora_b (N, R) are float32, with R the sum of `ranks`. Each adapter has PEFT's initial values: A is
    Kaiming-uniform and B zero, so that the policy starts at the reference for every blend.

    whole: a delta without factors, for output projections, whose kernels take factors. Each rank is then K, A is the identity
        and not trained, and B (N, D * K) holds the deltas themselves.
    delta: that B, if another layer shares the weight (the embedding that the projection is tied to).
    """

    def __init__(
        self,
        base: nn.Linear | Conv1D,
        blend: Blend,
        ranks: Sequence[int],
        scalings: Sequence[float],
        whole: bool = False,
        delta: nn.Parameter | None = None,
    ):
        super().__init__(base, blend)
        self.whole = whole
        self.ranks = (self.in_features,) * len(ranks) if self.whole else tuple(ranks)
        self.scalings = (1.0,) * len(ranks) if self.whole else tuple(scalings)
        total, like = sum(self.ranks), {"device": base.weight.device, "dtype": torch.float32}
        if self.whole:
            self.register_buffer("lora_a", torch.eye(self.in_features, **like).repeat(len(ranks), 1), False)
        else:
            self.lora_a = nn.Parameter(torch.empty(total, self.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, total, **like)) if delta is None else delta

    def reset_parameters(self, generator: torch.Generator) -> None:
        if self.whole:
            return
        # U(-1/sqrt(K), 1/sqrt(K)) equals kaiming_uniform_(a=sqrt(5)). Drawing on the CPU makes a seed mean the same everywhere.
        bound = 1 / math.sqrt(self.in_features)
        drawn = torch.empty(self.lora_a.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_a.copy_(drawn)
            self.lora_b.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._blend.coefficients is None:
            return self.base(x)
        return multi_lora_linear(
            x,
            self.weight,
            *self._factors(x.dtype),
            self._blend.gate(self.ranks, self.scalings),
            bias=self.bias,
            gate_index=self._blend.index_for(x),
        )

    def _factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        kept = None if self._blend.factors is None else self._blend.factors.get(self)
        return kept or (self.lora_a.to(dtype), self.lora_b.to(dtype))

    def weight_delta(self, coefficients: torch.Tensor) -> torch.Tensor:
        """The blended update of the weight, `sum_i c_i s_i B_i A_i`, (N, K) float32, for coefficients (D,)."""
        gate = expand_gate(coefficients.to(self.lora_a).unsqueeze(0), self.ranks, self.scalings)[0]
        return (self.lora_b.float() * gate) @ self.lora_a.float()

    def targets(self) -> list[tuple[str, torch.Tensor]]:
        if not self.whole:
            return []
        return [("weight", self.lora_b.unflatten(1, (len(self.ranks), -1)).transpose(0, 1))]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, ranks={self.ranks}"


def of_one_input(layers: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """The layers' outputs for x, a row of which is a row of the blend: query, key and value, or gate and up, of a decode step.

    Layers with low-rank factors and one gate are one call, in which each layer's own weight is read where it lies. Otherwise
    each layer is called.
    """
    first = layers[0]
    # A class derived from ConditionedLinear may have a product of its own.
    one_gate = type(first) is ConditionedLinear and all(
        type(layer) is ConditionedLinear and (layer.ranks, layer.scalings) == (first.ranks, first.scalings)
        for layer in layers
    )
    if not one_gate or first._blend.coefficients is None or first._blend.index_for(x) is not None:
        return [layer(x) for layer in layers]
    each = [(layer.weight, *layer._factors(x.dtype), layer.bias) for layer in layers]
    return multi_lora_linears(x, each, first._blend.gate(first.ranks, first.scalings))
