"""Runs every kernel at small, awkward shapes, for compute-sanitizer to watch.

    python -m bench.gpu.sanitize [OP ...] [--device cuda]

Every op of clp_kernels, forwards and backwards, in every dtype that its back-end takes, with Triton and, where it has such
kernels, CUDA C++ forced: ragged sizes and aligned ones, few rows and many, so that each kernel is launched with each tile of
its tables. On a GPU the calls that a CUDA graph can hold are captured and replayed, too. Results are compared with float64, so
that a run that finds nothing has also computed something. On a CPU Triton's interpreter runs the kernels.

The last lines say how many kernels were launched, and fail the run where one of clp_kernels.triton_kernels never was. For a
slow tool the ops may go in several processes (`--list` names them), each with --record FILE; --judge FILE ... then puts the
launches together. prefix_attention's kernels are compiled by torch and have no names here. --graphs runs what a graph can hold
alone, --candidates everything that tuning may choose, each choice once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import os
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

if "cpu" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import clp_kernels
import torch
from clp_kernels import HeadLoRA, PrefixLayout, batch_invariant, expand_gate, triton_kernels, use_backend
from clp_kernels.backends import forced_backend, interpreting
from clp_kernels.triton_kernels import tuning
from torch import Tensor

from bench.cases import sampling
from bench.core import accuracy

Tensors = dict[str, Tensor]
HALF, SINGLE = torch.bfloat16, torch.float32
# Wider than the benchmarks' bound: some results here are a few numbers, whose errors do not average out, or a difference of
# numbers of order 10 that is nearly 0 (the log-prob of a token that is nearly certain).
FACTOR, ABSOLUTE = 4.0, 2e-6
ALL = ("logprob", "entropy", "ref_logprob", "kl", "reverse_kl", "lse", "top1")


@dataclass(frozen=True)
class Check:
    """call(tensors) -> outputs; `tensors` are made on the CPU in float32; gradients are taken in `wanted`.

    judge   for random outputs: outputs -> {name: exact value}, in place of the same call in float64
    graph   the call, which takes no gradients, is also captured in a CUDA graph and replayed
    wide    tensors that stay in float32 in every dtype
    """

    label: str
    tensors: Mapping[str, Tensor]
    call: Callable[[Tensors], Tensors]
    wanted: tuple[str, ...] = ()
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    backend: str = "triton"
    dtypes: tuple[torch.dtype, ...] = (HALF, torch.float16, SINGLE)
    judge: Callable[[Tensors, Tensors], Tensors] | None = None
    graph: bool = False
    wide: tuple[str, ...] = ()


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape) * scale


def shifted(tensor: Tensor) -> Tensor:
    """All but 16 of the columns, rows 16 elements apart and none on 16 bytes: what the bulk copy engine cannot load."""
    return tensor[:, 1:-15]


# --- the checks, by op -------------------------------------------------------------------------------------


def multi_lora_linear() -> Iterator[Check]:
    from clp_kernels.triton_kernels import multi_lora_strategy as strategy

    def call(t: Tensors) -> Tensors:
        names = ("x", "weight", "lora_a", "lora_b", "gate")
        y = clp_kernels.multi_lora_linear(
            *(t[name] for name in names), bias=t.get("bias"), gate_index=t.get("index")
        )
        return {"y": y}

    def call_shifted(t: Tensors) -> Tensors:
        return call(t | {"x": shifted(t["x"])})

    def layer(rows: int, n: int, k: int, rank: int, groups: int | None, **more: Tensor) -> Tensors:
        gate = expand_gate(torch.rand(groups or rows, 1), (rank,), (1.0,))
        made = {"x": normal(rows, k), "weight": normal(n, k, scale=k**-0.5), "gate": gate, **more}
        return made | {"lora_a": normal(rank, k, scale=k**-0.5), "lora_b": normal(n, rank, scale=0.1)}

    def index(rows: int, groups: int, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"index": torch.randint(groups, (rows,), dtype=dtype)}

    every = ("x", "lora_a", "lora_b", "gate")
    for rows, n, k, rank in (
        (1, 45, 37, 3),
        (17, 48, 2064, 27),  # a contraction that is cut, aligned and not
        (17, 45, 2065, 27),
        (70, 45, 37, 88),
        (70, 80, 48, 16),
        (1030, 48, 64, 48),  # many rows, summed in pieces
    ):
        for product, dy in (("fused", "twice"), ("fused", "once"), ("blas", "twice")):
            if dy == "once" and rank > 64:
                continue
            forced = functools.partial(strategy.force, product=product, dy=dy)
            extra = {"bias": normal(n), **index(rows, 3, torch.int64)} if product == "fused" else {}
            tensors = layer(rows, n, k, rank, 3 if extra else None, **extra)
            yield Check(
                f"{rows} rows of {k} to {n}, rank {rank}, {product}, dY {dy}", tensors, call, every, forced
            )
    once = functools.partial(strategy.force, product="fused", dy="once")
    yield Check("rank 32, dY once", layer(130, 1040, 48, 32, 1), call, every, once)
    yield Check("a shared gate", layer(66, 48, 64, 13, 1), call, every, dtypes=(HALF, SINGLE))
    yield Check("a shared gate without gradients", layer(70, 80, 48, 16, 1), call)
    yield Check("int32 index", layer(9, 40, 24, 5, 2, **index(9, 2, torch.int32)), call, every)
    for rows in (70, 1030):
        tensors = layer(rows, 48, 64, 16, None) | {"x": normal(rows, 80)}
        label = f"{rows} rows that start on no 16 bytes"
        yield Check(label, tensors, call_shifted, every, functools.partial(strategy.force, product="fused"))
    yield Check("rank 0", layer(9, 40, 24, 0, 1), call, ("x",))
    for rows, n, k in ((3, 48, 64), (70, 272, 64), (70, 45, 37)):
        yield Check(
            f"batch-invariant, {rows} rows", layer(rows, n, k, 16, None), call, every, batch_invariant
        )
    for rows in (1, 65):
        yield Check(f"{rows} rows without gradients", layer(rows, 80, 48, 16, None), call, graph=True)
    for rows in (1, 5, 16, 17, 33, 65, 129, 256):
        for n, k, rank, groups in ((80, 64, 48, None), (45, 40, 13, 3)):
            extra = {"bias": normal(n), **index(rows, groups, torch.int64)} if groups else {}
            tensors = layer(rows, n, k, rank, groups, **extra)
            label = f"decode, {rows} rows of {k} to {n}"
            halves = (HALF, torch.float16)
            yield Check(label, tensors, call, backend="cuda", dtypes=halves, graph=rows in (1, 65))


def _head(rows: int, width: int, vocabulary: int, own: bool = False, rank: int = 0) -> Tensors:
    """Tensors of linear_logprob with a reference near the policy: `own` for one with its own weights."""
    hidden = normal(rows, width)
    targets = torch.randint(vocabulary, (rows,))
    targets[2::5] = -100
    made = {
        "hidden": hidden,
        "weight": normal(vocabulary, width, scale=width**-0.5),
        "targets": targets,
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


def _statistics(outputs: tuple[str, ...], function=None, **options) -> Callable[[Tensors], Tensors]:
    def call(t: Tensors) -> Tensors:
        named = ("bias", "ref_hidden", "ref_weight", "ref_bias")
        given = {name: t[name] for name in named if name in t}
        lora = HeadLoRA(t["a"], t["b"], t["gate"]) if "a" in t else None
        if "row_temperature" in t:
            given["temperature"] = t["row_temperature"]
        op = function or clp_kernels.linear_logprob
        stats = op(t["hidden"], t["weight"], t["targets"], lora=lora, outputs=outputs, **given, **options)
        return {name: getattr(stats, name) for name in outputs}

    return call


def linear_logprob() -> Iterator[Check]:
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
            yield Check(label, tensors, _statistics(ALL, keep_bytes=kept), wanted, wide=("gate",))
    tensors = _head(9, 48, 4107)  # several splits of the vocabulary, two chunks of the gradient
    capped = tensors | {"row_temperature": torch.rand(9) + 0.5}
    options = {"softcap": 5.0, "logit_scale": 1.1}
    yield Check("several chunks", tensors, _statistics(some), head, dtypes=(HALF, SINGLE))
    yield Check(
        "capped, kept", capped, _statistics(some, keep_bytes=9 * 4107 * 4, **options), head,
        dtypes=(HALF, SINGLE), wide=("row_temperature",),
    )  # fmt: skip
    for outputs in (some, ("logprob",)):
        tensors = _head(37, 64, 304)
        wide = tensors | {
            name: normal(tensors[name].shape[0], 80) for name in ("hidden", "weight", "ref_hidden")
        }
        if outputs != some:
            wide = {name: wide[name] for name in ("hidden", "weight", "targets")}
        called = functools.partial(call_shifted, _statistics(outputs))
        label = f"{len(outputs)} outputs, rows that start on no 16 bytes"
        yield Check(label, wide, called, ("hidden", "weight"), dtypes=(HALF, SINGLE))
    tensors = _head(9, 264, 4107)
    yield Check("a wide hidden state", tensors, _statistics(("logprob",)), ("hidden",), dtypes=(HALF,))
    tensors = _head(9, 48, 4107)
    frozen = _statistics(some, differentiable=("logprob",), keep_bytes=9 * 48 * 8)
    yield Check("a frozen head, one output differentiable", tensors, frozen, ("hidden",), dtypes=(HALF,))
    for outputs in (("logprob",), ("entropy",), ("lse", "top1")):
        few = {name: tensors[name] for name in ("hidden", "weight", "targets")}
        wanted = ("hidden",)
        yield Check(f"{outputs[0]} alone", few, _statistics(outputs), wanted, dtypes=(HALF, SINGLE))
    yield Check("scoring", tensors, _statistics(some), graph=True, dtypes=(HALF,))
    yield Check(
        "batch-invariant", _head(3, 64, 304), _statistics(some), head, batch_invariant, dtypes=(HALF,)
    )


@contextlib.contextmanager
def _group_of_one() -> Iterator[None]:
    """A process group of this process alone, on every device."""
    import torch.distributed as dist

    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def vocab_parallel_linear_logprob() -> Iterator[Check]:
    def call(t: Tensors) -> Tensors:
        return (whole if forced_backend() == "reference" else sharded)(t)

    whole, sharded = _statistics(ALL), _statistics(ALL, clp_kernels.vocab_parallel_linear_logprob)
    tensors, wanted = _head(12, 24, 1009, rank=6), ("hidden", "weight", "bias", "a", "b", "gate")
    yield Check("one rank", tensors, call, wanted, _group_of_one, dtypes=(HALF, SINGLE), wide=("gate",))


def logits_logprob() -> Iterator[Check]:
    def call(t: Tensors) -> Tensors:
        options = {"ref_logits": t["ref_logits"]} if "ref_logits" in t else {}
        outputs = ALL if options else ("logprob", "entropy", "lse")
        stats = clp_kernels.logits_logprob(t["logits"], t["targets"], outputs=outputs, softcap=9.0, **options)
        return {name: getattr(stats, name) for name in outputs}

    for rows, vocabulary in ((1, 50), (5, 1025), (7, 4099)):
        logits, targets = normal(rows, vocabulary, scale=2.0), torch.randint(vocabulary, (rows,))
        targets[2::5] = -100
        tensors = {"logits": logits, "targets": targets}
        yield Check(f"{rows} rows of {vocabulary}", tensors, call, ("logits",))
        tensors = tensors | {"ref_logits": logits + normal(rows, vocabulary, scale=0.1)}
        yield Check(f"{rows} rows of {vocabulary}, a reference", tensors, call, ("logits",))
    yield Check("without gradients", tensors, call, graph=True)


def interpolate() -> Iterator[Check]:
    def single(t: Tensors) -> Tensors:
        return {"y": clp_kernels.interpolate(t["stack"], t["weights"], base=t.get("base"))}

    def lists(op: Callable, **options) -> Callable[[Tensors], Tensors]:
        def call(t: Tensors) -> Tensors:
            stacks = [list(t[f"stack{i}"].unbind(0)) for i in range(4)]
            found = op(stacks, t["weights"], base=[t[f"base{i}"] for i in range(4)], **options)
            return {f"y{i}": y for i, y in enumerate(found)}

        return call

    wanted = ("stack", "weights", "base")
    for models, shape, blends in ((3, (7, 143), ()), (1, (33,), ()), (16, (5, 16), (4,)), (2, (70000,), ())):
        tensors = {"stack": normal(models, *shape), "weights": torch.rand(*blends, models)}
        if not blends:
            tensors["base"] = normal(*shape)
        label = f"{models} of {shape}, {blends or 'one'} blends"
        yield Check(label, tensors, single, wanted[: len(tensors)], wide=("weights",))
    sizes = ((16, 16), (7, 5), (1,), (16500,))
    tensors = {f"stack{i}": normal(3, *shape) for i, shape in enumerate(sizes)}
    tensors |= {f"base{i}": normal(*shape) for i, shape in enumerate(sizes)} | {"weights": torch.rand(3)}
    leaves = tuple(name for name in tensors if name != "weights")
    yield Check("a list", tensors, lists(clp_kernels.interpolate), leaves, wide=("weights",))
    for normalize in (True, False):
        op = lists(clp_kernels.merge_sign_consensus, normalize=normalize)
        # In float32 alone: which sign a sum of halves near zero has is a matter of rounding.
        yield Check(f"sign consensus, mean {normalize}", tensors, op, dtypes=(SINGLE,), wide=("weights",))

    def table(t: Tensors) -> Tensors:
        rows = [[1, 1 << 40, -3], [7, 8, 9], [0, 16, 5]]
        if forced_backend() == "reference":
            return {"table": torch.tensor(rows)}
        return {"table": triton_kernels.interpolation._written(rows, t["a"].device)}

    yield Check("a table, as graphs have it", {"a": normal(1)}, table, dtypes=(SINGLE,))


def slerp() -> Iterator[Check]:
    def single(t: Tensors) -> Tensors:
        return {"y": clp_kernels.slerp(t["a"], t["b"], 0.3)}

    def lists(t: Tensors) -> Tensors:
        found = clp_kernels.slerp([t["a"], t["c"]], [t["b"], t["d"]], 0.7)
        return {"y": found[0], "z": found[1]}

    tensors = {name: normal(shape) for name, shape in (("a", 16500), ("b", 16500), ("c", 7), ("d", 7))}
    yield Check("one tensor", {n: tensors[n] for n in ("a", "b")}, single, ("a", "b"))
    yield Check("a list", tensors, lists, ("a", "b", "c", "d"))


def ema_() -> Iterator[Check]:
    def call(t: Tensors) -> Tensors:
        own = [t[f"average{i}"].clone() for i in range(3)]
        clp_kernels.ema_(own, [t[f"new{i}"] for i in range(3)], 0.99)
        return {f"y{i}": y for i, y in enumerate(own)}

    sizes = (100, 7, 16500)
    tensors = {f"{name}{i}": normal(s) for name in ("average", "new") for i, s in enumerate(sizes)}
    yield Check("a list", tensors, call)
    averages = tuple(f"average{i}" for i in range(3))
    yield Check("float32 averages of halves", tensors, call, dtypes=(HALF, torch.float16), wide=averages)


def sparsify() -> Iterator[Check]:
    def call(t: Tensors, **options) -> Tensors:
        found = clp_kernels.sparsify([t["a"], t["b"]], 0.3, **options)
        return {"y": found[0], "z": found[1]}

    tensors = {"a": normal(16500), "b": normal(7, 5)}
    yield Check("random", tensors, functools.partial(call, seed=3))
    yield Check("by magnitude", tensors, functools.partial(call, method="magnitude"))


def interpolated_linear() -> Iterator[Check]:
    def call(t: Tensors) -> Tensors:
        y = clp_kernels.interpolated_linear(
            t["x"], t["stack"], t["blend"], base=t.get("base"), bias=t.get("bias"), gate_index=t.get("index")
        )
        return {"y": y}

    wanted = ("x", "stack", "blend", "bias")
    for rows, groups, n, k in (
        (3, 3, 45, 37),
        (9, 9, 48, 64),
        (17, 17, 48, 64),
        (70, 70, 48, 64),
        (70, 70, 45, 37),
    ):
        tensors = {"x": normal(rows, k), "stack": normal(3, n, k, scale=k**-0.5), "bias": normal(n)}
        tensors |= {"blend": torch.rand(groups, 3), "base": normal(n, k, scale=k**-0.5)}
        yield Check(f"{rows} rows of {k} to {n}, a blend each", tensors, call, wanted, wide=("blend",))
    tensors |= {"blend": torch.rand(2, 3), "index": torch.randint(2, (70,))}
    yield Check("two blends by index", tensors, call, wanted, wide=("blend",))
    tensors = {name: t for name, t in tensors.items() if name != "index"} | {"blend": torch.rand(1, 3)}
    yield Check("one blend", tensors, call, wanted, wide=("blend",))
    tensors |= {"blend": torch.rand(70, 3)}
    yield Check("without gradients", tensors, call, wide=("blend",), graph=True)


def sample_tokens() -> Iterator[Check]:
    def check(rows: int, vocabulary: int, options: Mapping, seeded: bool, per_row: bool) -> Check:
        case = sampling.case("cpu", rows, vocabulary, SINGLE, options=options)
        tensors = {"logits": normal(rows, vocabulary, scale=3.0)}
        if seeded:
            tensors["seeds"] = torch.randint(-(2**63), 2**63 - 1, (rows,))

        def call(t: Tensors) -> Tensors:
            given = dict(options)
            if per_row:
                given = {n: torch.full((rows,), v, device=t["logits"].device) for n, v in options.items()}
            tokens, logprob = clp_kernels.sample_tokens(t["logits"], seeds=t.get("seeds"), **given)
            return {"tokens": tokens, "logprob": logprob}

        def judge(t: Tensors, outputs: Tensors) -> Tensors:
            return case.judge(t, outputs)[1]

        words = " ".join(f"{n} {v}" for n, v in options.items()) + " by row" * per_row + " seeded" * seeded
        label = f"{rows} of {vocabulary}, {words}"
        return Check(label, tensors, call, judge=judge, graph=seeded and not per_row)

    truncated = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.05}
    for rows, vocabulary in ((1, 50), (3, 1500), (5, 5003)):
        for options in (*sampling.OPTIONS[:5], truncated):
            yield check(rows, vocabulary, options, seeded=vocabulary == 1500, per_row=False)
        yield check(rows, vocabulary, truncated, seeded=True, per_row=True)


def prefix_attention() -> Iterator[Check]:
    layout = PrefixLayout.from_lengths([70, 9, 0, 33, 65, 3], [-1, 0, 0, 0, -1, 4])

    def call(t: Tensors, **options) -> Tensors:
        return {"out": clp_kernels.prefix_attention(t["q"], t["k"], t["v"], layout, **options)}

    q, k, v = (normal(layout.tokens, heads, 64) for heads in (4, 2, 2))
    for options in ({}, {"softcap": 20.0}, {"window": 40}):
        called = functools.partial(call, **options)
        yield Check(
            f"{options or 'plain'}", {"q": q, "k": k, "v": v}, called, ("q", "k", "v"), dtypes=(HALF,)
        )


def decode_step() -> Iterator[Check]:
    """Two heads to a key head and a size no power of two; keys cut into pieces, and not; rows with one key of their own."""
    rows, heads, kv_heads, size, group, room = 6, 4, 2, 24, 3, 70
    lengths, before = torch.tensor([0, 69, 63, 64, 2, 5]), torch.tensor([130, 0])

    def module():
        return importlib.import_module(
            "clp_kernels.reference.decode_step"
            if forced_backend() == "reference"
            else "clp_kernels.triton_kernels.decode_step"
        )

    def between(t: Tensors) -> Tensors:
        step, x = module(), t["y"].clone()
        embedded, first = step.embed(t["tokens"], t["embedding"], 1.5, t["gain"], 1e-6)
        n = step.add_norm(x, t["z"], t["gain"], t["gain"], 0.7, 1e-6)
        gates = {name: step.gated(t["y"], t["z"], name) for name in ("silu", "gelu_tanh")}
        return {"embedded": embedded, "first": first, "x": x, "n": n, **gates}

    def attention(t: Tensors, whole: bool) -> Tensors:
        step, q = module(), t["q"].clone()
        own = tuple(t[name].clone() for name in ("keys", "values"))
        gains = (t["gain"], t["gain"]) if whole else None
        place = (t["lengths"], t["before"])
        step.rope_and_store(q, t["k"], t["v"], *own, *place, t["cos"], t["sin"], gains, group, 1e-6)
        options = (20.0, 40) if whole else (None, None)
        out = step.attend(q, (t["prompt_keys"], t["prompt_values"]), own, *place, group, 0.2, *options)
        return {"q": q, "keys": own[0], "values": own[1], "out": out}

    width = 130
    rows_of = {name: normal(rows, width) for name in ("y", "z")}
    vectors = {"tokens": torch.arange(rows) % 4, "embedding": normal(5, width), "gain": torch.rand(width)}
    yield Check("between products", {**rows_of, **vectors}, between, graph=True, wide=("gain",))
    tensors = {
        "q": normal(rows, heads, size), "k": normal(rows, kv_heads, size), "v": normal(rows, kv_heads, size),
        "keys": normal(rows, kv_heads, room, size), "values": normal(rows, kv_heads, room, size),
        "prompt_keys": normal(2, kv_heads, width, size), "prompt_values": normal(2, kv_heads, width, size),
        "cos": normal(256, size), "sin": normal(256, size), "gain": torch.rand(size), "lengths": lengths, "before": before,
    }  # fmt: skip
    for whole in (True, False):
        call = functools.partial(attention, whole=whole)
        label = "attention, with all" if whole else "attention"
        yield Check(label, tensors, call, graph=True, wide=("gain",))
        yield Check(f"{label}, keys in one piece", tensors, call, context=batch_invariant, wide=("gain",))


OPS = {
    f.__name__: f
    for f in (
        multi_lora_linear, linear_logprob, vocab_parallel_linear_logprob, logits_logprob, interpolate, slerp, ema_,
        sparsify, interpolated_linear, sample_tokens, prefix_attention, decode_step,
    )
}  # fmt: skip


# --- running one -------------------------------------------------------------------------------------------


def _inputs(check: Check, dtype: torch.dtype, device: str) -> Tensors:
    """Rounded to the dtype, on the device."""

    def placed(name: str, tensor: Tensor) -> Tensor:
        rounds = tensor.is_floating_point() and name not in check.wide
        return tensor.to(device, dtype if rounds else tensor.dtype)

    return {name: placed(name, tensor) for name, tensor in check.tensors.items()}


def _outputs(check: Check, tensors: Tensors) -> Tensors:
    """What the call returns, and the gradients of all its outputs, each with an incoming gradient of its own."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in check.wanted}
    outputs = check.call({**tensors, **leaves})
    asked = [y for y in outputs.values() if y.requires_grad]
    found = {name: y.detach() for name, y in outputs.items()}
    if leaves:
        incoming = [
            torch.linspace(-1, 2, y.numel(), device=y.device).to(y.dtype).view(y.shape) for y in asked
        ]
        gradients = torch.autograd.grad(asked, list(leaves.values()), incoming)
        found |= {f"d_{name}": g for name, g in zip(leaves, gradients)}
    return found


