"""Calls of linear_logprob, whole and with the vocabulary split over ranks, and of logits_logprob."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from unittest import mock

import clp_kernels
import torch
from clp_kernels import (
    HeadLoRA,
    batch_invariant,
    linear_logprob,
    logits_logprob,
    vocab_parallel_linear_logprob,
)
from clp_kernels.backends import forced_backend
from torch import Tensor

from bench.calls.call import HALF, SINGLE, Call, Tensors, normal, shifted

ALL = ("logprob", "entropy", "ref_logprob", "kl", "reverse_kl", "lse", "top1")
SUBSETS = [(name,) for name in ALL] + [ALL, ("entropy", "kl"), ("logprob", "top1")]
WITHOUT_REFERENCE = (("logprob",), ("entropy", "lse"), ("top1",))
CAPPED = {"softcap": 3.0, "logit_scale": 1.1, "temperature": "per row"}


def targets_for(rows: int, vocabulary: int) -> Tensor:
    """Random, the last token of the vocabulary among them; every fifth is ignored."""
    targets = torch.randint(0, vocabulary, (rows,))
    targets[-1:] = vocabulary - 1
    targets[2::5] = -100
    return targets


def _head(rows: int, width: int, vocabulary: int, own: bool = False, rank: int = 0) -> Tensors:
    """Tensors of linear_logprob with a reference near the policy: `own` for one with its own weights."""
    hidden = normal(rows, width)
    made = {
        "hidden": hidden,
        "weight": normal(vocabulary, width, scale=width**-0.5),
        "targets": targets_for(rows, vocabulary),
        "ref_hidden": hidden + normal(rows, width, scale=0.1),
        "bias": normal(vocabulary, scale=0.1),
    }
    if own:
        made |= {
            "ref_weight": made["weight"] + normal(vocabulary, width, scale=0.01),
            "ref_bias": made["bias"],
        }
    if rank:
        made |= {"a": normal(rank, width, scale=width**-0.5), "b": normal(vocabulary, rank, scale=0.1)}
        made["gate"] = torch.rand(rows, rank)
    return made


def statistics(outputs: tuple[str, ...], function=None, **options) -> Callable[[Tensors], Tensors]:
    def call(t: Tensors) -> Tensors:
        named = ("bias", "ref_hidden", "ref_weight", "ref_bias")
        given = {name: t[name] for name in named if name in t}
        lora = HeadLoRA(t["a"], t["b"], t["gate"]) if "a" in t else None
        if "row_temperature" in t:
            given["temperature"] = t["row_temperature"]
        op = function or linear_logprob
        stats = op(t["hidden"], t["weight"], t["targets"], lora=lora, outputs=outputs, **given, **options)
        return {name: getattr(stats, name) for name in outputs}

    return call


def logits_statistics(
    outputs: tuple[str, ...], cut: Callable[[Tensor], Tensor] = lambda t: t, **options
) -> Callable[[Tensors], Tensors]:
    """cut: the logits that the op gets, of the tensors'."""

    def call(t: Tensors) -> Tensors:
        given = {"ref_logits": cut(t["ref_logits"])} if "ref_logits" in t else {}
        if "row_temperature" in t:
            given["temperature"] = t["row_temperature"]
        stats = logits_logprob(cut(t["logits"]), t["targets"], outputs=outputs, **given, **options)
        return {name: getattr(stats, name) for name in outputs}

    return call


