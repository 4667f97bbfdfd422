"""linear_logprob and logits_logprob on GPUs.

    forward     running sums of every split of the vocabulary, from a head (head_logits) or from logits (here)
    combine     the splits' sums of each row merged in order, statistics out of them (token_sums)
    gradient    d(loss)/d(logits) of a block of rows and a chunk of columns at a time, in hidden's dtype, from logits that
                were kept or are computed again (head_logits, token_gradient)
    product     d_hidden, d_weight and what LoRA needs, float32, accumulated over the chunks in order (products)
    along       a frozen head's d_hidden, which the forward pass has prepared with one product more (directions)

No atomics: the same call gives the same bits. Splits, chunks and tiles depend on the vocabulary, the width and the dtype,
never on the number of rows, so that a row's statistics, and its d_hidden, do not depend on what else is in the batch,
inside `batch_invariant()` or not, where its operands are laid out alike.

Memory: 40 bytes per row and split forward. Backward a block of d(loss)/d(logits): where only d_hidden is asked for, as many
rows at a time as make one wave of programs for its product (1024 at H = 4096, 16 MB), so that the block and the rows'
d_hidden stay in L2 between the two kernels and over the chunks; where sums over the rows are asked for, all rows.
A frozen head costs no product.

Rows, columns and contraction are masked, or bounded by descriptors; columns beyond the vocabulary have z = -inf; addresses
are 64 bits wide. The tiles compile without spilling for sm_80, sm_90, sm_100 and gfx942 (tests/kernels/test_aot.py). On
devices in `tuned.py` they are measured ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from clp_kernels.token_stats import (
    DIFFERENTIABLE,
    NEED_REFERENCE,
    NEED_TARGETS,
    OUTPUTS,
    Head,
    HeadGradients,
    HeadLoRA,
    Rows,
    Sums,
    coefficients,
    merge,
    merge_top1,
)
from clp_kernels.triton_kernels import directions as along
from clp_kernels.triton_kernels import launch
from clp_kernels.triton_kernels.aot import AotSpec, recorded, recorded_choices
from clp_kernels.triton_kernels.head_logits import FORWARD, GRADIENT, HeadLogits
from clp_kernels.triton_kernels.launch import cdiv
from clp_kernels.triton_kernels.launch import unsupported as unsupported
from clp_kernels.triton_kernels.products import PRODUCT, multiply
from clp_kernels.triton_kernels.token_gradient import _logits_gradient
from clp_kernels.triton_kernels.token_sums import (
    Partial,
    _fold_slices,
    _hit,
    _span,
    _store_sums,
    _unit,
    flags,
)

CHUNK = 4096  # columns of d(loss)/d(logits) that exist at a time, at least
_LOGITS_ROWS, _LOGITS_COLUMNS = 4, 1024


@triton.jit
def _logits_forward(
    logits,  # (T, V), rows any stride apart
    ref_logits,  # likewise, or None
    targets, inv_temperature, partial, partial_top,  # as in head_logits._linear_forward
    T, V, wide, span, narrow, softcap, logit_scale, stride_t, stride_rt,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, PROPORTIONAL: tl.constexpr,
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
    start, stop = _span(split, wide, span, narrow, V)
    for first in tl.range(start, stop, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V).to(tl.int64)
        mask = (row < T)[:, None] & (column < V)[None, :]
        at = logits + row[:, None] * stride_t + column[None, :]
        raw_p = tl.load(at, mask=mask, other=float("-inf")).to(tl.float32)
        raw_q = raw_p
        if REFERENCE:
            at = ref_logits + row[:, None] * stride_rt + column[None, :]
            raw_q = tl.load(at, mask=mask, other=float("-inf")).to(tl.float32)
        m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top = _fold_slices(
            raw_p, raw_q, None, None, None, None, None, None, first, row, 0, V, logit_scale, softcap, inv_t, target,
            _hit(target, first, BLOCK_V), m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q, top, BLOCK_V, PROPORTIONAL, REFERENCE,
            ENTROPY, KL, REVERSE, TOP1)  # fmt: skip
    _store_sums(partial, partial_top, split, row, T, _unit(logit_scale, inv_t, PROPORTIONAL), m_p, s_p, a_p, d_p, m_q, s_q,
                d_q, t_p, t_q, top, REFERENCE, TOP1)  # fmt: skip


def _head_partial(head: Head, rows: Rows, asked: frozenset[str], kept: Tensor | None) -> Partial:
    logits = HeadLogits(head, flags(asked)["REFERENCE"], FORWARD)
    partial = Partial(head.hidden, logits.rows, logits.vocabulary, asked)
    logits.fold(rows, partial, kept)
    return partial


def linear_forward(
    head: Head, rows: Rows, asked: frozenset[str], kept: Tensor | None, directions: Sequence[str] = ()
) -> tuple[list[Tensor], Tensor]:
    """-> outputs in the order of OUTPUTS, saved (SAVED, T). kept (copies, T_kept, V) float32 is filled with the raw logits of
    the leading T_kept rows, the policy's and, where copies is 2, the reference's; or kept (directions, T, H) with these."""
    if directions:
        (count, width), vocabulary = head.hidden.shape, head.weight.shape[0]
        height = _row_block(count, width, head.hidden.device)
        return along.forward(head, rows, asked, kept, directions, _chunk(vocabulary), height)
    return _head_partial(head, rows, asked, kept).finish(rows)


def linear_sums(head: Head, rows: Rows, asked: frozenset[str], kept: Tensor | None) -> tuple[Sums, Tensor]:
    """-> the sums in float32 and the column of the largest z, (T,) each; `_combine`'s arithmetic, splits in order, in torch."""
    partial = _head_partial(head, rows, asked, kept)
    fields = Sums(*partial.sums.unbind(1))
    if not flags(asked)["REFERENCE"]:
        fields = fields._replace(m_q=None, s_q=None, d_q=None, t_q=None)  # which the kernel has not written
    top = partial.sums.new_zeros(partial.sums.shape[2], dtype=torch.int32)
    return merge(fields), top if partial.top is None else merge_top1(fields.m_p, fields.s_p, partial.top)


