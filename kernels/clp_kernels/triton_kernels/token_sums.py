"""Running sums of a row over pieces of the vocabulary, and the statistics made of them; see clp_kernels.token_stats.

fold       one tile of z into the rows' sums, slice by slice, so that what exp and the differences leave behind beside
           the accumulators is a slice's worth of registers and not a tile's
combine    the sums of the vocabulary's splits merged in order, and every output out of them
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clp_kernels.token_stats import NEED_REFERENCE, OUTPUTS, SAVED, Rows
from clp_kernels.triton_kernels.launch import _halves, cdiv

# Columns of the vocabulary per program; multiples of every tile's. The last quarter of the vocabulary goes in the narrow ones,
# so that multiprocessors that are done early find work: 2048 programs of 4096 columns, of 128 rows out of 8192 and a vocabulary
# of 131072, would take 16 waves of 132 for the work of 15.5.
SPLIT, NARROW = 4096, 1024
# Floats of a row and split: the fields of token_stats.Sums, in their order.
_M_P = tl.constexpr(0)
_S_P = tl.constexpr(1)
_A_P = tl.constexpr(2)
_D_P = tl.constexpr(3)
_M_Q = tl.constexpr(4)
_S_Q = tl.constexpr(5)
_D_Q = tl.constexpr(6)
_T_P = tl.constexpr(7)
_T_Q = tl.constexpr(8)
_STATES = tl.constexpr(9)
_COMBINE_ROWS = 64
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_MOST_RATE = tl.constexpr(2.0**100)


@triton.jit
def _tanh(x):
    """To about 1 ulp: Cephes' polynomial near zero, where 1 - 2 / (e^2x + 1) would cancel."""
    y = x * x
    p = -5.70498872745e-3 * y + 2.06390887954e-2
    p = p * y - 5.37397155531e-2
    p = p * y + 1.33314422036e-1
    p = p * y - 3.33332819422e-1
    magnitude = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    return tl.where(magnitude < 0.625, p * y * x + x, tl.where(x < 0.0, -far, far))


@triton.jit
def _unit(logit_scale, inv_temperature, PROPORTIONAL: tl.constexpr):
    """z / raw (rows,) where the two are PROPORTIONAL: without a bias or a softcap, and with a positive scale. Sums are then
    made of raw logits, whose order is z's, and are multiplied once a row. Otherwise 1: they are made of z."""
    if PROPORTIONAL:
        unit = logit_scale * inv_temperature
    else:
        unit = tl.zeros_like(inv_temperature) + 1.0
    return unit


@triton.jit
def _rate(unit):
    """log2(e) times the unit, for exp2. A row with a temperature below 2^-100 has the same softmax with that one: one-hot."""
    return tl.minimum(unit * _LOG2_E, _MOST_RATE)


@triton.jit
def _transform(raw, bias, column, V, logit_scale, softcap, inv_temperature, PROPORTIONAL: tl.constexpr):
    """raw (rows, columns) -> z in `_unit`s, and tanh(u / softcap) (z where there is no softcap)."""
    z, capped = raw, raw
    if not PROPORTIONAL:
        if bias is not None:
            z += tl.load(bias + column, mask=column < V, other=0.0).to(tl.float32)[None, :]
        z *= logit_scale
        if softcap is not None:
            capped = _tanh(z / softcap)
            z = softcap * capped
        z *= inv_temperature[:, None]
    return z, capped


@triton.jit
def _masked(z, first, V):
    """z with -inf beyond the vocabulary. Where there is nothing beyond it, this costs a branch and no selections.

    Not for accumulators of a flattened loop, but for what was made of them, a half for instance: Triton would put the wait for
    the products into the branch, and ptxas then waits for each product before the next.
    """
    if first + z.shape[1] > V:
        z = tl.where((tl.arange(0, z.shape[1]) + first < V)[None, :], z, float("-inf"))
    return z


@triton.jit
def _masked_halves(z, first, V):
    """The halves of z, `_masked`, and the rows' maxima."""
    left, right = _halves(z)
    left, right = _masked(left, first, V), _masked(right, first + left.shape[1], V)
    return left, right, tl.max(tl.maximum(left, right), 1)


