"""A forward pass of linear_logprob that prepares a frozen head's gradient: two products in all, where recomputing takes three.

    d logprob / d hidden = c ((1 - p_y) W~_y - sum_{v != y} p_v W~_v)          d lse / d hidden = c sum p W~

with y the target, c = logit_scale / temperature, and W~ = (1 - tanh^2) W where there is a softcap and W where not. Both are
made of D = sum_{v != y} e^(z_v - centre) W~_v, which is accumulated in float32 while the vocabulary goes by. For a block of
rows and a chunk of columns, three launches:

    terms    each tile of logits folded into running sums, as in head_logits, and e^(z - centre) stored in hidden's dtype
    settle   the tiles' sums into the rows' own, and one centre for all tiles: that of a tile was raised where its largest z was
             out of range. The factor e^(old - new) by which D is to be multiplied
    product  D = D * factor + terms W

A term is rounded once, to 16 bits relative to itself, so the centre need not be the maximum: it only keeps terms in range. In
bfloat16 and float32 that is 0 as long as no z is beyond 60, and no term is ever touched again. In float16, whose numbers end at
e^11, it is 7 below the maximum: tiles raise it in the first chunk, and later where a z is 3 above all before; the chunk's
terms of some rows are then multiplied, and rounded, a second time.

Counts, for T rows, H wide, V columns, on an H200 (790 TFLOP/s of products measured, L2 of 50 MB, 4.3 TB/s):

    FLOPs   4 T H V: 22 ms at 8192 x 4096 x 131072. Recomputing takes 6 T H V: 33 ms
    L2      rows of a block: 1024 at H = 4096 (one wave of the product's tiles). Terms of a chunk of 8192 columns 16 MB, D
            16 MB, hidden 8 MB: 40 MB, beside which the weight streams. A chunk writes and reads the terms and D once each,
            64 MB at some 5 TB/s under 174 us of products
    memory  the weight twice for each block of rows and chunk: 17 GB in all, 4 ms of 22, under the products
    waves   terms 8 x 32 tiles, product 8 x 16, of 132 programs: 97% each

so that 4 T H V at 790 TFLOP/s, two waves at 97%, 3% of epilogues and 2% between launches give some 720 TFLOP/s: predicted, not
measured. keep_bytes counts D, 4 H bytes a row and output, as long as the call's graph lives; the terms are freed with the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from clp_kernels.token_stats import Head, Rows
from clp_kernels.triton_kernels import launch
from clp_kernels.triton_kernels.head_logits import GRADIENT, HeadLogits, _raw_logits
from clp_kernels.triton_kernels.launch import SLICE, _halves, cdiv, descriptor, power_of_2
from clp_kernels.triton_kernels.products import multiply
from clp_kernels.triton_kernels.token_sums import (
    _A_P,
    _D_P,
    _D_Q,
    _LOG2_E,
    _M_P,
    _M_Q,
    _S_P,
    _S_Q,
    _STATES,
    _T_P,
    _T_Q,
    Partial,
    _at_target_of_halves,
    _finite,
    _fold,
    _hit,
    _masked,
    _rate,
    _store_sums,
    _transform,
    _unit,
    _within,
    flags,
)

_ROOM = tl.constexpr(60.0)  # e^60 = 1e26, whose sums a float32 holds
_FLOAT16_ROOM = tl.constexpr(10.0)  # e^10 = 22026, less than 65504
_FLOAT16_LIFT = tl.constexpr(7.0)
_SETTLED = 1024  # sums that a program merges: rows times tiles of columns


@triton.jit
def _fold_terms(
    z_p, z_q, bound_p, bound_q, inv_t, rate, target, hit, lift, out, top, row, T, first, begin, last, stride_out, softcap,
    m_p, s_p, a_p, d_p, m_q, s_q, d_q, best,
    SLICE: tl.constexpr, STORED: tl.constexpr, REFERENCE: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr,
    REVERSE: tl.constexpr, TOP1: tl.constexpr,
):  # fmt: skip
    """A tile of z, in `_unit`s, into the rows' sums; its terms e^(z - m_p) lift into out; at most SLICE columns at a time."""
    if z_p.shape[1] > SLICE:
        left_p, right_p = _halves(z_p)
        left_q, right_q = left_p, right_p
        if REFERENCE:
            left_q, right_q = _halves(z_q)
        m_p, s_p, a_p, d_p, m_q, s_q, d_q, best = _fold_terms(
            left_p, left_q, bound_p, bound_q, inv_t, rate, target, hit, lift, out, top, row, T, first, begin, last,
            stride_out, softcap, m_p, s_p, a_p, d_p, m_q, s_q, d_q, best, SLICE, STORED, REFERENCE, ENTROPY, KL,
            REVERSE, TOP1)  # fmt: skip
        m_p, s_p, a_p, d_p, m_q, s_q, d_q, best = _fold_terms(
            right_p, right_q, bound_p, bound_q, inv_t, rate, target, hit, lift, out, top, row, T, first + left_p.shape[1],
            begin, last, stride_out, softcap, m_p, s_p, a_p, d_p, m_q, s_q, d_q, best, SLICE, STORED, REFERENCE,
            ENTROPY, KL, REVERSE, TOP1)  # fmt: skip
    else:
        WIDTH: tl.constexpr = z_p.shape[1]
        m_p, s_p, a_p, d_p, m_q, s_q, d_q, best, e = _fold(
            z_p, z_q, bound_p, bound_q, rate, first, m_p, s_p, a_p, d_p, m_q, s_q, d_q, best, WIDTH, REFERENCE, ENTROPY, KL,
            REVERSE, TOP1)  # fmt: skip
        if TOP1:  # whose m moves within the tile
            lift = lift * tl.exp2((m_p - _finite(bound_p)) * rate)
        term = e * lift[:, None]
        if softcap is not None:
            capped = z_p / (softcap * inv_t)[:, None]
            term = tl.where(e == 0.0, 0.0, term * (1.0 - capped * capped))
        if hit:
            place = tl.arange(0, WIDTH)[None, :]
            term = tl.where(place == _within(target, first, WIDTH)[:, None], 0.0, term)
        if STORED:
            out.store([top, first - begin], term.to(out.dtype))
        else:
            column = tl.arange(0, WIDTH) + first
            tl.store(
                out + row[:, None] * stride_out + (column - begin)[None, :],
                term.to(out.dtype.element_ty),
                mask=(row < T)[:, None] & (column < last)[None, :],
            )
    return m_p, s_p, a_p, d_p, m_q, s_q, d_q, best


