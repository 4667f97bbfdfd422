"""The blend in force: the coefficients of the deltas for each row of a batch."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from clp_kernels import expand_gate
from torch import nn


@dataclass
class Blend(threading.local):
    """The blend in force, shared by all conditioned layers of one policy. Each thread has its own. A copy starts without one.

    coefficients: (rows, D), one coefficient per delta. None means the base model, at no extra cost.
    index: (N,), the row of `coefficients` for each token, if the batch is one row of packed tokens. Otherwise None, with one
        row of `coefficients` per sequence of the batch.
    factors: low-rank factors (A, B) of some layers in the activations' dtype. Decoding converts them once, instead of for
        every token.
    """

    coefficients: torch.Tensor | None = None
    index: torch.Tensor | None = None
    factors: Mapping[ConditionedLayer, tuple[torch.Tensor, torch.Tensor]] | None = None
    _gates: dict[tuple, torch.Tensor] = field(default_factory=dict)
    _groups: tuple[torch.Tensor, torch.Tensor | None] | None = None
    _last: tuple | None = None

    def __reduce__(self) -> tuple:
        return Blend, ()

    @contextlib.contextmanager
    def use(
        self,
        coefficients: torch.Tensor | None,
        index: torch.Tensor | None = None,
        factors: Mapping[ConditionedLayer, tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> Iterator[None]:
        """Put `coefficients` in force inside the block.

        Values derived from the same tensors in the last block are kept, because decoding enters a block for every token.
        """
        before = self.coefficients, self.index, self.factors, self._gates, self._groups
        # A compiled graph would be tied to the stored tensors.
        remembers = not torch.compiler.is_compiling()
        same = (
            remembers and self._last is not None and self._last[0] is coefficients and self._last[1] is index
        )
        gates, groups = self._last[2:] if same else ({}, None)
        self.coefficients, self.index, self.factors = coefficients, index, factors
        self._gates, self._groups = gates, groups
        try:
            yield
        finally:
            if remembers and coefficients is not None and not coefficients.requires_grad:
                self._last = coefficients, index, self._gates, self._groups
            self.coefficients, self.index, self.factors, self._gates, self._groups = before

    def gate(self, ranks: tuple[int, ...], scalings: tuple[float, ...]) -> torch.Tensor:
        """The gate (rows, R), computed once per blend for all layers of the same ranks."""
        key = (ranks, scalings)
        if key not in self._gates:
            self._gates[key] = expand_gate(self.coefficients, ranks, scalings)
        return self._gates[key]

    def groups(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(blends, index): the distinct rows of `coefficients` (G, D), and the number of the one that each sequence, or packed
        token, has. index is None if G is 1.

        A compiled graph treats all rows as distinct, because its shapes must not depend on values.
        """
        if torch.compiler.is_compiling() and self.index is None:
            rows = self.coefficients.shape[0]
            index = None if rows == 1 else torch.arange(rows, device=self.coefficients.device)
            return self.coefficients, index
        if self._groups is None:
            blends, index = torch.unique(self.coefficients, dim=0, return_inverse=True)
            if self.index is not None:
                index = index[self.index]
            self._groups = blends, None if len(blends) == 1 else index
        return self._groups

    def index_for(self, x: torch.Tensor) -> torch.Tensor | None:
        """The row of `coefficients` for each row of x (..., H), or None if the first dimension of x gives it.

        Raises RuntimeError if the rows of x cannot be matched with the rows of `coefficients`.
        """
        if self.index is not None:
            return self.spread(self.index, x)
        rows = self.coefficients.shape[0]
        if rows in (1, x.shape[0]) or x.dim() > 2 and x.shape[0] == 1:  # one blend, or x is broadcast
            return None
        return self.spread(torch.arange(rows, device=x.device), x)

    def spread(self, index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`index`, one entry per packed token or per sequence, extended to one entry per row of x.

        The model may have flattened (sequences, positions) to one dimension. The rows of one sequence are then adjacent.
        """
        tokens = x.shape[:-1].numel()
        rows = tokens if self.index is not None else x.shape[0]
        if len(index) == rows:
            return index
        if self.index is not None or x.dim() > 2 or rows % len(index):
            raise RuntimeError(
                f"a conditioned layer received {rows} rows for a batch of {len(index)} blends and "
                "cannot tell which row has which blend (a routed expert?); exclude it with target_modules"
            )
        return index.repeat_interleave(rows // len(index))

    def of_rows(self, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """values (rows of `coefficients`, L) for each row of x (..., H), broadcastable to (..., L)."""
        if self.index is not None and x.dim() == 4:
            shape = [1, 1, 1, values.shape[-1]]
            shape[self._token_dimension(x)] = -1
            return values[self.index].view(shape)
        index = self.index_for(x)
        if index is None:
            return values.view(-1, *(1,) * (x.dim() - 2), values.shape[-1])
        return values[index].view(*x.shape[:-1], -1)

    def _token_dimension(self, x: torch.Tensor) -> int:
        """The dimension of x that holds the packed tokens, for a norm applied to each head.

        x is (1, N, heads, H) in Qwen 3 and (1, heads, N, H) in Gemma 3. If there are as many heads as tokens, the strides
        decide: the token dimension has the larger stride.
        """
        found = [d for d in (1, 2) if x.shape[d] == len(self.index)]
        if x.shape[0] != 1 or not found:
            raise RuntimeError(
                f"a conditioned layer received {tuple(x.shape)} for {len(self.index)} packed tokens"
            )
        return max(found, key=x.stride)

    def per_row(
        self, deltas: torch.Tensor, y: torch.Tensor, laid_out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """sum_i c_i deltas_i for each row of y (..., H), with deltas (D, H), broadcastable to y.

        laid_out: a tensor of y's shape with the model's own memory layout, if y may have another layout.
        """
        rows = y if laid_out is None else laid_out
        return self.of_rows((self.coefficients.to(deltas.dtype) @ deltas).to(y.dtype), rows)


class ConditionedLayer(nn.Module):
    """A frozen layer whose parameters are blended per row. Its own parameters are the deltas.

    base: the frozen layer, which is used alone if no blend is in force.
    """

    def __init__(self, base: nn.Module, blend: Blend):
        super().__init__()
        self.base, self._blend = base, blend

    def deltas_by_name(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, by name."""
        return {n: p for n, p in self.named_parameters(recurse=False) if p.requires_grad}

    def over(self, base: nn.Module, blend: Blend) -> ConditionedLayer:
        """A layer that shares these deltas, around another copy of the base layer and with a blend of its own."""
        other = copy.copy(self)
        for registry in ("_parameters", "_buffers", "_modules"):
            other.__dict__[registry] = dict(self.__dict__[registry])
        other.base, other._blend = base, blend
        for name, buffer in self._buffers.items():
            other._buffers[name] = None if buffer is None else buffer.to(base.weight)
        return other

    def delta_dim(self, part: str) -> int:
        """The dimension of the parameter `part` along which the deltas lie."""
        return 1 if part == "lora_b" else 0

    def targets(self) -> list[tuple[str, torch.Tensor]]:
        """(name of a parameter of `base`, its deltas (D, ...) in that parameter's layout). Empty for low-rank deltas."""
        return []


def place(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put each module at its dotted name in the model."""
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
