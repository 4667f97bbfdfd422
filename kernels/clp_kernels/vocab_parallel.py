"""vocab_parallel_linear_logprob: linear_logprob for a vocabulary whose columns are divided among the ranks of a group.

Each rank reduces its shard to `token_stats.Sums`. One all-gather brings the sums of all ranks to every rank, and `merge`, which
also merges the vocabulary splits of one GPU, adds them in the order of the ranks:

    m = max_r m_r    k_r = e^(m_r - m)    s = sum k_r s_r    a = sum k_r (a_r + (m_r - m) s_r)    d = sum k_r d_r    t = sum t_r

Every rank merges the same numbers with the same operations, so that all ranks hold the same bits. In the backward pass a rank's
columns need only the merged m, 1/s and means from the other ranks: dz is local, and so are d_weight, d_bias and d_b. The
gradients of factors that multiply all columns are summed over the ranks: d_hidden = sum_r dz_r W_r, and likewise d_a and d_gate
of the LoRA.

In the reference back-end the gradients are torch's own: the rank's sums keep their graph inside the merge, and the other ranks'
sums are constants. The fused back-ends compute their gradients from the merged sums.

A target that lies in another shard is -1 and matches no column. An empty shard has m = -inf and zeros.
Not done: overlapping the all-reduce of d_hidden with the product of d_weight, because the back-ends compute both in one pass
over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from clp_kernels.linear_logprob import TABLE, checked_call, kept_for_backward
from clp_kernels.reference import token_stats as reference
from clp_kernels.registration import no_second_derivative
from clp_kernels.token_stats import (
    DIFFERENTIABLE,
    NEED_REFERENCE,
    OUTPUTS,
    Head,
    HeadGradients,
    HeadLoRA,
    Keep,
    Rows,
    Sums,
    TokenStats,
    as_token_stats,
    backend_module,
    check_differentiable,
    implementation,
    merge,
    merge_top1,
    statistics,
)

_OP = "vocab_parallel_linear_logprob"
_ELSEWHERE, _IGNORED = -1, -100  # a shard's targets for a column of another shard, and for an ignored row
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SHARED = ("hidden", "lora_a", "gate")  # equal on all ranks; their gradients are summed over the ranks


@dataclass(frozen=True)
class _Call:
    """The checked arguments on this rank. head is the rank's shard; rows have the targets of the whole vocabulary."""

    names: tuple[str, ...]
    differentiable: tuple[str, ...]
    lead: torch.Size
    head: Head
    rows: Rows
    module: str


@dataclass(frozen=True)
class _Ranks:
    """The group, this rank's number, and its columns: start to start + V_r of `vocabulary`."""

    group: dist.ProcessGroup | None
    rank: int
    count: int
    start: int = 0
    vocabulary: int = 0


