"""AdamW over one flat buffer: every adapter is a view of it, clipping takes no pass of its own, and the host reads nothing.

    norm = |g|          over all of the buffer
    g   <- g / max(1, norm / max_norm)          by the fused step itself, through its `grad_scale`
    no step at all where the norm is not finite, through its `found_inf`

torch's fused optimisers take `grad_scale` and `found_inf` for mixed-precision training. Both are tensors on the device: the
kernel divides each gradient by the first as it reads it, and does nothing where the second is set. A step therefore reads the
gradients twice (norm, step), in one launch each however many adapters there are. The norm tells whether the step took place.

The adapters stay nn.Parameters of their layers: data and gradient are views of the buffer, and autograd adds into them. Code
that copies, saves or exports them needs no change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from clp_engine.core.errors import ConfigError

_ALIGNMENT = 64  # bytes between the starts of views: a vector register, and a cache line


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies: elements start to stop of `flat`."""

    flat: nn.Parameter
    start: int
    stop: int

    def of(self, buffer: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        return buffer[self.start : self.stop].view(parameter.shape)


class FlatAdamW(torch.optim.AdamW):
    """torch's fused AdamW over `parameters`, which become views of one buffer for each device and dtype among them.

    apart: more parameters, which stay where they are. They are stepped with the same `grad_scale`, and so are parameter groups
        that are added later.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, apart: Sequence[nn.Parameter] = (), **settings):
        self._places: dict[nn.Parameter, _Place] = {}
        ends: dict[tuple[torch.device, torch.dtype], int] = {}
        spans = []
        for p in parameters:
            kind, step = (p.device, p.dtype), _ALIGNMENT // p.element_size()
            start = ends.get(kind, 0)
            spans.append((p, kind, start))
            ends[kind] = start + -(-p.numel() // step) * step
        flats = {
            kind: nn.Parameter(torch.zeros(end, device=kind[0], dtype=kind[1])) for kind, end in ends.items()
        }
        for flat in flats.values():
            flat.grad = torch.zeros_like(flat)
        for p, kind, start in spans:
            self._places[p] = _Place(flats[kind], start, start + p.numel())
        self._flats = list(flats.values())
        super().__init__([{"params": [*self._flats, *apart]}], fused=True, **settings)
        self.bind()

    @torch.no_grad()
    def bind(self) -> None:
        """Make the parameters views again where they are not: after `policy.to(...)`, or an assignment to `.data` or `.grad`.

        Their values are taken over. Raises ConfigError where one has another device or dtype than its buffer, which holds
        the moments as well.
        """
        for p, place in self._places.items():
            flat = place.flat
            if p.device != flat.device or p.dtype != flat.dtype:
                raise ConfigError(
                    f"an adapter is {p.dtype} on {p.device} now, and was {flat.dtype} on {flat.device} when the optimiser was "
                    "made; move the policy before training, or make a new trainer"
                )
            offset = (
                place.start * flat.element_size()
            )  # to make a view only to look where it lies takes longer than the step
            if p.data_ptr() != flat.data_ptr() + offset or not p.is_contiguous():
                data = place.of(flat, p)
                data.copy_(p)
                p.data = data
            if p.grad is None or p.grad.data_ptr() != flat.grad.data_ptr() + offset:
                grad = place.of(flat.grad, p)
                if p.grad is None:
                    grad.zero_()
                else:
                    grad.copy_(p.grad)
                p.grad = grad

    @property
    def flat_gradients(self) -> list[torch.Tensor]:
        """The buffers that the adapters' gradients are views of, one for each device and dtype."""
        return [flat.grad for flat in self._flats if flat.grad is not None]

    @torch.no_grad()
    def clip(self, max_norm: float | None, apart: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Have the next step divide gradients by max(1, norm / max_norm), and do nothing where the norm is not finite.

        Returns the norm, a scalar on the device, of the flat gradients and of those whose norms `apart` has; None: no clipping.
        """
        norms = [torch.linalg.vector_norm(flat.grad, dtype=torch.float32) for flat in self._flats]
        norms += apart
        norm = norms[0]
        if len(norms) > 1:
            norm = torch.linalg.vector_norm(torch.stack([n.to(norm.device) for n in norms]))
        self.grad_scale = torch.ones_like(norm) if max_norm is None else (norm / max_norm).clamp(min=1)
        # A scale that is not finite would reach the gradients, were they not left alone.
        self.found_inf = (~norm.isfinite()).to(torch.float32)
        return norm

    def step(self, closure=None):
        result = super().step(closure)
        self.grad_scale = self.found_inf = None
        return result

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Fill the flat gradients with zeros, where they are; those of other groups as `set_to_none` says."""
        for flat in self._flats:
            flat.grad.zero_()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or any(p is flat for flat in self._flats):
                    continue
                if set_to_none:
                    p.grad = None
                else:
                    p.grad.zero_()

    def slots(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """The optimiser's state of one parameter, as an optimiser over the parameters themselves would have it."""
        place = self._places.get(parameter)
        if place is None:
            return self.state.get(parameter, {})
        return {
            name: value if value.dim() == 0 else place.of(value, parameter)
            for name, value in self.state.get(place.flat, {}).items()
        }

    @torch.no_grad()
    def set_slots(self, parameter: nn.Parameter, slots: dict[str, torch.Tensor]) -> None:
        """The other way round. All parameters of a buffer share one step count."""
        place = self._places.get(parameter)
        if place is None:
            self.state[parameter] = slots
            return
        state = self.state[place.flat]
        for name, value in slots.items():
            if value.dim() == 0:
                state[name] = value
            else:
                if name not in state:
                    state[name] = torch.zeros_like(place.flat)
                place.of(state[name], parameter).copy_(value)


def slots_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """The state that any optimiser has of a parameter."""
    if isinstance(optimizer, FlatAdamW):
        return optimizer.slots(parameter)
    return optimizer.state.get(parameter, {})


def set_slots_of(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, slots: dict[str, torch.Tensor]
) -> None:
    if isinstance(optimizer, FlatAdamW):
        optimizer.set_slots(parameter, slots)
    else:
        optimizer.state[parameter] = slots
