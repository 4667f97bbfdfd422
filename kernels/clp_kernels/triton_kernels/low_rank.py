"""What multi_lora_linear does besides the base product: the adapters' products, all skinny, and what the gate needs.

    skinny      acc = x A^T in float32, then the gate: h, h * g             (forward)
                acc = dY B, then dS * g, h * g, dS * h                      (backward)
    both        dS = dY B and dB = dY^T (h * g), each tile of dY read once for the two
    rank_grad   dA = s^T x and dB = dY^T s, contraction over the rows
    group_sum   d_gate: dS * h summed over the rows of each gate row, as a product with the one-hot of the row's group

All are a question of bandwidth. Bytes that move, in 16 bits, for T rows, K in, N out, rank R, besides the (T, R) ones:
forward 2TK; backward 2TK for dA, and for dS and dB either 4TN, or 2TN + 8TNR (1 / columns + 1 / rows of a program) with
`both`, whose partial sums pass through memory in float32: a program would have to hold all columns to spare those of dS,
all rows to spare those of dB (`multi_lora_strategy.dy` weighs the two). Feeding dX from the same tiles does not pay: each
of its column tiles reads dY again from L2 in any case, under a product that is bound by arithmetic, and dS is a summand
of dX, so that it has to be there before.

Contractions that are long where the output is small are split over the grid into float32 partial sums, added in order by
a second launch: one for dA, dB and d_gate together (`summed`). Inside `batch_invariant()` those over K and N are not split,
and have one tile for any number of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from clp_kernels.backends import is_batch_invariant
from clp_kernels.triton_kernels import launch
from clp_kernels.triton_kernels.launch import Tile, cdiv, power_of_2
from clp_kernels.triton_kernels.tuning import Tunable, counted

# (largest number of rows, tile), first that fits; columns is the largest block of the rank.
_SKINNY = {
    "half": ((64, Tile(16, 64, 256, 4, 3)), (None, Tile(64, 128, 64, 4, 4))),
    "hip": ((64, Tile(16, 64, 128, 4, 2)), (None, Tile(64, 64, 64, 4, 2))),
    "plain": ((64, Tile(16, 16, 64, 4, 2)), (None, Tile(64, 32, 32, 4, 2))),
}
# (largest rank, tile): rows and columns of dY, depth the block of the rank; none beyond the last.
_BOTH = {
    "half": ((16, Tile(64, 512, 16, 8, 2)), (32, Tile(64, 512, 32, 8, 2)), (64, Tile(64, 256, 64, 8, 3))),
    "plain": ((64, Tile(16, 32, 64, 4, 2)),),
}
# rows: the long dimension of the output, columns: rank, depth: rows of x.
_RANK_GRAD = {
    "half": Tile(128, 64, 64, 4, 3),
    "hip": Tile(128, 64, 64, 4, 2),
    "plain": Tile(64, 32, 32, 4, 2),
}
SKINNY = Tunable(
    "skinny",
    ("rows", "depth", "rank"),
    {
        "half": (
            *(tile for _, tile in _SKINNY["half"]), (16, 64, 128, 4, 4), (16, 32, 256, 4, 3), (32, 64, 128, 4, 4),
            (32, 64, 256, 4, 3), (64, 64, 64, 4, 5), (64, 64, 128, 4, 3), (128, 64, 64, 4, 4), (128, 64, 64, 8, 4),
            (128, 64, 128, 8, 3),
        ),
        "plain": (*(tile for _, tile in _SKINNY["plain"]), (64, 32, 32, 8, 3), (128, 32, 32, 8, 2)),
    },
    Tile._make,
)  # fmt: skip
BOTH = Tunable(
    "both",
    ("rows", "columns", "rank"),
    {
        "half": (
            *(tile for _, tile in _BOTH["half"]), (64, 256, 16, 8, 3), (64, 256, 32, 8, 3), (32, 512, 16, 8, 3),
            (128, 256, 16, 8, 2), (128, 256, 32, 8, 2), (64, 128, 64, 4, 3), (32, 256, 64, 8, 3),
        ),
    },
    Tile._make,
)  # fmt: skip
RANK_GRAD = Tunable(
    "rank_grad",
    ("rows", "columns", "rank"),
    {
        "half": (
            _RANK_GRAD["half"], (128, 64, 128, 4, 3), (128, 64, 64, 8, 4), (64, 64, 128, 4, 4), (64, 64, 64, 4, 5),
            (256, 64, 64, 8, 3), (128, 128, 64, 8, 3),
        ),
        "plain": (_RANK_GRAD["plain"], (64, 32, 32, 8, 3), (128, 32, 32, 8, 2)),
    },
    Tile._make,
)  # fmt: skip
_GROUPS, _GROUP_RANK, _GROUP_DEPTH = 16, 32, 64
_FILL = 256  # programs that fill a large GPU about twice


class Parts(NamedTuple):
    """A sum in the making: its parts (splits, ...), float32, or (1, ...) in `dtype`, which is that of the sum."""

    sums: Tensor
    dtype: torch.dtype


@triton.jit
def _gate_rows(acc, at, mask, group, rank, groups, R, gate, h, raw, scaled, gated, product):
    """What is made of acc (rows, rank) and the gate; outputs that are None are not asked for. All are (rows,
    R), dense."""
    inside = (group >= 0) & (group < groups)
    g = tl.load(
        gate + group[:, None] * R + rank[None, :], mask=mask & inside[:, None], other=float("nan")
    ).to(tl.float32)
    if raw is not None:
        tl.store(raw + at, acc.to(raw.dtype.element_ty), mask=mask)
    if scaled is not None:
        tl.store(scaled + at, (acc * g).to(scaled.dtype.element_ty), mask=mask)
    if h is not None:
        kept = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
        if gated is not None:
            tl.store(gated + at, (kept * g).to(gated.dtype.element_ty), mask=mask)
        if product is not None:
            tl.store(product + at, (acc * kept).to(product.dtype.element_ty), mask=mask)


@triton.jit
def group_of(row, rows, index, span):
    """The gate row of each row, 64 bits; -1 beyond the last row."""
    if index is not None:
        return tl.load(index + row, mask=row < rows, other=-1).to(tl.int64)
    return tl.where(row < rows, row // span, -1)


@triton.jit
def _skinny(
    x,  # (M, K), any strides
    a,  # (R, K), any strides
    gate, index,  # (groups, R) dense; (M,) or None
    h, raw, scaled, gated, product,  # (M, R) dense, or None
    partial,  # (SPLIT, M, R) float32, or None: the contraction is not split
    M, K, R, groups, span, chunk, stride_xm, stride_xk, stride_ar, stride_ak,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    first = tl.program_id(2) * chunk
    last = tl.minimum(first + chunk, K)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        x_tile = tl.load(
            x + row[:, None] * stride_xm + k[None, :] * stride_xk,
            mask=(row < M)[:, None] & (k < last)[None, :],
            other=0.0,
        )
        a_tile = tl.load(
            a + rank[None, :] * stride_ar + k[:, None] * stride_ak,
            mask=(rank < R)[None, :] & (k < last)[:, None],
            other=0.0,
        )
        acc = tl.dot(x_tile, a_tile, acc, input_precision="ieee")
    mask = (row < M)[:, None] & (rank < R)[None, :]
    at = row[:, None] * R + rank[None, :]
    if partial is not None:
        tl.store(partial + tl.program_id(2).to(tl.int64) * M * R + at, acc, mask=mask)
    else:
        group = group_of(row, M, index, span)
        _gate_rows(acc, at, mask, group, rank, groups, R, gate, h, raw, scaled, gated, product)


@triton.jit
def _skinny_end(
    partial, gate, index, h, raw, scaled, gated, product, M, R, groups, span, splits,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The sum of _skinny's partial results, and then what _skinny does with it."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    mask = (row < M)[:, None] & (rank < R)[None, :]
    at = row[:, None] * R + rank[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    size = tl.full((), R, tl.int64) * M
    part = partial + at
    for _ in range(splits):
        acc += tl.load(part, mask=mask, other=0.0)
        part += size
    group = group_of(row, M, index, span)
    _gate_rows(acc, at, mask, group, rank, groups, R, gate, h, raw, scaled, gated, product)


@triton.jit
def _both(
    dy,  # (M, N), any strides
    b,  # (N, R), any strides
    h,  # (M, R) dense
    gate, index,  # (groups, R) dense; (M,) or None
    partial_s,  # (column blocks, M, R) float32: dY B, a summand for each block of columns
    partial_b,  # (row pieces, N, R) float32: dY^T (h * gate), a summand for each piece of the rows
    M, N, R, groups, span, piece, stride_dm, stride_dn, stride_bn, stride_br,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = tl.arange(0, BLOCK_R).to(tl.int64)
    first = tl.program_id(1) * piece
    last = tl.minimum(first + piece, M)
    edge = (column < N)[:, None] & (rank < R)[None, :]
    b_tile = tl.load(b + column[:, None] * stride_bn + rank[None, :] * stride_br, mask=edge, other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    to_s = partial_s + tl.program_id(0).to(tl.int64) * M * R
    for start in range(first, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M).to(tl.int64)
        dy_tile = tl.load(
            dy + row[:, None] * stride_dm + column[None, :] * stride_dn,
            mask=(row < last)[:, None] & (column < N)[None, :],
            other=0.0,
        )
        mask = (row < last)[:, None] & (rank < R)[None, :]
        at = row[:, None] * R + rank[None, :]
        group = group_of(row, last, index, span)
        inside = (group >= 0) & (group < groups)
        # Beyond the last row the gate is zero, not NaN, as these rows are summed with the others.
        outside = tl.where(row < last, float("nan"), 0.0)
        g = tl.load(gate + group[:, None] * R + rank[None, :], mask=mask & inside[:, None], other=0.0)
        g = tl.where(inside[:, None], g.to(tl.float32), outside[:, None])
        gated = (tl.load(h + at, mask=mask, other=0.0).to(tl.float32) * g).to(dy_tile.dtype)
        tl.store(to_s + at, tl.dot(dy_tile, b_tile, input_precision="ieee"), mask=mask)
        acc = tl.dot(tl.trans(dy_tile), gated, acc, input_precision="ieee")
    to_b = partial_b + (tl.program_id(1).to(tl.int64) * N + column[:, None]) * R + rank[None, :]
    tl.store(to_b, acc, mask=edge)


@triton.jit
def _rank_grad(
    x,  # (M, N), any strides
    s,  # (M, R) dense
    out,  # (splits, ...) of x^T s: element (n, r) at n * stride_on + r * stride_or
    M, N, R, chunk, stride_xm, stride_xn, stride_on, stride_or,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    first = tl.program_id(2) * chunk
    last = tl.minimum(first + chunk, M)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M).to(tl.int64)
        x_tile = tl.load(
            x + column[:, None] * stride_xn + row[None, :] * stride_xm,
            mask=(column < N)[:, None] & (row < last)[None, :],
            other=0.0,
        )
        s_tile = tl.load(
            s + row[:, None] * R + rank[None, :], mask=(row < last)[:, None] & (rank < R)[None, :], other=0.0
        )
        acc = tl.dot(x_tile, s_tile, acc, input_precision="ieee")
    to = out + tl.program_id(2).to(tl.int64) * N * R + column[:, None] * stride_on + rank[None, :] * stride_or
    tl.store(to, acc.to(out.dtype.element_ty), mask=(column < N)[:, None] & (rank < R)[None, :])


@triton.jit
def _group_sum(
    product,  # (M, R) float32, dense
    index,  # (M,) or None
    out,  # (splits, groups, R)
    M, R, groups, span, splits,
    BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    # The rows that can belong to these groups, cut in `splits`.
    begin, end = 0, M
    if index is None:
        begin = tl.minimum(tl.program_id(0) * BLOCK_G * span, M)
        end = tl.minimum(begin + BLOCK_G * span, M)
    chunk = tl.cdiv(end - begin, splits)
    first = begin + tl.program_id(2) * chunk
    last = tl.minimum(first + chunk, end)
    acc = tl.zeros((BLOCK_G, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M).to(tl.int64)
        member = (group_of(row, last, index, span)[None, :] == group[:, None]).to(tl.float32)
        # Rows of one group mostly lie together: most blocks hold none of these groups, and cost a look at
        # their index.
        if tl.max(tl.max(member, 1), 0) > 0:
            tile = tl.load(
                product + row[:, None] * R + rank[None, :],
                mask=(row < last)[:, None] & (rank < R)[None, :],
                other=0.0,
            )
            acc = tl.dot(member, tile, acc, input_precision="ieee")
    to = out + (tl.program_id(2).to(tl.int64) * groups + group[:, None]) * R + rank[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(group < groups)[:, None] & (rank < R)[None, :])


@triton.jit
def _sum_up(partial, out, size, splits, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    part = partial + at
    for _ in range(splits):
        acc += tl.load(part, mask=at < size, other=0.0)
        part += tl.full((), size, tl.int64)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _sum_splits(
    partial_0, out_0, size_0, splits_0,  # (splits, ...) float32 and its sum (...), of that size, for each program_id(1)
    partial_1, out_1, size_1, splits_1,  # or None
    partial_2, out_2, size_2, splits_2,
    BLOCK: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    if which == 0:
        _sum_up(partial_0, out_0, size_0, splits_0, BLOCK)
    if partial_1 is not None:
        if which == 1:
            _sum_up(partial_1, out_1, size_1, splits_1, BLOCK)
    if partial_2 is not None:
        if which == 2:
            _sum_up(partial_2, out_2, size_2, splits_2, BLOCK)


def _splits(programs: int, steps: int) -> int:
    """Into how many parts a contraction of `steps` tile depths is cut: enough to fill the GPU, each four steps or more."""
    return max(1, min(cdiv(_FILL, programs), steps // 4))


def span_of(gate: Tensor, gate_index: Tensor | None, rows: int) -> int:
    return 1 if gate_index is not None else rows // gate.shape[0]


def pointer_family(*operands: Tensor) -> str:
    """A row of the tables here: those of "half" serve every generation of NVIDIA's."""
    kind = launch.family(*operands)
    return "half" if kind == "ampere" else kind


