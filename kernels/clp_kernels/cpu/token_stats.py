"""linear_logprob and logits_logprob on the CPU: products of `cpu.products`, C++ (csrc/cpu/token_stats.cpp) for the rest.

linear_logprob walks over chunks of at most CHUNK logits: one product fills a reused float32 buffer, one fused pass folds it
into the rows' running sums. Backward fills the chunk again, one fused pass turns it into d(loss)/d(logits) in place, and
products accumulate what was asked for: d_hidden over the vocabulary in float32, d_weight chunk by chunk. Beyond the inputs
and the gradients themselves that takes a few chunks and O(rows) numbers.

What stays between forward and backward, `token_stats.what_to_keep` says: logits of the first rows, or for a frozen head the
directions d(output)/d(hidden). With W~ = (1 - tanh^2) W where there is a softcap and W where not, c = logit_scale / temperature
and y the target, they are

    logprob   c (W~_y - sum_v p_v W~_v)      lse   c sum p W~      kl   c sum p (z - z' - E_p[z - z']) W~

all made of the sums of `_Terms`, whose maximum moves while the vocabulary goes by: the pass over a chunk rescales them, and its
exponentials, which it writes over the logits, are what the next product takes. Rows with an ignored target are left out of the
products.

The size of a chunk, 4 MB: measured at T = 2048, H = 512, V = 32000 with products on tiles, two threads took 0.66 s with it,
0.77 s with 8 MB and 0.73 s with 2 MB. Every product and pass is a parallel region, and where the cores are shared with other
processes each region waits for a descheduled thread: 1 MB was then three times slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from clp_kernels import _native
from clp_kernels.backends import is_batch_invariant
from clp_kernels.cpu import products
from clp_kernels.cpu.dtypes import DTYPES
from clp_kernels.cpu.dtypes import unsupported as unsupported
from clp_kernels.cpu.products import along
from clp_kernels.token_stats import (
    DIRECTED,
    OUTPUTS,
    Head,
    HeadGradients,
    Rows,
    Sums,
    coefficients,
    direction_width,
    statistics,
)

CHUNK = 1 << 20  # logits, 4 MB of float32; twice that with a reference
ROWS = 2048  # at most in a chunk

# TokenTerm: e^(z_p - m_p), and that times z_p - z_q; and the outputs that need each.
_TERM_OUTPUTS = (frozenset(DIRECTED), frozenset({"kl"}))
_BLOCK = 256  # rows of the directions that are put together at a time

_REFERENCE, _ENTROPY, _KL, _REVERSE_KL = 1, 2, 4, 8  # TokenStatFlag


def check_rows(rows: Rows, vocabulary: int) -> Tensor | None:
    """Which rows are ignored (None: there are no targets).

    Raises IndexError for a target outside the vocabulary, ValueError for a temperature that is not positive.
    """
    if (rows.inv_temperature <= 0).any() or not rows.inv_temperature.isfinite().all():
        raise ValueError(
            "temperature has an entry that is not positive and finite; expected positive numbers"
        )
    if rows.targets is None:
        return None
    ignored = rows.targets == rows.ignore_index
    wrong = ((rows.targets < 0) | (rows.targets >= vocabulary)) & ~ignored
    if wrong.any() and not rows.shard:
        at = int(wrong.nonzero()[0])
        raise IndexError(
            f"targets[{at}] (rows flattened) is {int(rows.targets[at])}; expected 0 to {vocabulary - 1}, or "
            f"ignore_index={rows.ignore_index} for a row to leave out"
        )
    return ignored


def _flags(asked: frozenset[str]) -> int:
    reference = bool(asked & {"ref_logprob", "kl", "reverse_kl"})
    return (
        _REFERENCE * reference
        | _ENTROPY * ("entropy" in asked)
        | _KL * ("kl" in asked)
        | _REVERSE_KL * ("reverse_kl" in asked)
    )


def _chunk(rows: Rows, flags: int) -> _native.TokenStatsChunk:
    chunk = _native.TokenStatsChunk()
    chunk.logit_scale, chunk.softcap = rows.logit_scale, rows.softcap or 0.0
    chunk.ignore_index, chunk.flags, chunk.threads = rows.ignore_index, flags, torch.get_num_threads()
    return chunk


def _point_at(
    chunk: _native.TokenStatsChunk,
    rows: Rows,
    policy: Tensor,
    reference: Tensor | None,
    row: int,
    column: int,
    bias: Tensor | None,
    ref_bias: Tensor | None,
) -> None:
    chunk.rows, chunk.cols = policy.shape
    chunk.first_column = column
    chunk.policy, chunk.policy_stride, chunk.dtype = (
        policy.data_ptr(),
        policy.stride(0),
        DTYPES[policy.dtype],
    )
    if reference is not None:
        chunk.reference, chunk.reference_stride = reference.data_ptr(), reference.stride(0)
    chunk.bias = 0 if bias is None else bias[column:].data_ptr()
    chunk.reference_bias = 0 if ref_bias is None else ref_bias[column:].data_ptr()
    chunk.inv_temperature = rows.inv_temperature[row:].data_ptr()
    chunk.targets = 0 if rows.targets is None else rows.targets[row:].data_ptr()


class _ForwardState:
    """The running sums of all rows, and the native call that folds a chunk into them."""

    def __init__(self, rows: Rows, asked: frozenset[str]) -> None:
        count = rows.inv_temperature.shape[0]
        self._rows, self._asked = rows, asked
        self.sums = torch.zeros(len(Sums._fields), count, dtype=torch.float64)
        for name in ("m_p", "m_q"):
            self.sums[Sums._fields.index(name)] = -torch.inf
        self.top1 = torch.full((count,), -1, dtype=torch.int64)
        self._chunk = _chunk(rows, _flags(asked))
        self._chunk.state_stride = count

    def fold(
        self,
        policy: Tensor,
        reference: Tensor | None,
        row: int,
        column: int,
        bias: Tensor | None = None,
        ref_bias: Tensor | None = None,
        terms: _Terms | None = None,
        places: Sequence[Tensor] = (),
    ) -> None:
        """places: where the terms of the chunk go, as it lies; they may be those of its logits."""
        chunk = self._chunk
        _point_at(chunk, self._rows, policy, reference, row, column, bias, ref_bias)
        if terms is not None:
            terms.point_at(chunk, places, row)
        chunk.state = self.sums[:, row:].data_ptr()
        chunk.top1 = self.top1[row:].data_ptr() if "top1" in self._asked else 0
        _native.token_stats_forward(chunk)

    def finish(self, ignored: Tensor | None) -> tuple[list[Tensor], Tensor]:
        return statistics(Sums(*self.sums), self.top1, self._asked, ignored)


class _BackwardState:
    """The coefficients of all rows, and the native call that turns a chunk of logits into d(loss)/d(logits)."""

    def __init__(self, rows: Rows, grads: dict[str, Tensor | None], saved: Tensor) -> None:
        self.with_reference = grads.get("kl") is not None or grads.get("reverse_kl") is not None
        self._rows, self._saved = rows, saved.contiguous()
        self._coefs = coefficients(grads, saved)
        self._chunk = _chunk(rows, _REFERENCE * self.with_reference)
        self._chunk.row_stride = saved.shape[1]

    def differentiate(
        self,
        policy: Tensor,
        reference: Tensor | None,
        out: Tensor,
        row: int,
        column: int,
        bias: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> None:
        chunk = self._chunk
        _point_at(chunk, self._rows, policy, reference, row, column, bias, ref_bias)
        chunk.saved, chunk.coefs = self._saved[:, row:].data_ptr(), self._coefs[:, row:].data_ptr()
        chunk.out, chunk.out_stride, chunk.out_dtype = out.data_ptr(), out.stride(0), DTYPES[out.dtype]
        _native.token_stats_backward(chunk)


class _LinearProblem:
    """One linear_logprob call without its ignored rows, ready to fill any chunk of logits."""

    def __init__(self, head: Head, rows: Rows, needs_reference: bool) -> None:
        self.ignored = check_rows(rows, head.weight.shape[0])
        self.index = None
        if self.ignored is not None and self.ignored.any():
            self.index = (~self.ignored).nonzero()[:, 0]
        self.rows = Rows(
            None if rows.targets is None else self.pick(rows.targets).contiguous(),
            self.pick(rows.inv_temperature).contiguous(),
            rows.softcap,
            rows.logit_scale,
            rows.ignore_index,
        )
        self.product_dtype = head.weight.dtype if products.takes(head.weight.dtype) else torch.float32
        self.hidden = along(self.pick(head.hidden).to(self.product_dtype))
        self.weight = along(head.weight)
        self.bias = None if head.bias is None else head.bias.float().contiguous()
        self.lora = head.lora
        if head.lora is not None:
            self.hidden32 = self.hidden.float()
            self.a, self.b = head.lora.a.float(), head.lora.b.float()
            self.gate = self.pick(head.lora.gate).float()
            self.down = self.hidden32.new_empty(self.hidden.shape[0], self.a.shape[0])
            products.multiply(self.hidden32, self.a.t(), self.down)
            self.gated = self.down * self.gate
        self.needs_reference = needs_reference
        if needs_reference:
            self.ref_hidden = along(self.pick(head.ref_hidden).to(self.product_dtype))
            self.ref_weight = along(head.ref_weight)
            self.ref_bias = None if head.ref_bias is None else head.ref_bias.float().contiguous()
            self.shares_weight = (
                head.ref_weight.data_ptr() == head.weight.data_ptr()
                and head.ref_weight.stride() == head.weight.stride()
            )
        else:
            self.ref_bias = None

    def pick(self, tensor: Tensor) -> Tensor:
        """The rows that count."""
        return tensor if self.index is None else tensor[self.index]

    def spread(self, tensor: Tensor, count: int) -> Tensor:
        """`pick` undone, with zeros for the rows that do not count."""
        if self.index is None:
            return tensor
        return tensor.new_zeros(count, *tensor.shape[1:]).index_copy_(0, self.index, tensor)

    def row_blocks(self, kept: int) -> list[tuple[int, int]]:
        """Blocks of rows; `kept` ends one."""
        count = self.hidden.shape[0]
        edges = sorted({*range(0, count, ROWS), min(kept, count), count})
        return list(zip(edges, edges[1:]))

    def width(self) -> int:
        """Columns of a chunk. The sums of a chunk are rounded once: in batch-invariant mode it may not depend on the rows."""
        rows = ROWS if is_batch_invariant() else max(min(self.hidden.shape[0], ROWS), 1)
        width = CHUNK // rows
        return min(
            width // 64 * 64 or width, self.weight.shape[0]
        )  # whole tiles; rows that start on a cache line

    def columns(self) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
        """Chunks of the vocabulary with the policy's and the reference's piece of the weight."""
        vocabulary = self.weight.shape[0]
        for c0 in range(0, vocabulary, self.width()):
            c1 = min(c0 + self.width(), vocabulary)
            piece = self.weight[c0:c1].to(self.product_dtype)
            ref_piece = None
            if self.needs_reference:
                ref_piece = piece if self.shares_weight else self.ref_weight[c0:c1].to(self.product_dtype)
            yield c0, c1, piece, ref_piece

    def buffers(self, count: int) -> list[Tensor]:
        size = min(self.hidden.shape[0], ROWS) * self.width()
        return [torch.empty(size) for _ in range(count)]

    def fill(self, out: Tensor, r0: int, r1: int, c0: int, c1: int, piece: Tensor) -> None:
        """The policy's raw logits, before the bias."""
        products.multiply(self.hidden[r0:r1], piece.t(), out)
        if self.lora is not None:
            products.accumulate(self.gated[r0:r1], self.b[c0:c1].t(), out)

    def fill_reference(self, out: Tensor, r0: int, r1: int, ref_piece: Tensor) -> None:
        products.multiply(self.ref_hidden[r0:r1], ref_piece.t(), out)


