"""sample_tokens on GPUs: one program per row, which reads its logits three times (from cache after the
first), no sort.

    1  largest logit
    2  mass: the sum of exp((x - largest) / temperature), in float32 within a block and float64 across blocks
    3  the block, and in it the token, at which the running mass passes u * total

A truncated row first looks for its threshold: eight rounds, each of which settles four bits of the
threshold's place in the order of the floats by weighing the values at or above fifteen candidates at once.
Neither time nor result depends on the other rows. On devices in `tuned.py` the blocks are measured ones.
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
from clp_kernels.triton_kernels.aot import AotSpec, recorded, recorded_choices
from clp_kernels.triton_kernels.tuning import Tunable

_SELECT_BLOCK = 512


class Blocks(NamedTuple):
    block: int
    select: int  # while a threshold is looked for: sixteen candidates are weighed for each of these columns
    num_warps: int


_CANDIDATES = (
    (4096, _SELECT_BLOCK, 8), (2048, 512, 4), (2048, 512, 8), (4096, 512, 16), (8192, 512, 16), (4096, 256, 8),
)  # fmt: skip
# Not by rows: what is drawn for a row does not depend on the others.
SAMPLE = Tunable("sample", ("vocabulary",), {"whole": _CANDIDATES, "truncated": _CANDIDATES}, Blocks._make)


def unsupported(*, device: torch.device, dtype: torch.dtype, **call) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"the Triton kernels take CUDA or ROCm tensors, not {device.type}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the Triton kernels take float32, float16 and bfloat16, not {dtype}"
    return None


@triton.jit
def _uniform(seed):
    """splitmix64, as reference.sampling.uniforms_of."""
    x = seed.to(tl.uint64) + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return ((x ^ (x >> 31)) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _key(x):
    """Integers in the order of the floats."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 2147483648)


