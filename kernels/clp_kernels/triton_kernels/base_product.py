"""The product of multi_lora_linear: y = x W + s B + bias, one accumulator, the rank as more columns of the contraction.

Two kernels. `_linear` takes any strides and loads through pointers with masks. `_linear_described` is for compute
capability 9 and later: tiles come through tensor descriptors, programs stay and take tile after tile, and the two
contractions are one loop that changes from (x, W) to (s, B) by choosing between descriptors, so that the loads of the one
are in flight while the other is multiplied; on capability 10 loads, products and stores go to warps of their own.

Tiles by shape where a device was measured (`tuning`), otherwise by rows; inside `batch_invariant()` always those for many
rows.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from clp_kernels.backends import is_batch_invariant
from clp_kernels.triton_kernels import launch
from clp_kernels.triton_kernels.launch import SLICE, Tile, _halves, cdiv, descriptor, power_of_2
from clp_kernels.triton_kernels.tuning import Tunable, counted

# (largest number of rows, tile), first that fits. Few rows are a question of bandwidth, so narrow column tiles (many
# programs) and deep loads; many rows of arithmetic, so what fills the tensor cores.
_TILES = {
    "half": (
        (16, Tile(16, 32, 256, 4, 3)),
        (64, Tile(64, 32, 128, 4, 4)),
        (1024, Tile(64, 128, 64, 4, 4)),
        (None, Tile(128, 256, 64, 8, 3)),
    ),
    "hip": (
        (16, Tile(16, 32, 256, 4, 2)),
        (64, Tile(64, 32, 128, 4, 2)),
        (1024, Tile(64, 128, 64, 4, 2)),
        (None, Tile(128, 128, 64, 8, 2)),
    ),
    "plain": ((16, Tile(16, 32, 64, 4, 2)), (None, Tile(64, 64, 32, 4, 2))),
}
_TILES["ampere"] = _TILES["half"]
# For tensor descriptors, from the first number of rows on; the one with the least work in whole waves of programs is taken.
_DESCRIBED_FROM = 65
_DESCRIBED = (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 4))
_NARROW = 0.9  # rate of the second, which loads more for each product, to the first's: assumed, not measured
_DESCRIBED_CANDIDATES = (
    *_DESCRIBED, (128, 256, 64, 8, 3), (256, 128, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 8, 5), (128, 128, 64, 4, 4),
    (128, 128, 128, 8, 3), (64, 256, 64, 4, 4), (64, 128, 64, 4, 5), (128, 64, 64, 4, 5), (64, 64, 128, 4, 4),
)  # fmt: skip
LINEAR = Tunable(
    "linear",
    ("rows", "columns", "depth"),
    {
        "tma": _DESCRIBED_CANDIDATES,  # w is the transpose of a dense matrix: forward
        "tma across": _DESCRIBED_CANDIDATES,  # w is dense: dX
        "half": (
            *(tile for _, tile in _TILES["half"]), (16, 64, 128, 4, 4), (16, 64, 256, 4, 3), (16, 128, 128, 4, 3),
            (16, 32, 128, 4, 5), (32, 32, 256, 4, 3), (32, 64, 128, 4, 4), (64, 64, 128, 4, 3), (64, 64, 64, 4, 5),
            (128, 128, 64, 8, 3),
        ),
        "plain": (*(tile for _, tile in _TILES["plain"]), (64, 64, 16, 4, 3), (128, 64, 16, 8, 3), (128, 128, 16, 8, 3)),
    },
    Tile._make,
)  # fmt: skip


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column block of a tile. GROUP_M row tiles come before the next column tile, so that the weight's tiles are
    in L2 when used again."""
    band = GROUP_M * tiles_n
    first = tile // band * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % band % height, tile % band // height