def _replayed(check: Check, tensors: Tensors) -> Tensors:
    """The outputs of a CUDA graph's replay, whose memory was filled with NaN before it."""
    from bench.core.measure import capture

    kept: list[Tensors] = []
    graph = capture([lambda: kept.append(check.call(tensors))], 1)
    for output in kept[-1].values():
        output.fill_(torch.nan if output.is_floating_point() else -7)
    graph.replay()
    torch.cuda.synchronize()
    return kept[-1]


def _captures(device: str) -> bool:
    """Whether CUDA graphs can be captured: not where every tensor is an allocation of its own."""
    return device == "cuda" and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ


def complaint(check: Check, dtype: torch.dtype, device: str) -> str | None:
    """Runs the check; what is wrong with its results, or None."""
    tensors, on_cpu = _inputs(check, dtype, device), _inputs(check, dtype, "cpu")
    with use_backend(check.backend), check.context():
        runs = {"": _outputs(check, tensors)}
        if check.graph and _captures(device):
            runs[" replayed"] = _replayed(check, tensors)
    # The truth is computed on the CPU: torch's own kernels need no watching, and being watched takes them long.
    plain = exact = {}
    with use_backend("reference"):
        if check.judge is None:
            plain = _outputs(check, on_cpu)
            exact = _outputs(
                check, {n: t.double() if t.is_floating_point() else t for n, t in on_cpu.items()}
            )
    for name, outputs in runs.items():
        found = {n: t.cpu() for n, t in outputs.items()}
        if check.judge is not None:
            exact = check.judge(
                {n: t.double() if t.is_floating_point() else t for n, t in on_cpu.items()}, found
            )
            plain = {n: t.float() for n, t in exact.items()}
        errors = accuracy.errors(found, plain, exact)
        for output, error in errors.items():
            size = exact[output].double().norm().clamp_min(1e-30).item()
            error.allowed = FACTOR * (error.torch + torch.finfo(dtype).eps) + ABSOLUTE / size
        if wrong := accuracy.complaint(errors, tuple(n for n, t in exact.items() if t.is_floating_point())):
            return wrong + name
    return None


