"""Logits of a head, tile by tile in registers: hidden W^T, with LoRA and a reference where there are any, forward and back.

    forward     one program per (block of rows, split of the vocabulary): each tile folded into the rows' running sums
    gradient    programs that take tile after tile: d(loss)/d(logits) of a block of rows and CHUNK columns, in hidden's dtype

Policy and reference share each tile of the weight where they share the weight. Operands come through tensor descriptors
where these can be had (DESCRIBED; see `launch`), otherwise through pointers with masks. Through descriptors the rank is as
many more steps of the policy's contraction, in one loop, which changes from (hidden, W) to (gated, b).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clp_kernels.token_stats import Head, Rows
from clp_kernels.triton_kernels import launch
from clp_kernels.triton_kernels.launch import SLICE, Tile, cdiv, descriptor
from clp_kernels.triton_kernels.products import multiply
from clp_kernels.triton_kernels.token_gradient import _row_terms, _store_gradient
from clp_kernels.triton_kernels.token_sums import Partial, _fold_raw, _hit, _span, _store_sums, _unit, flags
from clp_kernels.triton_kernels.tuning import Tunable

# "pair": two accumulators, the policy's and the reference's. Through descriptors a tile of 128 x 256, or a pair of 128 x
# 128, which loads 3/4 of what 128 x 128 would for each product; the registers it leaves are why it is folded in slices.
_TILES = {
    "tma": {"single": Tile(128, 256, 64, 8, 4), "pair": Tile(128, 128, 64, 8, 4)},
    "half": {"single": Tile(128, 128, 64, 8, 3), "pair": Tile(64, 128, 64, 8, 3)},
    "ampere": {"single": Tile(128, 128, 64, 8, 3), "pair": Tile(64, 64, 64, 8, 3)},
    "hip": {"single": Tile(128, 128, 32, 8, 2), "pair": Tile(64, 64, 32, 4, 2)},
    "plain": {"single": Tile(64, 64, 32, 4, 2), "pair": Tile(32, 64, 16, 8, 2)},
}
# What spills is left out: of the gradient 256 x 128, 128 x 128 with four warps, and a pair of 64 x 128; forward three stages in
# place of four, and pairs of 64 x 256, or 64 x 128 with four warps.
_PAIR = (_TILES["tma"]["pair"], (128, 64, 64, 8, 4))
_BOTH_WAYS = {
    "plain single": (_TILES["plain"]["single"], (64, 64, 16, 4, 3), (64, 64, 16, 8, 3)),
    "plain pair": (_TILES["plain"]["pair"], (64, 64, 16, 8, 2), (32, 64, 16, 4, 2)),
}
_SINGLE = (_TILES["tma"]["single"], (128, 128, 64, 8, 4), (128, 128, 128, 8, 3), (64, 256, 64, 4, 4))
_SIZES = (
    "vocabulary",
    "width",
)  # not the rows: a row's statistics do not depend on what else is in the batch
FORWARD = Tunable(
    "head_forward",
    _SIZES,
    {
        "tma single": (*_SINGLE, (256, 128, 64, 8, 4), (128, 128, 64, 4, 4)),
        "tma pair": (*_PAIR, (64, 128, 64, 8, 4)),
        **_BOTH_WAYS,
    },
    Tile._make,
)
GRADIENT = Tunable(
    "head_gradient", _SIZES, {"tma single": _SINGLE, "tma pair": _PAIR, **_BOTH_WAYS}, Tile._make
)


# As 3.6 flattens a pair, ptxas waits for each of its products.
_FLATTENS_PAIRS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


@triton.jit
def _dot(
    acc, x, w, row, column, T, V, H, stride_xt, stride_xh, stride_wv, stride_wh, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """acc + x[row] w[column]^T"""
    for start in range(0, H, BLOCK_H):
        k = start + tl.arange(0, BLOCK_H).to(tl.int64)
        x_tile = tl.load(
            x + row[:, None] * stride_xt + k[None, :] * stride_xh,
            mask=(row < T)[:, None] & (k < H)[None, :],
            other=0.0,
        )
        w_tile = tl.load(
            w + k[:, None] * stride_wh + column[None, :] * stride_wv,
            mask=(k < H)[:, None] & (column < V)[None, :],
            other=0.0,
        )
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def _raw_loaded(
    x, w, lora_s, lora_b, ref_x, ref_w, row, column, T, V, H, H_ref, R, stride_xt, stride_xh, stride_wv, stride_wh,
    stride_s, stride_bv, stride_br, stride_rt, stride_rh, stride_qv, stride_qh,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
    REFERENCE: tl.constexpr,
):  # fmt: skip
    """The policy's and the reference's raw logits of one tile, before any bias. A ref_w that is None is w."""
    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    acc_q = acc
    if REFERENCE:
        if ref_w is None:
            for start in range(0, H, BLOCK_H):
                k = start + tl.arange(0, BLOCK_H).to(tl.int64)
                mask = (row < T)[:, None] & (k < H)[None, :]
                x_tile = tl.load(x + row[:, None] * stride_xt + k[None, :] * stride_xh, mask=mask, other=0.0)
                r_tile = tl.load(
                    ref_x + row[:, None] * stride_rt + k[None, :] * stride_rh, mask=mask, other=0.0
                )
                w_tile = tl.load(
                    w + k[:, None] * stride_wh + column[None, :] * stride_wv,
                    mask=(k < H)[:, None] & (column < V)[None, :],
                    other=0.0,
                )
                acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
                acc_q = tl.dot(r_tile, w_tile, acc_q, input_precision="ieee")
        else:
            acc = _dot(acc, x, w, row, column, T, V, H, stride_xt, stride_xh, stride_wv, stride_wh, BLOCK_H)
            acc_q = _dot(
                acc_q, ref_x, ref_w, row, column, T, V, H_ref, stride_rt, stride_rh, stride_qv, stride_qh, BLOCK_H,
            )  # fmt: skip
    else:
        acc = _dot(acc, x, w, row, column, T, V, H, stride_xt, stride_xh, stride_wv, stride_wh, BLOCK_H)
    if lora_s is not None:
        for part in tl.static_range(PARTS):
            acc = _dot(
                acc, lora_s + stride_s // PARTS * part, lora_b, row, column, T, V, R, stride_s, 1, stride_bv, stride_br,
                BLOCK_R,
            )  # fmt: skip
    return acc, acc_q


@triton.jit
def _raw_described(
    x, w, lora_s, lora_b, ref_x, ref_w, row, column, H, H_ref, R,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PARTS: tl.constexpr, REFERENCE: tl.constexpr,
):  # fmt: skip
    """As _raw_loaded, of the tile at (row, column), from descriptors."""
    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    acc_q = acc
    base_steps = tl.cdiv(H, BLOCK_H)
    rank_steps = 0
    if lora_s is not None:
        rank_steps = tl.cdiv(R, BLOCK_H)
    done = 0
    if REFERENCE:
        if ref_w is None:
            for step in range(base_steps):
                k = step * BLOCK_H
                w_tile = w.load([column, k]).T
                acc = tl.dot(x.load([row, k]), w_tile, acc)
                acc_q = tl.dot(ref_x.load([row, k]), w_tile, acc_q)
            done = base_steps
        else:
            for step in range(tl.cdiv(H_ref, BLOCK_H)):
                k = step * BLOCK_H
                acc_q = tl.dot(ref_x.load([row, k]), ref_w.load([column, k]).T, acc_q)
    if ref_w is not None or lora_s is not None or not REFERENCE:
        for step in range(done, base_steps + rank_steps * PARTS):
            left, right = x, w
            k, at = step * BLOCK_H, step * BLOCK_H
            if lora_s is not None:
                if step >= base_steps:
                    left, right = lora_s, lora_b
                    k = (step - base_steps) * BLOCK_H
                    at = (step - base_steps) % rank_steps * BLOCK_H
            acc = tl.dot(left.load([row, k]), right.load([column, at]).T, acc)
    return acc, acc_q


@triton.jit
def _raw_logits(
    x, w, lora_s, lora_b, ref_x, ref_w, first_row, first, T, V, H, H_ref, R,
    stride_xt, stride_xh, stride_wv, stride_wh, stride_s, stride_bv, stride_br, stride_rt, stride_rh, stride_qv, stride_qh,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
    DESCRIBED: tl.constexpr, REFERENCE: tl.constexpr,
):  # fmt: skip
    if DESCRIBED:
        acc, acc_q = _raw_described(x, w, lora_s, lora_b, ref_x, ref_w, first_row, first, H, H_ref, R, BLOCK_T, BLOCK_V,
                                    BLOCK_H, PARTS, REFERENCE)  # fmt: skip
    else:
        row = first_row + tl.arange(0, BLOCK_T).to(tl.int64)
        column = first + tl.arange(0, BLOCK_V).to(tl.int64)
        acc, acc_q = _raw_loaded(x, w, lora_s, lora_b, ref_x, ref_w, row, column, T, V, H, H_ref, R,
                                 stride_xt, stride_xh, stride_wv, stride_wh, stride_s, stride_bv, stride_br,
                                 stride_rt, stride_rh, stride_qv, stride_qh,
                                 BLOCK_T, BLOCK_V, BLOCK_H, BLOCK_R, PARTS, REFERENCE)  # fmt: skip
    return acc, acc_q


@triton.jit
def _banded(place, blocks, columns, BAND):
    """(block of rows, block of columns) of the place-th tile. The row blocks of a band, whose hidden stays in L2, come one
    after another on each block of columns: its weight is read from memory once a band."""
    of_band = BAND * columns
    first = place // of_band * BAND
    height = tl.minimum(blocks - first, BAND)
    return first + place % of_band % height, place % of_band // height


@triton.jit
def _linear_forward(
    x,  # (T, H); here and below a descriptor, or a pointer to a matrix of any strides
    w,  # (V, H)
    lora_s,  # (T, PARTS blocks of at least R columns), adds up to (x a^T) * gate; or None
    lora_b,  # (V, R), or None
    ref_x,  # (T, H_ref), or None
    ref_w,  # (V, H_ref), or None: w
    bias, ref_bias,  # (V,) or None
    targets,  # (T,) or None
    inv_temperature,  # (T,)
    partial,  # (splits, _STATES, T) float32
    partial_top,  # (splits, T) int32, or None
    kept_p, kept_q,  # (kept_rows, V) float32, or None: raw logits for the backward pass
    T, V, H, H_ref, R, stride_xt, stride_xh, stride_wv, stride_wh, stride_s, stride_bv, stride_br, stride_rt, stride_rh,
    stride_qv, stride_qh, kept_rows, splits, wide, span, narrow, softcap, logit_scale, band,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
    DESCRIBED: tl.constexpr, FLATTEN: tl.constexpr, SLICE: tl.constexpr, PROPORTIONAL: tl.constexpr,
    REFERENCE: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, REVERSE: tl.constexpr, TOP1: tl.constexpr,
):  # fmt: skip
    block, split = _banded(tl.program_id(0), tl.cdiv(T, BLOCK_T), splits, band)
    first_row = block * BLOCK_T
    row = first_row + tl.arange(0, BLOCK_T).to(tl.int64)
    inv_t = tl.load(inv_temperature + row, mask=row < T, other=1.0)
    target = tl.full((BLOCK_T,), -1, tl.int64)
    if targets is not None:
        target = tl.load(targets + row, mask=row < T, other=-1)
    zero = tl.zeros((BLOCK_T,), tl.float32)
    m_p, m_q = zero + float("-inf"), zero + float("-inf")
    s_p, a_p, d_p, t_p, s_q, d_q, t_q = zero, zero, zero, zero, zero, zero, zero
    top = tl.full((BLOCK_T,), -1, tl.int32)
    start, stop = _span(split, wide, span, narrow, V)
    # Flattened: the first loads of a tile are in flight while the tile before it is folded.
    for first in tl.range(start, stop, BLOCK_V, flatten=FLATTEN):
        raw_p, raw_q = _raw_logits(x, w, lora_s, lora_b, ref_x, ref_w, first_row, first, T, V, H, H_ref, R,
                                   stride_xt, stride_xh, stride_wv, stride_wh, stride_s, stride_bv, stride_br,
                                   stride_rt, stride_rh, stride_qv, stride_qh,
                                   BLOCK_T, BLOCK_V, BLOCK_H, BLOCK_R, PARTS, DESCRIBED, REFERENCE)  # fmt: skip
        m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top = _fold_raw(
            raw_p, raw_q, bias, ref_bias, kept_p, kept_q, first, row, kept_rows, V, logit_scale, softcap, inv_t, target,
            m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top, SLICE, PROPORTIONAL, REFERENCE, ENTROPY, KL, REVERSE,
            TOP1)  # fmt: skip
    _store_sums(partial, partial_top, split, row, T, _unit(logit_scale, inv_t, PROPORTIONAL), m_p, s_p, a_p, d_p, m_q, s_q,
                d_q, t_p, t_q, top, REFERENCE, TOP1)  # fmt: skip


@triton.jit
def _linear_gradient(
    x, w, lora_s, lora_b, ref_x, ref_w, bias, ref_bias, targets, inv_temperature,  # as in _linear_forward
    saved,  # (6, T)
    coefs,  # (5, T)
    out,  # rows from first_row to last_row, columns from `first` to `last`; where DESCRIBED a descriptor
    T, V, H, H_ref, R, stride_xt, stride_xh, stride_wv, stride_wh, stride_s, stride_bv, stride_br, stride_rt, stride_rh,
    stride_qv, stride_qh, first_row, last_row, first, last, softcap, logit_scale, ignore_index, stride_out, programs,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
    DESCRIBED: tl.constexpr, FLATTEN: tl.constexpr, SLICE: tl.constexpr, PROPORTIONAL: tl.constexpr,
    REFERENCE: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(last_row - first_row, BLOCK_T)
    tiles = blocks * tl.cdiv(last - first, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=FLATTEN):
        top = tile % blocks * BLOCK_T
        start = first + tile // blocks * BLOCK_V
        raw_p, raw_q = _raw_logits(x, w, lora_s, lora_b, ref_x, ref_w, first_row + top, start, T, V, H, H_ref, R,
                                   stride_xt, stride_xh, stride_wv, stride_wh, stride_s, stride_bv, stride_br,
                                   stride_rt, stride_rh, stride_qv, stride_qh,
                                   BLOCK_T, BLOCK_V, BLOCK_H, BLOCK_R, PARTS, DESCRIBED, REFERENCE)  # fmt: skip
        row = first_row + top + tl.arange(0, BLOCK_T).to(tl.int64)
        inv_t, target, ignored, unit, m_p, m_q, of_p, of_shift, of_apart, of_q, of_target = _row_terms(
            targets, inv_temperature, saved, coefs, row, last_row, T, logit_scale, ignore_index, PROPORTIONAL,
            REFERENCE)  # fmt: skip
        hit, some_ignored = _hit(target, start, BLOCK_V), tl.max(ignored.to(tl.int32), 0) > 0
        _store_gradient(raw_p, raw_q, bias, ref_bias, out, top, row, V, first_row, last_row, start, first, last, softcap,
                        logit_scale, stride_out, hit, some_ignored, inv_t, target, ignored, unit, m_p, m_q, of_p, of_shift,
                        of_apart, of_q, of_target, SLICE, PROPORTIONAL, REFERENCE, ENTROPY, DESCRIBED)  # fmt: skip


class HeadLogits:
    """What the two kernels of one linear_logprob call have in common: operands, what LoRA holds, and the tile, which is the
    one for FORWARD or for GRADIENT."""

    def __init__(self, head: Head, with_reference: bool, tunable: Tunable, describe: bool = True) -> None:
        hidden, weight = head.hidden, head.weight
        self.rows, self.vocabulary = hidden.shape[0], weight.shape[0]
        self.with_reference = with_reference
        self.down = self.gated = parts = lora_b = None
        rank, count = 0, 1
        if head.lora is not None:
            self.a, lora_b, gate = (t.to(hidden.dtype) for t in head.lora)
            self.b, self.gate = lora_b, gate.float()
            rank = self.a.shape[0]
            self.down = hidden.new_empty(self.rows, rank, dtype=torch.float32)
            multiply(hidden, self.a.t(), self.down, add=False)
            wide = self.down * self.gate
            self.gated = wide.to(hidden.dtype)
            # 16 bits of it would be the one rounding between hidden and z: what they lose comes as a second part.
            count = 1 if hidden.dtype is torch.float32 else 2
            parts = hidden.new_zeros(self.rows, count, cdiv(rank, 64) * 64)
            parts[:, 0, :rank] = self.gated
            if count == 2:
                parts[:, 1, :rank] = wide - self.gated
            parts = parts.flatten(1)
        ref_hidden = ref_weight = ref_bias = None
        if with_reference:
            ref_hidden, ref_bias = head.ref_hidden, head.ref_bias
            shares = (
                head.ref_weight.data_ptr() == weight.data_ptr()
                and head.ref_weight.stride() == weight.stride()
                and ref_hidden.shape[1] == hidden.shape[1]
            )
            ref_weight = None if shares else head.ref_weight
        matrices = (hidden, weight, parts, lora_b, ref_hidden, ref_weight)
        present = [matrix for matrix in matrices if matrix is not None]
        dense = all(matrix.stride(1) == 1 for matrix in present)
        self.described = described = describe and dense and launch.describable(*present)
        # On capability 10 a flattened tile, and the halves of two, whose maxima are taken first, do not fit in the registers.
        self._spills = launch.major(hidden.device) >= 10
        self._by_slices = described and with_reference and self._spills
        family, kind = launch.family(hidden, weight), "pair" if with_reference else "single"
        if described:
            family = "tma"
        elif family == "half" and not describe:
            family = "ampere"  # the smaller tiles
        tile = (
            tunable.choice(f"{family} {kind}", hidden, self.vocabulary, hidden.shape[1])
            or _TILES[family][kind]
        )
        self.tile = tile
        ref_width = ref_hidden.shape[1] if with_reference else 0
        strides = [(0, 0) if matrix is None else matrix.stride() for matrix in matrices]
        if described:
            heights = (tile.rows, tile.columns) * 3
            matrices = [
                None if matrix is None else descriptor(matrix, height, tile.depth)
                for matrix, height in zip(matrices, heights)
            ]
        self._biases = (head.bias, ref_bias)
        self.tensors = (*matrices, *self._biases)
        # As many row blocks as have half of the cache for their hidden, policy's and reference's.
        row_bytes = tile.rows * (hidden.shape[1] + ref_width) * hidden.element_size()
        self._band = max(1, launch.cache_bytes(hidden.device) // 2 // max(row_bytes, 1))
        self.sizes = (self.rows, self.vocabulary, hidden.shape[1], ref_width, rank)
        self.strides = (*strides[0], *strides[1], strides[2][0], *strides[3], *strides[4], *strides[5])
        self.constants = {
            "BLOCK_T": tile.rows,
            "BLOCK_V": tile.columns,
            "BLOCK_H": tile.depth,
            "BLOCK_R": 16,
            "PARTS": count,
            "DESCRIBED": described,
            "FLATTEN": described and not rank and (ref_weight is None or not with_reference),
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def fold(self, rows: Rows, partial: Partial, kept: Tensor | None) -> None:
        """Every row's running sums into `partial`; raw logits of the leading rows into kept (copies, rows, V) float32."""
        if not self.rows:
            return
        keeps = kept is not None and kept.numel() > 0
        kept_q = kept[1] if keeps and kept.shape[0] > 1 else None
        constants = self.flattened(rows, not keeps)
        _linear_forward[(cdiv(self.rows, self.tile.rows) * partial.splits,)](
            *self.tensors, rows.targets, rows.inv_temperature, partial.sums, partial.top, kept[0] if keeps else None,
            kept_q, *self.sizes, *self.strides, kept.shape[1] if keeps else 0, partial.splits, *partial.spans, rows.softcap,
            rows.logit_scale, self._band, SLICE=self.columns_at_once(keeps), PROPORTIONAL=self.proportional(rows),
            **flags(partial.asked), **constants)  # fmt: skip

    def flattened(self, rows: Rows, may: bool = True) -> dict[str, int | bool]:
        """The constants; not flattened where Triton 3.6 or 3.7 fails to make one loop of two, or where ptxas would wait for
        each product before the next (tests/kernels/test_aot.py)."""
        may &= self.proportional(rows) and (_FLATTENS_PAIRS or not self.with_reference) and not self._spills
        return self.constants | {"FLATTEN": self.constants["FLATTEN"] and may}

    def columns_at_once(self, keeps: bool = False) -> int:
        """Columns that are folded together. What a slice needs beside the accumulators: z and z', their statistics, and
        64-bit addresses where it is kept."""
        piece = SLICE // (1 + self.with_reference) if self.described else min(SLICE, self.tile.columns)
        return min(piece, 32) if keeps else piece

    def proportional(self, rows: Rows) -> bool:
        """Whether z is a positive multiple of the raw logits, and whole tiles are folded by that."""
        multiple = (
            rows.softcap is None and rows.logit_scale > 0 and all(bias is None for bias in self._biases)
        )
        return multiple and not self._by_slices

    def gradient(
        self, rows: Rows, saved: Tensor, coefs: Tensor, entropy: bool, out: Tensor, first_row: int, first: int
    ) -> None:
        """d(loss)/d(logits) of the block that starts at (first_row, first) and has out's shape. entropy: whether its
        coefficient may differ from 0."""
        height, width = out.shape
        tiles = cdiv(height, self.tile.rows) * cdiv(width, self.tile.columns)
        programs = min(tiles, launch.multiprocessors(out.device)) if self.described else tiles
        piece = SLICE if self.described else self.tile.columns
        place = descriptor(out, self.tile.rows, piece) if self.described else out
        constants = self.flattened(rows, not self.with_reference)
        _linear_gradient[(programs,)](
            *self.tensors, rows.targets, rows.inv_temperature, saved, coefs, place, *self.sizes, *self.strides, first_row,
            first_row + height, first, first + width, rows.softcap, rows.logit_scale, rows.ignore_index, out.stride(0),
            programs, SLICE=piece, PROPORTIONAL=self.proportional(rows), REFERENCE=self.with_reference, ENTROPY=entropy,
            **constants)  # fmt: skip