def linear_checks() -> Iterator[Call]:
    def call_shifted(call: Callable[[Tensors], Tensors], t: Tensors) -> Tensors:
        names = [name for name in ("hidden", "weight", "ref_hidden") if name in t]
        return call(t | {name: shifted(t[name]) for name in names})

    some = ("logprob", "entropy", "kl")
    head = ("hidden", "weight", "bias")
    for rows, width, vocabulary in ((1, 8, 50), (40, 64, 304), (37, 45, 301)):
        for own, rank in ((False, 0), (True, 5)):
            tensors = _head(rows, width, vocabulary, own, rank)
            wanted = (*head, *(("a", "b", "gate") if rank else ()))
            label = f"{rows} rows of {width} to {vocabulary}" + ", LoRA, a reference of its own" * own
            kept = 0 if own else None
            yield Call(label, tensors, statistics(ALL, keep_bytes=kept), wanted, wide=("gate",))
    tensors = _head(9, 48, 4107)  # several splits of the vocabulary, two chunks of the gradient
    capped = tensors | {"row_temperature": torch.rand(9) + 0.5}
    options = {"softcap": 5.0, "logit_scale": 1.1}
    yield Call("several chunks", tensors, statistics(some), head, dtypes=(HALF, SINGLE))
    yield Call(
        "capped, kept", capped, statistics(some, keep_bytes=9 * 4107 * 4, **options), head,
        dtypes=(HALF, SINGLE), wide=("row_temperature",),
    )  # fmt: skip
    for outputs in (some, ("logprob",)):
        tensors = _head(37, 64, 304)
        wide = tensors | {
            name: normal(tensors[name].shape[0], 80) for name in ("hidden", "weight", "ref_hidden")
        }
        if outputs != some:
            wide = {name: wide[name] for name in ("hidden", "weight", "targets")}
        called = functools.partial(call_shifted, statistics(outputs))
        label = f"{len(outputs)} outputs, rows that start on no 16 bytes"
        yield Call(label, wide, called, ("hidden", "weight"), dtypes=(HALF, SINGLE))
    tensors = _head(9, 264, 4107)
    yield Call(
        "a wide hidden state", tensors, statistics(("logprob",), keep_bytes=0), ("hidden",), dtypes=(HALF,)
    )
    tensors = _head(9, 48, 4107)
    frozen = statistics(some, differentiable=("logprob",), keep_bytes=9 * 48 * 8)
    yield Call("a frozen head, one output differentiable", tensors, frozen, ("hidden",), dtypes=(HALF,))
    for outputs in (("logprob",), ("entropy",), ("lse", "top1")):
        few = {name: tensors[name] for name in ("hidden", "weight", "targets")}
        wanted = ("hidden",)
        yield Call(f"{outputs[0]} alone", few, statistics(outputs), wanted, dtypes=(HALF, SINGLE))
    yield Call("scoring", tensors, statistics(some), graph=True, dtypes=(HALF,))
    yield Call("batch-invariant", _head(3, 64, 304), statistics(some), head, batch_invariant, dtypes=(HALF,))


@contextlib.contextmanager
def _group_of_one() -> Iterator[None]:
    """A process group of this process alone, on every device."""
    import torch.distributed as dist

    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def vocab_parallel_checks() -> Iterator[Call]:
    def call(t: Tensors) -> Tensors:
        return (whole if forced_backend() == "reference" else sharded)(t)

    whole, sharded = statistics(ALL), statistics(ALL, vocab_parallel_linear_logprob)
    tensors, wanted = _head(12, 24, 1009, rank=6), ("hidden", "weight", "bias", "a", "b", "gate")
    yield Call("one rank", tensors, call, wanted, _group_of_one, dtypes=(HALF, SINGLE), wide=("gate",))


def logits_checks() -> Iterator[Call]:
    plain = logits_statistics(("logprob", "entropy", "lse"), softcap=9.0)
    referred = logits_statistics(ALL, softcap=9.0)
    for rows, vocabulary in ((1, 50), (5, 1025), (7, 4099)):
        logits = normal(rows, vocabulary, scale=2.0)
        tensors = {"logits": logits, "targets": targets_for(rows, vocabulary)}
        yield Call(f"{rows} rows of {vocabulary}", tensors, plain, ("logits",))
        tensors = tensors | {"ref_logits": logits + normal(rows, vocabulary, scale=0.1)}
        yield Call(f"{rows} rows of {vocabulary}, a reference", tensors, referred, ("logits",))
    yield Call("without gradients", tensors, referred, graph=True)


def _split(options: dict, rows: int) -> tuple[dict, Tensors]:
    """Options without a temperature per row, and that as a tensor."""
    if options.get("temperature") != "per row":
        return options, {}
    rest = {name: value for name, value in options.items() if name != "temperature"}
    return rest, {"row_temperature": torch.rand(rows) + 0.5}


@contextlib.contextmanager
def _cut(chunk: int, keep: int) -> Iterator[None]:
    """Of the CPU's kernels: columns of a chunk, six rows at a time, bytes of logits that are kept."""
    from clp_kernels.cpu import token_stats as native

    with (
        mock.patch.object(clp_kernels.token_stats, "KEEP_BYTES", keep),
        mock.patch.object(native, "CHUNK", chunk),
        mock.patch.object(native, "ROWS", 6),
    ):
        yield