@triton.jit
def _finite(m):
    """A stand-in for the maximum of a row that is masked so far: -inf - -inf would be NaN. For +inf it makes e^(z - m) and
    its sum inf, so that the sum is NaN only where a z is."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def _within(target, first, BLOCK_V: tl.constexpr):
    """The target's place in a tile, or -1: 32 bits, so that comparing with it does not take a tile of 64-bit columns."""
    place = target - first
    return tl.where((place >= 0) & (place < BLOCK_V), place, -1).to(tl.int32)


@triton.jit
def _hit(target, first, BLOCK_V: tl.constexpr):
    """Whether any row's target is in the tile: of 128 rows and 256 columns of a large vocabulary, one in three or four is."""
    return tl.max(_within(target, first, BLOCK_V), 0) >= 0


@triton.jit
def _fold(
    z_p, z_q, bound_p, bound_q, rate, first, m_p, s_p, a_p, d_p, m_q, s_q, d_q, top,
    BLOCK_V: tl.constexpr, REFERENCE: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, REVERSE: tl.constexpr,
    TOP1: tl.constexpr,
):  # fmt: skip
    """One tile of z, in `_unit`s, into the rows' running sums (token_stats.Sums), but t, and the column of the largest z.

    m and d are in units of z, a in powers of two; `_store_sums` converts them. rate (rows,): `_rate` of the units.
    bound_p, bound_q (rows,): the largest z of a tile that this one is a slice of, or None: this one's. With them m moves once a
    tile. -> the sums, top and e^(z_p - m_p)
    """
    place = tl.arange(0, BLOCK_V)[None, :]
    if bound_p is None or TOP1:
        highest = tl.max(z_p, 1)
    else:
        highest = bound_p
    if TOP1:
        best = (tl.min(tl.where(z_p == highest[:, None], place, BLOCK_V), 1) + first).to(tl.int32)
        top = tl.where((s_p == s_p) & ((highest > m_p) | (top < 0)), best, top)
    m_new = tl.maximum(m_p, highest)
    scale = tl.exp2((m_p - _finite(m_new)) * rate)
    shifted = (z_p - _finite(m_new)[:, None]) * rate[:, None]
    e = tl.exp2(shifted)
    if ENTROPY:
        # An e of 0 has a shift of -inf, or one below -149, and adds nothing.
        a_p = scale * (a_p + (_finite(m_p) - _finite(m_new)) * rate * s_p) + tl.sum(
            e * tl.maximum(shifted, -200.0), 1
        )
    if KL:
        d_p = scale * d_p + tl.sum(tl.where(e > 0.0, e * (z_p - z_q), 0.0), 1)
    total = tl.sum(e, 1)
    if TOP1:
        # The first NaN counts as the largest, as in torch's argmax; s_p is NaN from there on.
        has_nan = (total != total) & (s_p == s_p)
        if tl.max(has_nan.to(tl.int32), 0) > 0:
            first_nan = tl.min(tl.where(z_p != z_p, place, BLOCK_V), 1) + first
            top = tl.where(has_nan, first_nan.to(tl.int32), top)
    s_p = scale * s_p + total
    m_p = m_new
    if REFERENCE:
        if bound_q is None:
            m_new = tl.maximum(m_q, tl.max(z_q, 1))
        else:
            m_new = tl.maximum(m_q, bound_q)
        scale = tl.exp2((m_q - _finite(m_new)) * rate)
        f = tl.exp2((z_q - _finite(m_new)[:, None]) * rate[:, None])
        if REVERSE:
            d_q = scale * d_q + tl.sum(tl.where(f > 0.0, f * (z_q - z_p), 0.0), 1)
        s_q = scale * s_q + tl.sum(f, 1)
        m_q = m_new
    return m_p, s_p, a_p, d_p, m_q, s_q, d_q, top, e


@triton.jit
def _at_target(z, target, first):
    """z at the rows' targets, 0 where they are in other tiles."""
    place = tl.arange(0, z.shape[1])[None, :]
    return tl.sum(tl.where(place == _within(target, first, z.shape[1])[:, None], z, 0.0), 1)


@triton.jit
def _at_target_of_halves(left, right, target, first):
    return _at_target(left, target, first) + _at_target(right, target, first + left.shape[1])


@triton.jit
def _keep(raw, kept, row, column, kept_rows, V):
    if kept is not None:
        at = row[:, None] * V + column[None, :]
        tl.store(kept + at, raw, mask=(row < kept_rows)[:, None] & (column < V)[None, :])