def _rank_block(rank: int, largest: int) -> int:
    """All of the rank where it fits: each block of it reads the long operand again."""
    return min(max(16, power_of_2(rank)), largest)


def skinny(x: Tensor, a: Tensor, gate: Tensor, gate_index: Tensor | None, **tensors: Tensor | None) -> None:
    """x a^T for x (M, K), a (R, K), and from it what `tensors` asks for: h, raw, scaled, gated, product as _skinny has
    them. gate and gate_index are dense."""
    (rows, depth), rank = x.shape, a.shape[0]
    invariant = is_batch_invariant()
    family = pointer_family(x, a)
    tile = SKINNY.choice(family, x, counted(rows), depth, rank) or next(
        t for most, t in _SKINNY[family] if most is None or (rows <= most and not invariant)
    )
    block = _rank_block(rank, tile.columns)
    grid = cdiv(rows, tile.rows), cdiv(rank, block)
    # One wave has enough loads in flight; a cut contraction writes and reads 8 R bytes a row and cut, in a launch more.
    whole = invariant or 4 * grid[0] * grid[1] >= 3 * launch.multiprocessors(x.device)
    splits = 1 if whole else _splits(grid[0] * grid[1], cdiv(depth, tile.depth))
    chunk = cdiv(cdiv(depth, splits), tile.depth) * tile.depth
    splits = cdiv(depth, chunk)
    partial = x.new_empty((splits, rows, rank), dtype=torch.float32) if splits > 1 else None
    outputs = [tensors.get(name) for name in ("h", "raw", "scaled", "gated", "product")]
    _skinny[(*grid, splits)](
        x, a, gate, gate_index, *outputs, partial, rows, depth, rank, gate.shape[0], span_of(gate, gate_index, rows), chunk,
        *x.stride(), *a.stride(), BLOCK_M=tile.rows, BLOCK_R=block, BLOCK_K=tile.depth, num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        apply_gate(partial, gate, gate_index, **tensors)


def apply_gate(partial: Tensor, gate: Tensor, gate_index: Tensor | None, **tensors: Tensor | None) -> None:
    """The sum of partial (splits, M, R) over its first dimension, and from it what `tensors` asks for, as in `skinny`."""
    splits, rows, rank = partial.shape
    outputs = [tensors.get(name) for name in ("h", "raw", "scaled", "gated", "product")]
    _skinny_end[(cdiv(rows, 64), cdiv(rank, 32))](
        partial, gate, gate_index, *outputs, rows, rank, gate.shape[0], span_of(gate, gate_index, rows), splits,
        BLOCK_M=64, BLOCK_R=32,
    )  # fmt: skip


def pieces_of_both(dy: Tensor, lora_b: Tensor) -> tuple[Tile, int, int] | None:
    """How `both` would cut dY: tile, blocks of the columns, pieces of the rows; None where it has no tile."""
    family, rank = launch.family(dy, lora_b), lora_b.shape[1]
    tile = BOTH.choice(family, dy, *dy.shape, rank)
    if tile is None or tile.depth < rank:
        tile = next((t for most, t in _BOTH.get(family, ()) if rank <= most), None)
    if tile is None:
        return None
    blocks = cdiv(dy.shape[1], tile.columns)
    pieces = min(cdiv(_FILL // 2, blocks), cdiv(dy.shape[0], tile.rows))
    piece = cdiv(cdiv(dy.shape[0], pieces), tile.rows) * tile.rows
    return tile, blocks, cdiv(dy.shape[0], piece)


def both(
    dy: Tensor, lora_b: Tensor, gate: Tensor, gate_index: Tensor | None, h: Tensor, **tensors: Tensor | None
) -> Parts:
    """-> dB = dY^T (h * gate) (N, R) in parts, with dS = dY B turned into what `tensors` asks for, as in `skinny`."""
    cut = pieces_of_both(dy, lora_b)
    if cut is None:
        raise ValueError(f"dY once: no tile for rank {lora_b.shape[1]} in {dy.dtype}; force dy='twice'")
    tile, blocks, pieces = cut
    (rows, columns), rank = dy.shape, lora_b.shape[1]
    piece = cdiv(cdiv(rows, pieces), tile.rows) * tile.rows
    partial_s = dy.new_empty((blocks, rows, rank), dtype=torch.float32)
    partial_b = dy.new_empty((pieces, columns, rank), dtype=torch.float32)
    _both[(blocks, pieces)](
        dy, lora_b, h, gate, gate_index, partial_s, partial_b, rows, columns, rank, gate.shape[0],
        span_of(gate, gate_index, rows), piece, *dy.stride(), *lora_b.stride(), BLOCK_M=tile.rows, BLOCK_N=tile.columns,
        BLOCK_R=tile.depth, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if any(t is not None for t in tensors.values()):
        apply_gate(partial_s, gate, gate_index, h=h, **tensors)
    return Parts(partial_b, lora_b.dtype)


def rank_grad(x: Tensor, s: Tensor, transposed: bool) -> Parts:
    """x^T s (N, R) for x (M, N) and s (M, R) dense, or its transpose (R, N), in parts."""
    (rows, columns), rank = x.shape, s.shape[1]
    family = pointer_family(x)
    tile = RANK_GRAD.choice(family, x, rows, columns, rank) or _RANK_GRAD[family]
    block = _rank_block(rank, tile.columns)
    grid = cdiv(columns, tile.rows), cdiv(rank, block)
    splits = _splits(grid[0] * grid[1], cdiv(rows, tile.depth))
    chunk = cdiv(cdiv(rows, splits), tile.depth) * tile.depth
    splits = cdiv(rows, chunk)
    shape, strides = ((rank, columns), (1, columns)) if transposed else ((columns, rank), (rank, 1))
    out = x.new_empty((splits, *shape), dtype=x.dtype if splits == 1 else torch.float32)
    _rank_grad[(*grid, splits)](
        x, s, out, rows, columns, rank, chunk, *x.stride(), *strides, BLOCK_N=tile.rows, BLOCK_R=block,
        BLOCK_M=tile.depth, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return Parts(out, x.dtype)


def group_sum(product: Tensor, gate: Tensor, gate_index: Tensor | None) -> Parts:
    """product (M, R) float32 summed over the rows that each row of gate served, in gate's shape, in parts."""
    (rows, rank), groups = product.shape, gate.shape[0]
    span = span_of(gate, gate_index, rows)
    grid = cdiv(groups, _GROUPS), cdiv(rank, _GROUP_RANK)
    served = rows if gate_index is not None else min(rows, span * _GROUPS)
    splits = _splits(grid[0] * grid[1], cdiv(served, _GROUP_DEPTH))
    out = product.new_empty((splits, groups, rank), dtype=gate.dtype if splits == 1 else torch.float32)
    _group_sum[(*grid, splits)](
        product, gate_index, out, rows, rank, groups, span, splits, BLOCK_G=_GROUPS, BLOCK_R=_GROUP_RANK,
        BLOCK_M=_GROUP_DEPTH,
    )  # fmt: skip
    return Parts(out, gate.dtype)


def summed(*found: Parts | None) -> list[Tensor | None]:
    """Each of at most three results, its parts added up and in its dtype, by one launch for all; None for None."""
    several = [
        (p, p.sums.new_empty(p.sums.shape[1:], dtype=p.dtype))
        for p in found
        if p is not None and len(p.sums) > 1
    ]
    if several:
        operands = [(p.sums, out, out.numel(), len(p.sums)) for p, out in several]
        operands += [(None,) * 4] * (3 - len(operands))
        largest = max(out.numel() for _, out in several)
        _sum_splits[(cdiv(largest, 1024), len(several))](
            *(value for of_one in operands for value in of_one), BLOCK=1024
        )
    done = {id(p): out for p, out in several}
    return [None if p is None else done[id(p)] if id(p) in done else p.sums[0].to(p.dtype) for p in found]
