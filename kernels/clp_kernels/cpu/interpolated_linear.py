"""interpolated_linear on the CPU: torch's BLAS for the products, C++ for the blends and inner products of weights.

Blended products are the reference's own: they are matrix products but for a row-wise scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels import row_groups
from clp_kernels.arguments import rows_of
from clp_kernels.cpu import interpolation
from clp_kernels.reference import interpolated_linear as products
from clp_kernels.row_groups import Machine, RowGroups, blends_weights

# Where the two ways crossed on a core with AVX-512 and AMX, 1024 x 1024, 2 and 4 models: 10 and 64. More scratch is slower, as
# glibc then takes it from the system, page by page, at every call: 35 ms with 64 MiB for 8 float32 weights, 11 with 12.
_MACHINES = {
    torch.float32: Machine(balance=10.0, scratch=12 << 20),
    torch.bfloat16: Machine(balance=64.0, scratch=12 << 20),
}


def unsupported(*, device: torch.device, dtype: torch.dtype, **call) -> str | None:
    return interpolation.unsupported(device=device, dtype=dtype, other=dtype)


def _grouped(blend: Tensor, gate_index: Tensor | None, rows: int) -> RowGroups:
    groups = row_groups.row_groups(blend.shape[0], rows, gate_index)
    for index in groups.blends[:1] + groups.blends[-1:]:  # the smallest and the largest
        if not 0 <= index < blend.shape[0]:
            raise IndexError(
                f"interpolated_linear: gate_index holds {index}; expected 0 <= index < {blend.shape[0]}, the number of "
                "blend rows"
            )
    return groups


def forward(
    x: Tensor,
    stack: Tensor,
    blend: Tensor,
    base: Tensor | None,
    bias: Tensor | None,
    gate_index: Tensor | None,
) -> Tensor:
    """As reference.interpolated_linear.forward."""
    flat, machine = rows_of(x), _MACHINES[x.dtype]
    groups = _grouped(blend, gate_index, flat.shape[0])
    if not blends_weights(machine, flat.shape[0], len(groups.blends), stack, base):
        return products.forward(x, stack, blend, base, bias, gate_index, products.in_dtype)
    y = row_groups.forward(flat, stack, blend, base, bias, groups, machine, interpolation)
    return y.view(*x.shape[:-1], stack.shape[1])


def backward(
    dy: Tensor,
    x: Tensor,
    stack: Tensor,
    blend: Tensor,
    base: Tensor | None,
    gate_index: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """As reference.interpolated_linear.backward."""
    flat, machine = rows_of(x), _MACHINES[x.dtype]
    groups = _grouped(blend, gate_index, flat.shape[0])
    if not blends_weights(machine, flat.shape[0], len(groups.blends), stack, base):
        return products.backward(dy, x, stack, blend, base, gate_index, needs, products.in_dtype)
    dy = rows_of(dy)
    grads = row_groups.backward(dy, flat, stack, blend, base, groups, machine, interpolation, needs)
    if needs[0]:
        grads[0] = grads[0].view(x.shape)
    return [grad for grad in grads if grad is not None] + ([dy.sum(0)] if needs[3] else [])
