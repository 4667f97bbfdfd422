"""interpolated_linear on GPUs.

Blended weights (row_groups.py): the blends and inner products of interpolation.py's kernels around library products.

Blended products: one kernel, y = x base + sum_i b_i * (x S_i) + bias. Each weight's product has its own accumulator, which
is scaled by the rows' coefficients in float32 and added to that of the result, so that x is never scaled and rounded, and
the stack is read once: the floor of decoding with a blend for each row, (M + 1) N K elements with a base. The same kernel
with the weights transposed gives dx, and on the way the inner products of each dy S_i with x, which are the gradient of the
blend; those of different column tiles are added up by torch. dS_i = (b_i * dy)^T x are M library products.

Tiles compile for sm_80, sm_90, sm_100 and gfx942 (tests/kernels/test_aot.py). On devices in `tuned.py` they are measured ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from clp_kernels import row_groups
from clp_kernels.arguments import rows_of
from clp_kernels.backends import is_batch_invariant
from clp_kernels.reference import interpolated_linear as products
from clp_kernels.reference.multi_lora import sum_over_rows
from clp_kernels.row_groups import Machine, blends_weights
from clp_kernels.triton_kernels import interpolation
from clp_kernels.triton_kernels.aot import AotSpec, recorded, recorded_choices
from clp_kernels.triton_kernels.launch import Tile, cdiv
from clp_kernels.triton_kernels.launch import unsupported as unsupported
from clp_kernels.triton_kernels.low_rank import group_of, pointer_family, span_of
from clp_kernels.triton_kernels.tuning import Tunable, counted

# By rows, as in base_product.py; two accumulators leave room for no more than 64 x 128.
_TILES = {
    "half": ((16, Tile(16, 32, 256, 4, 3)), (64, Tile(64, 32, 128, 4, 3)), (None, Tile(64, 128, 64, 8, 3))),
    "hip": (
        (16, Tile(16, 32, 256, 4, 2)),
        (64, Tile(64, 32, 128, 4, 2)),
        (None, Tile(64, 128, 64, 8, 2)),
    ),
    "plain": ((16, Tile(16, 32, 64, 4, 2)), (None, Tile(64, 64, 32, 8, 2))),
}
MIXED = Tunable(
    "mixed",
    ("rows", "columns", "depth"),
    {
        "half": (
            *(tile for _, tile in _TILES["half"]), (16, 64, 128, 4, 4), (16, 64, 256, 4, 3), (32, 64, 128, 4, 3),
            (64, 64, 64, 4, 4), (64, 64, 128, 4, 3), (64, 128, 64, 4, 3), (128, 64, 64, 8, 3), (128, 128, 64, 8, 3),
        ),
    },
    Tile._make,
)  # fmt: skip
# FLOPs per byte of an H200: 790 TFLOP/s of 16-bit products, about 60 of float32 ones, 4.3 TB/s.
_SCRATCH = 256 << 20
_HALF, _SINGLE = Machine(balance=184.0, scratch=_SCRATCH), Machine(balance=14.0, scratch=_SCRATCH)


@triton.jit
def _product(
    x, w, row, column, M, N, K, stride_xm, stride_xk, stride_wk, stride_wn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of x w, x (M, K) and w (K, N), float32."""
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
    return acc


