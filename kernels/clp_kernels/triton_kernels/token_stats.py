"""linear_logprob and logits_logprob on GPUs.

    forward     one program per (block of rows, SPLIT columns of the vocabulary): logits tile by tile in registers, folded
                into the rows' running sums; policy and reference share each weight tile where they share the weight
    combine     the splits' sums of each row merged in order, statistics out of them
    gradient    CHUNK columns of d(loss)/d(logits) at a time, from logits computed again, in hidden's dtype
    product     d_hidden (float32, accumulated over the chunks in order), d_weight, and what LoRA needs

No atomics: the same call gives the same bits. Splits and tiles depend on the vocabulary and the dtype, never on the number
of rows, so a row's statistics do not depend on what else is in the batch. Memory: 40 bytes per row and split forward, a
chunk of logits backward (64 MB at 8192 rows).

Rows, columns and contraction are masked; columns beyond the vocabulary have z = -inf; addresses are 64 bits wide. The
tiles compile without spilling for sm_80, sm_90, sm_100 and gfx942 (tests/kernels/test_aot.py) and have not been tuned on
a device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from clp_kernels.backends import interpreting
from clp_kernels.token_stats import (
    DIFFERENTIABLE,
    NEED_REFERENCE,
    NEED_TARGETS,
    OUTPUTS,
    SAVED,
    Head,
    HeadGradients,
    HeadLoRA,
    Rows,
    Sums,
    coefficients,
    merge,
    merge_top1,
)
from clp_kernels.triton_kernels.aot import AotSpec, recorded

SPLIT = 4096  # columns of the vocabulary per program; a multiple of every tile's columns
CHUNK = 4096  # columns of d(loss)/d(logits) that exist at a time

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_STATES = tl.constexpr(9)  # floats per row and split: the fields of token_stats.Sums, in order


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int  # of the contraction
    num_warps: int
    num_stages: int


# "pair": two accumulators, the policy's and the reference's. "plain" is for float32, which has no tensor cores here, and for
# rows that do not start on 16 elements, whose loads take an address each.
_TILES = {
    "half": {
        "single": Tile(128, 128, 64, 8, 3),
        "pair": Tile(64, 128, 64, 8, 3),
        "product": Tile(128, 128, 64, 8, 3),
    },
    "half_ampere": {
        "single": Tile(128, 128, 64, 8, 3),
        "pair": Tile(64, 64, 64, 4, 3),
        "product": Tile(128, 128, 64, 8, 3),
    },
    "half_hip": {
        "single": Tile(128, 128, 32, 8, 2),
        "pair": Tile(64, 64, 32, 4, 2),
        "product": Tile(128, 128, 32, 8, 2),
    },
    "plain": {
        "single": Tile(64, 64, 32, 4, 2),
        "pair": Tile(32, 64, 16, 4, 2),
        "product": Tile(64, 64, 32, 4, 2),
    },
}
_LOGITS_ROWS, _LOGITS_COLUMNS = 4, 1024
_COMBINE_ROWS = 64


def unsupported(*, device: torch.device, dtype: torch.dtype, **call) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"the Triton kernels take CUDA or ROCm tensors, not {device.type}"
    if dtype not in _DTYPES:
        return f"the Triton kernels take float32, float16 and bfloat16, not {dtype}"
    if interpreting() and dtype is torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly; use float16 or float32 there"
    return None


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
def _transform(raw, bias, column, V, logit_scale, softcap, inv_temperature):
    """raw (rows, columns) -> z, -inf beyond the vocabulary, and tanh(u / softcap) (z where there is no softcap)."""
    if bias is not None:
        raw += tl.load(bias + column, mask=column < V, other=0.0).to(tl.float32)[None, :]
    u = raw * logit_scale
    if softcap is not None:
        capped = _tanh(u / softcap)
        z = softcap * capped * inv_temperature[:, None]
    else:
        z = u * inv_temperature[:, None]
        capped = z
    return tl.where((column < V)[None, :], z, float("-inf")), capped


@triton.jit
def _finite(m):
    """A stand-in for the maximum of a row that is masked so far: -inf - -inf would be NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _within(target, first, BLOCK_V: tl.constexpr):
    """The target's place in a tile, or -1: 32 bits, so that comparing with it does not take a tile of 64-bit columns."""
    place = target - first
    return tl.where((place >= 0) & (place < BLOCK_V), place, -1).to(tl.int32)