@torch.compiler.disable
def vocab_parallel_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    reduce_gradients: bool = True,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    lora: HeadLoRA | None = None,
    outputs: Sequence[str] = ("logprob",),
    differentiable: Sequence[str] | None = None,
    ignore_index: int = -100,
    keep_bytes: int | None = None,
) -> TokenStats:
    """`linear_logprob` for a vocabulary whose columns lie on the ranks of a torch.distributed group (tensor parallelism).

    hidden, targets, ref_hidden, temperature, lora.a, lora.gate
                      whole, and equal on all ranks; targets and top1 are ids of the whole vocabulary
    weight            (V_r, H), this rank's tokens vocab_start to vocab_start + V_r. Shards may differ in size and be empty.
    bias, ref_weight, ref_bias, lora.b
                      the same tokens' part of each
    group             None: the default group. All its ranks make the call, with the same options and outputs.
    vocab_start       None: the shards follow each other in the order of the ranks
    vocab_size        V, the sum of all V_r; None: found by an exchange
    differentiable    as in `linear_logprob`, the same on every rank
    keep_bytes        as in `linear_logprob`, for the logits of this rank's shard; it may differ between ranks
    reduce_gradients  True: d_hidden, d_lora.a and d_lora.gate are summed over the ranks. False: each rank gets its own term of
                      the sums, for a caller that adds them up (a reduce-scatter under sequence parallelism)
    returns           on every rank, to the bit, the `TokenStats` of the whole vocabulary, otherwise as in `linear_logprob`

    Gradients. Every rank computes the same loss from the outputs and runs backward, which contains a collective. On every rank,
    hidden, lora.a and lora.gate then get the gradient that one process with the whole vocabulary would compute, and not a
    multiple of it by the number of ranks. The call contains Megatron's copy-to-parallel region, so hidden must not pass through
    another one before. d_weight, d_bias and d_lora.b are complete for the rank's own tokens, and need no sum over ranks.

    Communication, for T rows on k ranks. The forward pass has one all-gather of at most 10 numbers per row and rank, 40 bytes
    with Triton (80 with the float64 of the CPU and the reference): the running sums that the outputs need, and top1. logprob
    takes 3 numbers. entropy, kl, reverse_kl and ref_logprob add 1, 3, 3 and 3 (two of which they share), and top1 adds 1. The
    backward pass has one all-reduce of d_hidden in float32 (4 T H bytes), rounded once to hidden's dtype after it. Trained LoRA
    factors add one all-reduce of 4 R (H + T) bytes.

    Before the forward pass the ranks exchange 14 integers each (sizes, dtypes and options), to find the offsets and to refuse
    invalid arguments together. On a GPU that waits for the stream. The exchange is left out if both vocab_start and vocab_size
    are given, on all ranks. The offsets are not cached between calls: if two heads had one size on this rank and two on
    another, this rank would skip the second exchange, and the other would wait in it.

    Memory beside the inputs and gradients: that of linear_logprob for V_r tokens, and a few times the gathered sums, at most
    10 numbers per row and rank.

    Under torch.compile the call is a graph break and runs uncompiled; fullgraph=True refuses it.

    Raises as linear_logprob does. Also raises ValueError if ranks disagree or the shards do not tile the vocabulary, and
    RuntimeError if torch.distributed is not initialised, or another rank refuses its arguments. With the exchange, all ranks
    raise or none does. Without it a rank that alone has invalid arguments raises alone, and the others wait for the group's
    timeout.
    """
    ranks = _ranks(group)
    call = refusal = None
    try:
        call = _check(
            hidden, weight, targets, bias, temperature, softcap, logit_scale, ref_hidden, ref_weight, ref_bias, lora,
            outputs, ignore_index, differentiable=differentiable)  # fmt: skip
    except Exception as error:  # raised below, after the other ranks know of it
        refusal = error
    if vocab_start is None or vocab_size is None:
        given = (vocab_start, vocab_size)
        vocab_start, vocab_size = _exchange(ranks, hidden.device, call, refusal, given, reduce_gradients)
    elif refusal is not None:
        raise refusal
    elif not 0 <= vocab_start <= vocab_start + weight.shape[0] <= vocab_size:
        raise ValueError(
            f"{_OP}: weight is {tuple(weight.shape)} and vocab_start {vocab_start}; expected a part of vocab_size={vocab_size} "
            "tokens"
        )
    ranks = replace(ranks, start=vocab_start, vocabulary=vocab_size)
    if hidden.device.type == "cpu":
        _check_targets(call.rows, vocab_size)
    with torch.autocast(hidden.device.type, enabled=False):  # the arguments have been cast already
        if call.module == reference.__name__:
            values = _plain(call, ranks, reduce_gradients)
        else:
            lora_a, lora_b, gate = call.head.lora or (None, None, None)
            tensors = (call.head.hidden, call.head.weight, call.head.bias, lora_a, lora_b, gate)
            keep = kept_for_backward(call.module, call.head, call.differentiable, keep_bytes, shard=True)
            values = _Fused.apply(call, ranks, reduce_gradients, keep, *tensors)
    return as_token_stats(values, call.names, call.lead)


