"""What the ops over lists of tensors (interpolation.py) hand to their back-ends, and the tables these make of it.

A list's tensors are called items. An item's stack is given in parts: tensors with a leading dimension of models, which
follow one another: one part of (M, ...), or M parts of (1, ...). A back-end reads them as M tensors of the item's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MERGES = ("sum", "consensus", "consensus_mean")


@dataclass(frozen=True)
class Blends:
    """outs[p][g] = base_scale * bases[p] + merge over i of weights[rows[p], g, i] * stacks[p][i], for each item p.

    stacks      parts of one dtype
    weights     (any, G, M), float32, or float64 where an item is
    bases       in the dtype of outs, or None
    outs        (G, ...) or, where G is 1, (...); contiguous, one dtype; with G = 1 an item's base or one of its stack
    merge       of MERGES; consensus as interpolation.merge_sign_consensus has it
    """

    stacks: Sequence[Sequence[Tensor]]
    weights: Tensor
    rows: Sequence[int]
    bases: Sequence[Tensor] | None
    outs: Sequence[Tensor]
    base_scale: float = 1.0
    merge: str = "sum"


@dataclass(frozen=True)
class Pairs:
    """[p, l, r] = sum over elements of left[p][l] * right[p][r]; each side parts of one dtype."""

    left: Sequence[Sequence[Tensor]]
    right: Sequence[Sequence[Tensor]]

    def counts(self) -> tuple[int, int]:
        return models_of(self.left[0]), models_of(self.right[0])


@dataclass(frozen=True)
class Sparse:
    """outs[p] = scale * tensors[p] where it is kept, else 0; contiguous, one dtype.

    states      for a random mask, item p's state of the hash: element j stays where hash(states[p], j) < kept, with hash
                the upper 53 bits of the j-th output of SplitMix64 started at the state; otherwise None
    thresholds  (items,) float32 (float64 where an item is), without states: an element stays unless abs(x) < threshold
    """

    tensors: Sequence[Tensor]
    outs: Sequence[Tensor]
    scale: float
    states: Sequence[int] | None = None
    kept: int = 0
    thresholds: Tensor | None = None


def on_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.tensor(values), nested lists of numbers, without the host waiting for the device, and so that a CUDA graph that is
    being captured keeps them."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    host = torch.tensor(values, dtype=dtype, device="cpu")
    if not torch.cuda.is_current_stream_capturing():
        return host.pin_memory().to(device, non_blocking=True)
    filled = torch.empty(host.shape, dtype=dtype, device=device)
    for place, value in zip(filled.view(-1), host.flatten().tolist()):
        place.fill_(value)
    return filled


def models_of(parts: Sequence[Tensor]) -> int:
    return sum(part.shape[0] for part in parts)


def dense(parts: Sequence[Tensor], alive: list[Tensor]) -> list[int]:
    """The address of each model of the parts, in dense memory; what was copied for that is put into `alive`."""
    found = []
    for part in parts:
        if not part.is_contiguous():
            part = part.contiguous()
            alive.append(part)
        address, count = part.data_ptr(), part.shape[0]
        if count == 1:
            found.append(address)
        else:
            step = part.numel() // max(count, 1) * part.element_size()
            found.extend(range(address, address + step * count, step) if step else [address] * count)
    return found
