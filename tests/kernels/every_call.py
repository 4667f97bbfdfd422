"""Calls of every op with every choice that its code makes, over ragged sizes: what the memory tests run.

Each is (label, function); the function makes its inputs and returns every result that has to be finite.
"""

import itertools
from unittest import mock

import clp_kernels.cpu.token_stats
import clp_kernels.token_stats
import torch
from clp_kernels import (
    HeadLoRA,
    PrefixLayout,
    linear_logprob,
    logits_logprob,
    multi_lora_linear,
    prefix_attention,
    sample_tokens,
)

OUTPUTS = ("logprob", "entropy", "ref_logprob", "kl", "reverse_kl", "lse", "top1")
CONSTANT = ("ref_logprob", "top1")
SUBSETS = [(name,) for name in OUTPUTS] + [OUTPUTS, ("entropy", "kl"), ("logprob", "top1")]


def gradients(outputs, leaves):
    """Of outputs, each with random incoming gradients, in the leaves; none where no leaf asks."""
    asking = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    outputs = [y for y in outputs if y.requires_grad]
    if not asking or not outputs:
        return []
    return list(torch.autograd.grad(outputs, asking, [torch.randn_like(y) for y in outputs]))


def multi_lora_calls(dtype, large):
    def call(lead, k, n, rank, groups, gate_dtype, index, bias, needs):
        shapes = ((*lead, k), (n, k), (rank, k), (n, rank), (groups, rank), (n,))
        tensors = [torch.randn(shape).to(dtype) for shape in shapes]
        tensors[4] = tensors[4].to(gate_dtype)
        if not bias:
            tensors[5] = None
        for tensor, need in zip(tensors, needs):
            if need and tensor is not None:
                tensor.requires_grad_()
        gate_index = None
        if index:
            gate_index = torch.randint(0, groups, lead).to(index)
        y = multi_lora_linear(*tensors[:5], bias=tensors[5], gate_index=gate_index)
        return [y, *gradients([y], tensors)]

    everything, frozen = (True,) * 6, (True, False, True, True, True, False)
    gates = [
        ((5,), 1, None),
        ((5,), 5, None),
        ((2, 3), 2, None),
        ((5,), 3, torch.int64),
        ((2, 3), 9, torch.int32),
    ]
    for (lead, groups, index), needs in itertools.product(gates, itertools.product((False, True), repeat=6)):
        yield f"needs {needs}", call, (lead, 7, 6, 3, groups, torch.float32, index, True, needs)
    sizes = [((1,), 1, 1, 1), ((3,), 33, 17, 13), ((0,), 4, 3, 2), ((4,), 4, 3, 0), ((37,), 70, 45, 88)]
    if large:  # several threads; the second has fewer groups than threads own rows
        sizes += [
            ((1937,), 9, 5, 27),
            ((13, 149), 5, 9, 19),
            ((170,), 163, 161, 9),
        ]  # the last: products on tiles
    for (lead, k, n, rank), gate_dtype, bias in itertools.product(
        sizes, {torch.float32, dtype}, (False, True)
    ):
        for groups, index in ((1, None), (lead[0], None), (7, torch.int64)):
            yield (f"{lead} {k} {n} {rank} groups {groups}", call,
                   (lead, k, n, rank, groups, gate_dtype, index, bias, everything if bias else frozen))  # fmt: skip


def targets_for(rows, vocabulary):
    targets = torch.randint(0, vocabulary, (rows,))
    targets[-1:] = vocabulary - 1
    targets[2::5] = -100
    return targets


