"""Full-weight conditioning: layers in which every parameter has a delta per objective, blended per row.

    W_row = W + sum_i c_i Delta_i

A linear layer calls `clp_kernels.interpolated_linear`. That function either blends the weight once for all rows of a blend, or
blends products, whichever is cheaper. Its backward pass gives each delta the gradient `c_i * dW`. Embeddings and norms are
linear in their parameters, so their deltas are blended per row directly. Deltas are float32 and start at zero: the policy
starts as the reference for every blend.
"""

from __future__ import annotations

import torch
from clp_kernels import interpolated_linear
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from clp_engine.models.blend import Blend, ConditionedLayer
from clp_engine.models.low_rank_layers import ConditionedProjection


def _zeros(like: torch.Tensor, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, device=like.device, dtype=torch.float32))


class InterpolatedLinear(ConditionedProjection):
    """nn.Linear or Conv1D with deltas `delta` (D, N, K) and, if it has a bias, `delta_bias` (D, N)."""

    def __init__(self, base: nn.Linear | Conv1D, blend: Blend, deltas: int):
        super().__init__(base, blend)
        self.delta = _zeros(base.weight, deltas, self.out_features, self.in_features)
        self.delta_bias = None if base.bias is None else _zeros(base.weight, deltas, self.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._blend.coefficients is None:
            return self.base(x)
        coefficients, index = self._blend.groups()
        if index is not None:
            index = self._blend.spread(index, x)
            if len(index) != x.shape[:-1].numel():
                index = index.unsqueeze(-1).expand(x.shape[:-1])
        y = interpolated_linear(
            x, self.delta.to(x.dtype), coefficients, base=self.weight, bias=self.bias, gate_index=index
        )
        if self.delta_bias is None:
            return y
        return y + self._blend.per_row(self.delta_bias, y)

    def targets(self) -> list[tuple[str, torch.Tensor]]:
        weight = self.delta.transpose(1, 2) if self.transposed else self.delta
        return [("weight", weight)] + ([] if self.delta_bias is None else [("bias", self.delta_bias)])

    def weight_delta(self, coefficients: torch.Tensor) -> torch.Tensor:
        return torch.tensordot(coefficients.to(self.delta), self.delta, 1)


class InterpolatedEmbedding(ConditionedLayer):
    """An embedding of tokens or learned positions, with deltas `delta` (V, D * H). One read fetches all deltas of a token.

    delta: the deltas of another layer with the same weight (a tied output projection, an encoder's and a decoder's embedding).
    """

    def __init__(self, base: nn.Embedding, blend: Blend, deltas: int, delta: nn.Parameter | None = None):
        super().__init__(base, blend)
        self.deltas = deltas
        rows, width = base.weight.shape
        self.delta = _zeros(base.weight, rows, deltas * width) if delta is None else delta

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, *args, **kwargs) -> torch.Tensor:
        embedded = self.base(*args, **kwargs)
        if self._blend.coefficients is None:
            return embedded
        # Subclasses scale the embedding or offset the position. Their own forward does the same to the deltas.
        changes = functional_call(self.base, {"weight": self.delta}, args, kwargs)
        if embedded.dim() == 2:  # positions (T, H), looked up once for all rows
            embedded, changes = embedded.unsqueeze(0), changes.unsqueeze(0)
        changes = changes.unflatten(-1, (self.deltas, -1))
        coefficients = self._blend.of_rows(self._blend.coefficients.to(changes.dtype), embedded)
        return embedded + (coefficients.unsqueeze(-2) @ changes).squeeze(-2).to(embedded.dtype)

    def delta_dim(self, part: str) -> int:
        return 1

    def targets(self) -> list[tuple[str, torch.Tensor]]:
        return [("weight", self.delta.unflatten(-1, (self.deltas, -1)).transpose(0, 1))]


class InterpolatedAffine(ConditionedLayer):
    """A norm, y = n(x) * (c + g) + b with parameters g and b (H,), deltas `delta` and `delta_bias` (D, H).

    c is 0, or 1 in models that store a gain as its difference from one (Gemma). `fits` tells whether a layer has this form.
    """

    def __init__(self, base: nn.Module, blend: Blend, deltas: int):
        super().__init__(base, blend)
        width = base.weight.shape[0]
        self.offset = _gain_offset(base)
        bias = getattr(base, "bias", None)
        self.delta = _zeros(base.weight, deltas, width)
        self.delta_bias = None if bias is None else _zeros(base.weight, deltas, width)
        self.register_buffer("_gain", torch.full_like(base.weight, 1.0 - self.offset), False)
        self.register_buffer("_shift", None if bias is None else torch.zeros_like(bias), False)

    @staticmethod
    def fits(base: nn.Module) -> bool:
        own = dict(base.named_parameters(recurse=False))
        return (
            set(own) in ({"weight"}, {"weight", "bias"})
            and all(p.dim() == 1 for p in own.values())
            and not list(base.children())
            and _gain_offset(base) is not None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._blend.coefficients is None:
            return self.base(x)
        unit = {"weight": self._gain} if self._shift is None else {"weight": self._gain, "bias": self._shift}
        normed = functional_call(self.base, unit, (x,))
        gain = self.base.weight + self._blend.per_row(self.delta, normed, x)
        y = normed * (gain + self.offset if self.offset else gain).to(normed.dtype)
        if self.delta_bias is None:
            return y
        return y + (self.base.bias + self._blend.per_row(self.delta_bias, normed, x)).to(y.dtype)

    def targets(self) -> list[tuple[str, torch.Tensor]]:
        return [("weight", self.delta)] + ([] if self.delta_bias is None else [("bias", self.delta_bias)])


@torch.no_grad()
def _gain_offset(base: nn.Module) -> float | None:
    """c of `y = n(x) * (c + g) + b`, found by evaluating the layer. None if the layer does not have this form."""
    weight, bias = base.weight, getattr(base, "bias", None)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[0], generator=generator).to(weight)

    def run(gain: torch.Tensor) -> torch.Tensor:
        return functional_call(
            base, {"weight": gain} | ({} if bias is None else {"bias": torch.zeros_like(bias)}), (x,)
        ).float()

    try:
        zero, one, expected = run(torch.zeros_like(weight)), run(torch.ones_like(weight)), base(x).float()
    except (RuntimeError, TypeError):
        return None
    normed = one - zero
    for offset in (0.0, 1.0):
        y = normed * (offset + weight.float()) + (0.0 if bias is None else bias.float())
        if torch.allclose(y, expected, rtol=1e-2, atol=1e-2) and torch.allclose(
            zero, normed * offset, rtol=1e-2, atol=1e-2
        ):
            return offset
    return None
