"""d(loss)/d(logits) of a tile, and the kernel that makes it from logits in memory."""

from __future__ import annotations

import triton
import triton.language as tl

from clp_kernels.triton_kernels.launch import _halves
from clp_kernels.triton_kernels.token_sums import _LN_2, _LOG2_E, _finite, _hit, _transform, _unit, _within


@triton.jit
def _row_terms(
    targets, inv_temperature, saved, coefs, row, last_row, T, logit_scale, ignore_index,
    PROPORTIONAL: tl.constexpr, REFERENCE: tl.constexpr,
):  # fmt: skip
    """What a tile's gradient takes of each row, loaded once for the tile.

    -> inverse temperature, target, whether it is ignored, `_unit`, m_p, m_q, and the factors, chain rule included, of e_p,
    e_p (z_p - m_p), e_p (z_p - z_q) in units, e_q and the target; see `token_stats.coefficients` for the formula
    """
    mask = row < last_row
    size = tl.full((), T, tl.int64)
    inv_t = tl.load(inv_temperature + row, mask=mask, other=1.0)
    unit = _unit(logit_scale, inv_t, PROPORTIONAL)
    chain = logit_scale * inv_t
    m_p = _finite(tl.load(saved + row, mask=mask, other=0.0))
    over_s = chain * tl.load(saved + size + row, mask=mask, other=0.0)
    of_p = over_s * tl.load(coefs + row, mask=mask, other=0.0)
    of_shift = over_s * tl.load(coefs + size + row, mask=mask, other=0.0)
    m_q, of_apart, of_q, of_target = m_p, of_p, of_p, of_p
    if REFERENCE:
        of_apart = over_s * unit * tl.load(coefs + 2 * size + row, mask=mask, other=0.0)
        m_q = _finite(tl.load(saved + 2 * size + row, mask=mask, other=0.0))
        of_q = chain * tl.load(saved + 3 * size + row, mask=mask, other=0.0)
        of_q *= tl.load(coefs + 3 * size + row, mask=mask, other=0.0)
    target = tl.full((row.shape[0],), -1, tl.int64)
    ignored = row < 0
    if targets is not None:
        target = tl.load(targets + row, mask=mask, other=-1)
        ignored = target == ignore_index
        of_target = chain * tl.load(coefs + 4 * size + row, mask=mask, other=0.0)
    return inv_t, target, ignored, unit, m_p, m_q, of_p, of_shift, of_apart, of_q, of_target


@triton.jit
def _power(z, unit, m):
    """log2(e) (unit z - m). The product is rounded by itself, as the m of the forward pass was: fused with the difference, it
    would leave the largest z a probability that is off by a rounding of z."""
    return (tl.fma(z, unit[:, None], 0.0) - m[:, None]) * _LOG2_E


