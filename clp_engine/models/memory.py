"""The memory that a form of conditioning needs, computed from shapes alone, before anything is loaded or trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from clp_engine.core.errors import ConfigError
from clp_engine.core.sizes import size
from clp_engine.models.base import auto_class
from clp_engine.models.forms import CARRIERS, Conditioning
from clp_engine.models.targets import attention_layers, is_whole, lora_targets, unconditioned

_FLOAT32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes that stay allocated while a policy is trained. Activations and caches come on top.

    base: the frozen model's parameters. deltas: the deltas in float32. trained: the number of trained parameters.
    gradients: as many bytes as the deltas. optimizer: AdamW's two moments.
    """

    base: int
    trained: int

    @property
    def deltas(self) -> int:
        return self.trained * _FLOAT32

    @property
    def gradients(self) -> int:
        return self.deltas

    @property
    def optimizer(self) -> int:
        return 2 * self.deltas

    @property
    def total(self) -> int:
        return self.base + self.deltas + self.gradients + self.optimizer

    def __str__(self) -> str:
        parts = {
            "model": self.base,
            "deltas": self.deltas,
            "gradients": self.gradients,
            "optimiser": self.optimizer,
        }
        listed = ", ".join(f"{name} {size(value)}" for name, value in parts.items())
        return f"{self.trained:,} trained parameters; {size(self.total)} without activations ({listed})"


def skeleton(name_or_path: str | Path) -> PreTrainedModel:
    """The model of this name without its weights, with shapes and dtype alone. Raises ConfigError if it has no config."""
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=config.dtype or torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"cannot read the configuration of {str(name_or_path)!r}: {reason}") from error
    model.tie_weights()
    return model


def estimate(
    model: PreTrainedModel,
    conditioning: str,
    objectives: int,
    *,
    carrier: str = "lora",
    rank: int | Sequence[int] = 16,
    target_modules: Sequence[str] | None = None,
    base_itemsize: int | None = None,
) -> Memory:
    """The memory for training a policy over a plain model. Its weights may be unloaded.

    The arguments are as for ConditionedPolicy.from_pretrained.
    base_itemsize: bytes of a base parameter, if the model will be loaded in another dtype.
    """
    parsed = Conditioning.parse(conditioning, carrier)
    deltas = objectives if parsed.blended else 1
    ranks = [rank] * deltas if isinstance(rank, int) else list(rank)
    base = sum(p.numel() * (base_itemsize or p.element_size()) for p in model.parameters())
    if "full" in parsed.carriers:
        frozen = set(unconditioned(model))
        return Memory(
            base, deltas * sum(p.numel() for name, p in model.named_parameters() if name not in frozen)
        )
    head, trained = model.get_output_embeddings(), 0
    for name in lora_targets(model, parsed, target_modules):
        module = model.get_submodule(name)
        rows, columns = _shape(module)
        whole = is_whole(module, head, ranks)
        trained += rows * columns * deltas if whole else (rows + columns) * sum(ranks)
    if "attention" in parsed.carriers:
        layers = [model.get_submodule(name) for name in attention_layers(model)]
        trained += deltas * sum(p.numel() for layer in layers for p in layer.parameters())
    return Memory(base, trained)


def by_conditioning(model: PreTrainedModel, objectives: int, **options) -> dict[str, Memory]:
    """`estimate` for every form that blends parameters, by form."""
    return {name: estimate(model, name, objectives, **options) for name in CARRIERS}


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
