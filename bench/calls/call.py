"""One call of an op: its tensors by name, how the op is called with them, and what gradients are taken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
HALF, SINGLE = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Call:
    """call(tensors) -> outputs; `tensors` are made on the CPU in float32; gradients are taken in `wanted`.

    judge   for random outputs: outputs -> {name: exact value}, in place of the same call in float64
    graph   the call, which takes no gradients, is also captured in a CUDA graph and replayed
    wide    tensors that keep their dtype, whatever the others are rounded to
    """

    label: str
    tensors: Mapping[str, Tensor]
    call: Callable[[Tensors], Tensors]
    wanted: tuple[str, ...] = ()
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    backend: str = "triton"
    dtypes: tuple[torch.dtype, ...] = (HALF, torch.float16, SINGLE)
    judge: Callable[[Tensors, Tensors], Tensors] | None = None
    graph: bool = False
    wide: tuple[str, ...] = ()


def inputs(call: Call, dtype: torch.dtype, device: str = "cpu") -> Tensors:
    """Rounded to the dtype, on the device."""

    def placed(name: str, tensor: Tensor) -> Tensor:
        rounds = tensor.is_floating_point() and name not in call.wide
        return tensor.to(device, dtype if rounds else tensor.dtype)

    return {name: placed(name, tensor) for name, tensor in call.tensors.items()}


def outputs(call: Call, tensors: Tensors) -> Tensors:
    """What the call returns, and the gradients of all its outputs, each with an incoming gradient of its own."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in call.wanted}
    returned = call.call({**tensors, **leaves})
    asked = [y for y in returned.values() if y.requires_grad]
    found = {name: y.detach() for name, y in returned.items()}
    if asked:
        incoming = [
            torch.linspace(-1, 2, y.numel(), device=y.device).to(y.dtype).view(y.shape) for y in asked
        ]
        gradients = torch.autograd.grad(asked, list(leaves.values()), incoming)
        found |= {f"d_{name}": g for name, g in zip(leaves, gradients)}
    return found


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape) * scale


def shifted(tensor: Tensor) -> Tensor:
    """All but 16 of the columns, rows 16 elements apart and none on 16 bytes: what the bulk copy engine cannot load."""
    return tensor[:, 1:-15]