@triton.jit
def _statistic_halves(raw, bias, first, V, logit_scale, softcap, inv_t, PROPORTIONAL: tl.constexpr):
    """The halves of z, in `_unit`s, and the rows' maxima."""
    left, right = _halves(raw)
    WIDTH: tl.constexpr = left.shape[1]
    column = tl.arange(0, WIDTH) + first
    left, _ = _transform(left, bias, column, V, logit_scale, softcap, inv_t, PROPORTIONAL)
    right, _ = _transform(right, bias, column + WIDTH, V, logit_scale, softcap, inv_t, PROPORTIONAL)
    left, right = _masked(left, first, V), _masked(right, first + WIDTH, V)
    return left, right, tl.max(tl.maximum(left, right), 1)


@triton.jit
def _raised(centre, highest, FLOAT16: tl.constexpr):
    """The centre of a tile whose largest z is `highest`: the one so far, -inf before the first, unless e^(z - centre) would be
    out of range. 0 where it can be, on which tiles agree that do not know of each other."""
    if FLOAT16:
        raised = tl.where(highest > centre + _FLOAT16_ROOM, highest - _FLOAT16_LIFT, centre)
    else:
        raised = tl.where(highest > centre + _ROOM, tl.where(tl.abs(highest) < _ROOM, 0.0, highest), centre)
    return raised