@triton.jit
def _fold(
    z_p, z_q, first, target, m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top,
    BLOCK_V: tl.constexpr, REFERENCE: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, REVERSE: tl.constexpr,
    TOP1: tl.constexpr,
):  # fmt: skip
    """One tile of z into the rows' running sums (token_stats.Sums) and the column of the largest z."""
    place = tl.arange(0, BLOCK_V)[None, :]
    is_target = place == _within(target, first, BLOCK_V)[:, None]
    highest = tl.max(z_p, 1)
    if TOP1:
        best = (tl.min(tl.where(z_p == highest[:, None], place, BLOCK_V), 1) + first).to(tl.int32)
        top = tl.where((highest > m_p) | (top < 0), best, top)
    m_new = tl.maximum(m_p, highest)
    scale = tl.exp(m_p - _finite(m_new))
    shifted = z_p - _finite(m_new)[:, None]
    e = tl.exp(shifted)
    if ENTROPY:
        a_p = scale * (a_p + (_finite(m_p) - _finite(m_new)) * s_p) + tl.sum(
            tl.where(e > 0.0, e * shifted, 0.0), 1
        )
    if KL:
        d_p = scale * d_p + tl.sum(tl.where(e > 0.0, e * (z_p - z_q), 0.0), 1)
    s_p = scale * s_p + tl.sum(e, 1)
    m_p = m_new
    t_p += tl.sum(tl.where(is_target, z_p, 0.0), 1)
    if REFERENCE:
        m_new = tl.maximum(m_q, tl.max(z_q, 1))
        scale = tl.exp(m_q - _finite(m_new))
        f = tl.exp(z_q - _finite(m_new)[:, None])
        if REVERSE:
            d_q = scale * d_q + tl.sum(tl.where(f > 0.0, f * (z_q - z_p), 0.0), 1)
        s_q = scale * s_q + tl.sum(f, 1)
        m_q = m_new
        t_q += tl.sum(tl.where(is_target, z_q, 0.0), 1)
    return m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top