@triton.jit
def _linear(
    x,  # (M, K), any strides
    w,  # (K, N), any strides
    s,  # (M, R) dense, or None
    b,  # (R, N), any strides
    bias,  # (N,) or None
    y,  # (M, N) dense
    M, N, K, R, stride_xm, stride_xk, stride_wk, stride_wn, stride_br, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    block_m, block_n = _place(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
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
def _store_described(acc, y, bias, row, column, N, SLICE: tl.constexpr):
    """acc + bias to the tile of y at (row, column), SLICE columns at a time: what is being stored has to lie in shared
    memory, which the loads of the next tile want."""
    if acc.shape[1] > SLICE:
        left, right = _halves(acc)
        _store_described(left, y, bias, row, column, N, SLICE)
        _store_described(right, y, bias, row, column + left.shape[1], N, SLICE)
    else:
        if bias is not None:
            at = column + tl.arange(0, SLICE)
            acc += tl.load(bias + at, mask=at < N, other=0.0).to(tl.float32)[None, :]
        y.store([row, column], acc.to(y.dtype))


@triton.jit
def _linear_described(
    x,  # descriptor of (M, K), tiles (BLOCK_M, BLOCK_K)
    w,  # descriptor of (N, K), tiles (BLOCK_N, BLOCK_K), where TRANSPOSED; else of (K, N), tiles (BLOCK_K, BLOCK_N)
    s,  # descriptor of (M, R), tiles as x; or None
    b,  # descriptor of (N, R) or (R, N), tiles as w; or None
    bias,  # (N,) or None
    y,  # descriptor of (M, N), tiles (BLOCK_M, SLICE)
    M, N, K, R, programs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SLICE: tl.constexpr, TRANSPOSED: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    base_steps = tl.cdiv(K, BLOCK_K)
    steps = base_steps
    if s is not None:
        steps += tl.cdiv(R, BLOCK_K)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, programs, flatten=True, warp_specialize=SPECIALIZE
    ):
        block_m, block_n = _place(tile, tiles_m, tiles_n, GROUP_M)
        row, column = block_m * BLOCK_M, block_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps):
            left, right = x, w
            k = step * BLOCK_K
            if s is not None:
                if step >= base_steps:
                    left, right = s, b
                    k = (step - base_steps) * BLOCK_K
            left_tile = left.load([row, k])
            if TRANSPOSED:
                right_tile = right.load([column, k]).T
            else:
                right_tile = right.load([k, column])
            acc = tl.dot(left_tile, right_tile, acc)
        _store_described(acc, y, bias, row, column, N, SLICE)


def _described_tile(x: Tensor, columns: int, transposed: bool) -> Tile:
    rows, depth = x.shape
    tile = LINEAR.choice("tma" if transposed else "tma across", x, counted(rows), columns, depth)
    if tile is not None or is_batch_invariant():
        return tile or _DESCRIBED[0]
    return _least_waves(rows, columns, launch.multiprocessors(x.device))


@functools.lru_cache(maxsize=1 << 12)
def _least_waves(rows: int, columns: int, programs: int) -> Tile:
    """Asked for at every launch: kept for each shape."""

    def time(tile: Tile) -> float:
        tiles = cdiv(rows, tile.rows) * cdiv(columns, tile.columns)
        return cdiv(tiles, programs) * tile.columns / (1.0 if tile is _DESCRIBED[0] else _NARROW)

    return min(_DESCRIBED, key=time)


def family(x: Tensor, w: Tensor, s: Tensor | None, b: Tensor) -> str:
    """What serves the call: "tma" is `_linear_described`, anything else `_linear` with the tiles of launch.family."""
    low_rank = () if s is None else (s, b)
    transposed = [matrix.stride(0) == 1 for matrix in (w, *low_rank[1:])]
    fits = x.stride(1) == 1 and len(set(transposed)) == 1 and w.shape[1] * x.element_size() % 16 == 0
    few = x.shape[0] < _DESCRIBED_FROM and not is_batch_invariant()
    return "tma" if fits and not few and launch.describable(x, w, *low_rank) else launch.family(x, w)


def linear(
    x: Tensor, w: Tensor, s: Tensor | None, b: Tensor, bias: Tensor | None, kind: str | None = None
) -> Tensor:
    """x w + s b + bias for x (M, K), w (K, N), s (M, R) dense or None, b (R, N), bias (N,) dense or None; kind: of `family`."""
    (rows, depth), columns = x.shape, w.shape[1]
    y = x.new_empty((rows, columns))
    kind = kind or family(x, w, s, b)
    if kind == "tma":
        _launch_described(x, w, s, b, bias, y)
        return y
    tile = LINEAR.choice(kind, x, counted(rows), columns, depth) or next(
        t for most, t in _TILES[kind] if most is None or (rows <= most and not is_batch_invariant())
    )
    rank_block = min(max(16, power_of_2(b.shape[0])), 64, tile.depth)
    grid = (cdiv(rows, tile.rows) * cdiv(columns, tile.columns),)
    _linear[grid](
        x, w, s, b, bias, y, rows, columns, depth, b.shape[0], *x.stride(), *w.stride(), *b.stride(),
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, BLOCK_R=rank_block, GROUP_M=8,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y


def _launch_described(
    x: Tensor, w: Tensor, s: Tensor | None, b: Tensor, bias: Tensor | None, y: Tensor
) -> None:
    (rows, depth), columns, rank = x.shape, w.shape[1], b.shape[0]
    transposed = w.stride(0) == 1
    tile = _described_tile(x, columns, transposed)

    def right(matrix: Tensor):
        if transposed:
            return descriptor(matrix.t(), tile.columns, tile.depth)
        return descriptor(matrix, tile.depth, tile.columns)

    tiles = cdiv(rows, tile.rows) * cdiv(columns, tile.columns)
    programs = min(tiles, launch.multiprocessors(x.device))
    _linear_described[(programs,)](
        descriptor(x, tile.rows, tile.depth), right(w),
        None if s is None else descriptor(s, tile.rows, tile.depth), None if s is None else right(b),
        bias, descriptor(y, tile.rows, SLICE), rows, columns, depth, rank, programs,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, GROUP_M=8, SLICE=SLICE,
        TRANSPOSED=transposed, SPECIALIZE=launch.major(x.device) >= 10, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
