"""sample_tokens on GPUs: the vocabulary of each row is cut into parts of one tile, a program for each; no sort.

    _parts   of each part its largest logit t and the sum of exp((x - t) / temperature)
    _count   (top_k, top_p) a histogram of the logits above a bound, and the bin in which the threshold lies; then of that bin
    _kept    (any truncation) of each part the sum of exp((x - largest) / temperature) over what is kept
    _draw    a program for each row: from the parts' sums the part, and from its logits the token, at which the running mass
             passes u * total

Neither launches nor result depend on the other rows. Sums are float32 within a part and float64 across parts.

**Thresholds.** top_k asks for the largest t such that k logits are t or more, top_p for the largest t such that the mass of the
logits that are t or more is p of what top_k kept. Both are found exactly, in the order of the floats: each logit is an integer
key, the keys from the largest logit's down to a bound are cut into 2048 bins of equal length, and the bin in which the running
weight (from the largest down) reaches what is wanted is cut again, until a bin is one key: 2 launches for 16-bit logits, 3 for
float32. Weights are integers (1, or the mass as a multiple of 2^-S, S = 62 - bits of V), so that atomics add them up to the
same bits in any order. The last program of a row to arrive reads the row's histogram.

**Bounds** keep most logits out of the histogram. Top-k: the k-th largest of the maxima of groups of 128 columns, above which
lie k logits and hardly more (of a k beyond the number of groups: none). Top-p without top-k: logits of a mass below
(1 - p) total / 2V, which together are below (1 - p) / 2 of it.

**Counts**, V = 152,064 in bfloat16, 38 parts of 4096, predictions at 4.3 TB/s, 2 us for a launch in a graph that is not
filled with work; nothing is measured:
                          launches             reads of the logits         64 rows     1 row
    whole                 2                    1                           8 us        5 us
    min_p                 3                    2                          14 us        7 us
    top_k, or top_p       6 (float32: 7)       4 (5)                      30 us       13 us
    top_k and top_p       8 (10)               6 (8)                      45 us       17 us
One launch is the zeroing of the histograms. A program for each row (64 of 132 multiprocessors, no load ahead of another, three
reads) was predicted to take 65 us whole, and with a threshold more than a millisecond: eight rounds of fifteen comparisons
for every logit. At 256 rows the logits no longer fit in L2, and a read of them takes 18 us.

Rejected by count: sixteen candidates a round over programs (180 operations a logit and threshold: 60 us for 64 rows); a
weighted histogram as a product of one-hot matrices (60 operations and their layout: 20 us a round); a program's own histogram
in shared memory, which Triton has for counts alone. On devices in `tuned.py` the parts are measured ones.
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
from clp_kernels.triton_kernels.launch import cdiv, power_of_2
from clp_kernels.triton_kernels.tuning import Tunable

_BINS = 2048
_GROUP = 128  # columns of which one maximum is kept
# The bits of a float32 that logits of a dtype leave zero: their keys are shorter.
_UNUSED = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


class Blocks(NamedTuple):
    block: int  # columns of a part
    num_warps: int


_CANDIDATES = ((4096, 8), (1024, 4), (2048, 4), (2048, 8), (4096, 16), (8192, 16))
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
def _key(x, UNUSED: tl.constexpr):
    """Integers, 0 or more, in the order of the floats, without their UNUSED last bits."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 2147483648) >> UNUSED


@triton.jit
def _value(key, UNUSED: tl.constexpr):
    whole = key << UNUSED
    negative = -1 - (whole | ((1 << UNUSED) - 1))
    return (
        tl.where(whole < 2147483648, negative, whole - 2147483648).to(tl.int32).to(tl.float32, bitcast=True)
    )


@triton.jit
def _option(rows, row, number, DTYPE: tl.constexpr):
    """The row's own value of an option, or the number that holds for all."""
    if rows is not None:
        value = tl.load(rows + row)
    else:
        value = tl.full((), number, DTYPE)
    return value


