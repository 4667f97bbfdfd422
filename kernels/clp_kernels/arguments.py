"""Checks of arguments that the ops have in common, and descriptions of arguments that do not fit."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor


def refuse_wrapped(op: str, **arguments: Tensor | Sequence | object | None) -> None:
    """Raise for a call whose tensors are stand-ins: inside a torch.func transform, or with DTensors among the arguments.

    Raises NotImplementedError (transforms), TypeError (DTensor). Nested lists and tuples are searched, other objects ignored.
    Under torch.compile nothing is checked, because tensors are always stand-ins there.
    """
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"{op}: called inside a torch.func transform (vmap, grad, vjp, jvp or another), for which it has no rule; expected "
            "a call outside: pass a batch as leading dimensions instead of vmap, and take gradients with torch.autograd"
        )
    distributed = sys.modules.get(
        "torch.distributed.tensor"
    )  # without an import of this module there can be no DTensor
    if distributed is None:
        return
    for name, argument in arguments.items():
        for tensor in _tensors_in(argument):
            if isinstance(tensor, distributed.DTensor):
                raise TypeError(
                    f"{op}: {name} is a DTensor {tuple(tensor.shape)} placed {tensor.placements}; expected a plain tensor: "
                    f"make the call in the forward of the FSDP2 module that owns it, where parameters are gathered; or pass "
                    "its full_tensor() (gradients flow through it), or, where the op is elementwise, each rank's to_local()"
                )


def _tensors_in(argument: object) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument]
    return [t for each in argument for t in _tensors_in(each)] if isinstance(argument, (list, tuple)) else []


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`tensor` in the autocast dtype. float64 stays, as in torch's own autocast."""
    eligible = tensor is not None and tensor.dtype.is_floating_point and tensor.dtype is not torch.float64
    return tensor.to(dtype) if eligible else tensor


def count_rows(shape: Sequence[int]) -> int:
    """The product of all dimensions but the last."""
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows


def rows_of(tensor: Tensor) -> Tensor:
    """(..., K) as (rows, K). K may be 0."""
    return tensor.reshape(count_rows(tensor.shape), tensor.shape[-1])


def gate_fits(shape: torch.Size, groups: int, gate_index: Tensor | None) -> bool:
    """Whether the rows of an x of this shape can take their coefficients from `groups` rows of a gate."""
    if gate_index is not None:
        return (gate_index.shape == shape[:-1] or tuple(gate_index.shape) == (count_rows(shape),)) and (
            gate_index.dtype in (torch.int64, torch.int32)
        )
    return groups == 1 or (len(shape) > 1 and groups == shape[0]) or groups == count_rows(shape)


def not_a_view(y: Tensor) -> Tensor:
    """y itself, or the same memory as a tensor that autograd does not treat as a view.

    A back-end may return a view of a tensor that it has just made and that no other code uses. Autograd would forbid changing
    such an output in place (`y += residual`).
    """
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def explain_gate(op: str, name: str, x: Tensor, gate: Tensor, gate_index: Tensor | None) -> None:
    """Raise the error that says why gate_fits() is false. name: the op's name for its gate."""
    rows = count_rows(x.shape)
    if gate_index is None:
        raise ValueError(
            f"{op}: {name} has {gate.shape[0]} rows and x is {tuple(x.shape)}; "
            f"expected 1, {rows} (one per row of x)"
            + (f" or {x.shape[0]} (one per sequence)" if x.dim() > 2 else "")
            + ", or a gate_index"
        )
    if gate_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: gate_index is {gate_index.dtype}; expected torch.int64 or torch.int32")
    raise ValueError(
        f"{op}: gate_index is {tuple(gate_index.shape)}; expected ({rows},) or {tuple(x.shape[:-1])}, "
        f"the {name} row of each row of x"
    )