@triton.jit
def _fold_slices(
    raw_p, raw_q, bound_p, bound_q, bias, ref_bias, kept_p, kept_q, first, row, kept_rows, V, logit_scale, softcap, inv_t,
    target, hit, m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top,
    SLICE: tl.constexpr, PROPORTIONAL: tl.constexpr, REFERENCE: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr,
    REVERSE: tl.constexpr, TOP1: tl.constexpr,
):  # fmt: skip
    """`_fold_raw` of a part of the tile, whose largest raw logits are the bounds; PROPORTIONAL ones are masked."""
    if raw_p.shape[1] > SLICE:
        left_p, right_p = _halves(raw_p)
        left_q, right_q = left_p, right_p
        if REFERENCE:
            left_q, right_q = _halves(raw_q)
        m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top = _fold_slices(
            left_p, left_q, bound_p, bound_q, bias, ref_bias, kept_p, kept_q, first, row, kept_rows, V, logit_scale, softcap,
            inv_t, target, hit, m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top, SLICE, PROPORTIONAL, REFERENCE, ENTROPY, KL,
            REVERSE, TOP1)  # fmt: skip
        m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top = _fold_slices(
            right_p, right_q, bound_p, bound_q, bias, ref_bias, kept_p, kept_q, first + left_p.shape[1], row, kept_rows, V,
            logit_scale, softcap, inv_t, target, hit, m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top, SLICE, PROPORTIONAL,
            REFERENCE, ENTROPY, KL, REVERSE, TOP1)  # fmt: skip
    else:
        column = tl.arange(0, raw_p.shape[1]) + first
        _keep(raw_p, kept_p, row, column, kept_rows, V)
        z_p, _ = _transform(raw_p, bias, column, V, logit_scale, softcap, inv_t, PROPORTIONAL)
        if not PROPORTIONAL:
            z_p = _masked(z_p, first, V)
        z_q = z_p
        if REFERENCE:
            _keep(raw_q, kept_q, row, column, kept_rows, V)
            z_q, _ = _transform(raw_q, ref_bias, column, V, logit_scale, softcap, inv_t, PROPORTIONAL)
            if not PROPORTIONAL:
                z_q = _masked(z_q, first, V)
        rate = _rate(_unit(logit_scale, inv_t, PROPORTIONAL))
        m_p, s_p, a_p, d_p, m_q, s_q, d_q, top, _ = _fold(
            z_p, z_q, bound_p, bound_q, rate, first, m_p, s_p, a_p, d_p, m_q, s_q, d_q, top, raw_p.shape[1], REFERENCE,
            ENTROPY, KL, REVERSE, TOP1)  # fmt: skip
        if bound_p is None:
            if hit:
                t_p += _at_target(z_p, target, first)
                if REFERENCE:
                    t_q += _at_target(z_q, target, first)
    return m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top


@triton.jit
def _fold_raw(
    raw_p, raw_q, bias, ref_bias, kept_p, kept_q, first, row, kept_rows, V, logit_scale, softcap, inv_t, target,
    m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top,
    SLICE: tl.constexpr, PROPORTIONAL: tl.constexpr, REFERENCE: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr,
    REVERSE: tl.constexpr, TOP1: tl.constexpr,
):  # fmt: skip
    """Raw logits (rows, columns from `first` on) into the rows' running sums, at most SLICE columns at a time.

    kept_p, kept_q (kept_rows, V) float32, or None: where the raw logits of the leading rows go.
    """
    hit = _hit(target, first, raw_p.shape[1])
    if PROPORTIONAL:
        left_p, right_p, bound_p = _masked_halves(raw_p, first, V)
        left_q, right_q, bound_q = left_p, right_p, bound_p
        if REFERENCE:
            left_q, right_q, bound_q = _masked_halves(raw_q, first, V)
        if hit:
            t_p += _at_target_of_halves(left_p, right_p, target, first)
            if REFERENCE:
                t_q += _at_target_of_halves(left_q, right_q, target, first)
        m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top = _fold_slices(
            left_p, left_q, bound_p, bound_q, bias, ref_bias, kept_p, kept_q, first, row, kept_rows, V, logit_scale, softcap,
            inv_t, target, hit, m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top, SLICE, PROPORTIONAL, REFERENCE, ENTROPY, KL,
            REVERSE, TOP1)  # fmt: skip
        m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top = _fold_slices(
            right_p, right_q, bound_p, bound_q, bias, ref_bias, kept_p, kept_q, first + left_p.shape[1], row, kept_rows, V,
            logit_scale, softcap, inv_t, target, hit, m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top, SLICE, PROPORTIONAL,
            REFERENCE, ENTROPY, KL, REVERSE, TOP1)  # fmt: skip
    else:
        m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top = _fold_slices(
            raw_p, raw_q, None, None, bias, ref_bias, kept_p, kept_q, first, row, kept_rows, V, logit_scale, softcap, inv_t,
            target, hit, m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top, SLICE, PROPORTIONAL, REFERENCE, ENTROPY, KL,
            REVERSE, TOP1)  # fmt: skip
    return m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top