@triton.jit
def _temperature(rows, row, number):
    """(temperature, 1 / temperature, whether the row is greedy: its temperature is then 1)."""
    temperature = _option(rows, row, number, tl.float32)
    greedy = temperature <= 0
    temperature = tl.where(greedy, 1.0, temperature).to(tl.float32)
    inverse = tl.minimum(1.0 / temperature, 3.4028234663852886e38)  # 0 * infinity would be NaN
    return temperature, inverse, greedy


@triton.jit
def _logits(logits, row, part, vocab, stride_row, stride, BLOCK: tl.constexpr):
    """(columns, whether there are such, their logits; -inf where not) of a part of a row."""
    column = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = column < vocab
    x = tl.load(logits + row * stride_row + column * stride, mask=there, other=float("-inf"))
    return column, there, x.to(tl.float32)


@triton.jit
def _summary(tops, sums, row, parts, inverse, PARTS: tl.constexpr):
    """(largest logit, NaN if it is not finite; of each part the largest, its share of the mass of the largest, and its sum)."""
    part = tl.arange(0, PARTS)
    at = row * parts + part
    # Past L1, which may hold what lay here before other programs of this launch wrote it.
    top = tl.load(tops + at, mask=part < parts, other=float("-inf"), cache_modifier=".cg")
    each = tl.load(sums + at, mask=part < parts, other=0.0, cache_modifier=".cg")
    largest = tl.max(top, 0)
    fine = (tl.max((top != top).to(tl.int32), 0) == 0) & (largest > float("-inf")) & (largest < float("inf"))
    largest = tl.where(fine, largest, float("nan"))
    share = tl.where(top > float("-inf"), tl.exp((top - largest) * inverse), 0.0)
    return largest, top, share, each


@triton.jit
def _last(arrived, row, parts):
    """Whether this is the last of the row's programs to come here. It then sees what the others wrote before."""
    tl.debug_barrier()
    return tl.atomic_add(arrived + row, 1, sem="acq_rel") == parts - 1


@triton.jit
def _shift(span):
    """The least number of bits by which `span` is shifted to be less than 2048."""
    shift = tl.full((), 0, tl.int64)
    for bit in tl.static_range(11, 33):
        shift += ((span >> bit) > 0).to(tl.int64)
    return shift


