"""Registration of an op with torch.library, in the namespace clp_kernels: schema, implementation, fake, autograd.

    register(schema, implementation, fake)                      an operator
    differentiable(name, backward, setup_context)               its gradients
    differentiable(name, backward, setup_context, instead=...)  its gradients, without second derivatives: asking for one raises

An operator has one implementation for all devices, which chooses the back-end itself (`backends.select`). The fake returns
outputs of the right shapes and dtypes, for torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("clp_kernels", "FRAGMENT")


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """schema: "name(Tensor x, ...) -> ...", as in torch.library. implementation and fake take its arguments in order."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"clp_kernels::{name}", fake, lib=_LIBRARY)


def differentiable(
    name: str, backward: Callable, setup_context: Callable, *, instead: str | None = None
) -> None:
    """Register gradients. backward(ctx, *gradients of outputs) and setup_context(ctx, inputs, output) are as for
    torch.library.register_autograd.

    instead  names an alternative that has second derivatives; None if `backward` is made of differentiable operators
    """
    qualified = f"clp_kernels::{name}"
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    if instead is not None:

        def refuse(ctx, *_):
            raise no_second_derivative(name, instead)

        torch.library.register_autograd(f"{qualified}_backward", refuse, lib=_LIBRARY)


def no_second_derivative(op: str, instead: str | None = None) -> NotImplementedError:
    """The error for a call that asks for a gradient of a gradient."""
    remedy = f", or {instead}" if instead else ""
    return NotImplementedError(
        f"{op}: second derivatives are not implemented; use create_graph=False{remedy}"
    )
