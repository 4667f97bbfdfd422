"""Calls of multi_lora_linear."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from clp_kernels import batch_invariant, expand_gate, multi_lora_linear
from torch import Tensor

from bench.calls.call import HALF, SINGLE, Call, Tensors, normal, shifted

NAMES = ("x", "weight", "lora_a", "lora_b", "gate", "bias")


def call(t: Tensors) -> Tensors:
    y = multi_lora_linear(*(t[name] for name in NAMES[:5]), bias=t.get("bias"), gate_index=t.get("index"))
    return {"y": y}


def checks() -> Iterator[Call]:
    from clp_kernels.triton_kernels import multi_lora_strategy as strategy

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
            yield Call(
                f"{rows} rows of {k} to {n}, rank {rank}, {product}, dY {dy}", tensors, call, every, forced
            )
    once = functools.partial(strategy.force, product="fused", dy="once")
    yield Call("rank 32, dY once", layer(130, 1040, 48, 32, 1), call, every, once)
    yield Call("a shared gate", layer(66, 48, 64, 13, 1), call, every, dtypes=(HALF, SINGLE))
    yield Call("a shared gate without gradients", layer(70, 80, 48, 16, 1), call)
    yield Call("int32 index", layer(9, 40, 24, 5, 2, **index(9, 2, torch.int32)), call, every)
    for rows in (70, 1030):
        tensors = layer(rows, 48, 64, 16, None) | {"x": normal(rows, 80)}
        label = f"{rows} rows that start on no 16 bytes"
        yield Call(label, tensors, call_shifted, every, functools.partial(strategy.force, product="fused"))
    yield Call("rank 0", layer(9, 40, 24, 0, 1), call, ("x",))
    for rows, n, k in ((3, 48, 64), (70, 272, 64), (70, 45, 37)):
        yield Call(f"batch-invariant, {rows} rows", layer(rows, n, k, 16, None), call, every, batch_invariant)
    for rows in (1, 65):
        yield Call(f"{rows} rows without gradients", layer(rows, 80, 48, 16, None), call, graph=True)
    for rows in (1, 5, 16, 17, 33, 65, 129, 256):
        for n, k, rank, groups in ((80, 64, 48, None), (45, 40, 13, 3)):
            extra = {"bias": normal(n), **index(rows, groups, torch.int64)} if groups else {}
            tensors = layer(rows, n, k, rank, groups, **extra)
            label = f"decode, {rows} rows of {k} to {n}"
            halves = (HALF, torch.float16)
            yield Call(label, tensors, call, backend="cuda", dtypes=halves, graph=rows in (1, 65))


def sweep(dtype: torch.dtype, large: bool) -> Iterator[tuple[str, Callable[[], Call]]]:
    def made(lead, k, n, rank, groups, gate_dtype, index, bias, needs) -> Call:
        shapes = ((*lead, k), (n, k), (rank, k), (n, rank), (groups, rank), (n,))
        tensors = {name: normal(*shape) for name, shape in zip(NAMES, shapes) if bias or name != "bias"}
        tensors["gate"] = tensors["gate"].to(gate_dtype)
        wanted = tuple(name for name, need in zip(NAMES, needs) if need and name in tensors)
        if index:
            tensors["index"] = torch.randint(0, groups, lead).to(index)
        return Call("", tensors, call, wanted, wide=("gate",))

    everything, frozen = (True,) * 6, (True, False, True, True, True, False)
    gates = [
        ((5,), 1, None),
        ((5,), 5, None),
        ((2, 3), 2, None),
        ((5,), 3, torch.int64),
        ((2, 3), 9, torch.int32),
    ]
    for (lead, groups, index), needs in itertools.product(gates, itertools.product((False, True), repeat=6)):
        arguments = (lead, 7, 6, 3, groups, torch.float32, index, True, needs)
        yield f"needs {needs}", functools.partial(made, *arguments)
    sizes = [((1,), 1, 1, 1), ((3,), 33, 17, 13), ((0,), 4, 3, 2), ((4,), 4, 3, 0), ((37,), 70, 45, 88)]
    if (
        large
    ):  # several threads; the second has fewer groups than threads own rows; the last: products on tiles
        sizes += [((1937,), 9, 5, 27), ((13, 149), 5, 9, 19), ((170,), 163, 161, 9)]
    kinds = itertools.product(sizes, {torch.float32, dtype}, (False, True))
    for (lead, k, n, rank), gate_dtype, bias in kinds:
        for groups, index in ((1, None), (lead[0], None), (7, torch.int64)):
            arguments = (lead, k, n, rank, groups, gate_dtype, index, bias, everything if bias else frozen)
            yield f"{lead} {k} {n} {rank} groups {groups}", functools.partial(made, *arguments)