# --- which kernels were launched ---------------------------------------------------------------------------


def kernels() -> dict[str, object]:
    """Every kernel of clp_kernels.triton_kernels that is launched from the host, by module.name: those that no other calls."""
    found, called = {}, set()
    for info in pkgutil.iter_modules(triton_kernels.__path__):
        module = importlib.import_module(f"{triton_kernels.__name__}.{info.name}")
        for name, value in vars(module).items():
            function = getattr(value, "fn", None)
            if hasattr(value, "run") and getattr(function, "__module__", None) == module.__name__:
                found[f"{info.name}.{name}"] = value
                names = function.__code__.co_names
                called |= {id(function.__globals__[n]) for n in names if n in function.__globals__}
    return {name: kernel for name, kernel in found.items() if id(kernel) not in called}


def tiles() -> dict[str, tuple]:
    """Every Tile of the kernels' tables: "module.table[key]" and which -> (module, tile)."""
    from clp_kernels.triton_kernels.launch import Tile

    found = {}

    def walk(where: str, module: str, value: object) -> None:
        if isinstance(value, Tile):
            found[f"{where} {tuple(value)}"] = module, value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{where}[{key}]", module, inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                walk(where, module, inner)

    for info in pkgutil.iter_modules(triton_kernels.__path__):
        module = importlib.import_module(f"{triton_kernels.__name__}.{info.name}")
        for name, value in vars(module).items():
            if name.isupper() or name.startswith("_"):
                if isinstance(value, dict | tuple):
                    walk(f"{info.name}.{name}", info.name, value)
    return found