@triton.jit
def _span(split, wide, span, narrow, V):
    """The first column of a split and the one behind its last: the first `wide` have `span` columns, the others `narrow`."""
    behind = tl.maximum(split - wide, 0)
    start = tl.minimum(split, wide) * span + behind * narrow
    return start, tl.minimum(start + tl.where(split < wide, span, narrow), V)


@triton.jit
def _store_sums(
    partial, partial_top, split, row, T, unit, m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top,
    REFERENCE: tl.constexpr, TOP1: tl.constexpr,
):  # fmt: skip
    mask = row < T
    size = tl.full((), T, tl.int64)
    at = partial + split.to(tl.int64) * _STATES * size + row
    tl.store(at + _M_P * size, m_p * unit, mask=mask)
    tl.store(at + _S_P * size, s_p, mask=mask)
    tl.store(at + _A_P * size, a_p * _LN_2, mask=mask)
    tl.store(at + _D_P * size, d_p * unit, mask=mask)
    tl.store(at + _T_P * size, t_p * unit, mask=mask)
    if REFERENCE:
        tl.store(at + _M_Q * size, m_q * unit, mask=mask)
        tl.store(at + _S_Q * size, s_q, mask=mask)
        tl.store(at + _D_Q * size, d_q * unit, mask=mask)
        tl.store(at + _T_Q * size, t_q * unit, mask=mask)
    if TOP1:
        tl.store(partial_top + split.to(tl.int64) * size + row, top, mask=mask)


@triton.jit
def _store_output(out, row, T, value, ignored):
    if out is not None:
        tl.store(out + row, tl.where(ignored, 0.0, value), mask=row < T)