def _shaped(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


class _Terms:
    """sum_v term_v W~_v over the chunks so far, (H,) per row, of the terms that some outputs' directions are made of; where
    there is LoRA also sum_v term_v b~_v, (R,).

    sums (terms, N, H + R): in `kept` where there is room. The target's column is left out: `directions` adds it by itself.
    """

    def __init__(self, problem: _LinearProblem, names: Sequence[str], kept: Tensor) -> None:
        self.problem, self.names, self.kept = problem, names, kept
        self.which = [term for term, outputs in enumerate(_TERM_OUTPUTS) if outputs.intersection(names)]
        count, width = problem.hidden.shape[0], kept.shape[2]
        if len(self.which) <= len(names):
            self.sums = kept[: len(self.which), :count].zero_()
        else:
            self.sums = torch.zeros(len(self.which), count, width)
        self.centre = torch.zeros(count)
        self._narrow: Tensor | None = None

    def point_at(self, chunk: _native.TokenStatsChunk, places: Sequence[Tensor], row: int) -> None:
        terms, sums = [0] * len(_TERM_OUTPUTS), [0] * len(_TERM_OUTPUTS)
        for term, place, total in zip(self.which, places, self.sums):
            terms[term], sums[term] = place.data_ptr(), total[row:].data_ptr()
        chunk.terms, chunk.term_sums = terms, sums
        chunk.centre = self.centre[row:].data_ptr()
        chunk.term_sums_stride, chunk.term_width = self.sums.stride(1), self.sums.shape[2]

    def add(self, places: Sequence[Tensor], r0: int, r1: int, c0: int, c1: int, piece: Tensor) -> None:
        """The products of a chunk's terms."""
        problem, width = self.problem, piece.shape[1]
        for place, total in zip(places, self.sums):
            out = place
            if problem.product_dtype is not torch.float32:
                if self._narrow is None:
                    self._narrow = torch.empty(place.numel(), dtype=problem.product_dtype)
                out = _shaped(self._narrow, *place.shape).copy_(place)
            products.accumulate(out, piece, total[r0:r1, :width])
            if problem.lora is not None:
                torch.addmm(total[r0:r1, width:], place, problem.b[c0:c1], out=total[r0:r1, width:])

    def finish(self, sums: Sums, top1: Tensor) -> None:
        """Turn the sums into directions, in `kept`."""
        problem, rows, width = self.problem, self.problem.rows, self.problem.hidden.shape[1]
        _, saved = statistics(sums, top1, frozenset(), None, torch.float64)
        m_p, inv_s_p = saved[:2]
        chain = rows.logit_scale * rows.inv_temperature.double()
        p_y, slope = (sums.t_p - m_p).exp() * inv_s_p, torch.ones_like(chain)
        if rows.softcap is not None:
            slope = 1 - (sums.t_p / (rows.inv_temperature * rows.softcap)).square()
        scales = []  # of the sums and of the target's row of the weight, for each output
        for name in self.names:
            c0, _, c2, _, ct = coefficients({name: torch.ones_like(chain)}, saved)
            of_terms = ((c0 + c2 * self.centre) * inv_s_p * chain, c2 * inv_s_p * chain)
            dz = (p_y * (c0 + c2 * (sums.t_p - sums.t_q))).masked_fill(p_y == 0, 0) + ct
            scales.append([*(of_terms[term] for term in self.which), dz * slope * chain])
        scales = torch.stack([torch.stack(each) for each in scales]).float()
        for r0 in range(0, problem.hidden.shape[0], _BLOCK):
            r1 = min(r0 + _BLOCK, problem.hidden.shape[0])
            parts = [total[r0:r1].clone() for total in self.sums]
            if rows.targets is not None:
                targets = rows.targets[r0:r1]
                parts.append(problem.weight[targets].float())
                if problem.lora is not None:
                    parts[-1] = torch.cat((parts[-1], problem.b[targets]), 1)
            for scale, out in zip(scales, self.kept[:, r0:r1]):
                torch.mul(parts[0], scale[0, r0:r1, None], out=out)
                for part, factor in zip(parts[1:], scale[1:]):
                    out.addcmul_(part, factor[r0:r1, None])
                if problem.lora is not None:
                    out[:, :width].addmm_(out[:, width:] * problem.gate[r0:r1], problem.a)


def _folded(
    head: Head, rows: Rows, asked: frozenset[str], kept: Tensor, directions: Sequence[str] = ()
) -> tuple[_LinearProblem, _ForwardState]:
    """The whole vocabulary folded into the sums of the rows that count.

    kept float32, filled: (copies, K, V) with the raw logits of the first K of the rows that count, policy's and reference's; or
    (directions, T, H + R) with those directions, those of the rows that count coming first.
    """
    problem = _LinearProblem(head, rows, bool(_flags(asked) & _REFERENCE))
    state = _ForwardState(problem.rows, asked)
    heads = 2 if problem.needs_reference else 1
    if directions:
        terms, copies, kept_rows = _Terms(problem, directions, kept), 0, 0
        buffers = problem.buffers(max(heads, len(terms.which)))
    else:
        terms, (copies, kept_rows) = None, kept.shape[:2]
        buffers = problem.buffers(heads)
    for c0, c1, piece, ref_piece in problem.columns():
        for r0, r1 in problem.row_blocks(kept_rows):
            places = [_shaped(buffer, r1 - r0, c1 - c0) for buffer in buffers]
            if r0 < kept_rows:
                places[:copies] = kept[:, r0:r1, c0:c1]
            problem.fill(places[0], r0, r1, c0, c1, piece)
            if problem.needs_reference:
                problem.fill_reference(places[1], r0, r1, ref_piece)
            state.fold(
                places[0],
                places[1] if problem.needs_reference else None,
                r0,
                c0,
                problem.bias,
                problem.ref_bias,
                terms,
                places,
            )
            if terms is not None:
                terms.add(places, r0, r1, c0, c1, piece)
    if terms is not None:
        terms.finish(Sums(*state.sums), state.top1)
    return problem, state


def linear_sums(head: Head, rows: Rows, asked: frozenset[str], kept: Tensor) -> tuple[Sums, Tensor]:
    """-> the sums in float64 and the column of the largest z, (T,) each; 0 in ignored rows. kept as for linear_forward."""
    problem, state = _folded(head, rows, asked, kept)
    total = rows.inv_temperature.shape[0]
    return Sums(*problem.spread(state.sums.t(), total).t()), problem.spread(state.top1, total)


def linear_forward(
    head: Head, rows: Rows, asked: frozenset[str], kept: Tensor, directions: Sequence[str] = ()
) -> tuple[list[Tensor], Tensor]:
    """-> outputs in the order of OUTPUTS (T,), saved (SAVED, T). kept, directions: see `_folded`."""
    problem, state = _folded(head, rows, asked, kept, directions)
    outputs, saved = state.finish(None)
    total = rows.inv_temperature.shape[0]
    outputs = [problem.spread(o, total) if name in asked else o for name, o in zip(OUTPUTS, outputs)]
    return outputs, problem.spread(saved.t(), total).t().contiguous()


def linear_backward(
    head: Head,
    rows: Rows,
    grads: dict[str, Tensor | None],
    saved: Tensor,
    kept: Tensor,
    needs: frozenset[str],
) -> HeadGradients:
    """Gradients of the arguments named in `needs` (fields of HeadGradients), float32 or in their arguments' dtypes."""
    needs_reference = grads.get("kl") is not None or grads.get("reverse_kl") is not None
    problem = _LinearProblem(head, rows, needs_reference)
    grads = {name: None if g is None else problem.pick(g) for name, g in grads.items()}
    state = _BackwardState(problem.rows, grads, problem.pick(saved.t()).t())
    count, width = problem.hidden.shape
    copies, kept_rows = kept.shape[:2]
    wide = {"dtype": torch.float32}
    d_hidden = torch.zeros(count, width, **wide) if "hidden" in needs else None
    d_weight = torch.empty(head.weight.shape, dtype=head.weight.dtype) if "weight" in needs else None
    d_bias = torch.zeros(head.weight.shape[0], **wide) if "bias" in needs else None
    d_b = torch.empty(problem.b.shape, **wide) if "lora_b" in needs else None
    through_lora = problem.lora is not None and needs & {"hidden", "lora_a", "gate"}
    d_gated = torch.zeros_like(problem.gated) if through_lora else None
    buffers = problem.buffers(2 if needs_reference else 1)
    narrow = None
    if problem.product_dtype is not torch.float32:
        narrow = torch.empty_like(buffers[0], dtype=problem.product_dtype)
    for c0, c1, piece, ref_piece in problem.columns():
        d_piece = torch.zeros(c1 - c0, width, **wide) if "weight" in needs else None
        if d_b is not None:
            d_b[c0:c1] = 0
        for r0, r1 in problem.row_blocks(kept_rows):
            wide_out = _shaped(buffers[0], r1 - r0, c1 - c0)
            policy, reference = wide_out, None
            if r0 < kept_rows:
                policy = kept[0, r0:r1, c0:c1]
            else:
                problem.fill(policy, r0, r1, c0, c1, piece)
            if needs_reference and copies > 1 and r0 < kept_rows:
                reference = kept[1, r0:r1, c0:c1]
            elif needs_reference:
                reference = _shaped(buffers[1], r1 - r0, c1 - c0)
                problem.fill_reference(reference, r0, r1, ref_piece)
            state.differentiate(policy, reference, wide_out, r0, c0, problem.bias, problem.ref_bias)
            out = wide_out if narrow is None else _shaped(narrow, r1 - r0, c1 - c0).copy_(wide_out)
            if d_hidden is not None:
                products.accumulate(out, piece, d_hidden[r0:r1])
            if d_piece is not None:
                products.accumulate(out.t(), problem.hidden[r0:r1], d_piece)
            if d_bias is not None:
                d_bias[c0:c1] += wide_out.sum(0)
            if d_gated is not None:
                torch.addmm(d_gated[r0:r1], wide_out, problem.b[c0:c1], out=d_gated[r0:r1])
            if d_b is not None:
                torch.addmm(d_b[c0:c1], wide_out.t(), problem.gated[r0:r1], out=d_b[c0:c1])
        if d_piece is not None:
            d_weight[c0:c1] = d_piece

    result = HeadGradients(weight=d_weight)
    if d_gated is not None:
        d_down = d_gated * problem.gate
        if d_hidden is not None:
            torch.addmm(d_hidden, d_down, problem.a, out=d_hidden)
        if "lora_a" in needs:
            result.lora_a = torch.mm(d_down.t(), problem.hidden32)
        if "gate" in needs:
            result.gate = problem.spread(d_gated * problem.down, head.lora.gate.shape[0])
    if d_hidden is not None:
        result.hidden = problem.spread(d_hidden, head.hidden.shape[0])
    if d_bias is not None:
        result.bias = d_bias.to(head.bias.dtype)
    if d_b is not None:
        result.lora_b = d_b.to(head.lora.b.dtype)
    return result


def linear_backward_along(
    head: Head,
    rows: Rows,
    grads: dict[str, Tensor | None],
    kept: Tensor,
    directions: Sequence[str],
    needs: frozenset[str],
) -> HeadGradients:
    """`linear_backward` from the directions in `kept`: no product with the weight."""
    problem = _LinearProblem(head, rows, False)
    count, width = problem.hidden.shape
    along = torch.zeros(count, direction_width(head))
    for name, direction in zip(directions, kept[:, :count]):
        if grads[name] is not None:
            along.addcmul_(direction, problem.pick(grads[name])[:, None])
    total = head.hidden.shape[0]
    result = HeadGradients()
    if "hidden" in needs:
        result.hidden = problem.spread(along[:, :width], total)
    if "lora_a" in needs:
        result.lora_a = torch.mm((along[:, width:] * problem.gate).t(), problem.hidden32)
    if "gate" in needs:
        result.gate = problem.spread(along[:, width:] * problem.down, total)
    return result


def logits_forward(
    logits: Tensor, ref_logits: Tensor | None, rows: Rows, asked: frozenset[str]
) -> tuple[list[Tensor], Tensor]:
    """logits, ref_logits (T, V), the last dimension contiguous; read once, where they are."""
    ignored = check_rows(rows, logits.shape[1])
    state = _ForwardState(rows, asked)
    state.fold(logits, ref_logits if _flags(asked) & _REFERENCE else None, 0, 0)
    return state.finish(ignored)


def logits_backward(
    logits: Tensor, ref_logits: Tensor | None, rows: Rows, grads: dict[str, Tensor | None], saved: Tensor
) -> Tensor:
    """d(loss)/d(logits), in logits' dtype."""
    state = _BackwardState(rows, grads, saved)
    out = torch.empty(logits.shape, dtype=logits.dtype)
    state.differentiate(logits, ref_logits if state.with_reference else None, out, 0, 0)
    return out