@triton.jit
def _differentiate(
    z_p, capped, z_q, first, hit, target, unit, m_p, m_q, of_p, of_shift, of_apart, of_q, of_target, softcap,
    BLOCK_V: tl.constexpr, REFERENCE: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """d(loss)/d(raw) of one tile of z in units, of rows that are not ignored."""
    power = _power(z_p, unit, m_p)
    e = tl.exp2(power)
    factor = of_p[:, None]
    if ENTROPY:
        factor += (of_shift * _LN_2)[:, None] * tl.maximum(power, -200.0)  # where e is 0, the product is
    if REFERENCE:
        factor += of_apart[:, None] * (z_p - z_q)
    g = e * factor
    if REFERENCE:
        g = tl.where(e == 0.0, 0.0, g)
        g += of_q[:, None] * tl.exp2(_power(z_q, unit, m_q))
    if hit:
        place = tl.arange(0, BLOCK_V)[None, :]
        g = tl.where(place == _within(target, first, BLOCK_V)[:, None], g + of_target[:, None], g)
    if softcap is not None:
        g *= 1.0 - capped * capped
    return g


@triton.jit
def _store_gradient(
    raw_p, raw_q, bias, ref_bias, out, top, row, V, first_row, last_row, start, first, last, softcap, logit_scale,
    stride_out, hit, some_ignored, inv_t, target, ignored, unit, m_p, m_q, of_p, of_shift, of_apart, of_q, of_target,
    SLICE: tl.constexpr, PROPORTIONAL: tl.constexpr, REFERENCE: tl.constexpr, ENTROPY: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Of raw logits (rows, columns from `start` on) into out, which holds the rows from first_row to last_row and the
    columns from `first` to `last`; at most SLICE columns at a time. out is a pointer, or where STORED a descriptor of tiles of
    SLICE columns; the tile's first row is its row `top`."""
    if raw_p.shape[1] > SLICE:
        left_p, right_p = _halves(raw_p)
        left_q, right_q = left_p, right_p
        if REFERENCE:
            left_q, right_q = _halves(raw_q)
        _store_gradient(left_p, left_q, bias, ref_bias, out, top, row, V, first_row, last_row, start, first, last, softcap,
                        logit_scale, stride_out, hit, some_ignored, inv_t, target, ignored, unit, m_p, m_q, of_p, of_shift,
                        of_apart, of_q, of_target, SLICE, PROPORTIONAL, REFERENCE, ENTROPY, STORED)  # fmt: skip
        _store_gradient(right_p, right_q, bias, ref_bias, out, top, row, V, first_row, last_row, start + left_p.shape[1],
                        first, last, softcap, logit_scale, stride_out, hit, some_ignored, inv_t, target, ignored, unit, m_p,
                        m_q, of_p, of_shift, of_apart, of_q, of_target, SLICE, PROPORTIONAL, REFERENCE, ENTROPY,
                        STORED)  # fmt: skip
    else:
        column = tl.arange(0, raw_p.shape[1]) + start
        z_p, capped = _transform(raw_p, bias, column, V, logit_scale, softcap, inv_t, PROPORTIONAL)
        z_q = z_p
        if REFERENCE:
            z_q, _ = _transform(raw_q, ref_bias, column, V, logit_scale, softcap, inv_t, PROPORTIONAL)
        g = _differentiate(z_p, capped, z_q, start, hit, target, unit, m_p, m_q, of_p, of_shift, of_apart, of_q, of_target,
                           softcap, raw_p.shape[1], REFERENCE, ENTROPY)  # fmt: skip
        if some_ignored:  # last: what is NaN in an ignored row would stay NaN
            g = tl.where(ignored[:, None], 0.0, g)
        if STORED:
            out.store([top, start - first], g.to(out.dtype))
        else:
            tl.store(
                out + (row - first_row)[:, None] * stride_out + (column - first)[None, :],
                g.to(out.dtype.element_ty),
                mask=(row < last_row)[:, None] & (column < last)[None, :],
            )


@triton.jit
def _logits_gradient(
    logits,  # (rows from 0 on, V), rows any stride apart
    ref_logits,  # likewise, or None
    bias, ref_bias,  # (V,) or None: still to be added to the logits
    targets, inv_temperature,  # (T,) or None; (T,)
    saved,  # (6, T)
    coefs,  # (5, T)
    out,  # rows from first_row to last_row, columns from `first` to `last`
    T, V, first_row, last_row, first, last, softcap, logit_scale, ignore_index, stride_t, stride_rt, stride_out,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, PROPORTIONAL: tl.constexpr, REFERENCE: tl.constexpr,
    ENTROPY: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(last_row - first_row, BLOCK_T)
    top = tl.program_id(0) % blocks * BLOCK_T
    row = first_row + top + tl.arange(0, BLOCK_T).to(tl.int64)
    start = first + tl.program_id(0) // blocks * BLOCK_V
    column = start + tl.arange(0, BLOCK_V)
    mask = (row < last_row)[:, None] & (column < last)[None, :]
    inv_t, target, ignored, unit, m_p, m_q, of_p, of_shift, of_apart, of_q, of_target = _row_terms(
        targets, inv_temperature, saved, coefs, row, last_row, T, logit_scale, ignore_index, PROPORTIONAL,
        REFERENCE)  # fmt: skip
    at = logits + row[:, None] * stride_t + column[None, :]
    raw_p = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    raw_q = raw_p
    if REFERENCE:
        at = ref_logits + row[:, None] * stride_rt + column[None, :]
        raw_q = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    hit, some_ignored = _hit(target, start, BLOCK_V), tl.max(ignored.to(tl.int32), 0) > 0
    _store_gradient(raw_p, raw_q, bias, ref_bias, out, top, row, V, first_row, last_row, start, first, last, softcap,
                    logit_scale, stride_out, hit, some_ignored, inv_t, target, ignored, unit, m_p, m_q, of_p, of_shift,
                    of_apart, of_q, of_target, BLOCK_V, PROPORTIONAL, REFERENCE, ENTROPY, False)  # fmt: skip