@triton.jit
def _value(key):
    bits = tl.where(key < 2147483648, -1 - key, key - 2147483648)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _threshold(row, vocab, stride, floor, wanted, largest, inverse, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest t such that the values >= max(t, floor) weigh `wanted` or more; each weighs 1, or its
    mass."""
    digit = tl.arange(0, 16).to(tl.int64)
    key = tl.full((), 0, tl.int64)
    for step in range(8):
        scale = tl.full((), 1, tl.int64) << (28 - 4 * step)
        candidates = key + digit * scale
        weight = tl.zeros((16,), tl.float64)
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK).to(tl.int64)
            x = tl.load(row + column * stride, mask=column < vocab, other=float("-inf")).to(tl.float32)
            if MASS:
                each = tl.exp((x - largest) * inverse)
            else:
                each = tl.where(column < vocab, 1.0, 0.0)
            reached = (_key(x)[:, None] >= candidates[None, :]) & (x >= floor)[:, None]
            weight += tl.sum(tl.where(reached, each[:, None], 0.0), 0).to(tl.float64)
        # The smallest candidate always qualifies: it is what the last round settled on (at first, below
        # everything).
        chosen = tl.max(tl.where((weight >= wanted) | (digit == 0), digit, 0), 0)
        key += chosen * scale
    return tl.maximum(_value(key), floor)


@triton.jit
def _mass(row, vocab, stride, threshold, largest, inverse, BLOCK: tl.constexpr):
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        x = tl.load(row + column * stride, mask=column < vocab, other=float("-inf")).to(tl.float32)
        total += tl.sum(tl.where(x >= threshold, tl.exp((x - largest) * inverse), 0.0), 0).to(tl.float64)
    return total


@triton.jit
def _sample(
    logits,  # (rows, vocab), any strides
    draws,  # (rows,) float64 uniforms, or int64 seeds
    temperature_rows, top_k_rows, top_p_rows, min_p_rows,  # (rows,), or None: the number holds for all
    tokens, logprob,  # (rows,) out
    vocab, stride_row, stride,
    temperature, top_k, top_p, min_p,
    SEEDED: tl.constexpr, BLOCK: tl.constexpr, SELECT_BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride_row
    if temperature_rows is not None:
        temperature = tl.load(temperature_rows + index)
    largest = tl.full((), float("-inf"), tl.float32)
    first = tl.full((), -1, tl.int64)  # where the largest is
    nan = tl.full((), 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        x = tl.load(row + column * stride, mask=column < vocab, other=float("-inf")).to(tl.float32)
        nan = tl.maximum(nan, tl.max((x != x).to(tl.int32), 0))
        top = tl.max(x, 0)
        place = tl.min(tl.where(x == top, column, vocab), 0)
        first = tl.where(top > largest, place, first)
        largest = tl.maximum(largest, top)
    fine = (nan == 0) & (largest > float("-inf")) & (largest < float("inf"))

    greedy = temperature <= 0
    temperature = tl.where(greedy, 1.0, temperature).to(tl.float32)
    inverse = tl.minimum(1.0 / temperature, 3.4028234663852886e38)  # 0 * infinity would be NaN
    whole = _mass(row, vocab, stride, float("-inf"), largest, inverse, BLOCK)
    token = first
    if fine & (greedy == 0):
        threshold = tl.full((), float("-inf"), tl.float32)
        kept = whole
        if top_k is not None:
            if top_k_rows is not None:
                k = tl.load(top_k_rows + index)
            else:
                k = tl.full((), top_k, tl.int64)
            if (k > 0) & (k < vocab):
                threshold = _threshold(
                    row, vocab, stride, threshold, k.to(tl.float64), largest, inverse, False, SELECT_BLOCK
                )
                kept = _mass(row, vocab, stride, threshold, largest, inverse, BLOCK)
        if top_p is not None:
            if top_p_rows is not None:
                p = tl.load(top_p_rows + index)
            else:
                p = tl.full((), top_p, tl.float32)
            if p < 1:
                threshold = _threshold(
                    row,
                    vocab,
                    stride,
                    threshold,
                    p.to(tl.float64) * kept,
                    largest,
                    inverse,
                    True,
                    SELECT_BLOCK,
                )
        if min_p is not None:
            if min_p_rows is not None:
                m = tl.load(min_p_rows + index)
            else:
                m = tl.full((), min_p, tl.float32)
            if m > 0:
                threshold = tl.maximum(threshold, largest + temperature * tl.log(m))
        if (top_p is not None) | (min_p is not None):
            kept = _mass(row, vocab, stride, threshold, largest, inverse, BLOCK)

        draw = tl.load(draws + index)
        if SEEDED:
            target = _uniform(draw) * kept
        else:
            target = draw * kept
        below = tl.full((), 0.0, tl.float64)
        token = tl.full((), -1, tl.int64)
        passed = tl.full((), 0, tl.int32)
        for start in range(0, vocab, BLOCK):
            if passed == 0:
                column = start + tl.arange(0, BLOCK).to(tl.int64)
                x = tl.load(row + column * stride, mask=column < vocab, other=float("-inf")).to(tl.float32)
                e = tl.where(x >= threshold, tl.exp((x - largest) * inverse), 0.0)
                mass = tl.sum(e, 0).to(tl.float64)
                # The last token of any weight stands where rounding keeps the running sum below the target.
                token = tl.maximum(token, tl.max(tl.where(e > 0, column, -1), 0))
                if below + mass > target:
                    running = below + tl.cumsum(e, 0).to(tl.float64)
                    token = tl.minimum(
                        token, tl.min(tl.where((running > target) & (e > 0), column, vocab), 0)
                    )
                    passed = tl.full((), 1, tl.int32)
                below += mass
    x = tl.load(row + tl.maximum(token, 0) * stride).to(tl.float32)
    tl.store(tokens + index, tl.where(fine, token, -1))
    tl.store(
        logprob + index, tl.where(fine, (x - largest) * inverse - tl.log(whole).to(tl.float32), float("nan"))
    )


def sample(
    logits: Tensor,
    draws: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    tokens: Tensor,
    logprob: Tensor,
) -> int | None:
    """As reference.sampling.sample; where the tensors are on a GPU, rows without a finite maximum are not
    looked for."""
    rows, vocab = logits.shape
    if rows == 0:
        return None

    def split(value, off):
        """(per-row tensor or None, number); None for both where the option is off, so that its code is left
        out."""
        return (value, 0) if isinstance(value, Tensor) else (None, None if value == off else value)

    (k_rows, k), (p_rows, p), (m_rows, m) = split(top_k, 0), split(top_p, 1.0), split(min_p, 0.0)
    t_rows, t = (temperature, 1.0) if isinstance(temperature, Tensor) else (None, temperature)
    truncated = not (
        k_rows is None and k is None and p_rows is None and p is None and m_rows is None and m is None
    )
    blocks = SAMPLE.choice("truncated" if truncated else "whole", logits, vocab)
    if blocks is None:
        block = min(4096, max(16, triton.next_power_of_2(vocab)))
        blocks = Blocks(block, min(block, _SELECT_BLOCK), 8 if block >= 2048 else 4)
    with torch.cuda.device_of(logits):
        _sample[(rows,)](
            logits,
            draws,
            t_rows,
            k_rows,
            p_rows,
            m_rows,
            tokens,
            logprob,
            vocab,
            logits.stride(0),
            logits.stride(1),
            t,
            k,
            p,
            m,
            SEEDED=not draws.dtype.is_floating_point,
            BLOCK=blocks.block,
            SELECT_BLOCK=blocks.select,
            num_warps=blocks.num_warps,
        )
    if logits.device.type == "cpu" and (bad := tokens < 0).any():
        return int(bad.int().argmax())
    return None


def aot_specs() -> Iterator[AotSpec]:
    """Every block, dtype and kind of draw, with each option left out, a number, and a tensor."""

    def example(vocab: int, dtype: torch.dtype, draws: torch.dtype, *options):
        def call():
            outputs = [torch.empty(32, dtype=d, device="meta") for d in (draws, torch.int64, torch.float32)]
            sample(torch.empty(32, vocab, dtype=dtype, device="meta"), outputs[0], *options, *outputs[1:])

        return call

    def rows(dtype):
        return torch.empty(32, dtype=dtype, device="meta")

    plain, truncated = (0.7, 0, 1.0, 0.0), (0.7, 50, 0.9, 0.05)
    per_row = tuple(rows(d) for d in (torch.float32, torch.int64, torch.float32, torch.float32))
    mixed = [tuple(per_row[i] if i == j else plain[i] for i in range(4)) for j in range(4)]
    mixed += [tuple(truncated[i] if i == j else plain[i] for i in range(4)) for j in range(1, 4)]
    for target, dtype, draws, vocab, options in itertools.product(
        ("sm_80", "sm_90", "sm_100", "gfx942"), (torch.bfloat16, torch.float16, torch.float32), (torch.float64, torch.int64),
        (151936, 4099, 1500, 50), (plain, truncated, per_row, *mixed),
    ):  # fmt: skip
        yield from recorded(f"{str(dtype)[6:]} {vocab}", example(vocab, dtype, draws, *options), (target,))
    for dtype in (torch.bfloat16, torch.float32):

        def chosen(family: str, choice: tuple, dtype=dtype):
            return example(151936, dtype, torch.int64, *(plain if family == "whole" else truncated))

        yield from recorded_choices(SAMPLE, chosen)
