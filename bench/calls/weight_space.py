"""Calls of the ops on weights (interpolate, merge_sign_consensus, slerp, ema_, sparsify) and of interpolated_linear."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import clp_kernels
import torch
from clp_kernels.backends import forced_backend

from bench.calls.call import HALF, SINGLE, Call, Tensors, normal


def blend(t: Tensors) -> Tensors:
    return {"y": clp_kernels.interpolate(t["stack"], t["weights"], base=t.get("base"))}


def interpolate_checks() -> Iterator[Call]:
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
        yield Call(label, tensors, blend, wanted[: len(tensors)], wide=("weights",))
    sizes = ((16, 16), (7, 5), (1,), (16500,))
    tensors = {f"stack{i}": normal(3, *shape) for i, shape in enumerate(sizes)}
    tensors |= {f"base{i}": normal(*shape) for i, shape in enumerate(sizes)} | {"weights": torch.rand(3)}
    leaves = tuple(name for name in tensors if name != "weights")
    yield Call("a list", tensors, lists(clp_kernels.interpolate), leaves, wide=("weights",))
    for normalize in (True, False):
        op = lists(clp_kernels.merge_sign_consensus, normalize=normalize)
        # In float32 alone: which sign a sum of halves near zero has is a matter of rounding.
        yield Call(f"sign consensus, mean {normalize}", tensors, op, dtypes=(SINGLE,), wide=("weights",))

    def table(t: Tensors) -> Tensors:
        rows = [[1, 1 << 40, -3], [7, 8, 9], [0, 16, 5]]
        if forced_backend() == "reference":
            return {"table": torch.tensor(rows)}
        from clp_kernels.triton_kernels import interpolation

        return {"table": interpolation._written(rows, t["a"].device)}

    yield Call("a table, as graphs have it", {"a": normal(1)}, table, dtypes=(SINGLE,))


def slerp_checks() -> Iterator[Call]:
    def single(t: Tensors) -> Tensors:
        return {"y": clp_kernels.slerp(t["a"], t["b"], 0.3)}

    def lists(t: Tensors) -> Tensors:
        found = clp_kernels.slerp([t["a"], t["c"]], [t["b"], t["d"]], 0.7)
        return {"y": found[0], "z": found[1]}

    tensors = {name: normal(shape) for name, shape in (("a", 16500), ("b", 16500), ("c", 7), ("d", 7))}
    yield Call("one tensor", {n: tensors[n] for n in ("a", "b")}, single, ("a", "b"))
    yield Call("a list", tensors, lists, ("a", "b", "c", "d"))


def ema_checks() -> Iterator[Call]:
    def call(t: Tensors) -> Tensors:
        own = [t[f"average{i}"].clone() for i in range(3)]
        clp_kernels.ema_(own, [t[f"new{i}"] for i in range(3)], 0.99)
        return {f"y{i}": y for i, y in enumerate(own)}

    sizes = (100, 7, 16500)
    tensors = {f"{name}{i}": normal(s) for name in ("average", "new") for i, s in enumerate(sizes)}
    yield Call("a list", tensors, call)
    averages = tuple(f"average{i}" for i in range(3))
    yield Call("float32 averages of halves", tensors, call, dtypes=(HALF, torch.float16), wide=averages)


def sparsify_checks() -> Iterator[Call]:
    def call(t: Tensors, **options) -> Tensors:
        found = clp_kernels.sparsify([t["a"], t["b"]], 0.3, **options)
        return {"y": found[0], "z": found[1]}

    tensors = {"a": normal(16500), "b": normal(7, 5)}
    yield Call("random", tensors, functools.partial(call, seed=3))
    yield Call("by magnitude", tensors, functools.partial(call, method="magnitude"))


def linear(t: Tensors) -> Tensors:
    options = {"base": t.get("base"), "bias": t.get("bias"), "gate_index": t.get("index")}
    return {"y": clp_kernels.interpolated_linear(t["x"], t["stack"], t["blend"], **options)}


def linear_checks() -> Iterator[Call]:
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
        yield Call(f"{rows} rows of {k} to {n}, a blend each", tensors, linear, wanted, wide=("blend",))
    tensors |= {"blend": torch.rand(2, 3), "index": torch.randint(2, (70,))}
    yield Call("two blends by index", tensors, linear, wanted, wide=("blend",))
    tensors = {name: t for name, t in tensors.items() if name != "index"} | {"blend": torch.rand(1, 3)}
    yield Call("one blend", tensors, linear, wanted, wide=("blend",))
    tensors |= {"blend": torch.rand(70, 3)}
    yield Call("without gradients", tensors, linear, wide=("blend",), graph=True)