@dataclass
class Launches:
    """kernel -> its configurations: constants that are blocks, warps, stages."""

    by_kernel: dict[str, set[tuple]] = field(default_factory=dict)

    def note(self, name: str, options: Mapping) -> None:
        blocks = tuple(sorted(v for k, v in options.items() if k.startswith("BLOCK") and isinstance(v, int)))
        config = (blocks, options.get("num_warps"), options.get("num_stages"))
        self.by_kernel.setdefault(name, set()).add(config)

    def has_tile(self, module: str, tile) -> bool:
        return any(
            {tile.rows, tile.depth} <= set(blocks) and (warps, stages) == (tile.num_warps, tile.num_stages)
            for name, configs in self.by_kernel.items()
            if name.partition(".")[0] == module
            for blocks, warps, stages in configs
        )

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Notes what Triton launches in the block."""
        names = {id(kernel): name for name, kernel in kernels().items()}
        kind = type(next(iter(kernels().values())))
        run = kind.run

        def noted(kernel, *args, **options):
            if name := names.get(id(kernel)):
                self.note(name, options)
            return run(kernel, *args, **options)

        with mock.patch.object(kind, "run", noted):
            yield

    def save(self, path: Path, ops: list[str]) -> None:
        held = {
            name: sorted(map(list, configs), key=repr) for name, configs in sorted(self.by_kernel.items())
        }
        path.write_text(json.dumps({"ops": ops, "kernels": held}, indent=1) + "\n", encoding="utf-8")

    def add(self, path: Path) -> list[str]:
        """Takes in what `save` wrote; the ops that it is of."""
        saved = json.loads(path.read_text(encoding="utf-8"))
        for name, configs in saved["kernels"].items():
            held = {(tuple(blocks), warps, stages) for blocks, warps, stages in configs}
            self.by_kernel.setdefault(name, set()).update(held)
        return saved["ops"]


# --- what a table of tuned choices may ask for ------------------------------------------------------------------


def candidates(device: str) -> Iterator[tuple[str, str, torch.dtype, Check]]:
    """(op, label, dtype, check) for everything that tuning may choose: the largest check whose launchers ask for such a choice,
    with the choice forced. Found by a run in which nothing is launched."""
    askers: dict[tuple[str, str], tuple[str, torch.dtype, Check]] = {}
    choose = tuning.Tunable.choice
    kind = type(next(iter(kernels().values())))
    for op in OPS:
        for dtype, check in _chosen(op, device, 1):

            def noted(tunable, family, *sizes, here=(op, dtype, check)):
                before = askers.get((tunable.kernel, family))
                if before is None or _elements(before[2]) < _elements(here[2]):
                    askers[tunable.kernel, family] = here
                return choose(tunable, family, *sizes)

            unlaunched = mock.patch.object(kind, "run", lambda *a, **options: None)
            # What the kernels left unwritten may be no token, and is then refused.
            with (
                unlaunched,
                mock.patch.object(tuning.Tunable, "choice", noted),
                contextlib.suppress(ValueError),
            ):
                with use_backend(check.backend), check.context():
                    _outputs(check, _inputs(check, dtype, device))
    declared = {}  # by identity: modules import each other's
    for info in pkgutil.iter_modules(triton_kernels.__path__):
        module = importlib.import_module(f"{triton_kernels.__name__}.{info.name}")
        declared |= {id(v): v for v in vars(module).values() if isinstance(v, tuning.Tunable)}
    for tunable in declared.values():
        for _, family, choice in tunable.possible():
            if (tunable.kernel, family) not in askers:
                print(f"{tunable.kernel}, {family}: no check asks for it")
                continue
            op, dtype, check = askers[tunable.kernel, family]
            context = functools.partial(_both, check.context, tunable.kernel, family, choice)
            label = f"{tunable.kernel}, {family}, {tuple(choice) if isinstance(choice, tuple) else choice}"
            yield op, label, dtype, replace(check, context=context, graph=False)


def _elements(check: Check) -> int:
    return sum(tensor.numel() for tensor in check.tensors.values())


@contextlib.contextmanager
def _both(context: Callable, kernel: str, family: str, choice) -> Iterator[None]:
    with context(), tuning.force(kernel, family, choice):
        yield


def never_launched(launches: Launches, device: str) -> list[str]:
    from clp_kernels.triton_kernels import launch

    missing = [name for name in kernels() if name not in launches.by_kernel]
    if launch.major(torch.device(device, 0) if device == "cuda" else torch.device("cpu")) < 9:
        missing = [
            name for name in missing if not name.endswith("_described")
        ]  # they need the bulk copy engine
    return missing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"default: all of {', '.join(OPS)}")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--list", action="store_true", help="print the names of the ops, and do nothing else")
    parser.add_argument(
        "--graphs",
        action="store_true",
        help="only the checks that a CUDA graph can hold, which needs torch's cache",
    )
    parser.add_argument(
        "--candidates", action="store_true", help="only what tuning may choose, each choice once"
    )
    parser.add_argument("--record", metavar="FILE", type=Path, help="what was launched, for --judge")
    parser.add_argument(
        "--judge", metavar="FILE", type=Path, nargs="+", help="run nothing; put these records together"
    )
    parser.add_argument("--thin", type=int, default=1, metavar="N", help="only every N-th check of an op")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(OPS))
        return 0
    for name in options.ops:
        if name not in OPS:
            raise SystemExit(f"unknown op {name!r}; known: {', '.join(OPS)}")
    ops, device, launches, failed, count = options.ops or list(OPS), options.device, Launches(), [], 0
    if options.judge:
        done = [op for path in options.judge for op in launches.add(path)]
        return _judge(launches, done, device, whole=options.thin == 1)
    if options.candidates:
        chosen, ops = (
            ((op, f"{label}: {check.label}", d, check) for op, label, d, check in candidates(device)),
            [],
        )
        chosen = itertools.islice(chosen, None, None, options.thin)
    else:
        chosen = ((op, c.label, d, c) for op in ops for d, c in _chosen(op, device, options.thin))
    with launches.watched():
        for op, words, dtype, check in chosen:
            if check.graph or not options.graphs:
                label = f"{op}: {words}, {str(dtype).removeprefix('torch.')} [{check.backend}]"
                start = time.monotonic()
                wrong = _run(check, dtype, device, launches)
                count += 1
                failed += [label] if wrong else []
                print(f"{time.monotonic() - start:6.1f} s  {label}: {wrong or 'right'}", flush=True)
    if options.graphs:
        ops = []  # none of them as a whole
        print(f"graphs were {'' if _captures(device) else 'not '}captured and replayed")
    if options.record:
        launches.save(options.record, ops)
    for label in failed:
        print(f"WRONG {label}")
    print(f"{count} checks, {len(failed)} wrong")
    return max(_judge(launches, ops, device, whole=options.thin == 1), 1 if failed else 0)


def _judge(launches: Launches, ops: list[str], device: str, whole: bool) -> int:
    """Prints what was launched and what never was; 1 where all ops' checks were run and a kernel was not, else 0."""
    configurations = sum(map(len, launches.by_kernel.values()))
    launched = f"{len(launches.by_kernel)} kernels in {configurations} configurations"
    waiting = [op for op in OPS if op not in ops]
    if waiting or not whole:
        left = f"{', '.join(waiting)}" if waiting else "checks that --thin left out"
        print(f"{launched}; which are never launched is judged with {left}")
        return 0
    for where, (module, tile) in tiles().items():
        if not launches.has_tile(module, tile):
            print(f"tile not launched: {where}")
    missing = never_launched(launches, device)
    for name in missing:
        print(f"NEVER LAUNCHED {name}: give it a check in bench/gpu/sanitize.py, or take it out")
    print(f"{launched}, {len(missing)} never launched")
    return 1 if missing else 0


