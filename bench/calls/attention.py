"""Calls of prefix_attention, and of the kernels of a fused decode decode_step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from clp_kernels import PrefixLayout, batch_invariant, decode_step, prefix_attention

from bench.calls.call import HALF, Call, Tensors, normal


def attended(lengths: Sequence[int], parents: Sequence[int], **options) -> Callable[[Tensors], Tensors]:
    def call(t: Tensors) -> Tensors:
        layout = PrefixLayout.from_lengths(lengths, parents)
        return {"out": prefix_attention(t["q"], t["k"], t["v"], layout, **options)}

    return call


def checks() -> Iterator[Call]:
    lengths, parents = [70, 9, 0, 33, 65, 3], [-1, 0, 0, 0, -1, 4]
    q, k, v = (normal(sum(lengths), heads, 64) for heads in (4, 2, 2))
    for options in ({}, {"softcap": 20.0}, {"window": 40}):
        called = attended(lengths, parents, **options)
        yield Call(f"{options or 'plain'}", {"q": q, "k": k, "v": v}, called, ("q", "k", "v"), dtypes=(HALF,))


def decode_step_checks() -> Iterator[Call]:
    """Two heads to a key head and a size no power of two; keys cut into pieces, and not; rows with one key of their own."""
    rows, heads, kv_heads, size, group, room = 6, 4, 2, 24, 3, 70
    lengths, before = torch.tensor([0, 69, 63, 64, 2, 5]), torch.tensor([130, 0])

    def between(t: Tensors) -> Tensors:
        x = t["y"].clone()
        embedded, first = decode_step.embed(t["tokens"], t["embedding"], 1.5, t["gain"], 1e-6)
        n = decode_step.add_norm(x, t["z"], t["gain"], t["gain"], 0.7, 1e-6)
        gates = {name: decode_step.gated(t["y"], t["z"], name) for name in ("silu", "gelu_tanh")}
        return {"embedded": embedded, "first": first, "x": x, "n": n, **gates}

    def attention(t: Tensors, whole: bool) -> Tensors:
        q = t["q"].clone()
        own = tuple(t[name].clone() for name in ("keys", "values"))
        gains = (t["gain"], t["gain"]) if whole else None
        place = (t["lengths"], t["before"])
        decode_step.rope_and_store(q, t["k"], t["v"], *own, *place, t["cos"], t["sin"], gains, group, 1e-6)
        options = (20.0, 40) if whole else (None, None)
        out = decode_step.attend(q, (t["prompt_keys"], t["prompt_values"]), own, *place, group, 0.2, *options)
        return {"q": q, "keys": own[0], "values": own[1], "out": out}

    def recorded(t: Tensors) -> Tensors:
        names = ("tokens", "logprobs", "seeds", "count", "limit", "last", "seed", "lengths")
        into = decode_step.Completions(*(t[name].clone() for name in names))
        decode_step.record(t["drawn"], t["logprob"], t["stop_ids"], into, t["chosen"])
        return vars(into)

    room_of_rows, apart = 5, torch.arange(rows)
    yield Call(
        "record",
        {
            "tokens": torch.arange(rows * room_of_rows).view(rows, -1), "logprobs": torch.zeros(rows, room_of_rows),
            "seeds": torch.arange(rows * room_of_rows).view(rows, -1) * 11, "count": torch.tensor([0, 1, 4, 2, 3, 5]),
            "limit": torch.tensor([5, 2, 5, 2, 5, 5]), "last": apart, "seed": apart + 100, "lengths": apart + 200,
            "drawn": torch.tensor([40, 7, -1, 42]), "logprob": torch.linspace(-3, -1, 4), "stop_ids": torch.tensor([3, 7]),
            "chosen": torch.tensor([5, 0, 4, 2]),
        },
        recorded,
        graph=True,
        wide=("logprobs", "logprob"),
    )  # fmt: skip

    width = 130
    rows_of = {name: normal(rows, width) for name in ("y", "z")}
    vectors = {"tokens": torch.arange(rows) % 4, "embedding": normal(5, width), "gain": torch.rand(width)}
    yield Call("between products", {**rows_of, **vectors}, between, graph=True, wide=("gain",))
    tensors = {
        "q": normal(rows, heads, size), "k": normal(rows, kv_heads, size), "v": normal(rows, kv_heads, size),
        "keys": normal(rows, kv_heads, room, size), "values": normal(rows, kv_heads, room, size),
        "prompt_keys": normal(2, kv_heads, width, size), "prompt_values": normal(2, kv_heads, width, size),
        "cos": normal(256, size), "sin": normal(256, size), "gain": torch.rand(size), "lengths": lengths, "before": before,
    }  # fmt: skip
    for whole in (True, False):
        call = functools.partial(attention, whole=whole)
        label = "attention, with all" if whole else "attention"
        yield Call(label, tensors, call, graph=True, wide=("gain",))
        yield Call(f"{label}, keys in one piece", tensors, call, context=batch_invariant, wide=("gain",))


def sweep(dtype: torch.dtype, large: bool) -> Iterator[tuple[str, Callable[[], Call]]]:
    def made(lengths, parents, heads, kv_heads, dim, options, needs) -> Call:
        shapes = {
            "q": (sum(lengths), heads, dim),
            "k": (sum(lengths), kv_heads, dim),
            "v": (sum(lengths), kv_heads, dim),
        }
        tensors = {name: normal(*shape) for name, shape in shapes.items()}
        wanted = tuple(name for name, need in zip(tensors, needs) if need)
        return Call("", tensors, attended(lengths, parents, **options), wanted)

    layouts = [((5, 3, 0, 4), (-1, 0, 0, 0)), ((1,), (-1,)), ((), ()), ((70, 9, 65, 3, 1), (-1, 0, -1, 2, 0))]
    if large:  # more keys than one softmax takes, several threads
        layouts += [((300, 70, 1, 40, 66), (-1, 0, 0, -1, 3))]
    heads = [(1, 1, 1), (4, 2, 7), (3, 3, 16), (5, 1, 24), (2, 1, 33), (4, 1, 64), (2, 2, 80), (1, 1, 256)]
    options = [{}, {"softcap": 2.0}, {"window": 1}, {"window": 40}]
    for (lengths, parents), sizes, option in itertools.product(layouts, heads, options):
        arguments = (lengths, parents, *sizes, option, (True,) * 3)
        yield f"{lengths} {parents} {sizes} {option}", functools.partial(made, *arguments)
    for needs in itertools.product((False, True), repeat=3):
        yield f"needs {needs}", functools.partial(made, *layouts[3], *heads[1], {}, needs)
