"""The common parts of the ops over lists of tensors (interpolation.py, averaging.py, sparsify.py): checks of arguments, the
arguments of back-ends, and the back-ends' tables.

A list's tensors are called items. An item's stack is given in parts, which are tensors with a leading dimension of models: one
part of (M, ...), or M parts of (1, ...). A back-end reads them as M tensors of the item's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clp_kernels.arguments import describe

TABLE = {
    "reference": "clp_kernels.reference.interpolation",
    "cpu": "clp_kernels.cpu.interpolation",
    "triton": "clp_kernels.triton_kernels.interpolation",
}
MERGES = ("sum", "consensus", "consensus_mean")


@dataclass(frozen=True)
class Blends:
    """outs[p][g] = base_scale * bases[p] + merge over i of weights[rows[p], g, i] * stacks[p][i], for each item p.

    stacks      parts of one dtype
    weights     (any, G, M), float32, or float64 if an item is
    bases       in the dtype of outs, or None
    outs        (G, ...) or, if G is 1, (...); contiguous, one dtype; with G = 1 it may be an item's base or one of its stack
    merge       one of MERGES; the two consensus forms are those of interpolation.merge_sign_consensus
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
    """[p, l, r] = sum over elements of left[p][l] * right[p][r]. Each side has parts of one dtype."""

    left: Sequence[Sequence[Tensor]]
    right: Sequence[Sequence[Tensor]]

    def counts(self) -> tuple[int, int]:
        return models_of(self.left[0]), models_of(self.right[0])


@dataclass(frozen=True)
class Sparse:
    """outs[p] = scale * tensors[p] for kept elements, 0 for others. Contiguous tensors of one dtype.

    states      for a random mask, item p's state of the hash: element j is kept if hash(states[p], j) < kept, with hash
                the upper 53 bits of the j-th output of SplitMix64 started at the state. Otherwise None
    thresholds  (items,) float32 (float64 if an item is), without states: an element is kept unless abs(x) < threshold
    """

    tensors: Sequence[Tensor]
    outs: Sequence[Tensor]
    scale: float
    states: Sequence[int] | None = None
    kept: int = 0
    thresholds: Tensor | None = None


def on_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.tensor(values) for nested lists of numbers. The host does not wait for the device, and a CUDA graph that is being
    captured keeps the values."""
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
    """The address of each model of the parts in dense memory. Copies made for that are appended to `alive`."""
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


def by_item(flat: Sequence[Tensor], parts: int) -> list[list[Tensor]]:
    return [list(flat[at : at + parts]) for at in range(0, len(flat), parts)]


def by_kind(kinds: Sequence[tuple]) -> dict[tuple, list[int]]:
    """The indices of the items for each combination of dtypes, which is one launch."""
    found: dict[tuple, list[int]] = {}
    for p, kind in enumerate(kinds):
        found.setdefault(kind, []).append(p)
    return found


def check_out(op, outs, expected, device, eager) -> None:
    if len(outs) != len(expected):
        raise ValueError(f"{op}: out holds {len(outs)} tensors; expected {len(expected)}")
    for p, (tensor, (shape, dtype)) in enumerate(zip(outs, expected)):
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype is not dtype or tensor.device != device:
            raise ValueError(
                f"{op}: out[{p}] is {describe(tensor)}; expected {tuple(shape)} {str(dtype).removeprefix('torch.')} on {device}"
            )
    if asks_for_gradient(outs):
        raise RuntimeError(f"{op}: out asks for a gradient; use torch.no_grad(), or give out.detach()")
    if eager:
        refuse_twice(op, outs, "out")


def refuse_twice(op: str, tensors: Sequence[Tensor], name: str) -> None:
    filled = [tensor.data_ptr() for tensor in tensors if tensor.numel()]
    if len({*filled}) != len(filled) and all(tensor.device.type != "meta" for tensor in tensors):
        raise ValueError(
            f"{op}: {name} holds a tensor twice, which would be written twice at once; keep tied weights once"
        )


def put_back(outs: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor]:
    """Copy `results` into `outs` where they are other tensors, and tell autograd that `outs` changed."""
    for out, result in zip(outs, results):
        if out is result:
            torch.autograd.graph.increment_version(out)
        else:
            out.copy_(result)
    return list(outs)


def asks_for_gradient(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def not_differentiable(op: str) -> str:
    return f"{op}: not differentiable, and a gradient is asked for; use torch.no_grad() or .detach()"
