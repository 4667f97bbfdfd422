"""multi_lora_linear on GPUs. Forward: two launches; backward: up to six, none with atomics.

    skinny      acc = x A^T in float32, then the gate: h, h * g             (forward)
                acc = dY B, then dS * g, h * g, dS * h                      (backward)
    linear      y = x W^T + s B^T + bias, one accumulator                   (forward; the same kernel gives
                dX = dY W + s A)
    rank_grad   dA = s^T x and dB = dY^T s, contraction over the rows
    group_sum   d_gate: dS * h summed over the rows of each gate row, as a product with the one-hot of the
                row's group

The low rank is R more columns of the base product's contraction, so y is written once and read never.
Contractions that are long where the output is small are split over the grid into float32 partial sums, added
in order by a second launch.

Masks on rows, columns and contraction; addresses in 64 bits; strides are arguments, so operands may be
transposed or cut out of larger ones. Tiles come from the tables below, by shape, dtype and vendor; they
compile for sm_80, sm_90, sm_100 and gfx942 (tests/kernels/test_aot.py) and have not been tuned on a device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from clp_kernels.backends import interpreting
from clp_kernels.triton_kernels.aot import AotSpec, recorded

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int  # of the contraction
    num_warps: int
    num_stages: int


# (largest number of rows, tile), first that fits; "plain" is for float32 and unaligned operands. Few rows
# are a question of bandwidth, so narrow column tiles (many programs) and deep loads; many rows of
# arithmetic, so what fills the tensor cores.
_LINEAR = {
    "half": (
        (16, Tile(16, 32, 256, 4, 3)),
        (64, Tile(64, 32, 128, 4, 4)),
        (1024, Tile(64, 128, 64, 4, 4)),
        (None, Tile(128, 256, 64, 8, 3)),
    ),
    "half_hip": (
        (16, Tile(16, 32, 256, 4, 2)),
        (64, Tile(64, 32, 128, 4, 2)),
        (1024, Tile(64, 128, 64, 4, 2)),
        (None, Tile(128, 128, 64, 8, 2)),
    ),
    "plain": ((16, Tile(16, 32, 64, 4, 2)), (None, Tile(64, 64, 32, 4, 2))),
}
# columns here is the block of the rank.
_SKINNY = {
    "half": ((64, Tile(16, 16, 256, 4, 3)), (None, Tile(64, 64, 64, 4, 4))),
    "half_hip": ((64, Tile(16, 16, 256, 4, 2)), (None, Tile(64, 64, 64, 4, 2))),
    "plain": ((64, Tile(16, 16, 64, 4, 2)), (None, Tile(64, 32, 32, 4, 2))),
}
# rows: the long dimension of the output, columns: rank, depth: rows of x.
_RANK_GRAD = {
    "half": ((None, Tile(128, 64, 64, 4, 3)),),
    "half_hip": ((None, Tile(128, 64, 64, 4, 2)),),
    "plain": ((None, Tile(64, 32, 32, 4, 2)),),
}
_GROUPS, _GROUP_RANK, _GROUP_DEPTH = 16, 32, 64
_FILL = 256  # programs that fill a large GPU about twice


def unsupported(*, device: torch.device, dtype: torch.dtype, **call) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"the Triton kernels take CUDA or ROCm tensors, not {device.type}"
    if dtype not in _DTYPES:
        return f"the Triton kernels take float32, float16 and bfloat16, not {dtype}"
    if interpreting() and dtype is torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly; use float16 or float32 there"
    return None


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
def _group_of(row, rows, index, span):
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
        _gate_rows(
            acc,
            at,
            mask,
            _group_of(row, M, index, span),
            rank,
            groups,
            R,
            gate,
            h,
            raw,
            scaled,
            gated,
            product,
        )


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
    _gate_rows(
        acc, at, mask, _group_of(row, M, index, span), rank, groups, R, gate, h, raw, scaled, gated, product
    )


@triton.jit
def _linear(
    x,  # (M, K), any strides
    w,  # (K, N), any strides
    s,  # (M, R) dense, or None
    b,  # (R, N), any strides
    bias,  # (N,) or None
    y,  # (M, N) dense
    M, N, K, R, stride_xm, stride_xk, stride_wk, stride_wn, stride_br, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M:
    tl.constexpr,
):  # fmt: skip
    # Programs run down GROUP_M row tiles before the next column tile, so that the weight's tiles are in L2
    # when used again.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program, band = tl.program_id(0), GROUP_M * tiles_n
    first = program // band * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    row = (first + program % band % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (program % band // height).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = (row < M)[:, None], (column < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        x_tile = tl.load(
            x + row[:, None] * stride_xm + k[None, :] * stride_xk, mask=rows & (k < K)[None, :], other=0.0
        )
        w_tile = tl.load(
            w + k[:, None] * stride_wk + column[None, :] * stride_wn,
            mask=(k < K)[:, None] & columns,
            other=0.0,
        )
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
    if s is not None:
        for start in range(0, R, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R).to(tl.int64)
            s_tile = tl.load(s + row[:, None] * R + r[None, :], mask=rows & (r < R)[None, :], other=0.0)
            b_tile = tl.load(
                b + r[:, None] * stride_br + column[None, :] * stride_bn,
                mask=(r < R)[:, None] & columns,
                other=0.0,
            )
            acc = tl.dot(s_tile, b_tile, acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * N + column[None, :], acc.to(y.dtype.element_ty), mask=rows & columns)


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
        member = (_group_of(row, last, index, span)[None, :] == group[:, None]).to(tl.float32)
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
def _sum_splits(partial, out, size, splits, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    part = partial + at
    for _ in range(splits):
        acc += tl.load(part, mask=at < size, other=0.0)
        part += tl.full((), size, tl.int64)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=at < size)


def _tile(table: dict, rows: int, dtype: torch.dtype, *operands: Tensor) -> Tile:
    # Elements of rows that do not start on 16 elements are loaded one by one, with an address each in a
    # register: the tiles
    # of float32 leave room for that.
    aligned = all(stride == 1 or stride % 16 == 0 for operand in operands for stride in operand.stride())
    family = "half_hip" if torch.version.hip else "half"
    if dtype is torch.float32 or not aligned:
        family = "plain"
    return next(tile for most, tile in table[family] if most is None or rows <= most)


def _splits(programs: int, steps: int) -> int:
    """Into how many parts a contraction of `steps` tile depths is cut: enough to fill the GPU, each four
    steps or more."""
    return max(1, min(triton.cdiv(_FILL, programs), steps // 4))


def _span(gate: Tensor, gate_index: Tensor | None, rows: int) -> int:
    return 1 if gate_index is not None else rows // gate.shape[0]


def _launch_skinny(x, a, gate, gate_index, **tensors) -> None:
    """a is (R, K); tensors: h, raw, scaled, gated, product as _skinny has them."""
    (rows, depth), rank = x.shape, a.shape[0]
    tile = _tile(_SKINNY, rows, x.dtype, x, a)
    grid = triton.cdiv(rows, tile.rows), triton.cdiv(rank, tile.columns)
    splits = _splits(grid[0] * grid[1], triton.cdiv(depth, tile.depth))
    chunk = triton.cdiv(triton.cdiv(depth, splits), tile.depth) * tile.depth
    splits = triton.cdiv(depth, chunk)
    partial = x.new_empty((splits, rows, rank), dtype=torch.float32) if splits > 1 else None
    outputs = {name: tensors.get(name) for name in ("h", "raw", "scaled", "gated", "product")}
    groups, span = gate.shape[0], _span(gate, gate_index, rows)
    _skinny[(*grid, splits)](
        x,
        a,
        gate,
        gate_index,
        **outputs,
        partial=partial,
        M=rows,
        K=depth,
        R=rank,
        groups=groups,
        span=span,
        chunk=chunk,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_ar=a.stride(0),
        stride_ak=a.stride(1),
        BLOCK_M=tile.rows,
        BLOCK_R=tile.columns,
        BLOCK_K=tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits > 1:
        _skinny_end[grid](
            partial,
            gate,
            gate_index,
            **outputs,
            M=rows,
            R=rank,
            groups=groups,
            span=span,
            splits=splits,
            BLOCK_M=tile.rows,
            BLOCK_R=tile.columns,
        )


def _launch_linear(x, w, s, b, bias) -> Tensor:
    """x w + s b + bias for x (M, K), w (K, N), s (M, R) or None, b (R, N)."""
    (rows, depth), columns = x.shape, w.shape[1]
    tile = _tile(_LINEAR, rows, x.dtype, x, w)
    y = x.new_empty((rows, columns))
    _linear[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
        x,
        w,
        s,
        b,
        bias,
        y,
        rows,
        columns,
        depth,
        b.shape[0],
        x.stride(0),
        x.stride(1),
        w.stride(0),
        w.stride(1),
        b.stride(0),
        b.stride(1),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        BLOCK_R=_rank_block(b.shape[0], tile),
        GROUP_M=8,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y


def _rank_block(rank: int, tile: Tile) -> int:
    return min(max(16, triton.next_power_of_2(rank)), 64, tile.depth)


def _launch_rank_grad(x, s, transposed: bool) -> Tensor:
    """x^T s (N, R), or its transpose (R, N)."""
    (rows, columns), rank = x.shape, s.shape[1]
    tile = _tile(_RANK_GRAD, rows, x.dtype, x)
    grid = triton.cdiv(columns, tile.rows), triton.cdiv(rank, tile.columns)
    splits = _splits(grid[0] * grid[1], triton.cdiv(rows, tile.depth))
    chunk = triton.cdiv(triton.cdiv(rows, splits), tile.depth) * tile.depth
    splits = triton.cdiv(rows, chunk)
    shape = (rank, columns) if transposed else (columns, rank)
    out = x.new_empty((splits, *shape), dtype=x.dtype if splits == 1 else torch.float32)
    _rank_grad[(*grid, splits)](
        x,
        s,
        out,
        rows,
        columns,
        rank,
        chunk,
        x.stride(0),
        x.stride(1),
        *((1, columns) if transposed else (rank, 1)),
        BLOCK_N=tile.rows,
        BLOCK_R=tile.columns,
        BLOCK_M=tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return _summed(out, x.dtype)


def _launch_group_sum(product, gate, gate_index) -> Tensor:
    (rows, rank), groups = product.shape, gate.shape[0]
    span = _span(gate, gate_index, rows)
    grid = triton.cdiv(groups, _GROUPS), triton.cdiv(rank, _GROUP_RANK)
    served = rows if gate_index is not None else min(rows, span * _GROUPS)
    splits = _splits(grid[0] * grid[1], triton.cdiv(served, _GROUP_DEPTH))
    out = product.new_empty((splits, groups, rank), dtype=gate.dtype if splits == 1 else torch.float32)
    _group_sum[(*grid, splits)](
        product,
        gate_index,
        out,
        rows,
        rank,
        groups,
        span,
        splits,
        BLOCK_G=_GROUPS,
        BLOCK_R=_GROUP_RANK,
        BLOCK_M=_GROUP_DEPTH,
    )
    return _summed(out, gate.dtype)


def _summed(partial: Tensor, dtype: torch.dtype) -> Tensor:
    if partial.shape[0] == 1:
        return partial[0]
    out = partial.new_empty(partial.shape[1:], dtype=dtype)
    _sum_splits[(triton.cdiv(out.numel(), 1024),)](partial, out, out.numel(), partial.shape[0], BLOCK=1024)
    return out


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    gate_index: Tensor | None,
    keep_h: bool = True,
) -> tuple[Tensor, Tensor]:
    """As reference.multi_lora.forward."""
    flat = x.reshape(-1, x.shape[-1])
    rows, rank = flat.shape[0], lora_a.shape[0]
    h, scaled = x.new_empty((rows, rank)) if keep_h else x.new_empty(0), None
    with torch.cuda.device_of(x):
        if rows and rank:
            scaled = x.new_empty((rows, rank))
            index = None if gate_index is None else gate_index.reshape(-1).contiguous()
            _launch_skinny(flat, lora_a, gate.contiguous(), index, raw=h if keep_h else None, scaled=scaled)
        y = (
            _launch_linear(flat, weight.t(), scaled, lora_b.t(), None if bias is None else bias.contiguous())
            if rows
            else x.new_empty((0, weight.shape[0]))
        )
    return y.view(*x.shape[:-1], weight.shape[0]), h


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    gate_index: Tensor | None,
    h: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """As reference.multi_lora.backward. Gradients of weight and bias, which are rarely asked for, are
    torch's own."""
    lead, dy = dy.shape[:-1], dy.reshape(-1, dy.shape[-1])
    (rows, rank), in_features = h.shape, lora_a.shape[1]
    flat = None if x is None else x.reshape(rows, in_features)
    index = None if gate_index is None else gate_index.reshape(-1).contiguous()
    gate = gate.contiguous()
    need_x, need_weight, need_bias, need_a, need_b, need_gate = needs
    empty = not (rows and rank)
    alone = (
        gate_index is None and gate.shape[0] == rows
    )  # each gate row serves one row: dS * h is its gradient
    scaled = gated = product = None
    grads = []
    with torch.cuda.device_of(dy):
        if not empty:
            scaled = torch.empty_like(h) if need_x or need_a else None
            gated = torch.empty_like(h) if need_b else None
            product = torch.empty_like(h, dtype=gate.dtype if alone else torch.float32) if need_gate else None
            if need_x or need_a or need_gate:
                _launch_skinny(dy, lora_b.t(), gate, index, h=h, scaled=scaled, gated=gated, product=product)
            elif need_b:
                grid = triton.cdiv(rows, 64), triton.cdiv(rank, 32)
                _skinny_end[grid](
                    h,
                    gate,
                    index,
                    None,
                    None,
                    gated,
                    None,
                    None,
                    rows,
                    rank,
                    gate.shape[0],
                    _span(gate, index, rows),
                    1,
                    BLOCK_M=64,
                    BLOCK_R=32,
                )
        if need_x:
            dx = _launch_linear(dy, weight, scaled, lora_a, None) if rows else dy.new_empty((0, in_features))
            grads.append(dx.view(*lead, in_features))
        if need_weight:
            grads.append(dy.t() @ flat)
        if need_bias:
            grads.append(dy.sum(0))
        if need_a:
            grads.append(
                torch.zeros_like(lora_a, memory_format=torch.contiguous_format)
                if empty
                else _launch_rank_grad(flat, scaled, transposed=True)
            )
        if need_b:
            grads.append(
                torch.zeros_like(lora_b, memory_format=torch.contiguous_format)
                if empty
                else _launch_rank_grad(dy, gated, transposed=False)
            )
        if need_gate:
            grads.append(
                torch.zeros_like(gate)
                if empty
                else product
                if alone
                else _launch_group_sum(product, gate, index)
            )
    return grads