def linear_calls(dtype, large):
    def call(rows, width, vocabulary, outputs, bias, rank, reference, options, frozen, chunk, keep):
        def leaf(*shape, kind=dtype, frozen=False):
            return torch.randn(shape).to(kind).requires_grad_(not frozen)

        hidden, weight = leaf(rows, width), leaf(vocabulary, width, frozen=frozen)
        leaves = [hidden, weight, leaf(vocabulary, kind=torch.float32, frozen=frozen) if bias else None]
        options = dict(options)
        if options.get("temperature") == "per row":
            options["temperature"] = torch.rand(rows) + 0.5
        if rank is not None:
            lora = HeadLoRA(leaf(rank, width), leaf(vocabulary, rank), leaf(rows, rank, kind=torch.float32))
            leaves += lora
            options["lora"] = lora
        if reference:
            options["ref_hidden"] = torch.randn(rows, width + (reference == "apart")).to(dtype)
        if reference == "apart":
            options["ref_weight"] = torch.randn(vocabulary, width + 1).to(dtype)
            options["ref_bias"] = torch.randn(vocabulary)
        with mock.patch.object(clp_kernels.token_stats, "KEEP_BYTES", keep), \
             mock.patch.object(clp_kernels.cpu.token_stats, "CHUNK", chunk), \
             mock.patch.object(clp_kernels.cpu.token_stats, "ROWS", 6):  # fmt: skip
            stats = linear_logprob(
                hidden, weight, targets_for(rows, vocabulary), bias=leaves[2], outputs=outputs, **options
            )
            results = [value for value in stats if value is not None]
            return results + gradients(results, leaves)

    usual, kept = 1 << 21, 1 << 26
    small = (7, 5, 37)
    for outputs, bias, rank, reference in itertools.product(
        SUBSETS, (False, True), (None, 3), ("shared", "apart")
    ):
        yield (f"{outputs} bias {bias} rank {rank} {reference}", call,
               (*small, outputs, bias, rank, reference, {}, False, 61, 0))  # fmt: skip
    for outputs in (("logprob",), ("entropy", "lse"), ("top1",)):
        yield (
            f"{outputs} without a reference",
            call,
            (*small, outputs, False, None, None, {}, True, usual, kept),
        )
    for outputs, reference, chunk in itertools.product(
        (("logprob",), ("logprob", "lse", "kl"), ("kl",)), ("shared", "apart"), (usual, 61)
    ):  # a frozen head, without room for its logits: directions are kept
        for rows, vocabulary in ((7, 37), (13, 2051)):
            for options in ({}, {"softcap": 3.0, "temperature": "per row"}):
                options = {**options, "keep_bytes": 4 * rows * 5 * len(outputs)}
                yield (f"{outputs} directions {rows} {vocabulary} chunk {chunk} {options}", call,
                       (rows, 5, vocabulary, outputs, False, None, reference, options, True, chunk, kept))  # fmt: skip
    sizes = [(1, 1, 1), (3, 4, 1023), (2, 4, 1025), (13, 9, 2051), (0, 4, 9)]
    if large:  # several threads
        sizes.append((70, 6, 1031))
    for (rows, width, vocabulary), chunk, keep, frozen in itertools.product(
        sizes, (usual, 700), (0, kept), (False, True)
    ):
        for options in ({}, {"softcap": 3.0, "logit_scale": 1.1, "temperature": "per row"}):
            yield (f"{rows} {width} {vocabulary} chunk {chunk} keep {keep} {options}", call,
                   (rows, width, vocabulary, OUTPUTS, True, 2, "shared", options, frozen, chunk, keep))  # fmt: skip
    yield "rank 0", call, (*small, OUTPUTS, True, 0, "apart", {}, False, usual, kept)


def logits_calls(dtype, large):
    def call(rows, vocabulary, outputs, reference, options, strided):
        def make():
            if strided == "columns":
                return torch.randn(rows, 2 * vocabulary).to(dtype)[:, ::2]
            if strided == "rows":
                return torch.randn(rows, vocabulary + 3).to(dtype)[:, 1 : vocabulary + 1]
            return torch.randn(rows, vocabulary).to(dtype)

        logits, options = make().requires_grad_(), dict(options)
        if options.get("temperature") == "per row":
            options["temperature"] = torch.rand(rows) + 0.5
        stats = logits_logprob(logits, targets_for(rows, vocabulary), ref_logits=make() if reference else None,
                               outputs=outputs, **options)  # fmt: skip
        results = [value for value in stats if value is not None]
        return results + gradients(results, [logits])

    capped = {"softcap": 3.0, "logit_scale": 1.1, "temperature": "per row"}
    for outputs, options in itertools.product(SUBSETS, ({}, capped)):
        yield f"{outputs} {options}", call, (7, 37, outputs, True, options, None)
    for outputs in (("logprob",), ("entropy", "lse"), ("top1",)):
        yield f"{outputs} without a reference", call, (7, 37, outputs, False, {}, None)
    sizes = [(1, 1), (3, 1023), (2, 1024), (5, 1025), (4, 2051), (0, 9)]
    if large:
        sizes.append((33, 1031))
    for (rows, vocabulary), strided, options in itertools.product(
        sizes, (None, "rows", "columns"), ({}, capped)
    ):
        yield (
            f"{rows} {vocabulary} {strided} {options}",
            call,
            (rows, vocabulary, OUTPUTS, True, options, strided),
        )


