"""Weight space: interpolate, slerp, ema_ over lists of tensors, and interpolated_linear. Bound by copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.cases import formulas
from bench.cases.models import MODELS, blends, normal
from bench.core.case import Case, Prepared, Tensors, Work, plain_exact

DECAY, SHARE = 0.99, 0.3


def cases(device: str, sizes: str) -> list[Case]:
    dtype = torch.float32 if sizes != "gpu" else torch.bfloat16
    if sizes == "tiny":
        return [
            _interpolate(device, 3, 1000, dtype),
            _slerp(device, 1000, dtype),
            _ema(device, [100, 7, 33], dtype),
            _interpolated_linear(device, 3, 24, 16, 8, dtype),
        ]
    if sizes == "cpu":
        elements, layer, rows = 4_000_000, (1024, 1024), 256
        tensors = _weights(1024, 2816, 4)
    else:
        # A billion weights: past this size only the time grows. The list is four layers of a 7B, in its own tensors.
        elements, layer, rows = 1_000_000_000, (4096, 4096), 2048
        model = MODELS["Qwen2.5-7B"]
        tensors = _weights(model.hidden, model.intermediate, 4)
    found = [_interpolate(device, count, elements, dtype) for count in (3, 2, 8)]
    found += [_slerp(device, elements, dtype), _ema(device, tensors, dtype)]
    if sizes == "gpu":
        found.append(_interpolate(device, 3, elements, torch.float32))
    return found + [
        _interpolated_linear(device, 3, *layer, rows, dtype),
        _interpolated_linear(device, 3, *layer, 8, dtype),
    ]


def _weights(hidden: int, intermediate: int, layers: int) -> list[int]:
    """Sizes of the tensors of some transformer layers: four of attention, three of the MLP, two norms."""
    return ([hidden * hidden] * 4 + [hidden * intermediate] * 3 + [hidden] * 2) * layers


def _case(
    op: str, device: str, shape: dict[str, int], dtype: torch.dtype, make, exact, work: Work, **more
) -> Case:
    return Case("interpolate", op, op, shape, dtype, device, make, exact, work, **more)


def _interpolate(device: str, count: int, elements: int, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        return {
            "stack": normal(count, elements, generator=generator, dtype=dtype),
            "weights": blends("dirichlet", 1, count, generator)[0],
        }

    def exact(inputs: Tensors, dtype: torch.dtype) -> Tensors:
        # One copy after the other: the whole stack in float64 would be four times its size.
        weights = inputs["weights"].to(dtype)
        if dtype is not torch.float64:
            return formulas.interpolate(inputs)
        total = torch.zeros(elements, dtype=dtype, device=inputs["stack"].device)
        for i in range(count):
            total.add_(inputs["stack"][i].to(dtype), alpha=float(weights[i]))
        return {"y": total}

    work = Work(2.0 * count * elements, float(dtype.itemsize * (count + 1) * elements))
    shape = {"M": count, "elements": elements}
    targets = ("interpolate",) if elements >= 1_000_000_000 else ()
    return _case("interpolate", device, shape, dtype, make, exact, work, targets=targets)


def _slerp(device: str, elements: int, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        return {name: normal(elements, generator=generator, dtype=dtype) for name in ("a", "b")}

    # The angle needs both, read once, before the first output can be written: five times the size.
    work = Work(9.0 * elements, float(dtype.itemsize * 5 * elements))
    exact = plain_exact((), lambda t: formulas.slerp(t, SHARE))
    targets = ("interpolate",) if elements >= 1_000_000_000 else ()
    return _case(
        "slerp",
        device,
        {"elements": elements},
        dtype,
        make,
        exact,
        work,
        options={"t": SHARE},
        targets=targets,
    )


def _ema(device: str, tensors: list[int], dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        names = ("average", "new")
        return {
            f"{n}{i}": normal(s, generator=generator, dtype=dtype)
            for n in names
            for i, s in enumerate(tensors)
        }

    def exact(inputs: Tensors, dtype: torch.dtype) -> Tensors:
        average, new = _lists(inputs)
        return {"y": torch.cat([a.to(dtype).lerp(b.to(dtype), 1 - DECAY) for a, b in zip(average, new)])}

    elements = sum(tensors)
    work = Work(3.0 * elements, float(dtype.itemsize * 3 * elements))
    shape = {"tensors": len(tensors), "elements": elements}
    targets = ("interpolate",) if elements >= 500_000_000 else ()
    return _case("ema_", device, shape, dtype, make, exact, work, options={"decay": DECAY}, targets=targets)


def _lists(inputs: Tensors) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    count = len(inputs) // 2
    return [inputs[f"average{i}"] for i in range(count)], [inputs[f"new{i}"] for i in range(count)]


def averages(inputs: Tensors, update: Callable[[list[torch.Tensor], list[torch.Tensor]], object]) -> Prepared:
    """A variant of ema_: update(average, new) in place, on a copy of its own, which every call moves on from.

    What is checked is one update from the case's inputs, made apart.
    """
    average, new = _lists(inputs)
    own = [a.clone() for a in average]

    def outputs(_: object) -> Tensors:
        once = [a.clone() for a in average]
        update(once, new)
        return {"y": torch.cat(once)}

    return Prepared(lambda: update(own, new), outputs)


def _interpolated_linear(device: str, count: int, n: int, k: int, rows: int, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        return {
            "x": normal(rows, k, generator=generator, dtype=dtype),
            "stack": normal(count, n, k, generator=generator, dtype=dtype, scale=k**-0.5),
            "blend": blends("dirichlet", rows, count, generator),
        }

    work = Work(2.0 * rows * count * n * k, float(dtype.itemsize * (count * n * k + rows * (n + k))))
    exact = plain_exact((), formulas.interpolated_linear)
    shape = {"T": rows, "M": count, "N": n, "K": k}
    return _case("interpolated_linear", device, shape, dtype, make, exact, work)