def linear_backward_along(
    head: Head,
    rows: Rows,
    grads: dict[str, Tensor | None],
    kept: Tensor,
    directions: Sequence[str],
    needs: frozenset[str],
) -> HeadGradients:
    """`linear_backward` from the directions in `kept`, of a head without LoRA: no product at all."""
    return HeadGradients(hidden=along.backward(grads, kept, directions, head.hidden.dtype))


def _chunk(vocabulary: int) -> int:
    """A sixteenth of the vocabulary, in steps of CHUNK: wide chunks read and write d_hidden less often."""
    return max(CHUNK, vocabulary // 16 // CHUNK * CHUNK)


def _row_block(rows: int, width: int, device: torch.device) -> int:
    """Rows whose product with a chunk of the weight is one wave of programs, each 128 rows and 256 columns."""
    return min(rows, 128 * max(1, launch.multiprocessors(device) // max(1, cdiv(width, 256))))


def _without_ignored(head: Head, ignored: Tensor) -> Head:
    """The head with zeros in its ignored rows: a product would multiply NaN there with their gradient of zero."""
    ignored, lora = ignored[:, None], head.lora
    if lora is not None:
        lora = lora._replace(gate=lora.gate.masked_fill(ignored, 0))
    return replace(head, hidden=head.hidden.masked_fill(ignored, 0), lora=lora)


def linear_backward(
    head: Head,
    rows: Rows,
    grads: dict[str, Tensor | None],
    saved: Tensor,
    kept: Tensor | None,
    needs: frozenset[str],
) -> HeadGradients:
    """Gradients of the arguments named in `needs` (fields of HeadGradients), float32 or in their arguments' dtypes."""
    with_reference = grads.get("kl") is not None or grads.get("reverse_kl") is not None
    if rows.targets is not None and (head.lora is not None or "weight" in needs):
        head = _without_ignored(head, rows.targets == rows.ignore_index)
    logits = HeadLogits(head, with_reference, GRADIENT)
    hidden, weight = head.hidden, head.weight
    (count, width), vocabulary = hidden.shape, weight.shape[0]
    coefs, entropy = coefficients(grads, saved), grads.get("entropy") is not None
    saved = saved.contiguous()

    def wide(*shape: int) -> Tensor:
        return hidden.new_zeros(shape, dtype=torch.float32)

    d_hidden = wide(count, width) if "hidden" in needs else None
    d_weight = (
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if "weight" in needs else None
    )
    d_bias = wide(vocabulary) if "bias" in needs else None
    d_b = wide(*logits.b.shape) if "lora_b" in needs else None
    through_lora = head.lora is not None and needs & {"hidden", "lora_a", "gate"}
    d_gated = wide(*logits.down.shape) if through_lora else None
    sums_over_rows = needs & {"weight", "bias", "lora_b"}
    height = count if sums_over_rows else _row_block(count, width, hidden.device)
    chunk = _chunk(vocabulary)
    buffer = hidden.new_empty(height, min(chunk, cdiv(vocabulary, 16) * 16))
    for top in range(0, count, max(height, 1)):
        bottom = min(top + height, count)
        for first in range(0, vocabulary, chunk):
            last = min(first + chunk, vocabulary)
            out = buffer[: bottom - top, : last - first]
            _fill(out, logits, head, rows, saved, coefs, entropy, kept, top, first)
            if d_hidden is not None:
                multiply(out, weight[first:last], d_hidden[top:bottom], add=True)
            if d_gated is not None:
                multiply(out, logits.b[first:last], d_gated[top:bottom], add=True)
            if d_weight is not None:
                multiply(out.t(), hidden, d_weight[first:last], add=False)
            if d_bias is not None:
                d_bias[first:last] = out.sum(0, dtype=torch.float32)
            if d_b is not None:
                multiply(out.t(), logits.gated, d_b[first:last], add=False)
    if d_weight is not None and not count:
        d_weight.zero_()

    result = HeadGradients(weight=d_weight)
    if d_gated is not None:
        d_down = (d_gated * logits.gate).to(hidden.dtype)
        if d_hidden is not None:
            multiply(d_down, logits.a, d_hidden, add=True)
        if "lora_a" in needs:
            d_a = wide(*logits.a.shape)
            multiply(d_down.t(), hidden, d_a, add=False)
            result.lora_a = d_a
        if "gate" in needs:
            result.gate = d_gated * logits.down
    if d_hidden is not None:
        result.hidden = d_hidden
    if d_bias is not None:
        result.bias = d_bias.to(head.bias.dtype)
    if d_b is not None:
        result.lora_b = d_b.to(head.lora.b.dtype)
    return result


def _fill(
    out: Tensor,
    logits: HeadLogits,
    head: Head,
    rows: Rows,
    saved: Tensor,
    coefs: Tensor,
    entropy: bool,
    kept: Tensor | None,
    top: int,
    first: int,
) -> None:
    """d(loss)/d(logits) of the block at (top, first): of its rows that were kept from memory, of the others once more."""
    height, width = out.shape
    there = 0 if kept is None or not kept.shape[0] else max(0, min(kept.shape[1] - top, height))
    if there:
        reference = kept[1] if logits.with_reference else None
        ref_bias = head.ref_bias if logits.with_reference else None
        _differentiate_logits(
            kept[0], reference, head.bias, ref_bias, rows, saved, coefs, entropy, out[:there], top, first
        )
    if there < height:
        logits.gradient(rows, saved, coefs, entropy, out[there:], top + there, first)


def _proportional(rows: Rows) -> bool:
    """Whether z is a positive multiple of the logits."""
    return rows.softcap is None and rows.logit_scale > 0


def _differentiate_logits(
    logits: Tensor,
    ref_logits: Tensor | None,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    rows: Rows,
    saved: Tensor,
    coefs: Tensor,
    entropy: bool,
    out: Tensor,
    top: int,
    first: int,
) -> None:
    """d(loss)/d(logits) of the block of logits (T or fewer rows, V) that starts at (top, first) and has out's shape."""
    height, width = out.shape
    _logits_gradient[(cdiv(height, _LOGITS_ROWS) * cdiv(width, _LOGITS_COLUMNS),)](
        logits, ref_logits, bias, ref_bias, rows.targets, rows.inv_temperature, saved, coefs, out, saved.shape[1],
        logits.shape[1], top, top + height, first, first + width, rows.softcap, rows.logit_scale, rows.ignore_index,
        logits.stride(0), 0 if ref_logits is None else ref_logits.stride(0), out.stride(0),
        BLOCK_T=_LOGITS_ROWS, BLOCK_V=_LOGITS_COLUMNS, PROPORTIONAL=bias is ref_bias is None and _proportional(rows),
        REFERENCE=ref_logits is not None, ENTROPY=entropy, num_warps=8)  # fmt: skip


def logits_forward(
    logits: Tensor, ref_logits: Tensor | None, rows: Rows, asked: frozenset[str]
) -> tuple[list[Tensor], Tensor]:
    """logits, ref_logits (T, V), the last dimension contiguous; read once, where they are."""
    needed = flags(asked)
    count, vocabulary = logits.shape
    partial = Partial(logits, count, vocabulary, asked)
    if not needed["REFERENCE"]:
        ref_logits = None
    if count:
        _logits_forward[(cdiv(count, _LOGITS_ROWS) * partial.splits,)](
            logits, ref_logits, rows.targets, rows.inv_temperature, partial.sums, partial.top, count, vocabulary,
            *partial.spans, rows.softcap, rows.logit_scale, logits.stride(0), 0 if ref_logits is None else ref_logits.stride(0),
            BLOCK_T=_LOGITS_ROWS, BLOCK_V=_LOGITS_COLUMNS, PROPORTIONAL=_proportional(rows), **needed, num_warps=8)  # fmt: skip
    return partial.finish(rows)


def logits_backward(
    logits: Tensor, ref_logits: Tensor | None, rows: Rows, grads: dict[str, Tensor | None], saved: Tensor
) -> Tensor:
    """d(loss)/d(logits), in logits' dtype."""
    with_reference = grads.get("kl") is not None or grads.get("reverse_kl") is not None
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if not with_reference:
        ref_logits = None
    if logits.shape[0]:
        coefs = coefficients(grads, saved)
        entropy = grads.get("entropy") is not None
        _differentiate_logits(
            logits, ref_logits, None, None, rows, saved.contiguous(), coefs, entropy, out, 0, 0
        )
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
        kept: int,
    ):
        # Nothing divisible by 16 takes the other loads.
        rows, width, vocabulary, rank = (1937, 897, 50257, 27) if odd else (2048, 1024, 50304, 48)

        def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def call() -> None:
            hidden, weight = make(rows, width), make(vocabulary, width)
            adapters = HeadLoRA(make(rank, width), make(vocabulary, rank), make(rows, rank)) if lora else None
            ref_weight = make(vocabulary, 2 * width) if apart else weight
            biases = [make(vocabulary) if bias else None for _ in range(2)]
            head = Head(
                hidden, weight, biases[0], make(rows, ref_weight.shape[1]), ref_weight, biases[1], adapters
            )
            targets = make(rows, dtype=torch.int64) if asked.intersection(NEED_TARGETS) else None
            options = Rows(targets, make(rows, dtype=torch.float32), softcap, 1.0, -100)
            copies = 2 if asked.intersection(("kl", "reverse_kl")) else 1
            logits = make(copies, kept, vocabulary, dtype=torch.float32) if kept else None
            outputs, saved = linear_forward(head, options, asked, logits)
            grads = {
                name: value
                for name, value in zip(OUTPUTS, outputs)
                if value.numel() and name in DIFFERENTIABLE
            }
            needs = frozenset(("hidden", "weight", "bias", *(("lora_a", "lora_b", "gate") if lora else ())))
            if grads:
                linear_backward(head, options, grads, saved, logits, needs if bias else needs - {"bias"})
                linear_backward(head, options, grads, saved, None, frozenset(("hidden",)))
            if not lora:
                room = make(2, rows, width, dtype=torch.float32)
                linear_forward(
                    head, options, asked, room, ("logprob", "lse") if targets is not None else ("lse",)
                )
            logits = make(rows, vocabulary)
            outputs, saved = logits_forward(logits, logits, options, asked)
            if grads:
                logits_backward(logits, logits, options, grads, saved)

        return call

    def matrix(kernel: str, constants) -> bool:
        return kernel in (
            "_linear_forward",
            "_linear_gradient",
            "_linear_terms",
            "_product",
            "_product_described",
        )

    subsets = [frozenset(OUTPUTS), *(frozenset({name}) for name in OUTPUTS), frozenset({"entropy", "kl"})]
    for target, dtype, asked, odd, apart, lora, bias, softcap, kept in itertools.product(
        ("sm_80", "sm_90", "sm_100", "gfx942"), (torch.bfloat16, torch.float16, torch.float32), subsets, (False, True),
        (False, True), (True, False), (True, False), (30.0, None), (0, 100),
    ):  # fmt: skip
        if (apart and not asked.intersection(NEED_REFERENCE)) or (
            kept and not asked.intersection(DIFFERENTIABLE)
        ):
            continue
        call = example(dtype, asked, odd=odd, apart=apart, lora=lora, bias=bias, softcap=softcap, kept=kept)
        label = f"{str(dtype)[6:]} {','.join(sorted(asked))}{' odd' * odd}{' apart' * apart}{' lora' * lora}"
        label += " kept" * bool(kept)
        yield from recorded(
            label, call, (target,), matrix if dtype is not torch.float32 and not odd else lambda *_: False
        )

    for tunable, (kept, softcap) in itertools.product((FORWARD, GRADIENT, PRODUCT), ((0, None), (100, 30.0))):

        def chosen(family: str, choice: tuple, kept=kept, softcap=softcap):
            dtype = torch.float32 if family.startswith("plain") else torch.bfloat16
            asked = frozenset(("logprob", "entropy") if family.endswith("single") else OUTPUTS)
            return example(
                dtype, asked, odd=False, apart=False, lora=True, bias=True, softcap=softcap, kept=kept
            )

        yield from recorded_choices(tunable, chosen, matrix)
