"""A case: one computation at one shape, that several variants do on the same inputs.

    make(generator) -> inputs                random tensors by name; never zeros
    exact(inputs, dtype) -> outputs          plain torch, in float64 for the truth and in the case's dtype for torch's own error
    variants by name                         prepare(case, inputs) -> Prepared, whose call() is timed

The gradients are asked for in the same way of every variant: `case.wanted` names the inputs that they are taken in, and
inputs["grad_" + name] is the gradient that reaches output `name`; they come out as "d_" + input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.core import schema

Tensors = dict[str, Tensor]


class Refused(Exception):
    """A variant that cannot serve a case; the message says why."""


@dataclass(frozen=True)
class Work:
    """The least that must be done: floating-point operations of products, bytes read and written once, exponentials."""

    flops: float = 0.0
    bytes: float = 0.0
    exps: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """call() does the work and returns anything; outputs(result) names it, untimed; partial: not all of the case's outputs."""

    call: Callable[[], Any]
    outputs: Callable[[Any], Tensors] = lambda result: result
    partial: bool = False


Prepare = Callable[["Case", Tensors], Prepared]


@dataclass(frozen=True)
class Case:
    group: str
    op: str  # the name of the function that a peer's module offers
    title: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    device: str
    make: Callable[[torch.Generator], Tensors]
    exact: Callable[[Tensors, torch.dtype], Tensors]
    work: Work
    outputs: tuple[str, ...] = ("y",)  # that a variant must return; besides them, the gradients of `wanted`
    wanted: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    bare: Prepare | None = None
    judge: Callable[[Tensors, Tensors], tuple[Tensors, Tensors]] | None = (
        None  # where outputs are random: sampling
    )
    targets: tuple[str, ...] = ()

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        options = {name: str(value) for name, value in self.options.items()}
        return schema.case_id(self.group, self.title, self.shape, self.dtype_name, options)


def differentiated(forward: Callable[[Tensors], Tensors], partial: bool = False) -> Prepare:
    """The variant forward(inputs) -> outputs, with the gradients that the case wants from torch's autograd."""

    def prepare(case: Case, inputs: Tensors) -> Prepared:
        leaves = [inputs[name].detach().requires_grad_() for name in case.wanted]
        tensors = {**inputs, **dict(zip(case.wanted, leaves))}
        if not leaves:
            return Prepared(torch.no_grad()(lambda: forward(tensors)), partial=partial)

        def call() -> Tensors:
            outputs = forward(tensors)
            return {**outputs, **gradients(case.wanted, outputs, tensors, leaves)}

        return Prepared(call, partial=partial)

    return prepare


def gradients(wanted: Sequence[str], outputs: Tensors, inputs: Tensors, leaves: list[Tensor]) -> Tensors:
    """Of the outputs that have an incoming gradient among the inputs."""
    names = [name for name in outputs if f"grad_{name}" in inputs]
    incoming = [inputs[f"grad_{name}"].to(outputs[name].dtype) for name in names]
    found = torch.autograd.grad([outputs[name] for name in names], leaves, incoming)
    return {f"d_{name}": gradient for name, gradient in zip(wanted, found)}


def widened(inputs: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: t.to(dtype) if t.dtype.is_floating_point else t for name, t in inputs.items()}


def plain_exact(wanted: tuple[str, ...], forward: Callable[[Tensors], Tensors]):
    """`exact` of a case that needs no chunks: forward and autograd on the inputs in the given dtype."""

    def exact(inputs: Tensors, dtype: torch.dtype) -> Tensors:
        tensors = widened(inputs, dtype)
        leaves = [tensors[name].detach().requires_grad_() for name in wanted]
        tensors.update(zip(wanted, leaves))
        with torch.set_grad_enabled(bool(leaves)):
            outputs = forward(tensors)
        if not leaves:
            return outputs
        found = gradients(wanted, outputs, tensors, leaves)
        return {**{name: value.detach() for name, value in outputs.items()}, **found}

    return exact
