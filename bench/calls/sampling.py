"""Calls of sample_tokens."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
from clp_kernels import sample_tokens

from bench.calls.call import SINGLE, Call, Tensors, normal


def drawn(
    options: Mapping, per_row: bool = False, stride: int = 1, out: bool = False
) -> Callable[[Tensors], Tensors]:
    """per_row: each option as a tensor. out: into tensors that are given, and a token outside the vocabulary is an error."""

    def call(t: Tensors) -> Tensors:
        logits, given = t["logits"][:, ::stride], dict(options)
        rows, vocabulary = logits.shape
        if per_row:
            given = {n: torch.full((rows,), v, device=logits.device) for n, v in options.items()}
        if out:
            given["out"] = (torch.empty(rows, dtype=torch.int64), torch.empty(rows))
        tokens, logprob = sample_tokens(logits, seeds=t.get("seeds"), **given)
        assert not out or rows == 0 or (tokens.min() >= 0 and tokens.max() < vocabulary)
        return {"tokens": tokens, "logprob": logprob}

    return call


def checks() -> Iterator[Call]:
    from bench.cases import sampling  # which needs more than torch

    def check(rows: int, vocabulary: int, options: Mapping, seeded: bool, per_row: bool) -> Call:
        case = sampling.case("cpu", rows, vocabulary, SINGLE, options=options)
        tensors = {"logits": normal(rows, vocabulary, scale=3.0)}
        if seeded:
            tensors["seeds"] = torch.randint(-(2**63), 2**63 - 1, (rows,))

        def judge(t: Tensors, outputs: Tensors) -> Tensors:
            return case.judge(t, outputs)[1]

        words = " ".join(f"{n} {v}" for n, v in options.items()) + " by row" * per_row + " seeded" * seeded
        label = f"{rows} of {vocabulary}, {words}"
        return Call(label, tensors, drawn(options, per_row), judge=judge, graph=seeded and not per_row)

    truncated = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.05}
    for rows, vocabulary in ((1, 50), (3, 1500), (5, 5003)):
        for options in (*sampling.OPTIONS[:5], truncated):
            yield check(rows, vocabulary, options, seeded=vocabulary == 1500, per_row=False)
        yield check(rows, vocabulary, truncated, seeded=True, per_row=True)


def sweep(dtype: torch.dtype, large: bool) -> Iterator[tuple[str, Callable[[], Call]]]:
    def made(rows, vocabulary, options, per_row, seeded, stride) -> Call:
        tensors = {"logits": normal(rows, vocabulary * stride)}
        if seeded:
            tensors["seeds"] = torch.randint(-(2**63), 2**63 - 1, (rows,))
        return Call("", tensors, drawn(options, per_row, stride, out=True))

    choices = {"temperature": (1.0, 0.0, 0.7), "top_k": (0, 1, 5), "top_p": (1.0, 0.8), "min_p": (0.0, 0.05)}
    for values in itertools.product(*choices.values()):
        options = dict(zip(choices, values))
        for per_row, seeded in itertools.product((False, True), repeat=2):
            label = f"{options} {per_row} {seeded}"
            yield label, functools.partial(made, 4, 23, options, per_row, seeded, 1)
    sizes = [(1, 1), (3, 255), (2, 256), (3, 257), (2, 4099), (0, 5)]
    if large:
        sizes.append((40, 1031))
    for (rows, vocabulary), stride in itertools.product(sizes, (1, 2)):
        options = {"temperature": 0.9, "top_k": max(vocabulary // 2, 1), "top_p": 0.9, "min_p": 0.001}
        label = f"{rows} {vocabulary} {stride}"
        yield label, functools.partial(made, rows, vocabulary, options, True, True, stride)