@triton.jit
def _combine(
    partial,  # (splits, _STATES, T)
    partial_top,  # (splits, T) or None
    targets,  # (T,) or None
    logprob, entropy, ref_logprob, kl, reverse_kl, lse, top1,  # (T,), None where not asked for
    saved,  # (6, T): m_p, 1/s_p, m_q, 1/s_q, E_p[z_p - m_p], E_p[z_p - z_q]
    T, V, splits, ignore_index,
    BLOCK_T: tl.constexpr, REFERENCE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = row < T
    size = tl.full((), T, tl.int64)
    zero = tl.zeros((BLOCK_T,), tl.float32)
    m_p, m_q = zero + float("-inf"), zero + float("-inf")
    s_p, a_p, d_p, t_p, s_q, d_q, t_q = zero, zero, zero, zero, zero, zero, zero
    top = tl.zeros((BLOCK_T,), tl.int32)
    at = partial + row
    for split in range(splits):
        m = tl.load(at + _M_P * size, mask=mask, other=0.0)
        s = tl.load(at + _S_P * size, mask=mask, other=1.0)
        if partial_top is not None:
            column = tl.load(partial_top + split * size + row, mask=mask, other=0)
            better = (s_p == s_p) & ((s != s) | (m > m_p))
            top = tl.where(better | (split == 0), column, top)
        m_new = tl.maximum(m_p, m)
        old, new = tl.exp(m_p - _finite(m_new)), tl.exp(m - _finite(m_new))
        a = tl.load(at + _A_P * size, mask=mask, other=0.0)
        shift_old, shift_new = _finite(m_p) - _finite(m_new), _finite(m) - _finite(m_new)
        a_p = old * (a_p + shift_old * s_p) + new * (a + shift_new * s)
        d_p = old * d_p + new * tl.load(at + _D_P * size, mask=mask, other=0.0)
        s_p = old * s_p + new * s
        m_p = m_new
        t_p += tl.load(at + _T_P * size, mask=mask, other=0.0)
        if REFERENCE:
            m = tl.load(at + _M_Q * size, mask=mask, other=0.0)
            m_new = tl.maximum(m_q, m)
            old, new = tl.exp(m_q - _finite(m_new)), tl.exp(m - _finite(m_new))
            s_q = old * s_q + new * tl.load(at + _S_Q * size, mask=mask, other=1.0)
            d_q = old * d_q + new * tl.load(at + _D_Q * size, mask=mask, other=0.0)
            m_q = m_new
            t_q += tl.load(at + _T_Q * size, mask=mask, other=0.0)
        at += _STATES * size

    ignored = row >= T
    if targets is not None:
        target = tl.load(targets + row, mask=mask, other=0)
        ignored = target == ignore_index
        inside = (target >= 0) & (target < V)
        t_p = tl.where(inside, t_p, float("nan"))
        t_q = tl.where(inside, t_q, float("nan"))
    _store_output(lse, row, T, m_p + tl.log(s_p), ignored)
    # Nothing but lse is defined where a z is +inf.
    s_p = tl.where(s_p == float("inf"), float("nan"), s_p)
    s_q = tl.where(s_q == float("inf"), float("nan"), s_q)
    log_s = tl.log(s_p)
    mean_a, mean_d = a_p / s_p, d_p / s_p
    _store_output(logprob, row, T, (t_p - m_p) - log_s, ignored)
    _store_output(entropy, row, T, log_s - mean_a, ignored)
    if top1 is not None:
        tl.store(top1 + row, tl.where(ignored, 0, top).to(tl.int64), mask=mask)
    tl.store(saved + row, m_p, mask=mask)
    tl.store(saved + size + row, 1.0 / s_p, mask=mask)
    tl.store(saved + 4 * size + row, mean_a, mask=mask)
    tl.store(saved + 5 * size + row, mean_d, mask=mask)
    if REFERENCE:
        log_ratio = (m_p - m_q) + tl.log(s_p / s_q)  # lse_p - lse_q, small where the two are close
        _store_output(ref_logprob, row, T, (t_q - m_q) - tl.log(s_q), ignored)
        _store_output(kl, row, T, mean_d - log_ratio, ignored)
        _store_output(reverse_kl, row, T, d_q / s_q + log_ratio, ignored)
        tl.store(saved + 2 * size + row, m_q, mask=mask)
        tl.store(saved + 3 * size + row, 1.0 / s_q, mask=mask)


def flags(asked: frozenset[str]) -> dict[str, bool]:
    """Which sums the outputs need."""
    return {
        "REFERENCE": bool(asked.intersection(NEED_REFERENCE)),
        "ENTROPY": "entropy" in asked,
        "KL": "kl" in asked,
        "REVERSE": "reverse_kl" in asked,
        "TOP1": "top1" in asked,
    }


class Partial:
    """The splits' running sums: made here, filled by a forward kernel, merged by `finish`."""

    def __init__(
        self, like: Tensor, rows: int, vocabulary: int, asked: frozenset[str], splits: int | None = None
    ) -> None:
        wide = vocabulary * 3 // 4 // SPLIT
        self.splits = splits or wide + cdiv(vocabulary - wide * SPLIT, NARROW)
        self.spans = (wide, SPLIT, NARROW)
        self.asked, self.vocabulary = asked, vocabulary
        self.sums = like.new_empty(self.splits, _STATES.value, rows, dtype=torch.float32)
        self.top = like.new_empty(self.splits, rows, dtype=torch.int32) if "top1" in asked else None

    def finish(self, rows: Rows) -> tuple[list[Tensor], Tensor]:
        count = self.sums.shape[2]
        outputs = {
            name: self.sums.new_empty(count, dtype=torch.int64 if name == "top1" else torch.float32)
            for name in OUTPUTS
            if name in self.asked
        }
        # Zeros: without a reference its four rows are never written.
        saved = self.sums.new_zeros(SAVED, count)
        if count:
            _combine[(cdiv(count, _COMBINE_ROWS),)](
                self.sums, self.top, rows.targets, *(outputs.get(name) for name in OUTPUTS), saved, count, self.vocabulary,
                self.splits, rows.ignore_index, BLOCK_T=_COMBINE_ROWS, REFERENCE=flags(self.asked)["REFERENCE"],
                num_warps=2)  # fmt: skip
        empty = {
            name: self.sums.new_empty(0, dtype=torch.int64 if name == "top1" else torch.float32)
            for name in OUTPUTS
        }
        return [outputs.get(name, empty[name]) for name in OUTPUTS], saved