@triton.jit
def _linear_terms(
    x, w, lora_s, lora_b, ref_x, ref_w, bias, ref_bias, targets, inv_temperature,  # as in head_logits._linear_forward
    partial,  # (tiles of columns, _STATES, T) float32
    partial_top,  # (tiles of columns, T) int32, or None
    centre,  # (T,) of the columns so far, -inf before the first
    centres,  # (tiles of columns, T): of each tile
    out,  # (T, columns from `begin` to `last`); where DESCRIBED a descriptor
    T, V, H, H_ref, R, stride_xt, stride_xh, stride_wv, stride_wh, stride_s, stride_bv, stride_br, stride_rt, stride_rh,
    stride_qv, stride_qh, begin, last, softcap, logit_scale, stride_out, programs,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
    DESCRIBED: tl.constexpr, FLATTEN: tl.constexpr, SLICE: tl.constexpr, PROPORTIONAL: tl.constexpr, FLOAT16: tl.constexpr,
    REFERENCE: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, REVERSE: tl.constexpr, TOP1: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_T)
    for tile in tl.range(
        tl.program_id(0), blocks * tl.cdiv(last - begin, BLOCK_V), programs, flatten=FLATTEN
    ):
        top, place = tile % blocks * BLOCK_T, tile // blocks
        first = begin + place * BLOCK_V
        z_p, z_q = _raw_logits(x, w, lora_s, lora_b, ref_x, ref_w, top, first, T, V, H, H_ref, R,
                               stride_xt, stride_xh, stride_wv, stride_wh, stride_s, stride_bv, stride_br,
                               stride_rt, stride_rh, stride_qv, stride_qh,
                               BLOCK_T, BLOCK_V, BLOCK_H, BLOCK_R, PARTS, DESCRIBED, REFERENCE)  # fmt: skip
        row = top + tl.arange(0, BLOCK_T).to(tl.int64)
        inv_t = tl.load(inv_temperature + row, mask=row < T, other=1.0)
        target = tl.full((BLOCK_T,), -1, tl.int64)
        if targets is not None:
            target = tl.load(targets + row, mask=row < T, other=-1)
        left_p, right_p, bound_p = _statistic_halves(
            z_p, bias, first, V, logit_scale, softcap, inv_t, PROPORTIONAL
        )
        left_q, right_q, bound_q = left_p, right_p, bound_p
        if REFERENCE:
            left_q, right_q, bound_q = _statistic_halves(
                z_q, ref_bias, first, V, logit_scale, softcap, inv_t, PROPORTIONAL
            )
        unit = _unit(logit_scale, inv_t, PROPORTIONAL)
        highest = tl.fma(bound_p, unit, 0.0)  # rounded, as in the sums
        mine = tl.load(centre + row, mask=row < T, other=0.0)
        mine = _raised(mine, highest, FLOAT16)
        tl.store(centres + place.to(tl.int64) * T + row, mine, mask=row < T)
        lift = tl.exp2((highest - _finite(mine)) * _LOG2_E)
        rate, hit = _rate(unit), _hit(target, first, BLOCK_V)
        zero = tl.zeros((BLOCK_T,), tl.float32)
        m_p, m_q, best = zero + float("-inf"), zero + float("-inf"), tl.full((BLOCK_T,), -1, tl.int32)
        t_p, t_q = zero, zero
        if hit:
            t_p += _at_target_of_halves(left_p, right_p, target, first)
            if REFERENCE:
                t_q += _at_target_of_halves(left_q, right_q, target, first)
        m_p, s_p, a_p, d_p, m_q, s_q, d_q, best = _fold_terms(
            left_p, left_q, bound_p, bound_q, inv_t, rate, target, hit, lift, out, top, row, T, first, begin, last,
            stride_out, softcap, m_p, zero, zero, zero, m_q, zero, zero, best, SLICE, DESCRIBED, REFERENCE,
            ENTROPY, KL, REVERSE, TOP1)  # fmt: skip
        m_p, s_p, a_p, d_p, m_q, s_q, d_q, best = _fold_terms(
            right_p, right_q, bound_p, bound_q, inv_t, rate, target, hit, lift, out, top, row, T, first + BLOCK_V // 2, begin,
            last, stride_out, softcap, m_p, s_p, a_p, d_p, m_q, s_q, d_q, best, SLICE, DESCRIBED, REFERENCE,
            ENTROPY, KL, REVERSE, TOP1)  # fmt: skip
        _store_sums(partial, partial_top, place, row, T, unit, m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, best, REFERENCE,
                    TOP1)  # fmt: skip


