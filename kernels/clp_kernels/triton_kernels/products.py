"""out = x w, or in float32 out += x w or out = out * factor + x w: the products of linear_logprob beside its logits.

Through tensor descriptors where these can be had, by programs that stay and take tile after tile; otherwise through
pointers with masks. A tile's product is formed first and then added to what is there, so that the sum over many chunks of
the vocabulary is rounded to nearest chunk by chunk. A tile is chosen by columns and depth, never by rows: no row of d_hidden
feels the others.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from clp_kernels.triton_kernels import launch
from clp_kernels.triton_kernels.launch import SLICE, Tile, _halves, cdiv, descriptor
from clp_kernels.triton_kernels.tuning import Tunable

_TILES = {
    "half": Tile(128, 128, 64, 8, 3),
    "ampere": Tile(128, 128, 64, 8, 3),
    "hip": Tile(128, 128, 32, 8, 2),
    "plain": Tile(64, 64, 32, 4, 2),
}
# The first that is not wider than needed: the last is for a rank.
_DESCRIBED = (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 4))
_DESCRIBED_CANDIDATES = (
    *_DESCRIBED, (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 64, 8, 5), (128, 128, 64, 4, 4), (128, 128, 128, 8, 3),
)  # fmt: skip
PRODUCT = Tunable(
    "product",
    ("columns", "depth"),
    {
        "tma": _DESCRIBED_CANDIDATES,  # x is dense: d_hidden
        "tma across": _DESCRIBED_CANDIDATES,  # x is the transpose of a dense matrix: d_weight
        "plain": (_TILES["plain"], (64, 64, 16, 4, 3), (128, 64, 16, 8, 3)),
    },
    Tile._make,
)  # fmt: skip


@triton.jit
def _add(acc, out, factor, row, first, M, N, stride_out, SLICE: tl.constexpr, ADD: tl.constexpr):
    """out = out * factor + acc, or out = acc, for acc (rows, columns from `first` on), at most SLICE columns at a time.
    factor (rows,): None for ones."""
    if acc.shape[1] > SLICE:
        left, right = _halves(acc)
        _add(left, out, factor, row, first, M, N, stride_out, SLICE, ADD)
        _add(right, out, factor, row, first + left.shape[1], M, N, stride_out, SLICE, ADD)
    else:
        column = first + tl.arange(0, acc.shape[1]).to(tl.int64)
        mask = (row < M)[:, None] & (column < N)[None, :]
        at = out + row[:, None] * stride_out + column[None, :]
        if ADD:
            before = tl.load(at, mask=mask, other=0.0)
            if factor is not None:
                before *= factor[:, None]
            acc += before
        tl.store(at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _loaded(factor, row, M):
    loaded = None
    if factor is not None:
        loaded = tl.load(factor + row, mask=row < M, other=0.0)
    return loaded


@triton.jit
def _product(
    x,  # (M, K), any strides
    w,  # (K, N), any strides
    out,  # (M, N), rows any stride apart; float32 where ADD
    factor,  # (M,) float32, or None
    M, N, K, stride_xm, stride_xk, stride_wk, stride_wn, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(M, BLOCK_M)
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        x_tile = tl.load(
            x + row[:, None] * stride_xm + k[None, :] * stride_xk,
            mask=(row < M)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        w_tile = tl.load(
            w + k[:, None] * stride_wk + column[None, :] * stride_wn,
            mask=(k < K)[:, None] & (column < N)[None, :],
            other=0.0,
        )
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
    first = tl.program_id(0) // blocks * BLOCK_N
    _add(acc, out, _loaded(factor, row, M), row, first, M, N, stride_out, BLOCK_N, ADD)


@triton.jit
def _product_described(
    x,  # descriptor of (M, K), or of (K, M) where X_ACROSS
    w,  # descriptor of (K, N), or of (N, K) where W_ACROSS
    out,  # (M, N), rows any stride apart; float32 where ADD
    factor,  # (M,) float32, or None
    M, N, K, stride_out, programs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, X_ACROSS: tl.constexpr, W_ACROSS: tl.constexpr,
    SLICE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(M, BLOCK_M)
    for tile in tl.range(tl.program_id(0), blocks * tl.cdiv(N, BLOCK_N), programs, flatten=True):
        row, column = tile % blocks * BLOCK_M, tile // blocks * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(tl.cdiv(K, BLOCK_K)):
            k = step * BLOCK_K
            if X_ACROSS:
                x_tile = x.load([k, row]).T
            else:
                x_tile = x.load([row, k])
            if W_ACROSS:
                w_tile = w.load([column, k]).T
            else:
                w_tile = w.load([k, column])
            acc = tl.dot(x_tile, w_tile, acc)
        rows = row + tl.arange(0, BLOCK_M).to(tl.int64)
        _add(acc, out, _loaded(factor, rows, M), rows, column, M, N, stride_out, SLICE, ADD)


def multiply(x: Tensor, w: Tensor, out: Tensor, add: bool, factor: Tensor | None = None) -> None:
    """out (M, N) = x (M, K) w (K, N), or out, in float32, += it, or out = out * factor + it with a factor (M,) of each row."""
    (rows, depth), columns = x.shape, w.shape[1]
    if rows == 0 or columns == 0:
        return
    factor = factor if add else None
    described, x_across = launch.describable(x, w), x.stride(1) != 1
    family = ("tma across" if x_across else "tma") if described else launch.family(x, w)
    tile = PRODUCT.choice(family, x, columns, depth)
    if tile is None:
        tile = _described_tile(columns) if described else _TILES[family]
    tiles = cdiv(rows, tile.rows) * cdiv(columns, tile.columns)
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth, "ADD": add}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if not described:
        _product[(tiles,)](
            x, w, out, factor, rows, columns, depth, *x.stride(), *w.stride(), out.stride(0), **blocks, **options,
        )  # fmt: skip
        return
    w_across = w.stride(1) != 1
    programs = min(tiles, launch.multiprocessors(x.device))
    _product_described[(programs,)](
        descriptor(x.t(), tile.depth, tile.rows) if x_across else descriptor(x, tile.rows, tile.depth),
        descriptor(w.t(), tile.columns, tile.depth) if w_across else descriptor(w, tile.depth, tile.columns),
        out, factor, rows, columns, depth, out.stride(0), programs, X_ACROSS=x_across, W_ACROSS=w_across, SLICE=SLICE,
        **blocks, **options,
    )  # fmt: skip


def _described_tile(columns: int) -> Tile:
    return next((tile for tile in _DESCRIBED if tile.columns <= columns), _DESCRIBED[-1])