def _chosen(op: str, device: str, thin: int) -> Iterator[tuple[torch.dtype, Check]]:
    """The op's checks that can be run here."""
    torch.manual_seed(1)
    number, status = 0, clp_kernels.backends()
    if op == "prefix_attention" and device == "cpu":
        print(f"{op}: left out: its kernels are compiled for CUDA tensors alone")
        return
    checks = list(OPS[op]())
    for backend in dict.fromkeys(check.backend for check in checks):
        if not status[backend].available:
            print(f"{op}: {backend} left out: {status[backend].reason}")
    for check in checks:
        if not status[check.backend].available:
            continue
        for dtype in check.dtypes:
            if dtype is HALF and interpreting():
                if torch.float16 in check.dtypes:
                    continue
                dtype = torch.float16  # Triton's interpreter computes bfloat16 products wrongly
            number += 1
            if (number - 1) % thin == 0:
                yield dtype, check


def _run(check: Check, dtype: torch.dtype, device: str, launches: Launches) -> str | None:
    try:
        wrong = complaint(check, dtype, device)
    except Exception as error:  # one kernel's failure is not to hide the others'
        if device == "cuda":
            torch.cuda.synchronize()  # where the device is gone, nothing after this would mean anything: let it raise
        return f"raised {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
    if check.backend == "cuda":
        launches.note("cuda.multi_lora_decode", {})
    return wrong


if __name__ == "__main__":
    sys.exit(main())