def sampling_calls(dtype, large):
    def call(rows, vocabulary, options, per_row, seeded, stride):
        logits = torch.randn(rows, vocabulary * stride).to(dtype)[:, ::stride]
        if per_row:
            options = {name: torch.full((rows,), value) for name, value in options.items()}
        if seeded:
            options = {**options, "seeds": torch.randint(-(2**63), 2**63 - 1, (rows,))}
        out = (torch.empty(rows, dtype=torch.int64), torch.empty(rows))
        tokens, logprob = sample_tokens(logits, out=out, **options)
        assert rows == 0 or (tokens.min() >= 0 and tokens.max() < vocabulary)
        return [logprob]

    choices = {"temperature": (1.0, 0.0, 0.7), "top_k": (0, 1, 5), "top_p": (1.0, 0.8), "min_p": (0.0, 0.05)}
    for values in itertools.product(*choices.values()):
        options = dict(zip(choices, values))
        for per_row, seeded in itertools.product((False, True), repeat=2):
            yield f"{options} {per_row} {seeded}", call, (4, 23, options, per_row, seeded, 1)
    sizes = [(1, 1), (3, 255), (2, 256), (3, 257), (2, 4099), (0, 5)]
    if large:
        sizes.append((40, 1031))
    for (rows, vocabulary), stride in itertools.product(sizes, (1, 2)):
        options = {"temperature": 0.9, "top_k": max(vocabulary // 2, 1), "top_p": 0.9, "min_p": 0.001}
        yield f"{rows} {vocabulary} {stride}", call, (rows, vocabulary, options, True, True, stride)


def prefix_attention_calls(dtype, large):
    def call(lengths, parents, heads, kv_heads, dim, options, needs):
        layout = PrefixLayout.from_lengths(lengths, parents)
        shapes = ((layout.tokens, heads, dim), *((layout.tokens, kv_heads, dim),) * 2)
        tensors = [torch.randn(shape).to(dtype).requires_grad_(need) for shape, need in zip(shapes, needs)]
        out = prefix_attention(*tensors, layout, **options)
        return [out, *gradients([out], tensors)]

    layouts = [((5, 3, 0, 4), (-1, 0, 0, 0)), ((1,), (-1,)), ((), ()), ((70, 9, 65, 3, 1), (-1, 0, -1, 2, 0))]
    if large:  # more keys than one softmax takes, several threads
        layouts += [((300, 70, 1, 40, 66), (-1, 0, 0, -1, 3))]
    heads = [(1, 1, 1), (4, 2, 7), (3, 3, 16), (5, 1, 24), (2, 1, 33), (4, 1, 64), (2, 2, 80), (1, 1, 256)]
    options = [{}, {"softcap": 2.0}, {"window": 1}, {"window": 40}]
    every = list(itertools.product((False, True), repeat=3))
    for (lengths, parents), sizes, option in itertools.product(layouts, heads, options):
        yield f"{lengths} {parents} {sizes} {option}", call, (lengths, parents, *sizes, option, (True,) * 3)
    for needs in every:
        yield f"needs {needs}", call, (*layouts[3], *heads[1], {}, needs)


def every_call(dtype, large=True, thin=1, first=0):
    """large: also sizes at which the C++ kernels use several threads. thin: only every thin-th call of each op."""
    families = {"multi_lora_linear": multi_lora_calls, "linear_logprob": linear_calls,
                "logits_logprob": logits_calls, "sample_tokens": sampling_calls,
                "prefix_attention": prefix_attention_calls}  # fmt: skip
    for op, family in families.items():
        for label, call, arguments in itertools.islice(family(dtype, large), first % thin, None, thin):
            yield f"{op} {label}", lambda call=call, arguments=arguments: call(*arguments)