def _ranks(group: dist.ProcessGroup | None) -> _Ranks:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{_OP}: torch.distributed is not initialised; call torch.distributed.init_process_group() first (torchrun "
            "sets what it needs), or use linear_logprob in a single process"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{_OP}: this process is not in the group; expected a call from its ranks alone")
    return _Ranks(group, rank, dist.get_world_size(group))


def _check(hidden: Tensor, *arguments, differentiable: Sequence[str] | None) -> _Call:
    """Check the arguments of this rank alone, before the ranks wait for each other."""
    names, lead, head, rows = checked_call(_OP, hidden, *arguments)
    inverse = rows.inv_temperature
    if hidden.device.type == "cpu" and not ((inverse > 0) & inverse.isfinite()).all():
        raise ValueError(
            f"{_OP}: temperature has an entry that is not positive and finite; expected positive numbers"
        )
    differentiable = check_differentiable(_OP, differentiable, names)
    module = backend_module(_OP, TABLE, head.hidden.device.type, head.hidden.dtype)
    return _Call(names, differentiable, lead, head, rows, module)


def _check_targets(rows: Rows, vocabulary: int) -> None:
    if rows.targets is None:
        return
    wrong = _outside(rows, vocabulary)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise IndexError(
            f"{_OP}: targets[{at}] (rows flattened) is {int(rows.targets[at])}; expected 0 to {vocabulary - 1}, or "
            f"ignore_index={rows.ignore_index} for a row to leave out"
        )


def _outside(rows: Rows, vocabulary: int) -> Tensor:
    """The rows whose target is neither a token nor ignore_index."""
    return ((rows.targets < 0) | (rows.targets >= vocabulary)) & (rows.targets != rows.ignore_index)


# The values that the ranks must agree on, each as an integer, and its form in an error message.
_AGREED = {
    "the number of rows": str,
    "hidden's width": str,
    "hidden's dtype": lambda code: str(_DTYPES[code]),
    "the back-end": lambda code: TABLE[code][0],
    "outputs": lambda bits: _named(OUTPUTS, bits),
    "differentiable": lambda bits: _named(OUTPUTS, bits),
    "what requires a gradient": lambda bits: _named((*_SHARED, "reduced"), bits),
    "vocab_size": lambda size: "None" if size < 0 else str(size),
    "whether vocab_start is None": lambda given: str(not given),
}


def _bits(flags: Sequence[bool]) -> int:
    return sum(1 << place for place, flag in enumerate(flags) if flag)


def _named(names: Sequence[str], bits: int) -> str:
    return "+".join(name for place, name in enumerate(names) if bits >> place & 1) or "none"


def _exchange(
    ranks: _Ranks,
    device: torch.device,
    call: _Call | None,
    refusal: Exception | None,
    given: tuple[int | None, int | None],
    reduce_gradients: bool,
) -> tuple[int, int]:
    """Return vocab_start and vocab_size. All ranks call this, also those with invalid arguments, and all raise or none does."""
    mine = [1, 0, 0, 0, -1, *[0] * len(_AGREED)]
    if refusal is None:
        head, rows = call.head, call.rows
        lowest, highest = 0, -1
        if rows.targets is not None and device.type == "cpu":
            counted = rows.targets[rows.targets != rows.ignore_index]
            if counted.numel():
                lowest, highest = (int(value) for value in counted.aminmax())
        lora_a, _, gate = head.lora or (None, None, None)
        grads = (t is not None and t.requires_grad for t in (head.hidden, lora_a, gate))
        agreed = (
            *head.hidden.shape,
            _DTYPES.index(head.hidden.dtype) if head.hidden.dtype in _DTYPES else -1,
            [module for _, module in TABLE].index(call.module),
            _bits([name in call.names for name in OUTPUTS]),
            _bits([name in call.differentiable for name in OUTPUTS]),
            _bits([*(torch.is_grad_enabled() and g for g in grads), reduce_gradients]),
            -1 if given[1] is None else given[1],
            given[0] is not None,
        )
        mine = [0, head.weight.shape[0], given[0] or 0, lowest, highest, *agreed]
    every = torch.empty(ranks.count, len(mine), dtype=torch.int64, device=device)
    dist.all_gather([*every], torch.tensor(mine, dtype=torch.int64, device=device), group=ranks.group)
    refused, columns, starts, lowest, highest, *agreed = every.t().tolist()
    if refusal is not None:
        raise refusal
    if any(refused):
        raise RuntimeError(
            f"{_OP}: rank {refused.index(1)} of the group refused its arguments; its own error says why"
        )
    for (what, show), values in zip(_AGREED.items(), agreed):
        if len(set(values)) > 1:
            raise ValueError(
                f"{_OP}: {what} differs between the ranks: {', '.join(map(show, values))}; expected the same on every one"
            )
    vocabulary = sum(columns)
    if given[0] is None:
        starts = [sum(columns[:rank]) for rank in range(ranks.count)]
    end = 0
    for start, size in sorted((start, size) for start, size in zip(starts, columns) if size):
        if start != end:
            raise ValueError(
                f"{_OP}: the shards start at {starts} and hold {columns} tokens; expected them to tile the vocabulary"
            )
        end += size
    if vocabulary == 0 or given[1] not in (None, vocabulary):
        expected = "at least one token" if given[1] is None else f"vocab_size={given[1]} in all"
        raise ValueError(f"{_OP}: the shards hold {columns} tokens; expected {expected}")
    wrong = [r for r in range(ranks.count) if lowest[r] < 0 or highest[r] >= vocabulary]
    if wrong and ranks.rank not in wrong:  # the caller raises this rank's own error
        raise IndexError(
            f"{_OP}: the targets of rank {wrong[0]} run from {lowest[wrong[0]]} to {highest[wrong[0]]}; expected 0 to "
            f"{vocabulary - 1}, and the same targets on every rank"
        )
    return starts[ranks.rank], vocabulary


def _shard_rows(call: _Call, ranks: _Ranks) -> Rows:
    """The rows with targets counted from the shard's first column."""
    rows, targets = call.rows, call.rows.targets
    if targets is not None:
        place = targets - ranks.start
        inside = (place >= 0) & (place < call.head.weight.shape[0])
        targets = place.masked_fill(~inside, _ELSEWHERE).masked_fill(targets == rows.ignore_index, _IGNORED)
    return replace(rows, targets=targets, ignore_index=_IGNORED, shard=True)


def _fields(names: Sequence[str]) -> tuple[str, ...]:
    """The fields of Sums that the outputs need."""
    needed = {"a_p": "entropy", "d_p": "kl", "d_q": "reverse_kl", "t_p": "logprob", "t_q": "ref_logprob"}
    reference = any(name in NEED_REFERENCE for name in names)
    return tuple(
        field
        for field in Sums._fields
        if (needed[field] in names if field in needed else field in ("m_p", "s_p") or reference)
    )


def _gather(sums: Sums | None, top1: Tensor | None, call: _Call, ranks: _Ranks) -> tuple[Sums, Tensor]:
    """The sums and top1 of the whole vocabulary, from those of this rank's shard, which are None if the shard is empty."""
    count, names = call.head.hidden.shape[0], call.names
    dtype, bits = (torch.float32, torch.int32) if ".triton" in call.module else (torch.float64, torch.int64)
    fields = _fields(names)
    asks_top1 = "top1" in names
    mine = torch.zeros(len(fields) + asks_top1, count, dtype=dtype, device=call.head.hidden.device)
    for place, field in enumerate(fields):
        if sums is not None:
            mine[place] = getattr(sums, field).detach()
        elif field.startswith("m_"):
            mine[place] = -torch.inf
    if asks_top1:
        # The integer's bits are reinterpreted, since float32 represents integers exactly only up to 2^24.
        columns = mine[-1].view(bits)
        columns.copy_(top1 + ranks.start) if top1 is not None else columns.fill_(torch.iinfo(bits).max)
    every = mine.new_empty(ranks.count, *mine.shape)
    if mine.numel():
        dist.all_gather([*every], mine, group=ranks.group)
    pieces = {field: every[:, place] for place, field in enumerate(fields)}
    whole_top1 = every.new_zeros(count, dtype=torch.int64)
    if asks_top1:
        whole_top1 = merge_top1(pieces["m_p"], pieces["s_p"], every[:, -1].view(bits)).long()
    for field, piece in pieces.items():
        own = None if sums is None else getattr(sums, field)
        if own is not None and own.requires_grad:
            pieces[field] = torch.cat((piece[: ranks.rank], own[None].to(dtype), piece[ranks.rank + 1 :]))
    zeros = every.new_zeros(ranks.count, count)
    return merge(Sums(*(pieces.get(field, zeros) for field in Sums._fields))), whole_top1


def _statistics(sums: Sums, top1: Tensor, call: _Call, ranks: _Ranks) -> tuple[list[Tensor], Tensor]:
    """The outputs in the order of OUTPUTS, and `saved`. NaN for a target outside the vocabulary, which a GPU accepts."""
    rows = call.rows
    ignored = None
    if rows.targets is not None:
        ignored, wrong = rows.targets == rows.ignore_index, _outside(rows, ranks.vocabulary)
        sums = sums._replace(
            t_p=sums.t_p.masked_fill(wrong, torch.nan), t_q=sums.t_q.masked_fill(wrong, torch.nan)
        )
    dtype = torch.float64 if call.head.hidden.dtype is torch.float64 else torch.float32
    return statistics(sums, top1, frozenset(call.names), ignored, dtype)


def _sum_over_ranks(ranks: _Ranks, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums of the tensors over the group, in one all-reduce, in float32 (float64 if they are)."""
    if not tensors or not sum(t.numel() for t in tensors):
        return list(tensors)
    wide = [(t if t.dtype is torch.float64 else t.float()).reshape(-1) for t in tensors]
    flat = wide[0] if len(wide) == 1 else torch.cat(wide)
    dist.all_reduce(flat, group=ranks.group)
    return [piece.view(t.shape) for piece, t in zip(flat.split([t.numel() for t in tensors]), tensors)]


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():
        raise no_second_derivative(_OP)


class _SumGradients(torch.autograd.Function):
    """The identity, with a gradient summed over the ranks. Factors that multiply all columns pass through it."""

    @staticmethod
    def forward(ctx, ranks: _Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks = ranks
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *grads):
        _refuse_second_derivatives()
        needed = [g for g, need in zip(grads, ctx.needs_input_grad[1:]) if need]
        sums = iter(_sum_over_ranks(ctx.ranks, [g.clone() for g in needed]))
        return None, *(
            next(sums).to(g.dtype) if need else None for g, need in zip(grads, ctx.needs_input_grad[1:])
        )


def _plain(call: _Call, ranks: _Ranks, reduce_gradients: bool) -> list[Tensor]:
    """The reference back-end: torch's own gradients, through the merge as well."""
    head = call.head
    if reduce_gradients and head.lora is None:
        (hidden,) = _SumGradients.apply(ranks, head.hidden)
        head = replace(head, hidden=hidden)
    elif reduce_gradients:
        hidden, a, gate = _SumGradients.apply(ranks, head.hidden, head.lora.a, head.lora.gate)
        head = replace(head, hidden=hidden, lora=HeadLoRA(a, head.lora.b, gate))
    sums, top1 = reference.linear_sums(head, _shard_rows(call, ranks))
    sums, top1 = _gather(sums, top1 if head.weight.shape[0] else None, call, ranks)
    values, _ = _statistics(sums, top1, call, ranks)
    return [v if name in call.differentiable else v.detach() for name, v in zip(OUTPUTS, values)]


class _Fused(torch.autograd.Function):
    """The kernels of a fused back-end, with the collectives."""

    @staticmethod
    def forward(ctx, call: _Call, ranks: _Ranks, reduce_gradients: bool, keep: Keep, *tensors):
        head, names = call.head, call.names
        kept = head.hidden.new_empty(keep.shape(head), dtype=torch.float32)
        sums = top1 = None
        if head.weight.shape[0]:
            module = implementation(call.module, head.hidden.device)
            sums, top1 = module.linear_sums(head, _shard_rows(call, ranks), frozenset(names), kept)
        values, saved = _statistics(*_gather(sums, top1, call, ranks), call, ranks)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(v for name, v in zip(OUTPUTS, values) if name not in call.differentiable)
        )
        rows = call.rows
        ctx.save_for_backward(
            *tensors,
            head.ref_hidden,
            head.ref_weight,
            head.ref_bias,
            rows.targets,
            rows.inv_temperature,
            saved,
            kept,
        )
        # The context holds no tensors here, which would outlive the release by save_for_backward.
        ctx.call = replace(call, head=None, rows=replace(rows, targets=None, inv_temperature=None))
        ctx.ranks, ctx.reduce_gradients = ranks, reduce_gradients
        return tuple(values)

    @staticmethod
    def backward(ctx, *grads):
        _refuse_second_derivatives()
        hidden, weight, bias, a, b, gate, *references, targets, inv_temperature, saved, kept = (
            ctx.saved_tensors
        )
        names = ("hidden", "weight", "bias", "lora_a", "lora_b", "gate")
        arguments = dict(zip(names, (hidden, weight, bias, a, b, gate)))
        needs = [name for name, need in zip(names, ctx.needs_input_grad[4:]) if need]
        incoming = {name: g for name, g in zip(OUTPUTS, grads) if name in DIFFERENTIABLE}
        if not needs or all(g is None for g in incoming.values()):
            return (None,) * (4 + len(names))
        head = Head(hidden, weight, bias, *references, None if a is None else HeadLoRA(a, b, gate))
        rows = replace(ctx.call.rows, targets=targets, inv_temperature=inv_temperature)
        call = replace(ctx.call, head=head, rows=rows)
        if weight.shape[0]:
            module = implementation(call.module, head.hidden.device)
            with torch.autocast(hidden.device.type, enabled=False):
                result = module.linear_backward(
                    head, _shard_rows(call, ctx.ranks), incoming, saved, kept, frozenset(needs)
                )
        else:
            wide = {"dtype": torch.float32, "memory_format": torch.contiguous_format}
            result = HeadGradients(**{name: torch.zeros_like(arguments[name], **wide) for name in needs})
        if ctx.reduce_gradients:
            # d_hidden is reduced separately: joining it with the small tensors would copy it.
            for together in (("hidden",), ("lora_a", "gate")):
                shared = [name for name in together if name in needs]
                sums = _sum_over_ranks(ctx.ranks, [getattr(result, name) for name in shared])
                for name, value in zip(shared, sums):
                    setattr(result, name, value)
        return (None,) * 4 + tuple(
            getattr(result, name).to(arguments[name].dtype) if name in needs else None for name in names
        )