@triton.jit
def _settle(
    partial, partial_top,  # (tiles, _STATES, T); (tiles, T) or None: of the chunk
    centres,  # (tiles, T)
    terms,  # (T, columns)
    sums, sums_top,  # (_STATES, rows of the call), (rows of the call,) or None: of all columns so far; from this block on
    centre,  # (T,)
    factor,  # (T,): e^(old centre - new centre)
    T, columns, tiles, stride_terms, stride_sums,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, PIECES: tl.constexpr, REFERENCE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_T)
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    tile = tl.program_id(0) // blocks
    size = tl.full((), T, tl.int64)
    piece = tl.arange(0, PIECES)
    mask = (piece < tiles)[:, None] & (row < T)[None, :]
    new = tl.max(tl.load(centres + piece[:, None] * size + row[None, :], mask=mask, other=float("-inf")), 0)
    mine = tl.load(centres + tile * size + row, mask=row < T, other=0.0)
    again = tl.exp2((mine - _finite(new)) * _LOG2_E)
    if tl.max(((mine != new) & (row < T)).to(tl.int32), 0) > 0:
        for start in range(0, BLOCK_V, 64):
            column = tile * BLOCK_V + start + tl.arange(0, 64)
            inside = (row < T)[:, None] & (column < columns)[None, :]
            at = terms + row[:, None] * stride_terms + column[None, :]
            old = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            tl.store(at, (old * again[:, None]).to(terms.dtype.element_ty), mask=inside)
    if tile == 0:
        before = tl.load(centre + row, mask=row < T, other=0.0)
        tl.store(factor + row, tl.exp2((before - _finite(new)) * _LOG2_E), mask=row < T)
        tl.store(centre + row, new, mask=row < T)
        _merge(partial, partial_top, sums, sums_top, row, T, piece, mask, stride_sums, REFERENCE)


@triton.jit
def _merge(partial, partial_top, sums, sums_top, row, T, piece, mask, stride_sums, REFERENCE: tl.constexpr):
    """The pieces' sums added to the rows' own; see token_stats.merge."""
    size, wide = tl.full((), T, tl.int64), tl.full((), stride_sums, tl.int64)
    at = partial + piece[:, None] * _STATES * size + row[None, :]
    own, inside = sums + row, row < T
    m_i = tl.load(at + _M_P * size, mask=mask, other=float("-inf"))
    s_i = tl.load(at + _S_P * size, mask=mask, other=0.0)
    m_0, s_0 = (
        tl.load(own + _M_P * wide, mask=inside, other=0.0),
        tl.load(own + _S_P * wide, mask=inside, other=1.0),
    )
    if partial_top is not None:
        # As token_stats.merge_top1: a NaN is the largest, and the lowest column of equals wins.
        top = tl.load(partial_top + piece[:, None] * size + row[None, :], mask=mask, other=0)
        value = tl.where(s_i == s_i, m_i, float("inf"))
        has_nan = tl.max((s_i != s_i).to(tl.int32), 0) > 0
        first = (value == tl.max(value, 0)[None, :]) & ((s_i != s_i) | ~has_nan[None, :]) & mask
        column = tl.min(tl.where(first, top, 2147483647), 0)
        old = tl.load(sums_top + row, mask=inside, other=0)
        better = (s_0 == s_0) & (has_nan | (tl.max(m_i, 0) > m_0) | (old < 0))
        tl.store(sums_top + row, tl.where(better, column, old), mask=inside)
    m = tl.maximum(m_0, tl.max(m_i, 0))
    k_0, k_i = tl.exp(m_0 - _finite(m)), tl.exp(m_i - _finite(m)[None, :])
    a_0 = tl.load(own + _A_P * wide, mask=inside, other=0.0) + (_finite(m_0) - _finite(m)) * s_0
    a_i = tl.load(at + _A_P * size, mask=mask, other=0.0) + (_finite(m_i) - _finite(m)[None, :]) * s_i
    d_0, d_i = (
        tl.load(own + _D_P * wide, mask=inside, other=0.0),
        tl.load(at + _D_P * size, mask=mask, other=0.0),
    )
    t_0, t_i = (
        tl.load(own + _T_P * wide, mask=inside, other=0.0),
        tl.load(at + _T_P * size, mask=mask, other=0.0),
    )
    tl.store(own + _M_P * wide, m, mask=inside)
    tl.store(own + _S_P * wide, k_0 * s_0 + tl.sum(k_i * s_i, 0), mask=inside)
    tl.store(own + _A_P * wide, k_0 * a_0 + tl.sum(k_i * a_i, 0), mask=inside)
    tl.store(own + _D_P * wide, k_0 * d_0 + tl.sum(k_i * d_i, 0), mask=inside)
    tl.store(own + _T_P * wide, t_0 + tl.sum(t_i, 0), mask=inside)
    if REFERENCE:
        m_i = tl.load(at + _M_Q * size, mask=mask, other=float("-inf"))
        m_0 = tl.load(own + _M_Q * wide, mask=inside, other=0.0)
        m = tl.maximum(m_0, tl.max(m_i, 0))
        k_0, k_i = tl.exp(m_0 - _finite(m)), tl.exp(m_i - _finite(m)[None, :])
        s_0, s_i = (
            tl.load(own + _S_Q * wide, mask=inside, other=1.0),
            tl.load(at + _S_Q * size, mask=mask, other=0.0),
        )
        d_0, d_i = (
            tl.load(own + _D_Q * wide, mask=inside, other=0.0),
            tl.load(at + _D_Q * size, mask=mask, other=0.0),
        )
        t_0, t_i = (
            tl.load(own + _T_Q * wide, mask=inside, other=0.0),
            tl.load(at + _T_Q * size, mask=mask, other=0.0),
        )
        tl.store(own + _M_Q * wide, m, mask=inside)
        tl.store(own + _S_Q * wide, k_0 * s_0 + tl.sum(k_i * s_i, 0), mask=inside)
        tl.store(own + _D_Q * wide, k_0 * d_0 + tl.sum(k_i * d_i, 0), mask=inside)
        tl.store(own + _T_Q * wide, t_0 + tl.sum(t_i, 0), mask=inside)