def linear_sweep(dtype: torch.dtype, large: bool) -> Iterator[tuple[str, Callable[[], Call]]]:
    def made(rows, width, vocabulary, outputs, bias, rank, reference, options, frozen, chunk, keep) -> Call:
        options, tensors = _split(options, rows)
        tensors |= {"hidden": normal(rows, width), "weight": normal(vocabulary, width)}
        tensors["targets"] = targets_for(rows, vocabulary)
        wanted = ["hidden"] if frozen else ["hidden", "weight"]
        if bias:
            tensors["bias"] = normal(vocabulary)
            wanted += [] if frozen else ["bias"]
        if rank is not None:
            tensors |= {"a": normal(rank, width), "b": normal(vocabulary, rank), "gate": normal(rows, rank)}
            wanted += ["a", "b", "gate"]
        if reference:
            tensors["ref_hidden"] = normal(rows, width + (reference == "apart"))
        if reference == "apart":
            tensors |= {"ref_weight": normal(vocabulary, width + 1), "ref_bias": normal(vocabulary)}
        wide = ("bias", "gate", "ref_bias", "row_temperature")
        context = functools.partial(_cut, chunk, keep)
        return Call("", tensors, statistics(outputs, **options), tuple(wanted), context, wide=wide)

    def call(label, *arguments):
        return label, functools.partial(made, *arguments)

    usual, kept = 1 << 21, 1 << 26
    small = (7, 5, 37)
    kinds = itertools.product(SUBSETS, (False, True), (None, 3), ("shared", "apart"))
    for outputs, bias, rank, reference in kinds:
        label = f"{outputs} bias {bias} rank {rank} {reference}"
        yield call(label, *small, outputs, bias, rank, reference, {}, False, 61, 0)
    for outputs in WITHOUT_REFERENCE:
        label = f"{outputs} without a reference"
        yield call(label, *small, outputs, False, None, None, {}, True, usual, kept)
    for outputs, reference, chunk in itertools.product(
        (("logprob",), ("logprob", "lse", "kl"), ("kl",)), ("shared", "apart"), (usual, 61)
    ):  # a frozen head, without room for its logits: directions are kept
        for rows, vocabulary in ((7, 37), (13, 2051)):
            for options in ({}, {"softcap": 3.0, "temperature": "per row"}):
                options = {**options, "keep_bytes": 4 * rows * 5 * len(outputs)}
                label = f"{outputs} directions {rows} {vocabulary} chunk {chunk} {options}"
                more = (reference, options, True, chunk, kept)
                yield call(label, rows, 5, vocabulary, outputs, False, None, *more)
    sizes = [(1, 1, 1), (3, 4, 1023), (2, 4, 1025), (13, 9, 2051), (0, 4, 9)]
    if large:  # several threads
        sizes.append((70, 6, 1031))
    kinds = itertools.product(sizes, (usual, 700), (0, kept), (False, True))
    for (rows, width, vocabulary), chunk, keep, frozen in kinds:
        for options in ({}, CAPPED):
            label = f"{rows} {width} {vocabulary} chunk {chunk} keep {keep} {options}"
            more = (ALL, True, 2, "shared", options, frozen, chunk, keep)
            yield call(label, rows, width, vocabulary, *more)
    yield call("rank 0", *small, ALL, True, 0, "apart", {}, False, usual, kept)


def logits_sweep(dtype: torch.dtype, large: bool) -> Iterator[tuple[str, Callable[[], Call]]]:
    def made(rows, vocabulary, outputs, reference, options, strided) -> Call:
        columns, cut = {
            None: (vocabulary, lambda t: t),
            "rows": (vocabulary + 3, lambda t: t[:, 1 : vocabulary + 1]),
            "columns": (2 * vocabulary, lambda t: t[:, ::2]),
        }[strided]
        options, tensors = _split(options, rows)
        tensors |= {"logits": normal(rows, columns), "targets": targets_for(rows, vocabulary)}
        if reference:
            tensors["ref_logits"] = normal(rows, columns)
        call = logits_statistics(outputs, cut, **options)
        return Call("", tensors, call, ("logits",), wide=("row_temperature",))

    def call(label, *arguments):
        return label, functools.partial(made, *arguments)

    for outputs, options in itertools.product(SUBSETS, ({}, CAPPED)):
        yield call(f"{outputs} {options}", 7, 37, outputs, True, options, None)
    for outputs in WITHOUT_REFERENCE:
        yield call(f"{outputs} without a reference", 7, 37, outputs, False, {}, None)
    sizes = [(1, 1), (3, 1023), (2, 1024), (5, 1025), (4, 2051), (0, 9)]
    if large:
        sizes.append((33, 1031))
    kinds = itertools.product(sizes, (None, "rows", "columns"), ({}, CAPPED))
    for (rows, vocabulary), strided, options in kinds:
        yield call(f"{rows} {vocabulary} {strided} {options}", rows, vocabulary, ALL, True, options, strided)
