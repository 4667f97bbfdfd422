"""LoRA conditioning: linear layers whose low-rank update is blended per row.

    y = x W^T + b + ((x A^T) * gate) B^T,      gate = blend coefficients, each repeated r_i times and scaled by s_i

`A` stacks all objectives' factors to (R, K), `B` puts them side by side to (N, R); see `clp_kernels.multi_lora_linear`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from clp_kernels import expand_gate, multi_lora_linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from clp_engine.errors import ConfigError


@dataclass
class Blend:
    """The blend in force, shared by every conditioned layer of one policy.

    coefficients: (rows, M), one row per sequence of the batch; None means the base model, at no extra cost.
    """

    coefficients: torch.Tensor | None = None
    _gates: dict[tuple, torch.Tensor] = field(default_factory=dict)

    @contextlib.contextmanager
    def use(self, coefficients: torch.Tensor | None) -> Iterator[None]:
        before = self.coefficients, self._gates
        self.coefficients, self._gates = coefficients, {}
        try:
            yield
        finally:
            self.coefficients, self._gates = before

    def gate(self, ranks: tuple[int, ...], scalings: tuple[float, ...]) -> torch.Tensor:
        """(rows, R), computed once per blend for all layers of the same ranks."""
        key = (ranks, scalings)
        if key not in self._gates:
            self._gates[key] = expand_gate(self.coefficients, ranks, scalings)
        return self._gates[key]


class ConditionedLinear(nn.Module):
    """A frozen linear layer (nn.Linear or GPT-2's Conv1D) with M blended low-rank adapters.

    lora_a (R, K) and lora_b (N, R), float32, R = sum of `ranks`. Adapter i starts as PEFT starts one: A Kaiming-uniform,
    B zero, so the policy starts at the reference for every blend.
    """

    def __init__(
        self, base: nn.Linear | Conv1D, blend: Blend, ranks: Sequence[int], scalings: Sequence[float]
    ):
        super().__init__()
        self.base = base
        self.ranks, self.scalings = tuple(ranks), tuple(scalings)
        self._blend = blend
        self.transposed = isinstance(base, Conv1D)  # Conv1D keeps its weight as (K, N)
        self.out_features, self.in_features = (
            base.weight.shape[::-1] if self.transposed else base.weight.shape
        )
        total = sum(self.ranks)
        device = base.weight.device
        self.lora_a = nn.Parameter(torch.empty(total, self.in_features, device=device, dtype=torch.float32))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, total, device=device, dtype=torch.float32))

    def reset_parameters(self, generator: torch.Generator) -> None:
        # U(-1/sqrt(K), 1/sqrt(K)) is kaiming_uniform_(a=sqrt(5)); drawn on the CPU so that a seed means one thing everywhere.
        bound = 1 / math.sqrt(self.in_features)
        drawn = torch.empty(self.lora_a.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_a.copy_(drawn)
            self.lora_b.zero_()

    @property
    def weight(self) -> torch.Tensor:
        """(N, K), whatever the layout of the layer underneath."""
        return self.base.weight.t() if self.transposed else self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._blend.coefficients is None:
            return self.base(x)
        gate = self._blend.gate(self.ranks, self.scalings)
        rows = x.numel() // x.shape[-1]
        index = None
        if x.dim() == 2 and rows != gate.shape[0]:
            # The model flattened (sequences, positions): rows of one sequence lie together.
            if rows % gate.shape[0]:
                raise RuntimeError(
                    f"a conditioned layer received {rows} rows for a batch of {gate.shape[0]} blends and "
                    "cannot tell which row has which blend (a routed expert?); exclude it with target_modules"
                )
            index = torch.arange(gate.shape[0], device=x.device).repeat_interleave(rows // gate.shape[0])
        return multi_lora_linear(
            x,
            self.weight,
            self.lora_a.to(x.dtype),
            self.lora_b.to(x.dtype),
            gate,
            bias=self.bias,
            gate_index=index,
        )

    def delta(self, coefficients: torch.Tensor) -> torch.Tensor:
        """The blended update of the weight, `sum_i c_i s_i B_i A_i`, (N, K) float32, for coefficients (M,)."""
        gate = expand_gate(coefficients.to(self.lora_a).unsqueeze(0), self.ranks, self.scalings)[0]
        return (self.lora_b.float() * gate) @ self.lora_a.float()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, ranks={self.ranks}"


def find_targets(model: nn.Module, target_modules: str | Sequence[str] | None) -> list[str]:
    """Names of the layers to condition.

    None or "all-linear": every nn.Linear / Conv1D but the output projection. Otherwise names, matched as PEFT matches
    them: a module whose path is the name or ends in ".name". Raises ConfigError for a name that matches nothing.
    """
    head = model.get_output_embeddings()
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    if target_modules in (None, "all-linear"):
        chosen = [name for name, module in linear.items() if module is not head]
    else:
        wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        chosen = [name for name in linear if any(name == w or name.endswith("." + w) for w in wanted)]
        for name in wanted:
            if not any(c == name or c.endswith("." + name) for c in chosen):
                kinds = sorted({c.rsplit(".", 1)[-1] for c in linear})
                raise ConfigError(
                    f"target_modules: no linear layer of {type(model).__name__} is called {name!r}; "
                    f"it has {', '.join(kinds)}"
                )
        if (
            head is not None
            and any(linear[name] is head for name in chosen)
            and head.weight is model.get_input_embeddings().weight
        ):
            raise ConfigError(
                "target_modules names the output projection, which shares its weight with the input embedding; "
                "leave it out, or untie the two first"
            )
    if not chosen:
        raise ConfigError(f"{type(model).__name__} has no nn.Linear or Conv1D layer to condition")
    return chosen


def attach(
    model: nn.Module,
    names: Sequence[str],
    ranks: Sequence[int],
    scalings: Sequence[float],
    seed: int,
    blend: Blend,
) -> dict[str, ConditionedLinear]:
    """Put a ConditionedLinear in the place of each named layer; returns them by the name of the layer they wrap."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        layer = ConditionedLinear(getattr(parent, leaf), blend, ranks, scalings)
        layer.reset_parameters(generator)
        setattr(parent, leaf, layer)
        layers[name] = layer
    return layers


def detach(model: nn.Module, layers: dict[str, ConditionedLinear]) -> None:
    """Put the plain layers back."""
    place(model, {name: layer.base for name, layer in layers.items()})


def place(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put each module where its name says."""
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
