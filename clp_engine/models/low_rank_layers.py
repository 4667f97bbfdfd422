"""Layers that are blended per row: what they share, and LoRA conditioning.

    y = x W^T + b + ((x A^T) * gate) B^T,      gate = blend coefficients, each repeated r_i times and scaled by s_i

`A` stacks all objectives' factors to (R, K), `B` puts them side by side to (N, R); see `clp_kernels.multi_lora_linear`.
"""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from clp_kernels import expand_gate, multi_lora_linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from clp_engine.core.errors import ConfigError
from clp_engine.models.text_path import beside_text


@dataclass
class Blend(threading.local):
    """The blend in force, shared by every conditioned layer of one policy; each thread has its own. A copy starts with none.

    coefficients: (rows, D), a coefficient for each of D deltas; None means the base model, at no extra cost. A row of them per
    sequence of the batch, or, where the batch is one row of packed tokens, index (N,): which row each token has.
    factors: low-rank factors (A, B) of some layers that were converted to the activations' dtype beforehand: decoding would
    convert them for every token.
    """

    coefficients: torch.Tensor | None = None
    index: torch.Tensor | None = None
    factors: Mapping[ConditionedLinear, tuple[torch.Tensor, torch.Tensor]] | None = None
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
        factors: Mapping[ConditionedLinear, tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> Iterator[None]:
        """Inside, `coefficients` are in force. What was derived from the same tensors the last time is still there: decoding
        comes back with them for every token."""
        before = self.coefficients, self.index, self.factors, self._gates, self._groups
        # A compiled graph would be bound to the tensors that are remembered.
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
        """(rows, R), computed once per blend for all layers of the same ranks."""
        key = (ranks, scalings)
        if key not in self._gates:
            self._gates[key] = expand_gate(self.coefficients, ranks, scalings)
        return self._gates[key]

    def groups(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(blends, index): the different rows of `coefficients` (G, D), and which of them each sequence, or packed token, has;
        index is None where there is one for all. A compiled graph takes all rows as different: how many there are may not
        depend on their numbers."""
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
        """The row of `coefficients` that each row of x (..., H) has, or None where it is that of the first dimension.
        Raises RuntimeError where x has rows that cannot be told apart."""
        if self.index is not None:
            return self.spread(self.index, x)
        rows = self.coefficients.shape[0]
        if rows in (1, x.shape[0]) or x.dim() > 2 and x.shape[0] == 1:  # the same for all, or broadcast
            return None
        return self.spread(torch.arange(rows, device=x.device), x)

    def spread(self, index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`index` of packed tokens, or of sequences for the first dimension of x, where the model may have flattened
        (sequences, positions) to one: rows of one sequence then lie together."""
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
        """values (rows of `coefficients`, L) for each row of x (..., H), to be broadcast over it: (..., L)."""
        if self.index is not None and x.dim() == 4:
            shape = [1, 1, 1, values.shape[-1]]
            shape[self._token_dimension(x)] = -1
            return values[self.index].view(shape)
        index = self.index_for(x)
        if index is None:
            return values.view(-1, *(1,) * (x.dim() - 2), values.shape[-1])
        return values[index].view(*x.shape[:-1], -1)

    def _token_dimension(self, x: torch.Tensor) -> int:
        """Where the packed tokens of x lie, whose heads are normalised one by one: (1, N, heads, H) as Qwen 3 has them, or
        (1, heads, N, H) as Gemma 3. With as many heads as tokens, strides tell: heads were a token's last dimension."""
        found = [d for d in (1, 2) if x.shape[d] == len(self.index)]
        if x.shape[0] != 1 or not found:
            raise RuntimeError(f"a conditioned layer received {tuple(x.shape)} for {len(self.index)} packed tokens")
        return max(found, key=x.stride)

    def per_row(self, deltas: torch.Tensor, y: torch.Tensor, laid_out: torch.Tensor | None = None) -> torch.Tensor:
        """sum_i c_i deltas_i for each row of y (..., H), deltas (D, H), to be broadcast over it. laid_out: of y's shape, and in
        memory as the model made it, where y need not be."""
        rows = y if laid_out is None else laid_out
        return self.of_rows((self.coefficients.to(deltas.dtype) @ deltas).to(y.dtype), rows)


class ConditionedLayer(nn.Module):
    """A frozen layer whose parameters are blended per row; its own parameters are the deltas.

    base: the layer itself, which serves alone where there is no blend.
    """

    def __init__(self, base: nn.Module, blend: Blend):
        super().__init__()
        self.base, self._blend = base, blend

    def deltas_by_name(self) -> dict[str, nn.Parameter]:
        """The trainable parameters."""
        return {n: p for n, p in self.named_parameters(recurse=False) if p.requires_grad}

    def over(self, base: nn.Module, blend: Blend) -> ConditionedLayer:
        """The same deltas, shared, on another copy of the layer, under a blend of its own."""
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
        """(name of a parameter of `base`, its deltas (D, ...) in that parameter's layout); none where the deltas have another
        form."""
        return []


class ConditionedProjection(ConditionedLayer):
    """A frozen linear layer, nn.Linear or GPT-2's Conv1D, seen in one layout."""

    def __init__(self, base: nn.Linear | Conv1D, blend: Blend):
        super().__init__(base, blend)
        self.transposed = isinstance(base, Conv1D)  # Conv1D keeps its weight as (K, N)
        self.out_features, self.in_features = (
            base.weight.shape[::-1] if self.transposed else base.weight.shape
        )

    @property
    def weight(self) -> torch.Tensor:
        """(N, K), whatever the layout of the layer underneath."""
        return self.base.weight.t() if self.transposed else self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias


class ConditionedLinear(ConditionedProjection):
    """A frozen linear layer (nn.Linear or GPT-2's Conv1D) with D blended low-rank adapters.

    lora_a (R, K) and lora_b (N, R), float32, R = sum of `ranks`. Adapter i starts as PEFT starts one: A Kaiming-uniform,
    B zero, so the policy starts at the reference for every blend.

    whole: the matrix without factors: ranks are K, A is the identity and not trained, B (N, D * K) the deltas themselves. For
    output projections, whose kernels take factors. delta: that B, where another layer has the same weight (the embedding that
    the projection is tied to).
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
        # U(-1/sqrt(K), 1/sqrt(K)) is kaiming_uniform_(a=sqrt(5)); drawn on the CPU so that a seed means one thing everywhere.
        bound = 1 / math.sqrt(self.in_features)
        drawn = torch.empty(self.lora_a.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_a.copy_(drawn)
            self.lora_b.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._blend.coefficients is None:
            return self.base(x)
        kept = None if self._blend.factors is None else self._blend.factors.get(self)
        a, b = kept or (self.lora_a.to(x.dtype), self.lora_b.to(x.dtype))
        return multi_lora_linear(
            x,
            self.weight,
            a,
            b,
            self._blend.gate(self.ranks, self.scalings),
            bias=self.bias,
            gate_index=self._blend.index_for(x),
        )

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


def is_projection(module: nn.Module) -> bool:
    """Whether a layer is nn.Linear or Conv1D and computes what these compute (Llama 4's router, an nn.Linear, does not)."""
    return isinstance(module, nn.Linear | Conv1D) and type(module).forward in (nn.Linear.forward, Conv1D.forward)


def find_targets(model: nn.Module, target_modules: str | Sequence[str] | None) -> list[str]:
    """Names of the layers to condition.

    None or "all-linear": every nn.Linear / Conv1D but the output projection. Otherwise names, matched as PEFT matches
    them: a module whose path is the name or ends in ".name". Of a model of text and images these are layers of its language
    model: text passes the others by. Raises ConfigError for a name that matches nothing, or those others alone.
    """
    head, beside = model.get_output_embeddings(), beside_text(model)
    every = {name: module for name, module in model.named_modules() if is_projection(module)}
    linear = {name: module for name, module in every.items() if not beside(name)}
    if target_modules in (None, "all-linear"):
        chosen = [name for name, module in linear.items() if module is not head]
    else:
        wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        chosen = [name for name in linear if any(name == w or name.endswith("." + w) for w in wanted)]
        for name in wanted:
            if any(c == name or c.endswith("." + name) for c in chosen):
                continue
            if any(c == name or c.endswith("." + name) for c in every):
                refuse_beside_text(model, f"target_modules: {name!r}")
            kinds = sorted({c.rsplit(".", 1)[-1] for c in linear})
            raise ConfigError(
                f"target_modules: no linear layer of {type(model).__name__} is called {name!r}; "
                f"it has {', '.join(kinds)}"
            )
        check_targets(model, chosen)
    if not chosen:
        raise ConfigError(f"{type(model).__name__} has no nn.Linear or Conv1D layer to condition")
    return chosen


def refuse_beside_text(model: nn.Module, what: str) -> NoReturn:
    """Raises ConfigError: `what` names layers that no token passes."""
    raise ConfigError(
        f"{what} names layers of {type(model).__name__} that text passes by (a tower or projector of images), and only text "
        "is trained on here; leave it out"
    )


def check_targets(model: nn.Module, names: Sequence[str]) -> None:
    """Raises ConfigError where one of the layers is an output projection that cannot be changed by itself."""
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return
    if any(model.get_submodule(name) is head for name in names):
        raise ConfigError(
            "target_modules names the output projection, which shares its weight with the input embedding; "
            "leave it out, or untie the two first"
        )


def place(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put each module where its name says."""
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