@triton.jit
def _direct(
    sums,  # (T, H): D, overwritten by the first direction
    other,  # (T, H): the second, or None
    weight,  # (V, H), any strides
    targets,  # (T,) or None
    of_sums, of_target,  # (directions, T): the factors of D and of the target's row of the weight
    T, V, H, ignore_index, stride_t, stride_wv, stride_wh, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_T)
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.program_id(0) // blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    inside, mask = row < T, (row < T)[:, None] & (k < H)[None, :]
    at = row[:, None] * stride_t + k[None, :]
    total = tl.load(sums + at, mask=mask, other=0.0)
    own = tl.zeros_like(total)
    ignored = row < 0
    if targets is not None:
        target = tl.load(targets + row, mask=inside, other=-1)
        ignored = target == ignore_index
        there = mask & ((target >= 0) & (target < V))[:, None]
        own = tl.load(
            weight + target[:, None] * stride_wv + k[None, :] * stride_wh, mask=there, other=0.0
        ).to(tl.float32)
    size = tl.full((), T, tl.int64)
    value = _along(total, own, of_sums, of_target, row, inside, ignored)
    tl.store(sums + at, value, mask=mask)
    if other is not None:
        value = _along(total, own, of_sums + size, of_target + size, row, inside, ignored)
        tl.store(other + at, value, mask=mask)


@triton.jit
def _along(total, own, of_sums, of_target, row, inside, ignored):
    a = tl.load(of_sums + row, mask=inside, other=0.0)[:, None]
    b = tl.load(of_target + row, mask=inside, other=0.0)[:, None]
    return tl.where(ignored[:, None], 0.0, total * a + own * b)


def forward(
    head: Head, rows: Rows, asked: frozenset[str], kept: Tensor, names: Sequence[str], chunk: int, height: int
) -> tuple[list[Tensor], Tensor]:
    """As triton_kernels.token_stats.linear_forward, with d(output)/d(hidden) of the outputs `names`, logprob and lse alone, in
    kept (names, T, H); `chunk` columns of the vocabulary and `height` rows at a time."""
    needed = flags(asked)
    count, vocabulary = head.hidden.shape[0], head.weight.shape[0]
    total = Partial(head.hidden, count, vocabulary, asked, splits=1)
    total.sums.zero_()
    for largest in (_M_P, _M_Q):
        total.sums[0, largest.value].fill_(-torch.inf)
    if total.top is not None:
        total.top.fill_(-1)
    centre = total.sums.new_full((count,), -torch.inf)
    factor = torch.empty_like(centre)
    terms = head.hidden.new_empty(min(height, count), min(chunk, cdiv(vocabulary, 16) * 16))
    for top in range(0, count, max(height, 1)):
        block = slice(top, min(top + height, count))
        # On capability 10 the descriptors' tiles would spill, and so would the larger ones of pointers.
        describe = launch.major(head.hidden.device) < 10
        logits = HeadLogits(head.block(block), needed["REFERENCE"], GRADIENT, describe)
        for first in range(0, vocabulary, chunk):
            last = min(first + chunk, vocabulary)
            out = terms[: block.stop - top, : last - first]
            _terms(logits, rows.block(block), total, block, centre[block], factor[block], out, first)
            multiply(out, head.weight[first:last], kept[0, block], add=first > 0, factor=factor[block])
    outputs, saved = total.finish(rows)
    if count:
        _finish(head, rows, total, centre, saved, kept, names)
    return outputs, saved