@triton.jit
def _parts(
    logits,  # (rows, vocab), any strides
    temperature_rows, top_k_rows,  # (rows,), or None: the number holds for all
    tops, sums,  # (rows, parts) float32
    maxima,  # (rows, parts * GROUPS) float32: the largest of each group of columns; or None: there is no top_k
    peaks, wholes,  # (rows,) float32, float64: the largest logit and the whole mass; or None: no threshold is looked for
    state,  # (rows, 4) int64, as _count has it
    arrived,  # (rows,) int64 zeros
    vocab, stride_row, stride, temperature, top_k, parts,
    BLOCK: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, ALL_GROUPS: tl.constexpr, UNUSED: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, inverse, _ = _temperature(temperature_rows, row, temperature)
    _, _, x = _logits(logits, row, part, vocab, stride_row, stride, BLOCK)
    top = tl.max(x, 0)
    shifted = tl.where(x > float("-inf"), (x - top) * inverse, float("-inf"))
    tl.store(sums + row * parts + part, tl.sum(tl.exp(shifted), 0))
    nan = tl.max((x != x).to(tl.int32), 0) > 0
    tl.store(tops + row * parts + part, tl.where(nan, float("nan"), top))
    if maxima is not None:
        group = part.to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        of_groups = tl.max(tl.reshape(x, (GROUPS, BLOCK // GROUPS)), 1)
        tl.store(maxima + row * (parts * GROUPS) + group, of_groups)
    if peaks is not None:
        if _last(arrived, row, parts):
            tl.store(arrived + row, 0)
            largest, of_parts, share, each = _summary(tops, sums, row, parts, inverse, PARTS)
            tl.store(peaks + row, largest)
            tl.store(wholes + row, tl.sum(share.to(tl.float64) * each, 0))
            bound = _key(tl.full((), float("-inf"), tl.float32), UNUSED)
            if maxima is not None:
                k = _option(top_k_rows, row, top_k, tl.int64)
                if (k > 0) & (k < vocab):
                    each_group = tl.arange(0, ALL_GROUPS)
                    there = each_group < parts * GROUPS
                    m = tl.load(
                        maxima + row * (parts * GROUPS) + each_group,
                        mask=there,
                        other=float("-inf"),
                        cache_modifier=".cg",
                    )
                    keys = _key(m, UNUSED)
                    # The k-th largest, bit by bit; -inf where there are fewer.
                    found = tl.full((), 0, tl.int64)
                    for bit in range(32 - UNUSED):
                        tried = found | (tl.full((), 1, tl.int64) << (31 - UNUSED - bit))
                        enough = tl.sum((there & (keys >= tried)).to(tl.int64), 0) >= k
                        found = tl.where(enough, tried, found)
                    bound = tl.maximum(bound, found)
            tl.store(state + row * 4, bound)
            tl.store(state + row * 4 + 2, -1)


@triton.jit
def _count(
    logits,  # (rows, vocab), any strides
    temperature_rows, top_k_rows, top_p_rows,  # (rows,), or None: the number holds for all
    peaks, wholes,  # (rows,) as _parts leaves them
    state,  # (rows, 4) int64: the keys between which the threshold lies, low and high; bits of a bin; the weight still wanted.
    #         Where the bits are -1 the threshold is low
    histogram,  # (rows, BINS) int64 zeros; left as zeros
    arrived,  # (rows,) int64 zeros; left as zeros
    vocab, stride_row, stride, temperature, top_k, top_p, parts, scale,
    FIRST: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, UNUSED: tl.constexpr,
):  # fmt: skip
    """One cut of the keys that the threshold may have. MASS: of top_p, else of top_k; FIRST: the first cut for it.

    A first cut begins at state's low: a bound (top_k), or top_k's threshold, -inf without one (top_p).
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    width, inverse, greedy = _temperature(temperature_rows, row, temperature)
    largest = tl.load(peaks + row)
    low, high = tl.load(state + row * 4), tl.load(state + row * 4 + 1)
    shift, wanted = tl.load(state + row * 4 + 2), tl.load(state + row * 4 + 3)
    share = tl.full((), 1.0, tl.float64)
    if FIRST:
        high = _key(largest, UNUSED)
        if MASS:
            p = _option(top_p_rows, row, top_p, tl.float32)
            share = p.to(tl.float64)
            active = p < 1
            whole = tl.load(wholes + row)
            nothing = _key(tl.full((), float("-inf"), tl.float32), UNUSED)
            if low == nothing:
                wanted = tl.ceil(share * whole * scale).to(tl.int64)
                least = (0.5 * (1.0 - p) * whole / vocab).to(tl.float32)
                if least > 0:
                    low = tl.minimum(tl.maximum(low, _key(largest + width * tl.log(least), UNUSED)), high)
            else:
                wanted = tl.full((), -1, tl.int64)  # p of all that this histogram will hold
        else:
            wanted = _option(top_k_rows, row, top_k, tl.int64)
            active = (wanted > 0) & (wanted < vocab)
        shift = tl.where(active, _shift(high - low), -1)
    if (shift >= 0) & (largest == largest) & (greedy == 0):
        _, there, x = _logits(logits, row, part, vocab, stride_row, stride, BLOCK)
        key = _key(x, UNUSED)
        if MASS:
            weight = (tl.exp((x - largest) * inverse) * scale).to(tl.int64)
        else:
            weight = tl.full((BLOCK,), 1, tl.int64)
        counted = there & (key >= low) & (key <= high) & (weight > 0)
        to = histogram + row * BINS + tl.where(counted, (high - key) >> shift, 0)
        tl.atomic_add(to, weight, mask=counted, sem="relaxed")
        if _last(arrived, row, parts):
            tl.store(arrived + row, 0)
            bins = tl.arange(0, BINS).to(tl.int64)
            weights = tl.load(histogram + row * BINS + bins, cache_modifier=".cg")
            tl.store(histogram + row * BINS + bins, tl.zeros((BINS,), tl.int64))
            total = tl.sum(weights, 0)
            wanted = tl.where(wanted < 0, tl.ceil(share * total).to(tl.int64), wanted)
            wanted = tl.maximum(tl.minimum(wanted, total), 1)
            bin = tl.min(tl.where(tl.cumsum(weights, 0) >= wanted, bins, BINS - 1), 0)
            high -= bin << shift
            low = tl.maximum(low, high - ((tl.full((), 1, tl.int64) << shift) - 1))
            tl.store(state + row * 4, low)
            tl.store(state + row * 4 + 1, high)
            tl.store(state + row * 4 + 2, tl.where(shift > 0, _shift(high - low), -1))
            tl.store(state + row * 4 + 3, wanted - tl.sum(tl.where(bins < bin, weights, 0), 0))


@triton.jit
def _threshold(state, min_p_rows, row, min_p, largest, temperature, UNUSED: tl.constexpr):
    threshold = tl.full((), float("-inf"), tl.float32)
    if state is not None:
        threshold = _value(tl.load(state + row * 4), UNUSED)
    if min_p is not None:
        m = _option(min_p_rows, row, min_p, tl.float32)
        if m > 0:
            threshold = tl.maximum(threshold, largest + temperature * tl.log(m))
    return threshold


@triton.jit
def _kept(
    logits,  # (rows, vocab), any strides
    temperature_rows, min_p_rows,  # (rows,), or None: the number holds for all
    tops, sums,  # (rows, parts) as _parts leaves them
    state,  # (rows, 4) as _count leaves it, or None
    kept,  # (rows, parts) float32
    vocab, stride_row, stride, temperature, min_p, parts,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, UNUSED: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    width, inverse, _ = _temperature(temperature_rows, row, temperature)
    largest, _, _, _ = _summary(tops, sums, row, parts, inverse, PARTS)
    threshold = _threshold(state, min_p_rows, row, min_p, largest, width, UNUSED)
    _, _, x = _logits(logits, row, part, vocab, stride_row, stride, BLOCK)
    each = tl.where(x >= threshold, tl.exp((x - largest) * inverse), 0.0)
    tl.store(kept + row * parts + part, tl.sum(each, 0))


@triton.jit
def _draw(
    logits,  # (rows, vocab), any strides
    draws,  # (rows,) float64 uniforms, or int64 seeds
    temperature_rows, min_p_rows,  # (rows,), or None: the number holds for all
    tops, sums,  # (rows, parts) as _parts leaves them
    state,  # (rows, 4) as _count leaves it, or None
    kept,  # (rows, parts) as _kept leaves them, or None: all tokens are kept
    tokens, logprob,  # (rows,) out
    vocab, stride_row, stride, temperature, min_p, parts,
    SEEDED: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, UNUSED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    width, inverse, greedy = _temperature(temperature_rows, row, temperature)
    largest, top, share, each = _summary(tops, sums, row, parts, inverse, PARTS)
    part = tl.arange(0, PARTS)
    mass = share.to(tl.float64) * each
    whole = tl.sum(mass, 0)
    if kept is not None:
        mass = tl.load(kept + row * parts + part, mask=part < parts, other=0.0).to(tl.float64)
    draw = tl.load(draws + row)
    if SEEDED:
        draw = _uniform(draw)
    target = draw * tl.sum(mass, 0)
    running = tl.cumsum(mass, 0)
    # The last part of any weight stands where rounding keeps the running sum below the target; so does the last token.
    chosen = tl.minimum(
        tl.min(tl.where((running > target) & (mass > 0), part, PARTS), 0),
        tl.max(tl.where(mass > 0, part, 0), 0),
    )
    chosen = tl.where(greedy, tl.min(tl.where(top == largest, part, PARTS), 0), chosen)
    chosen = tl.minimum(chosen, parts - 1)  # of a row whose largest logit is not finite
    mine = part == chosen
    below = tl.sum(tl.where(mine, running - mass, 0.0), 0)
    column, _, x = _logits(logits, row, chosen, vocab, stride_row, stride, BLOCK)
    if kept is not None:
        threshold = _threshold(state, min_p_rows, row, min_p, largest, width, UNUSED)
        e = tl.where(x >= threshold, tl.exp((x - largest) * inverse), 0.0)
        passed = below + tl.cumsum(e, 0).to(tl.float64) > target
    else:
        # As _parts has them, so that these sum up to the part's mass.
        highest = tl.sum(tl.where(mine, top, 0.0), 0)
        e = tl.where(x > float("-inf"), tl.exp((x - highest) * inverse), 0.0)
        factor = tl.sum(tl.where(mine, share, 0.0), 0).to(tl.float64)
        passed = below + tl.cumsum(e, 0).to(tl.float64) * factor > target
    token = tl.minimum(
        tl.min(tl.where(passed & (e > 0), column, vocab), 0), tl.max(tl.where(e > 0, column, -1), 0)
    )
    token = tl.where(greedy, tl.min(tl.where(x == largest, column, vocab), 0), token)
    token = tl.where(largest == largest, token, -1)
    z = tl.load(logits + row * stride_row + tl.maximum(token, 0) * stride).to(tl.float32)
    tl.store(tokens + row, token)
    tl.store(logprob + row, (z - largest) * inverse - tl.log(whole).to(tl.float32))


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
    cut = k is not None or p is not None
    truncated = cut or m is not None
    blocks = SAMPLE.choice("truncated" if truncated else "whole", logits, vocab)
    if blocks is None:
        block = min(4096, max(16, power_of_2(vocab)))
        blocks = Blocks(block, 8 if block >= 2048 else 4)
    block, parts = blocks.block, cdiv(vocab, blocks.block)
    groups, unused = max(1, block // _GROUP), _UNUSED[logits.dtype]
    tops, sums, kept = logits.new_empty((3, rows, parts), dtype=torch.float32).unbind()
    maxima = peaks = wholes = state = arrived = histogram = None
    if cut:
        zeros = logits.new_zeros((rows * (_BINS + 1),), dtype=torch.int64)
        histogram, arrived = zeros[: rows * _BINS], zeros[rows * _BINS :]
        state = logits.new_empty((rows, 4), dtype=torch.int64)
        peaks, wholes = (logits.new_empty(rows, dtype=d) for d in (torch.float32, torch.float64))
        if k is not None:
            maxima = logits.new_empty((rows, parts * groups), dtype=torch.float32)
    place = vocab, *logits.stride()
    tiles = {"BLOCK": block, "UNUSED": unused, "num_warps": blocks.num_warps}
    of_parts = {**tiles, "PARTS": power_of_2(parts)}
    _parts[(rows, parts)](
        logits, t_rows, k_rows, tops, sums, maxima, peaks, wholes, state, arrived, *place, t, k, parts, GROUPS=groups,
        ALL_GROUPS=power_of_2(parts * groups), **of_parts,
    )  # fmt: skip
    for asked, mass in ((k, False), (p, True)):
        # Each launch cuts 11 bits.
        for level in range(0 if asked is None else cdiv(32 - unused, 11)):
            _count[(rows, parts)](
                logits, t_rows, k_rows, p_rows, peaks, wholes, state, histogram, arrived, *place, t, k, p, parts,
                2.0 ** (62 - vocab.bit_length()), FIRST=level == 0, MASS=mass, BINS=_BINS, **tiles,
            )  # fmt: skip
    if truncated:
        _kept[(rows, parts)](logits, t_rows, m_rows, tops, sums, state, kept, *place, t, m, parts, **of_parts)
    _draw[(rows,)](
        logits, draws, t_rows, m_rows, tops, sums, state, kept if truncated else None, tokens, logprob, *place, t, m,
        parts, SEEDED=not draws.dtype.is_floating_point, **of_parts,
    )  # fmt: skip
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