@triton.jit
def _store_sums(
    partial, partial_top, split, row, T, m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top,
    REFERENCE: tl.constexpr, TOP1: tl.constexpr,
):  # fmt: skip
    mask = row < T
    size = tl.full((), T, tl.int64)
    at = partial + split.to(tl.int64) * _STATES * size + row
    tl.store(at, m_p, mask=mask)
    tl.store(at + size, s_p, mask=mask)
    tl.store(at + 2 * size, a_p, mask=mask)
    tl.store(at + 3 * size, d_p, mask=mask)
    tl.store(at + 7 * size, t_p, mask=mask)
    if REFERENCE:
        tl.store(at + 4 * size, m_q, mask=mask)
        tl.store(at + 5 * size, s_q, mask=mask)
        tl.store(at + 6 * size, d_q, mask=mask)
        tl.store(at + 8 * size, t_q, mask=mask)
    if TOP1:
        tl.store(partial_top + split.to(tl.int64) * size + row, top, mask=mask)


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
def _raw_pair(
    x, w, lora_s, lora_b, ref_x, ref_w, row, column, T, V, H, H_ref, R, stride_xt, stride_xh, stride_wv, stride_wh,
    stride_bv, stride_br, stride_rt, stride_rh, stride_qv, stride_qh,
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
            s_part = lora_s + tl.full((), T, tl.int64) * R * part
            acc = _dot(acc, s_part, lora_b, row, column, T, V, R, R, 1, stride_bv, stride_br, BLOCK_R)
    return acc, acc_q


@triton.jit
def _linear_forward(
    x,  # (T, H), any strides
    w,  # (V, H), any strides
    bias,  # (V,) or None
    lora_s,  # (PARTS, T, R) dense, adds up to (x a^T) * gate; or None
    lora_b,  # (V, R), any strides, or None
    ref_x,  # (T, H_ref), any strides, or None
    ref_w,  # (V, H_ref), any strides, or None: w
    ref_bias,  # (V,) or None
    targets,  # (T,) or None
    inv_temperature,  # (T,)
    partial,  # (splits, _STATES, T) float32
    partial_top,  # (splits, T) int32, or None
    T, V, H, H_ref, R, span, softcap, logit_scale, stride_xt, stride_xh, stride_wv, stride_wh, stride_bv, stride_br,
    stride_rt, stride_rh, stride_qv, stride_qh,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
    REFERENCE: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, REVERSE: tl.constexpr, TOP1: tl.constexpr,
):  # fmt: skip
    # All row blocks of a split run side by side and read the same weight tiles: one read from memory, the rest from L2.
    blocks = tl.cdiv(T, BLOCK_T)
    split = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inv_t = tl.load(inv_temperature + row, mask=row < T, other=1.0)
    target = tl.full((BLOCK_T,), -1, tl.int64)
    if targets is not None:
        target = tl.load(targets + row, mask=row < T, other=-1)
    zero = tl.zeros((BLOCK_T,), tl.float32)
    m_p, m_q = zero + float("-inf"), zero + float("-inf")
    s_p, a_p, d_p, t_p, s_q, d_q, t_q = zero, zero, zero, zero, zero, zero, zero
    top = tl.full((BLOCK_T,), -1, tl.int32)
    for first in tl.range(split * span, tl.minimum(split * span + span, V), BLOCK_V):
        column = first + tl.arange(0, BLOCK_V).to(tl.int64)
        raw_p, raw_q = _raw_pair(x, w, lora_s, lora_b, ref_x, ref_w, row, column, T, V, H, H_ref, R,
                                 stride_xt, stride_xh, stride_wv, stride_wh, stride_bv, stride_br,
                                 stride_rt, stride_rh, stride_qv, stride_qh,
                                 BLOCK_T, BLOCK_V, BLOCK_H, BLOCK_R, PARTS, REFERENCE)  # fmt: skip
        z_p, _ = _transform(raw_p, bias, column, V, logit_scale, softcap, inv_t)
        z_q = z_p
        if REFERENCE:
            z_q, _ = _transform(raw_q, ref_bias, column, V, logit_scale, softcap, inv_t)
        m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top = _fold(
            z_p, z_q, first, target, m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top,
            BLOCK_V, REFERENCE, ENTROPY, KL, REVERSE, TOP1)  # fmt: skip
    _store_sums(
        partial, partial_top, split, row, T, m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top, REFERENCE, TOP1
    )


@triton.jit
def _logits_forward(
    logits,  # (T, V), rows any stride apart
    ref_logits,  # likewise, or None
    targets, inv_temperature, partial, partial_top,  # as in _linear_forward
    T, V, span, softcap, logit_scale, stride_t, stride_rt,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
    REFERENCE: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, REVERSE: tl.constexpr, TOP1: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_T)
    split = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inv_t = tl.load(inv_temperature + row, mask=row < T, other=1.0)
    target = tl.full((BLOCK_T,), -1, tl.int64)
    if targets is not None:
        target = tl.load(targets + row, mask=row < T, other=-1)
    zero = tl.zeros((BLOCK_T,), tl.float32)
    m_p, m_q = zero + float("-inf"), zero + float("-inf")
    s_p, a_p, d_p, t_p, s_q, d_q, t_q = zero, zero, zero, zero, zero, zero, zero
    top = tl.full((BLOCK_T,), -1, tl.int32)
    for first in tl.range(split * span, tl.minimum(split * span + span, V), BLOCK_V):
        column = first + tl.arange(0, BLOCK_V).to(tl.int64)
        mask = (row < T)[:, None] & (column < V)[None, :]
        raw_p = tl.load(logits + row[:, None] * stride_t + column[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        z_p, _ = _transform(raw_p, None, column, V, logit_scale, softcap, inv_t)
        z_q = z_p
        if REFERENCE:
            raw_q = tl.load(ref_logits + row[:, None] * stride_rt + column[None, :], mask=mask, other=0.0).to(
                tl.float32
            )
            z_q, _ = _transform(raw_q, None, column, V, logit_scale, softcap, inv_t)
        m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top = _fold(
            z_p, z_q, first, target, m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top,
            BLOCK_V, REFERENCE, ENTROPY, KL, REVERSE, TOP1)  # fmt: skip
    _store_sums(
        partial, partial_top, split, row, T, m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top, REFERENCE, TOP1
    )


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
        m = tl.load(at, mask=mask, other=0.0)
        s = tl.load(at + size, mask=mask, other=1.0)
        if partial_top is not None:
            column = tl.load(partial_top + split * size + row, mask=mask, other=0)
            top = tl.where((m > m_p) | (split == 0), column, top)
        m_new = tl.maximum(m_p, m)
        old, new = tl.exp(m_p - _finite(m_new)), tl.exp(m - _finite(m_new))
        a = tl.load(at + 2 * size, mask=mask, other=0.0)
        shift_old, shift_new = _finite(m_p) - _finite(m_new), _finite(m) - _finite(m_new)
        a_p = old * (a_p + shift_old * s_p) + new * (a + shift_new * s)
        d_p = old * d_p + new * tl.load(at + 3 * size, mask=mask, other=0.0)
        s_p = old * s_p + new * s
        m_p = m_new
        t_p += tl.load(at + 7 * size, mask=mask, other=0.0)
        if REFERENCE:
            m = tl.load(at + 4 * size, mask=mask, other=0.0)
            m_new = tl.maximum(m_q, m)
            old, new = tl.exp(m_q - _finite(m_new)), tl.exp(m - _finite(m_new))
            s_q = old * s_q + new * tl.load(at + 5 * size, mask=mask, other=1.0)
            d_q = old * d_q + new * tl.load(at + 6 * size, mask=mask, other=0.0)
            m_q = m_new
            t_q += tl.load(at + 8 * size, mask=mask, other=0.0)
        at += _STATES * size

    ignored = row >= T
    if targets is not None:
        target = tl.load(targets + row, mask=mask, other=0)
        ignored = target == ignore_index
        inside = (target >= 0) & (target < V)
        t_p = tl.where(inside, t_p, float("nan"))
        t_q = tl.where(inside, t_q, float("nan"))
    log_s = tl.log(s_p)
    mean_a, mean_d = a_p / s_p, d_p / s_p
    _store_output(logprob, row, T, (t_p - m_p) - log_s, ignored)
    _store_output(entropy, row, T, log_s - mean_a, ignored)
    _store_output(lse, row, T, m_p + log_s, ignored)
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
        g = tl.where((target == ignore_index)[:, None], 0.0, g)
    if softcap is not None:
        g *= 1.0 - capped * capped
    return g * (logit_scale * inv_temperature)[:, None]


@triton.jit
def _linear_gradient(
    x, w, bias, lora_s, lora_b, ref_x, ref_w, ref_bias, targets, inv_temperature,  # as in _linear_forward
    saved,  # (6, T)
    coefs,  # (5, T)
    out,  # (T, CHUNK): the columns from `first` to `last`
    T, V, H, H_ref, R, first, last, softcap, logit_scale, ignore_index, stride_xt, stride_xh, stride_wv, stride_wh,
    stride_bv, stride_br, stride_rt, stride_rh, stride_qv, stride_qh, stride_out,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
    REFERENCE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_T)
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    start = first + (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_V
    column = start + tl.arange(0, BLOCK_V)
    inv_t = tl.load(inv_temperature + row, mask=row < T, other=1.0)
    raw_p, raw_q = _raw_pair(x, w, lora_s, lora_b, ref_x, ref_w, row, column, T, V, H, H_ref, R,
                             stride_xt, stride_xh, stride_wv, stride_wh, stride_bv, stride_br,
                             stride_rt, stride_rh, stride_qv, stride_qh,
                             BLOCK_T, BLOCK_V, BLOCK_H, BLOCK_R, PARTS, REFERENCE)  # fmt: skip
    z_q = raw_p
    if REFERENCE:
        z_q, _ = _transform(raw_q, ref_bias, column, V, logit_scale, softcap, inv_t)
    z_p, capped = _transform(raw_p, bias, column, V, logit_scale, softcap, inv_t)
    g = _differentiate(z_p, capped, z_q, start, row, T, targets, saved, coefs, ignore_index, logit_scale, softcap, inv_t,
                       BLOCK_V, REFERENCE)  # fmt: skip
    tl.store(
        out + row[:, None] * stride_out + (column - first)[None, :],
        g.to(out.dtype.element_ty),
        mask=(row < T)[:, None] & (column < last)[None, :],
    )


@triton.jit
def _logits_gradient(
    logits, ref_logits, targets, inv_temperature,  # as in _logits_forward
    saved,  # (6, T)
    coefs,  # (5, T)
    out,  # (T, V) dense
    T, V, softcap, logit_scale, ignore_index, stride_t, stride_rt,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, REFERENCE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_T)
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    start = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_V
    column = start + tl.arange(0, BLOCK_V)
    mask = (row < T)[:, None] & (column < V)[None, :]
    inv_t = tl.load(inv_temperature + row, mask=row < T, other=1.0)
    raw_p = tl.load(logits + row[:, None] * stride_t + column[None, :], mask=mask, other=0.0).to(tl.float32)
    z_q = raw_p
    if REFERENCE:
        raw_q = tl.load(ref_logits + row[:, None] * stride_rt + column[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        z_q, _ = _transform(raw_q, None, column, V, logit_scale, softcap, inv_t)
    z_p, capped = _transform(raw_p, None, column, V, logit_scale, softcap, inv_t)
    g = _differentiate(z_p, capped, z_q, start, row, T, targets, saved, coefs, ignore_index, logit_scale, softcap, inv_t,
                       BLOCK_V, REFERENCE)  # fmt: skip
    size = tl.full((), V, tl.int64)
    tl.store(out + row[:, None] * size + column[None, :], g.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _product(
    x,  # (M, K), any strides
    w,  # (K, N), any strides
    out,  # (M, N) float32, rows any stride apart
    M, N, K, stride_xm, stride_xk, stride_wk, stride_wn, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """out = x w, or out += x w."""
    blocks = tl.cdiv(M, BLOCK_M)
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _dot(acc, x, w, row, column, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk, BLOCK_K)
    mask = (row < M)[:, None] & (column < N)[None, :]
    at = out + row[:, None] * stride_out + column[None, :]
    if ADD:
        acc += tl.load(at, mask=mask, other=0.0)
    tl.store(at, acc, mask=mask)


def _major() -> int:
    """The device's compute capability, 9 without a device."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 9


def _tile(kind: str, *operands: Tensor) -> Tile:
    aligned = all(stride == 1 or stride % 16 == 0 for operand in operands for stride in operand.stride())
    if operands[0].dtype is torch.float32 or not aligned:
        return _TILES["plain"][kind]
    return _TILES["half_hip" if torch.version.hip else "half_ampere" if _major() == 8 else "half"][kind]


def _multiply(x: Tensor, w: Tensor, out: Tensor, add: bool) -> None:
    """out (M, N) float32 = x (M, K) w (K, N), or += it."""
    (rows, depth), columns = x.shape, w.shape[1]
    if rows == 0 or columns == 0:
        return
    tile = _tile("product", x, w)
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)
    _product[grid](x, w, out, rows, columns, depth, *x.stride(), *w.stride(), out.stride(0), BLOCK_M=tile.rows,
                   BLOCK_N=tile.columns, BLOCK_K=tile.depth, ADD=add, num_warps=tile.num_warps,
                   num_stages=tile.num_stages)  # fmt: skip


def _flags(asked: frozenset[str]) -> dict[str, bool]:
    return {
        "REFERENCE": bool(asked.intersection(NEED_REFERENCE)),
        "ENTROPY": "entropy" in asked,
        "KL": "kl" in asked,
        "REVERSE": "reverse_kl" in asked,
        "TOP1": "top1" in asked,
    }


class _Partial:
    """The splits' running sums: made here, filled by a forward kernel, merged by `finish`."""

    def __init__(self, like: Tensor, rows: int, vocabulary: int, asked: frozenset[str]) -> None:
        self.splits = triton.cdiv(vocabulary, SPLIT)
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
            _combine[(triton.cdiv(count, _COMBINE_ROWS),)](
                self.sums, self.top, rows.targets, *(outputs.get(name) for name in OUTPUTS), saved, count, self.vocabulary,
                self.splits, rows.ignore_index, BLOCK_T=_COMBINE_ROWS, REFERENCE=_flags(self.asked)["REFERENCE"],
                num_warps=2)  # fmt: skip
        empty = {
            name: self.sums.new_empty(0, dtype=torch.int64 if name == "top1" else torch.float32)
            for name in OUTPUTS
        }
        return [outputs.get(name, empty[name]) for name in OUTPUTS], saved


class _Operands:
    """The arguments that the forward and the gradient kernel of one linear_logprob call have in common."""

    def __init__(self, head: Head, with_reference: bool) -> None:
        hidden, weight = head.hidden, head.weight
        self.hidden, self.weight = hidden, weight
        self.down = self.gated = gated_parts = lora_b = None
        rank, b_strides = 0, (0, 0)
        if head.lora is not None:
            self.a, lora_b, gate = (t.to(hidden.dtype) for t in head.lora)
            self.b, self.gate = lora_b, gate.float()
            rank, b_strides = self.a.shape[0], lora_b.stride()
            self.down = hidden.new_empty(hidden.shape[0], rank, dtype=torch.float32)
            _multiply(hidden, self.a.t(), self.down, add=False)
            wide = self.down * self.gate
            self.gated = wide.to(hidden.dtype)
            # 16 bits of it would be the one rounding between hidden and z: what they lose comes as a second part.
            parts = (
                [self.gated]
                if hidden.dtype is torch.float32
                else [self.gated, (wide - self.gated).to(hidden.dtype)]
            )
            gated_parts = torch.stack(parts)
        ref_hidden = ref_weight = ref_bias = None
        ref_width, ref_strides, ref_weight_strides = 0, (0, 0), (0, 0)
        if with_reference:
            ref_hidden, ref_bias = head.ref_hidden, head.ref_bias
            ref_width, ref_strides = ref_hidden.shape[1], ref_hidden.stride()
            shares = (
                head.ref_weight.data_ptr() == weight.data_ptr()
                and head.ref_weight.stride() == weight.stride()
                and ref_width == hidden.shape[1]
            )
            if not shares:
                ref_weight, ref_weight_strides = head.ref_weight, head.ref_weight.stride()
        self.tile = _tile("pair" if with_reference else "single", hidden, weight)
        self.tensors = (hidden, weight, head.bias, gated_parts, lora_b, ref_hidden, ref_weight, ref_bias)
        self.sizes = (hidden.shape[0], weight.shape[0], hidden.shape[1], ref_width, rank)
        self.strides = (*hidden.stride(), *weight.stride(), *b_strides, *ref_strides, *ref_weight_strides)
        self.constants = {
            "BLOCK_T": self.tile.rows,
            "BLOCK_V": self.tile.columns,
            "BLOCK_H": self.tile.depth,
            "BLOCK_R": 16,
            "PARTS": 1 if gated_parts is None else gated_parts.shape[0],
            "num_warps": self.tile.num_warps,
            "num_stages": self.tile.num_stages,
        }


def _linear_partial(head: Head, rows: Rows, asked: frozenset[str]) -> _Partial:
    flags = _flags(asked)
    operands = _Operands(head, flags["REFERENCE"])
    count, vocabulary = head.hidden.shape[0], head.weight.shape[0]
    partial = _Partial(head.hidden, count, vocabulary, asked)
    if count:
        _linear_forward[(triton.cdiv(count, operands.tile.rows) * partial.splits,)](
            *operands.tensors, rows.targets, rows.inv_temperature, partial.sums, partial.top, *operands.sizes, SPLIT,
            rows.softcap, rows.logit_scale, *operands.strides, **flags, **operands.constants)  # fmt: skip
    return partial


def linear_forward(
    head: Head, rows: Rows, asked: frozenset[str], kept: Tensor
) -> tuple[list[Tensor], Tensor]:
    """-> outputs in the order of OUTPUTS, saved (SAVED, T). Nothing is kept: `kept` has no rows."""
    return _linear_partial(head, rows, asked).finish(rows)


def linear_sums(head: Head, rows: Rows, asked: frozenset[str], kept: Tensor) -> tuple[Sums, Tensor]:
    """-> the sums in float32 and the column of the largest z, (T,) each; `_combine`'s arithmetic, splits in order, in torch."""
    partial = _linear_partial(head, rows, asked)
    fields = Sums(*partial.sums.unbind(1))
    if not _flags(asked)["REFERENCE"]:
        fields = fields._replace(m_q=None, s_q=None, d_q=None, t_q=None)  # which the kernel has not written
    top = partial.sums.new_zeros(partial.sums.shape[2], dtype=torch.int32)
    return merge(fields), top if partial.top is None else merge_top1(fields.m_p, partial.top)


def linear_backward(
    head: Head,
    rows: Rows,
    grads: dict[str, Tensor | None],
    saved: Tensor,
    kept: Tensor,
    needs: frozenset[str],
) -> HeadGradients:
    """Gradients of the arguments named in `needs` (fields of HeadGradients), float32 or in their arguments' dtypes."""
    with_reference = grads.get("kl") is not None or grads.get("reverse_kl") is not None
    operands = _Operands(head, with_reference)
    hidden, weight, tile = head.hidden, head.weight, operands.tile
    (count, width), vocabulary = hidden.shape, weight.shape[0]
    coefs = coefficients(grads, saved)

    def wide(*shape: int) -> Tensor:
        return hidden.new_zeros(shape, dtype=torch.float32)

    d_hidden = wide(count, width) if "hidden" in needs else None
    d_weight = (
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if "weight" in needs else None
    )
    d_bias = wide(vocabulary) if "bias" in needs else None
    d_b = wide(*operands.b.shape) if "lora_b" in needs else None
    through_lora = head.lora is not None and needs & {"hidden", "lora_a", "gate"}
    d_gated = wide(*operands.down.shape) if through_lora else None
    buffer = hidden.new_empty(count, min(CHUNK, triton.cdiv(vocabulary, 16) * 16))
    for first in range(0, vocabulary, CHUNK):
        last = min(first + CHUNK, vocabulary)
        out = buffer[:, : last - first]
        if count:
            _linear_gradient[(triton.cdiv(count, tile.rows) * triton.cdiv(last - first, tile.columns),)](
                *operands.tensors, rows.targets, rows.inv_temperature, saved, coefs, out, *operands.sizes, first, last,
                rows.softcap, rows.logit_scale, rows.ignore_index, *operands.strides, out.stride(0),
                REFERENCE=with_reference, **operands.constants)  # fmt: skip
        if d_hidden is not None:
            _multiply(out, weight[first:last], d_hidden, add=True)
        if d_weight is not None:
            piece = wide(last - first, width)
            _multiply(out.t(), hidden, piece, add=False)
            d_weight[first:last] = piece
        if d_bias is not None:
            d_bias[first:last] = out.sum(0, dtype=torch.float32)
        if d_gated is not None:
            _multiply(out, operands.b[first:last], d_gated, add=True)
        if d_b is not None:
            _multiply(out.t(), operands.gated, d_b[first:last], add=False)

    result = HeadGradients(weight=d_weight)
    if d_gated is not None:
        d_down = (d_gated * operands.gate).to(hidden.dtype)
        if d_hidden is not None:
            _multiply(d_down, operands.a, d_hidden, add=True)
        if "lora_a" in needs:
            d_a = wide(*operands.a.shape)
            _multiply(d_down.t(), hidden, d_a, add=False)
            result.lora_a = d_a
        if "gate" in needs:
            result.gate = d_gated * operands.down
    if d_hidden is not None:
        result.hidden = d_hidden
    if d_bias is not None:
        result.bias = d_bias.to(head.bias.dtype)
    if d_b is not None:
        result.lora_b = d_b.to(head.lora.b.dtype)
    return result


def logits_forward(
    logits: Tensor, ref_logits: Tensor | None, rows: Rows, asked: frozenset[str]
) -> tuple[list[Tensor], Tensor]:
    """logits, ref_logits (T, V), the last dimension contiguous; read once, where they are."""
    flags = _flags(asked)
    count, vocabulary = logits.shape
    partial = _Partial(logits, count, vocabulary, asked)
    if not flags["REFERENCE"]:
        ref_logits = None
    if count:
        _logits_forward[(triton.cdiv(count, _LOGITS_ROWS) * partial.splits,)](
            logits, ref_logits, rows.targets, rows.inv_temperature, partial.sums, partial.top, count, vocabulary, SPLIT,
            rows.softcap, rows.logit_scale, logits.stride(0), 0 if ref_logits is None else ref_logits.stride(0),
            BLOCK_T=_LOGITS_ROWS, BLOCK_V=_LOGITS_COLUMNS, **flags, num_warps=8)  # fmt: skip
    return partial.finish(rows)


def logits_backward(
    logits: Tensor, ref_logits: Tensor | None, rows: Rows, grads: dict[str, Tensor | None], saved: Tensor
) -> Tensor:
    """d(loss)/d(logits), in logits' dtype."""
    with_reference = grads.get("kl") is not None or grads.get("reverse_kl") is not None
    count, vocabulary = logits.shape
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if not with_reference:
        ref_logits = None
    if count:
        _logits_gradient[(triton.cdiv(count, _LOGITS_ROWS) * triton.cdiv(vocabulary, _LOGITS_COLUMNS),)](
            logits, ref_logits, rows.targets, rows.inv_temperature, saved, coefficients(grads, saved), out, count, vocabulary,
            rows.softcap, rows.logit_scale, rows.ignore_index, logits.stride(0),
            0 if ref_logits is None else ref_logits.stride(0),
            BLOCK_T=_LOGITS_ROWS, BLOCK_V=_LOGITS_COLUMNS, REFERENCE=with_reference, num_warps=8)  # fmt: skip
    return out


def aot_specs() -> Iterator[AotSpec]:
    """Every tile, for every dtype, with every set of flags, the reference sharing the weight, apart from it, and absent."""

    def example(
        dtype: torch.dtype,
        asked: frozenset[str],
        *,
        odd: bool,
        apart: bool,
        lora: bool,
        bias: bool,
        softcap: float | None,
        target: str,
    ):
        # Nothing divisible by 16 takes the other loads.
        rows, width, vocabulary, rank = (1937, 897, 50257, 27) if odd else (2048, 1024, 50304, 48)

        def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        @mock.patch(f"{__name__}._major", lambda: 8 if target == "sm_80" else 9)
        def call() -> None:
            hidden, weight = make(rows, width), make(vocabulary, width)
            adapters = HeadLoRA(make(rank, width), make(vocabulary, rank), make(rows, rank)) if lora else None
            ref_weight = make(vocabulary, 2 * width) if apart else weight
            biases = [make(vocabulary) if bias else None for _ in range(2)]
            head = Head(hidden, weight, biases[0], make(rows, ref_weight.shape[1]), ref_weight, biases[1], adapters)
            targets = make(rows, dtype=torch.int64) if asked.intersection(NEED_TARGETS) else None
            options = Rows(targets, make(rows, dtype=torch.float32), softcap, 1.0, -100)
            outputs, saved = linear_forward(head, options, asked, None)
            grads = {name: value for name, value in zip(OUTPUTS, outputs) if value.numel() and name in DIFFERENTIABLE}
            needs = frozenset(("hidden", "weight", "bias", *(("lora_a", "lora_b", "gate") if lora else ())))
            if grads:
                linear_backward(head, options, grads, saved, None, needs if bias else needs - {"bias"})
            logits = make(rows, vocabulary)
            outputs, saved = logits_forward(logits, logits, options, asked)
            if grads:
                logits_backward(logits, logits, options, grads, saved)

        return call

    def matrix(kernel: str, constants) -> bool:
        return kernel in ("_linear_forward", "_linear_gradient", "_product")

    subsets = [frozenset(OUTPUTS), *(frozenset({name}) for name in OUTPUTS), frozenset({"entropy", "kl"})]
    for target, dtype, asked, odd, apart, lora, bias, softcap in itertools.product(
        ("sm_80", "sm_90", "sm_100", "gfx942"), (torch.bfloat16, torch.float16, torch.float32), subsets, (False, True),
        (False, True), (True, False), (True, False), (30.0, None),
    ):  # fmt: skip
        if apart and not asked.intersection(NEED_REFERENCE):
            continue
        call = example(dtype, asked, odd=odd, apart=apart, lora=lora, bias=bias, softcap=softcap, target=target)
        label = f"{str(dtype)[6:]} {','.join(sorted(asked))}{' odd' * odd}{' apart' * apart}{' lora' * lora}"
        yield from recorded(label, call, (target,), matrix if dtype is not torch.float32 and not odd else lambda *_: False)
