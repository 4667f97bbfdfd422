"""A fingerprint of the base model: shape, dtype, sum and norm of every base tensor, saved beside a policy's deltas.

A name does not identify a model: its weights may have been merged with an adapter or fine-tuned since, or given another
vocabulary. Two tensors count as equal if their sums and norms differ by no more than rounding explains. For equal dtypes this
is the rounding of the summation. For a model loaded in another dtype it is also the rounding of every element, at most
u |w| / sqrt(3) in the root mean square, with u the unit roundoff of the coarser dtype.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from clp_engine.core import records
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import read_json
from clp_engine.models.blend import ConditionedLayer

FILE = "base_model.json"
# With the identity of the weights that were read; None: of weights that no longer lie in one place.
_KEPT: WeakKeyDictionary[nn.Module, tuple[tuple | None, dict[str, Tensor]]] = WeakKeyDictionary()


class Tensor(NamedTuple):
    """The fingerprint of one tensor. dtype: without "torch."."""

    shape: list[int]
    dtype: str
    sum: float
    norm: float


def of(model: nn.Module) -> dict[str, Tensor]:
    """The fingerprint of each base parameter, by its name in the base model, with or without conditioned layers.

    It is computed once, with one read of the weights for each of the two numbers, and again after the weights change.
    """
    kept = _KEPT.get(model)
    if kept is not None and kept[0] is None:
        return kept[1]
    base = parameters(model)
    identity = tuple((p.data_ptr(), p._version) for p in base.values())
    if kept is None or kept[0] != identity:
        kept = _KEPT[model] = identity, {name: tensor(p) for name, p in base.items()}
    return kept[1]


def keep(model: nn.Module, found: dict[str, Tensor]) -> None:
    """Let `of` give `found` from now on: the weights are about to be cut over processes, and do not change."""
    _KEPT[model] = None, found


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base parameters by their names in the base model."""
    layers = [module for module in model.modules() if isinstance(module, ConditionedLayer)]
    deltas = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    return {n.replace(".base.", "."): p for n, p in model.named_parameters() if id(p) not in deltas}


@torch.no_grad()
def tensor(p: torch.Tensor) -> Tensor:
    """The fingerprint of one tensor."""
    wide = torch.float32 if p.device.type == "mps" else torch.float64
    norm = torch.linalg.vector_norm(p, dtype=wide).item()
    return Tensor(list(p.shape), str(p.dtype).removeprefix("torch."), p.sum(dtype=wide).item(), norm)


def write(folder: Path, model: nn.Module) -> None:
    (folder / FILE).write_text(json.dumps(of(model)) + "\n", encoding="utf-8")


def check(folder: str | Path, model: PreTrainedModel) -> None:
    """Raises ConfigError if the policy in `folder` was saved over another base model than `model`.

    A folder of an earlier version, without a fingerprint, passes.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return
    remedy = f"{records.AGAIN}, or remove it to go unchecked"
    saved: dict[str, Tensor] = records.of(dict[str, Tensor], read_json(path), path, remedy)
    here = of(model)
    odd = [
        f"{name}: {difference}"
        for name in dict.fromkeys([*saved, *here])
        if (difference := _difference(saved.get(name), here.get(name)))
    ]
    if odd:
        name = model.config.name_or_path or "the model that was given"
        raise ConfigError(
            f"{folder} was saved over another base model than {name}: {len(odd)} of {len(saved)} tensors differ, first "
            f"{odd[0]}. Load it over the model it was trained over (base_model=, or model= of the trainer), with every adapter "
            "merged that was merged then"
        )


def _difference(saved: Tensor | None, here: Tensor | None) -> str:
    """The difference between two tensors' fingerprints, in words. Empty if they agree."""
    if saved is None or here is None:
        return "not there then" if saved is None else "not there now"
    if saved.shape != here.shape:
        return f"shape {saved.shape} then, {here.shape} now"
    error = 1e-12 * math.sqrt(math.prod(here.shape))
    if saved.dtype != here.dtype:
        then = getattr(torch, saved.dtype, None)
        if not isinstance(then, torch.dtype) or not then.is_floating_point:
            return f"dtype {saved.dtype} then, {here.dtype} now"
        coarser = max(torch.finfo(getattr(torch, name)).eps for name in (saved.dtype, here.dtype))
        error += 6 * coarser / 2 / math.sqrt(3)  # six standard deviations of the elements' rounding
    both_nan = math.isnan(saved.sum) and math.isnan(here.sum)
    allowed = error * here.norm
    for what, then, now in (("sum", saved.sum, here.sum), ("norm", saved.norm, here.norm)):
        if not (abs(then - now) <= allowed or then == now or both_nan):
            return f"{what} {then:.9g} then, {now:.9g} now"
    return ""
