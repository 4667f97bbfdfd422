"""d(loss)/d(logits) of a tile, and the kernel that makes it from logits in memory."""

from __future__ import annotations

import triton
import triton.language as tl

from clp_kernels.triton_kernels.launch import _halves
from clp_kernels.triton_kernels.token_sums import _finite, _transform, _within


@triton.jit
def _differentiate(
    z_p, capped, z_q, first, row, T, targets, saved, coefs, ignore_index, logit_scale, softcap, inv_temperature,
    BLOCK_V: tl.constexpr, REFERENCE: tl.constexpr,
):  # fmt: skip
    """d(loss)/d(raw) of one tile; see `token_stats.coefficients` for the formula."""
    mask = row < T
    size = tl.full((), T, tl.int64)
    m_p = _finite(tl.load(saved + row, mask=mask, other=0.0))[:, None]
    inv_s_p = tl.load(saved + size + row, mask=mask, other=0.0)[:, None]
    c0 = tl.load(coefs + row, mask=mask, other=0.0)[:, None]
    c1 = tl.load(coefs + size + row, mask=mask, other=0.0)[:, None]
    shifted = z_p - m_p
    p = tl.exp(shifted) * inv_s_p
    factor = c0 + c1 * shifted
    if REFERENCE:
        factor += tl.load(coefs + 2 * size + row, mask=mask, other=0.0)[:, None] * (z_p - z_q)
    g = tl.where(p == 0.0, 0.0, p * factor)
    if REFERENCE:
        m_q = _finite(tl.load(saved + 2 * size + row, mask=mask, other=0.0))[:, None]
        inv_s_q = tl.load(saved + 3 * size + row, mask=mask, other=0.0)[:, None]
        c3 = tl.load(coefs + 3 * size + row, mask=mask, other=0.0)[:, None]
        g += c3 * (tl.exp(z_q - m_q) * inv_s_q)
    if targets is not None:
        target = tl.load(targets + row, mask=mask, other=-1)
        ct = tl.load(coefs + 4 * size + row, mask=mask, other=0.0)[:, None]
        g = tl.where(tl.arange(0, BLOCK_V)[None, :] == _within(target, first, BLOCK_V)[:, None], g + ct, g)
    if softcap is not None:
        g *= 1.0 - capped * capped
    g *= (logit_scale * inv_temperature)[:, None]
    if targets is not None:  # last: what is NaN in an ignored row would stay NaN
        g = tl.where((target == ignore_index)[:, None], 0.0, g)
    return g


@triton.jit
def _store_gradient(
    raw_p, raw_q, bias, ref_bias, targets, saved, coefs, out, row, T, V, first_row, last_row, start, first, last, softcap,
    logit_scale, ignore_index, inv_t, stride_out, SLICE: tl.constexpr, REFERENCE: tl.constexpr,
):  # fmt: skip
    """Of raw logits (rows, columns from `start` on) into out, which holds the rows from first_row to last_row and the
    columns from `first` to `last`; at most SLICE columns at a time."""
    if raw_p.shape[1] > SLICE:
        left_p, right_p = _halves(raw_p)
        left_q, right_q = left_p, right_p
        if REFERENCE:
            left_q, right_q = _halves(raw_q)
        _store_gradient(left_p, left_q, bias, ref_bias, targets, saved, coefs, out, row, T, V, first_row, last_row, start,
                        first, last, softcap, logit_scale, ignore_index, inv_t, stride_out, SLICE, REFERENCE)  # fmt: skip
        _store_gradient(right_p, right_q, bias, ref_bias, targets, saved, coefs, out, row, T, V, first_row, last_row,
                        start + left_p.shape[1], first, last, softcap, logit_scale, ignore_index, inv_t, stride_out, SLICE,
                        REFERENCE)  # fmt: skip
    else:
        column = start + tl.arange(0, raw_p.shape[1])
        z_q = raw_p
        if REFERENCE:
            z_q, _ = _transform(raw_q, ref_bias, column, V, logit_scale, softcap, inv_t)
        z_p, capped = _transform(raw_p, bias, column, V, logit_scale, softcap, inv_t)
        g = _differentiate(z_p, capped, z_q, start, row, T, targets, saved, coefs, ignore_index, logit_scale, softcap,
                           inv_t, raw_p.shape[1], REFERENCE)  # fmt: skip
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
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, REFERENCE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(last_row - first_row, BLOCK_T)
    row = first_row + (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    start = first + (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_V
    column = start + tl.arange(0, BLOCK_V)
    mask = (row < last_row)[:, None] & (column < last)[None, :]
    inv_t = tl.load(inv_temperature + row, mask=row < last_row, other=1.0)
    at = logits + row[:, None] * stride_t + column[None, :]
    raw_p = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    raw_q = raw_p
    if REFERENCE:
        at = ref_logits + row[:, None] * stride_rt + column[None, :]
        raw_q = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    _store_gradient(raw_p, raw_q, bias, ref_bias, targets, saved, coefs, out, row, T, V, first_row, last_row, start, first,
                    last, softcap, logit_scale, ignore_index, inv_t, stride_out, BLOCK_V, REFERENCE)  # fmt: skip
