"""interpolated_linear by blended weights: the rows of each blend are one matrix product with the weight blended for them.

    W_g = base + sum_i blend[g, i] S_i        y_g = x_g W_g^T + bias        dx_g = dy_g W_g
    D_g = dy_g^T x_g                          dS_i = sum_g blend[g, i] D_g  d_blend[g, i] = <D_g, S_i>

Everything but the products uses interpolation.py's back-ends: blends of the stack, blends of the D_g, inner products. The
blends are processed in batches, which bounds the memory for W_g and D_g and reads the stack once per batch.

The cost model counts FLOPs for each element of one weight. A byte takes as long as `balance` FLOPs (the matrix-product rate
over the memory bandwidth), and M includes the base:

    blended weights     2 rows + balance * itemsize * (M * batches + 2 groups)
    blended products    2 rows M + balance * itemsize * M
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from clp_kernels.backends import is_batch_invariant
from clp_kernels.tensor_lists import Blends, Pairs, on_device


class Interpolation(Protocol):
    """A back-end's module with the ops of interpolation.py."""

    def blend(self, call: Blends) -> None: ...

    def inner_products(self, call: Pairs) -> Tensor: ...


@dataclass(frozen=True)
class Machine:
    """The machine's numbers for the choice and the batches: FLOPs per byte, and the most bytes of blended weights at once."""

    balance: float
    scratch: int

    def batch(self, stack: Tensor) -> int:
        """The number of blended weights that fit."""
        return max(1, self.scratch // max(1, stack[0].numel() * stack.element_size()))


@dataclass(frozen=True)
class RowGroups:
    """The rows of x grouped by blend.

    order   the rows in the order of the groups, or None if they are in that order already
    firsts  group k is rows firsts[k] to firsts[k + 1] of the order; no group is empty
    blends  the row of `blend` for each group
    """

    order: Tensor | None
    firsts: list[int]
    blends: list[int]

    def gathered(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous() if self.order is None else tensor[self.order]

    def scattered(self, tensor: Tensor) -> Tensor:
        return tensor if self.order is None else torch.empty_like(tensor).index_copy_(0, self.order, tensor)

    def batches(self, most: int):
        """Batches of up to `most` groups: (the groups' indices, the number of rows of each if it is the same for all)."""
        for start in range(0, len(self.blends), most):
            chosen = range(start, min(start + most, len(self.blends)))
            counts = {self.firsts[k + 1] - self.firsts[k] for k in chosen}
            yield chosen, counts.pop() if len(counts) == 1 else None


def row_groups(groups: int, rows: int, gate_index: Tensor | None) -> RowGroups:
    if gate_index is None:
        span = rows // groups if groups else 0
        return RowGroups(
            None, list(range(0, rows + 1, span)) if span else [0], list(range(groups if span else 0))
        )
    index = gate_index.reshape(-1)
    ordered, order = index.sort(stable=True)
    blends, counts = ordered.unique_consecutive(return_counts=True)
    firsts = [0]
    for count in counts.tolist():
        firsts.append(firsts[-1] + count)
    return RowGroups(None if torch.equal(ordered, index) else order, firsts, blends.tolist())


def blends_weights(machine: Machine, rows: int, groups: int, stack: Tensor, base: Tensor | None) -> bool:
    """Whether the cost model prefers blended weights. Never in batch-invariant mode, as the model depends on rows."""
    if is_batch_invariant():
        return False
    models = stack.shape[0] + (base is not None)
    byte = machine.balance * stack.element_size()
    batches = -(-groups // machine.batch(stack))
    return 2 * rows + byte * (models * batches + 2 * groups) < 2 * rows * models + byte * models


def _coefficients(blend: Tensor, groups: RowGroups, chosen: range) -> Tensor:
    """(1, groups, M) float32. NaN for an index out of range, which is not checked on a GPU."""
    rows = [groups.blends[k] for k in chosen]
    inside = [0 <= row < blend.shape[0] for row in rows]
    index = on_device([row if fine else 0 for row, fine in zip(rows, inside)], torch.int64, blend.device)
    found = blend.detach()[index].float()
    if not all(inside):
        found[on_device(inside, torch.bool, blend.device).logical_not()] = torch.nan
    return found[None]


def forward(
    x: Tensor,
    stack: Tensor,
    blend: Tensor,
    base: Tensor | None,
    bias: Tensor | None,
    groups: RowGroups,
    machine: Machine,
    ops: Interpolation,
) -> Tensor:
    """The output y (rows, N) for x (rows, K)."""
    rows, (_, out_features, in_features) = x.shape[0], stack.shape
    x = groups.gathered(x)
    y = x.new_empty(rows, out_features)
    most = min(machine.batch(stack), max(len(groups.blends), 1))
    weights = stack.new_empty(most, out_features, in_features)
    for chosen, each in groups.batches(most):
        blended = _blended(ops, stack, _coefficients(blend, groups, chosen), base, weights[: len(chosen)])
        first, last = groups.firsts[chosen[0]], groups.firsts[chosen[-1] + 1]
        if each is not None and len(chosen) > 1:
            shape = len(chosen), each
            mine, out = x[first:last].view(*shape, in_features), y[first:last].view(*shape, out_features)
            if bias is None:
                torch.bmm(mine, blended.mT, out=out)
            else:
                torch.baddbmm(bias, mine, blended.mT, out=out)
            continue
        for k, weight in zip(chosen, blended):
            first, last = groups.firsts[k], groups.firsts[k + 1]
            if bias is None:
                torch.mm(x[first:last], weight.t(), out=y[first:last])
            else:
                torch.addmm(bias, x[first:last], weight.t(), out=y[first:last])
    return groups.scattered(y)


def _blended(ops, stack, coefficients, base, out) -> Tensor:
    """out (groups, N, K): the weight of each group."""
    if out.numel():
        ops.blend(Blends([[stack]], coefficients, [0], None if base is None else [base], [out]))
    return out


def backward(
    dy: Tensor,
    x: Tensor,
    stack: Tensor,
    blend: Tensor,
    base: Tensor | None,
    groups: RowGroups,
    machine: Machine,
    ops: Interpolation,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of x (rows, K), stack and blend as `needs` says, or None."""
    need_x, need_stack, need_blend = needs[:3]
    rows, (models, out_features, in_features) = x.shape[0], stack.shape
    dy, x = groups.gathered(dy), groups.gathered(x) if need_stack or need_blend else None
    dx = dy.new_empty(rows, in_features) if need_x else None
    most = min(machine.batch(stack), max(len(groups.blends), 1))
    # A single batch is written directly. Several batches are added up in float32.
    several = len(groups.blends) > most
    d_stack = None
    if need_stack:
        d_stack = torch.zeros(
            stack.shape, dtype=torch.float32 if several else stack.dtype, device=stack.device
        )
    d_blend = torch.zeros(blend.shape, dtype=torch.float32, device=blend.device) if need_blend else None
    scratch = stack.new_empty(most, out_features, in_features)
    for chosen, each in groups.batches(most):
        coefficients = _coefficients(blend, groups, chosen)
        matrices = scratch[: len(chosen)]
        spans = [(groups.firsts[k], groups.firsts[k + 1]) for k in chosen]
        first, last = spans[0][0], spans[-1][1]
        together = each is not None and len(chosen) > 1
        if together:
            d_rows = dy[first:last].view(len(chosen), each, out_features)
        if need_x:
            blended = _blended(ops, stack, coefficients, base, matrices)
            if together:
                torch.bmm(d_rows, blended, out=dx[first:last].view(len(chosen), each, in_features))
            else:
                for (start, end), weight in zip(spans, blended):
                    torch.mm(dy[start:end], weight, out=dx[start:end])
        if not (need_stack or need_blend) or not scratch.numel():
            continue
        if together:
            torch.bmm(d_rows.mT, x[first:last].view(len(chosen), each, in_features), out=matrices)
        else:
            for (start, end), matrix in zip(spans, matrices):
                torch.mm(dy[start:end].t(), x[start:end], out=matrix)
        if need_blend:
            found = ops.inner_products(Pairs([[matrices]], [[stack]]))[0].float()
            inside = [n for n, k in enumerate(chosen) if 0 <= groups.blends[k] < blend.shape[0]]
            index = on_device([groups.blends[chosen[n]] for n in inside], torch.int64, blend.device)
            d_blend[index] = found[on_device(inside, torch.int64, blend.device)]
        if need_stack:
            transposed = coefficients.transpose(1, 2)  # (1, M, groups)
            if several:
                items = list(d_stack)
                ops.blend(
                    Blends(
                        [[matrices]] * models, transposed.transpose(0, 1), list(range(models)), items, items
                    )
                )
            else:
                ops.blend(Blends([[matrices]], transposed, [0], None, [d_stack]))
    return [
        None if dx is None else groups.scattered(dx),
        None if d_stack is None else d_stack.to(stack.dtype),
        None if d_blend is None else d_blend.to(blend.dtype),
    ]