def _terms(
    logits: HeadLogits,
    rows: Rows,
    total: Partial,
    block: slice,
    centre: Tensor,
    factor: Tensor,
    out: Tensor,
    first: int,
) -> None:
    """Terms of the columns from `first` on, of the rows of a block, in out; their sums in `total`."""
    (height, width), tile, needed = out.shape, logits.tile, flags(total.asked)
    columns = cdiv(width, tile.columns)
    partial = out.new_empty(columns, _STATES.value, height, dtype=torch.float32)
    top1 = None if total.top is None else out.new_empty(columns, height, dtype=torch.int32)
    centres = partial.new_empty(columns, height)
    tiles = cdiv(height, tile.rows) * columns
    programs = min(tiles, launch.multiprocessors(out.device)) if logits.described else tiles
    piece = min(SLICE // (1 + needed["REFERENCE"]), tile.columns)
    _linear_terms[(programs,)](
        *logits.tensors, rows.targets, rows.inv_temperature, partial, top1, centre, centres,
        descriptor(out, tile.rows, piece) if logits.described else out, *logits.sizes, *logits.strides, first, first + width,
        rows.softcap, rows.logit_scale, out.stride(0), programs, SLICE=piece, PROPORTIONAL=logits.proportional(rows),
        FLOAT16=out.dtype is torch.float16, **needed, **logits.flattened(rows))  # fmt: skip
    pieces = power_of_2(columns)
    some = max(1, _SETTLED // pieces)
    _settle[(cdiv(height, some) * columns,)](
        partial, top1, centres, out, total.sums[0, :, block], None if top1 is None else total.top[0, block], centre, factor,
        height, width, columns, out.stride(0), total.sums.stride(1), BLOCK_T=some, BLOCK_V=tile.columns,
        PIECES=pieces, REFERENCE=needed["REFERENCE"], num_warps=4)  # fmt: skip


def _finish(
    head: Head, rows: Rows, total: Partial, centre: Tensor, saved: Tensor, kept: Tensor, names: Sequence[str]
) -> None:
    """D, in kept[0], and the targets' rows of the weight into the directions of `names`, the first in D's place."""
    m_p, inv_s = saved[:2]
    chain = rows.logit_scale * rows.inv_temperature
    scale = chain * (centre - m_p).exp() * inv_s
    t_p = total.sums[0, _T_P.value]
    log_p = t_p - m_p + inv_s.log()
    slope = chain
    if rows.softcap is not None:
        slope = chain * (1 - (t_p / (rows.inv_temperature * rows.softcap)).square())
    of_sums, of_target = [], []
    for name in names:
        of_sums.append(-scale if name == "logprob" else scale)
        of_target.append(slope * (-log_p.expm1() if name == "logprob" else log_p.exp()))
    (count, width), weight = head.hidden.shape, head.weight
    block_t, block_h = 16, min(256, power_of_2(width))
    _direct[(cdiv(count, block_t) * cdiv(width, block_h),)](
        kept[0], kept[1] if len(names) > 1 else None, weight, rows.targets, torch.stack(of_sums), torch.stack(of_target), count,
        weight.shape[0], width, rows.ignore_index, kept.stride(1), *weight.stride(), BLOCK_T=block_t, BLOCK_H=block_h,
        num_warps=4)  # fmt: skip


def backward(
    grads: dict[str, Tensor | None], kept: Tensor, names: Sequence[str], dtype: torch.dtype
) -> Tensor:
    """d_hidden (T, H) in `dtype`: the directions times the incoming gradients."""
    given = [
        (grads[name][:, None], direction) for name, direction in zip(names, kept) if grads[name] is not None
    ]
    if len(given) == 1:
        return torch.mul(*given[0], out=kept.new_empty(kept.shape[1:], dtype=dtype))
    return sum(g * direction for g, direction in given).to(dtype)