def aot_specs() -> Iterator[AotSpec]:
    """Every tile of the tables, for every dtype, with and without what may be missing."""

    def example(
        rows: int, dtype: torch.dtype, size: int, rank: int, gate_dtype: torch.dtype, groups: int, indexed: bool, needs: str
    ):
        def make(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        def call():
            x, weight, bias, a, b = (
                make(rows, size),
                make(size, size),
                make(size) if indexed else None,
                make(rank, size),
                make(size, rank),
            )
            gate, index = make(groups, rank, dtype=gate_dtype), make(rows, dtype=torch.int64) if indexed else None
            y, h = forward(x, weight, bias, a, b, gate, index, keep_h=bool(needs))
            if needs:
                backward(y, x, weight, a, b, gate, index, h, [name in needs for name in ("x", "", "", "a", "b", "g")])

        return call

    def matrix(kernel: str, constants) -> bool:
        # wgmma takes 64 rows at a time.
        rows = constants.get("BLOCK_N" if kernel == "_rank_grad" else "BLOCK_M", 0)
        return kernel in ("_skinny", "_linear", "_rank_grad") and rows >= 64

    half, single = torch.bfloat16, torch.float32
    tables = (_LINEAR, _SKINNY, _RANK_GRAD)
    rows = sorted({most or 8192 for table in tables for tiles in table.values() for most, _ in tiles})
    for target, dtype, most, (odd, rank), gate_dtype, groups, indexed, needs in itertools.product(
        ("sm_80", "sm_90", "sm_100", "gfx942"), (half, torch.float16, single), rows, ((0, 48), (1, 27), (0, 0)), (None, single),
        (4, 0), (True, False), ("", "x a b g", "x", "b", "g"),
    ):  # fmt: skip
        if rank == 0 and not (gate_dtype and groups and needs in ("", "x")):
            continue
        most, size = most - odd, 1024 + odd * 913
        call = example(most, dtype, size, rank, gate_dtype or dtype, groups or most, indexed, needs)
        label = f"{str(dtype)[6:]} {most} rows, rank {rank}, gradients {needs or 'none'}"
        expected = matrix if dtype is not single else lambda kernel, constants: False
        yield from recorded(label, call, (target,), expected)