@triton.jit
def _mixed(
    x,  # (M, K), any strides
    stack,  # (models, K, N), any strides
    base,  # (K, N), any strides, or None
    bias,  # (N,) or None
    blend, index,  # (groups, models) dense; (M,) or None
    y,  # (M, N) dense, or None
    other,  # (M, N), any strides, or None
    dots,  # (column tiles, M, models) float32: the rows' inner products of x stack_i with other; or None
    M, N, K, models, groups, span, stride_xm, stride_xk, stride_s, stride_sk, stride_sn, stride_bk, stride_bn,
    stride_om, stride_on,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # As in base_product.py: programs run down GROUP_M row tiles before the next column tile.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program, band = tl.program_id(0), GROUP_M * tiles_n
    first = program // band * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    tile_n = program % band // height
    row = (first + program % band % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < M)[:, None] & (column < N)[None, :]
    group = group_of(row, M, index, span)
    inside = (group >= 0) & (group < groups)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if base is not None and y is not None:
        acc += _product(
            x,
            base,
            row,
            column,
            M,
            N,
            K,
            stride_xm,
            stride_xk,
            stride_bk,
            stride_bn,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    for i in range(models):
        w = stack + tl.full((), i, tl.int64) * stride_s
        one = _product(
            x, w, row, column, M, N, K, stride_xm, stride_xk, stride_sk, stride_sn, BLOCK_M, BLOCK_N, BLOCK_K
        )
        coefficient = tl.load(blend + group * models + i, mask=inside, other=float("nan")).to(tl.float32)
        acc += coefficient[:, None] * one
        if dots is not None:
            at = other + row[:, None] * stride_om + column[None, :] * stride_on
            dot = tl.sum(one * tl.load(at, mask=mask, other=0.0).to(tl.float32), 1)
            tl.store(dots + (tile_n.to(tl.int64) * M + row) * models + i, dot, mask=row < M)
    if bias is not None:
        acc += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if y is not None:
        tl.store(y + row[:, None] * N + column[None, :], acc.to(y.dtype.element_ty), mask=mask)


def _launch_mixed(
    x: Tensor,
    stack: Tensor,
    base: Tensor | None,
    bias: Tensor | None,
    blend: Tensor,
    gate_index: Tensor | None,
    other: Tensor | None = None,
    wants_y: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """x (M, K), stack (models, K, N) -> y (M, N), and with `other` the (M, models) inner products, float32."""
    (rows, depth), (models, _, columns) = x.shape, stack.shape
    family = pointer_family(x, stack, *(() if base is None else (base,)))
    tile = MIXED.choice(family, x, counted(rows), columns, depth) or next(
        tile for most, tile in _TILES[family] if most is None or (rows <= most and not is_batch_invariant())
    )
    tiles_m, tiles_n = cdiv(rows, tile.rows), cdiv(columns, tile.columns)
    y = x.new_empty((rows, columns)) if wants_y else None
    dots = None if other is None else x.new_empty((tiles_n, rows, models), dtype=torch.float32)
    blend = blend.contiguous()
    _mixed[(tiles_m * tiles_n,)](
        x,
        stack,
        base,
        None if bias is None else bias.contiguous(),
        blend,
        None if gate_index is None else gate_index.reshape(-1).contiguous(),
        y,
        other,
        dots,
        rows,
        columns,
        depth,
        models,
        blend.shape[0],
        span_of(blend, gate_index, rows),
        *x.stride(),
        *stack.stride(),
        *((0, 0) if base is None else base.stride()),
        *((0, 0) if other is None else other.stride()),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        GROUP_M=8,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y, None if dots is None else dots.sum(0)


def _by_weights(x: Tensor, stack: Tensor, blend: Tensor, base: Tensor | None, gate_index: Tensor | None):
    """(machine, groups of rows) where weights are blended; (None, None) where products are."""
    rows, machine = x.shape[0], _SINGLE if x.dtype is torch.float32 else _HALF
    # How many blends an index names is known on the device alone, and whose rows they are, for which the host would wait.
    if gate_index is not None and x.is_cuda and torch.cuda.is_current_stream_capturing():
        return None, None
    if not blends_weights(machine, rows, min(blend.shape[0], rows), stack, base):
        return None, None
    return machine, row_groups.row_groups(blend.shape[0], rows, gate_index)


def forward(
    x: Tensor,
    stack: Tensor,
    blend: Tensor,
    base: Tensor | None,
    bias: Tensor | None,
    gate_index: Tensor | None,
) -> Tensor:
    """As reference.interpolated_linear.forward."""
    flat = rows_of(x)
    if flat.shape[0] == 0 or stack[0].numel() == 0:
        return products.forward(x, stack, blend, base, bias, gate_index, products.in_dtype)
    machine, groups = _by_weights(flat, stack, blend, base, gate_index)
    if machine is not None:
        y = row_groups.forward(flat, stack, blend, base, bias, groups, machine, interpolation)
    else:
        y, _ = _launch_mixed(flat, stack.mT, None if base is None else base.t(), bias, blend, gate_index)
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
    need_x, need_stack, need_blend, need_bias = needs
    flat, dy = rows_of(x), rows_of(dy)
    if flat.shape[0] == 0 or stack[0].numel() == 0:
        return products.backward(dy, x, stack, blend, base, gate_index, needs, products.in_dtype)
    machine, groups = _by_weights(flat, stack, blend, base, gate_index)
    if machine is not None:
        grads = row_groups.backward(dy, flat, stack, blend, base, groups, machine, interpolation, needs)
    else:
        grads = [None, None, None]
        if need_x or need_blend:
            grads[0], dots = _launch_mixed(
                dy, stack, base, None, blend, gate_index, flat if need_blend else None, need_x
            )
            if need_blend:
                grads[2] = sum_over_rows(dots, torch.ones_like(dots), blend, gate_index)
        if need_stack:
            (grads[1],) = products.backward(
                dy, flat, stack, blend, base, gate_index, [False, True, False, False], products.in_dtype
            )
    if need_x:
        grads[0] = grads[0].view(x.shape)
    return [grad for grad in grads if grad is not None] + ([dy.sum(0)] if need_bias else [])


def aot_specs() -> Iterator[AotSpec]:
    """The kernel of blended products with every tile; that of blended weights is interpolation.py's."""

    def example(rows: int, dtype: torch.dtype, size: int = 1024, training: bool = False):
        def make(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        def call():
            x, stack, base, bias = make(rows, size), make(3, size, size), make(size, size), make(size)
            blend, index = make(rows, 3, dtype=torch.float32), make(rows, dtype=torch.int64)
            _launch_mixed(x, stack.mT, base.t(), bias, blend, index)
            if training:
                _launch_mixed(x, stack, base, None, blend, None, x)

        return call

    def matrix(kernel: str, constants) -> bool:
        return constants["BLOCK_M"] >= 64  # what wgmma takes

    half, single = torch.bfloat16, torch.float32
    generations = ("sm_80", "sm_90", "sm_100", "gfx942")
    for rows in (16, 64, 8192):
        yield from recorded(
            f"bfloat16 {rows} rows", example(rows, half, training=rows > 64), generations, matrix
        )
    for rows in (16, 8192):
        yield from recorded(f"float32 {rows} rows", example(rows, single, training=rows > 64))
    yield from recorded("bfloat16, nothing divisible by 16", example(8191, half, size=1937))
    yield from recorded_choices(
        MIXED, lambda family, _: example(8192, single if family == "plain" else half, training=True), matrix
    )
