"""What `python -m bench tune` measures: a kernel at a shape, with everything that it might take there instead of its default.

A trial is a Case (inputs, float64 truth) whose variants are the choices of a Tunable of clp_kernels.triton_kernels. Its shape
is the entry of the table that it becomes: the sizes that the choice depends on. `trials` gives them in the order in which they
are measured: the targets' shapes first, for every kernel its tiles before the choices between kernels that rest on them.

Estimates only order the candidates, and leave out what cannot win. They assume of a device what is below.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import clp_kernels
import torch
import torch.nn.functional as F
import triton
from clp_kernels.multi_lora import merged_weight
from clp_kernels.prefix_layout import PrefixLayout
from clp_kernels.reference import prefix_attention as reference_attention
from clp_kernels.tensor_lists import Blends
from clp_kernels.token_stats import Head, Rows, coefficients
from clp_kernels.triton_kernels import (
    base_product,
    head_logits,
    interpolated_linear,
    interpolation,
    launch,
    low_rank,
    multi_lora,
    prefix_attention,
    products,
    sampling,
    token_stats,
    tuning,
)
from clp_kernels.triton_kernels import multi_lora_strategy as strategy
from torch import Tensor

from bench.cases import formulas
from bench.cases import interpolate as weight_space
from bench.cases import sampling as drawing
from bench.cases.models import MODELS, integers, normal
from bench.core.case import Case, Tensors, Work, plain_exact

# For estimates: an H100 or H200 (132 multiprocessors, 227 KB of shared memory each), 790 TFLOP/s of 16-bit products, 64 bytes
# a clock from L2 to each multiprocessor at 1.7 GHz, 4.3 TB/s, and about a microsecond from a load to its data.
_PROCESSORS, _SHARED, _WARPS = 132, 227 << 10, 64
_FLOPS, _L2, _MEMORY, _LATENCY = 790e12 / _PROCESSORS, 64 * 1.7e9, 4.3e12, 1e-6
HOPELESS = 3.0  # times the best estimate: not measured


@dataclass(frozen=True)
class Trial:
    """A case, and how its variants are made: call(inputs) gives named outputs, within forced(choice), a context manager.

    default           what is taken where nothing was measured
    inputs            named shapes, as `drawn` reads them; empty: the kernels are not compiled ahead of time
    estimate          choice -> seconds; None: in the order of the candidates
    between_kernels   the choice is one between kernels, whose tiles are to be measured first
    """

    case: Case
    tunable: tuning.Tunable
    call: Callable[[Tensors], Tensors]
    default: Any
    forced: Callable[[Any], Any]
    inputs: Mapping[str, tuple] = field(default_factory=dict)
    estimate: Callable[[Any], float] | None = None
    between_kernels: bool = False

    @property
    def family(self) -> str:
        return self.case.options["family"]

    def ranked(self) -> list[tuple[Any, float | None]]:
        """(choice, estimate): the default, and the others from the best estimate to the last that is not hopeless."""
        others = [c for c in self.tunable.candidates.get(self.family, ()) if c != self.default]
        if self.estimate is None:
            return [(choice, None) for choice in (self.default, *others)]
        seconds = {choice: self.estimate(choice) for choice in (self.default, *others)}
        kept = [c for c in sorted(others, key=seconds.get) if seconds[c] <= HOPELESS * min(seconds.values())]
        return [(choice, seconds[choice]) for choice in (self.default, *kept)]


def name_of(choice: Any) -> str:
    return choice if isinstance(choice, str) else str(tuple(choice))


def tile_seconds(
    tile: tuple,
    rows: int,
    columns: int,
    depth: int,
    size: int,
    splits: Callable[[int, int], int] | None = None,
) -> float:
    """Of a product: the longest of its FLOPs in waves of programs, its loads from L2 (or what is in flight) in as many, and its
    bytes of memory, and an eighth of the others, which it hides.

    splits(programs, steps) cuts the contraction.
    """
    tile = launch.Tile._make(tile)
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    parts = splits(programs, triton.cdiv(depth, tile.depth)) if splits else 1
    stage = (tile.rows + tile.columns) * tile.depth * size
    resident = max(1, min(_WARPS // tile.num_warps, _SHARED // (stage * tile.num_stages)))
    in_turn = triton.cdiv(programs * parts, _PROCESSORS * resident) * resident * triton.cdiv(depth, parts)
    rate = _FLOPS if size == 2 else _FLOPS / 13
    flight = stage * tile.num_stages * resident / _LATENCY
    terms = (
        in_turn * 2 * tile.rows * tile.columns / rate,
        in_turn * (tile.rows + tile.columns) * size / min(_L2, flight),
        (rows * depth + depth * columns + rows * columns) * size / _MEMORY,
    )
    return max(terms) + (sum(terms) - max(terms)) / 8


def both_seconds(tile: tuple, rows: int, columns: int, rank: int) -> float:
    """By bytes, as multi_lora_strategy.dy counts them; a tile whose block of the rank is too small cannot serve."""
    height, width, block, *_ = tile
    if block < rank:
        return float("inf")
    return (
        2 * rows * columns + 8 * rank * rows * columns * (1 / width + 1 / max(height, rows // 16))
    ) / _MEMORY


# Inputs are named shapes: (shape, dtype) or (shape, dtype, standard deviation); integers (shape, bound).
def drawn(inputs: Mapping[str, tuple], generator: torch.Generator) -> Tensors:
    made = {}
    for name, (shape, kind, *scale) in inputs.items():
        if isinstance(kind, int):
            made[name] = integers(kind, shape[0], generator)
        else:
            made[name] = normal(*shape, generator=generator, dtype=kind, scale=scale[0] if scale else 1.0)
    return made


def ahead(inputs: Mapping[str, tuple]) -> Tensors:
    """The inputs without memory: what a launch compiles does not depend on more."""
    return {
        name: torch.empty(shape, dtype=torch.int64 if isinstance(kind, int) else kind, device="meta")
        for name, (shape, kind, *_) in inputs.items()
    }


def _trial(
    tunable: tuning.Tunable,
    family: str,
    shape: tuple[int, ...],
    device: str,
    dtype: torch.dtype,
    inputs: Mapping[str, tuple],
    call: Callable[[Tensors], Tensors],
    exact: Callable[[Tensors, torch.dtype], Tensors],
    default: Any,
    outputs: tuple[str, ...] = ("y",),
    forced: Callable[[Any], Any] | None = None,
    estimate: Callable[[Any], float] | None = None,
    options: Mapping[str, Any] | None = None,
    between_kernels: bool = False,
    judge: Callable[[Tensors, Tensors], tuple[Tensors, Tensors]] | None = None,
) -> Trial:
    case = Case(
        group="tune", op=tunable.kernel, title=tunable.kernel, shape=dict(zip(tunable.sizes, shape)), dtype=dtype,
        device=device, make=partial(drawn, inputs), exact=exact, work=Work(), outputs=outputs,
        options={"family": family, **(options or {})}, judge=judge,
    )  # fmt: skip
    forced = forced or partial(tuning.force, tunable.kernel, family)
    default = default if isinstance(default, str) else tuple(default)
    return Trial(case, tunable, call, default, forced, inputs, estimate, between_kernels)


def _by_rows(tiles: Iterable[tuple], rows: int):
    return next(tile for most, tile in tiles if most is None or rows <= most)


def _layer(rows: int, n: int, k: int, rank: int, dtype: torch.dtype) -> dict[str, tuple]:
    return {
        "x": ((rows, k), dtype),
        "weight": ((n, k), dtype, k**-0.5),
        "s": ((rows, rank), dtype),
        "lora_b": ((n, rank), dtype, 0.1),
    }


def _layer_product(t: Mapping[str, Tensor]) -> Tensors:
    y = F.linear(t["x"], t["weight"])
    return {"y": torch.addmm(y, t["s"], t["lora_b"].t())}


def linear(device: str, family: str, rows: int, n: int, k: int, dtype: torch.dtype, rank: int = 48) -> Trial:
    """x W^T + s B^T; "tma across" is dY W + s A, as a layer of transposed weights, whose matrices are kept transposed."""
    across = family == "tma across"
    inputs = _layer(rows, n, k, rank, dtype)
    if across:
        inputs["weight"], inputs["lora_b"] = ((k, n), dtype, k**-0.5), ((rank, n), dtype, 0.1)

    def turned(t: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {**t, "weight": t["weight"].t(), "lora_b": t["lora_b"].t()} if across else t

    def call(t: Tensors) -> Tensors:
        t = turned(t)
        _expect(base_product.family(t["x"], t["weight"].t(), t["s"], t["lora_b"].t()), family.split()[0])
        return {"y": base_product.linear(t["x"], t["weight"].t(), t["s"], t["lora_b"].t(), None)}

    with tuning.installed({}):
        if family.startswith("tma"):
            meta = ahead({"x": inputs["x"]})["x"]
            default = base_product._described_tile(meta, n, not across)
        else:
            default = _by_rows(base_product._TILES[family], rows)
    return _trial(
        base_product.LINEAR, family, (rows, n, k), device, dtype, inputs, call,
        plain_exact((), lambda t: _layer_product(turned(t))), default,
        estimate=lambda tile: tile_seconds(tile, rows, n, k + rank, dtype.itemsize), options={"rank": rank},
    )  # fmt: skip


def _expect(found: str, family: str) -> None:
    if found != family:
        raise RuntimeError(
            f"on this device the operands are of the family {found!r}, the candidates are for {family!r}: measure it on a "
            f"device of {tuning.CANDIDATES_FOR}, or add candidates for this one"
        )


def _gate(rows: int, rank: int) -> dict[str, tuple]:
    """A gate row for each of 32 sequences, or of as many as divide the rows."""
    return {"gate": ((math.gcd(rows, 32), rank), torch.float32)}


def _per_row(t: Mapping[str, Tensor], rows: int) -> Tensor:
    return t["gate"].repeat_interleave(rows // t["gate"].shape[0], 0)


def skinny(device: str, family: str, rows: int, depth: int, rank: int, dtype: torch.dtype) -> Trial:
    inputs = {"x": ((rows, depth), dtype), "a": ((rank, depth), dtype, depth**-0.5), **_gate(rows, rank)}

    def call(t: Tensors) -> Tensors:
        h, scaled = (t["x"].new_empty(rows, rank) for _ in range(2))
        low_rank.skinny(t["x"], t["a"], t["gate"], None, raw=h, scaled=scaled)
        return {"h": h, "scaled": scaled}

    def exact(t: Mapping[str, Tensor]) -> Tensors:
        h = t["x"] @ t["a"].t()
        return {"h": h, "scaled": h * _per_row(t, rows)}

    return _trial(
        low_rank.SKINNY, family, (rows, depth, rank), device, dtype, inputs, call, plain_exact((), exact),
        _by_rows(low_rank._SKINNY[family], rows), ("h", "scaled"),
        estimate=lambda tile: tile_seconds(
            (tile[0], low_rank._rank_block(rank, tile[1]), *tile[2:]), rows, rank, depth, dtype.itemsize, low_rank._splits
        ),
    )  # fmt: skip


def rank_grad(device: str, family: str, rows: int, columns: int, rank: int, dtype: torch.dtype) -> Trial:
    inputs = {"x": ((rows, columns), dtype), "s": ((rows, rank), dtype)}
    return _trial(
        low_rank.RANK_GRAD, family, (rows, columns, rank), device, dtype, inputs,
        lambda t: {"y": low_rank.summed(low_rank.rank_grad(t["x"], t["s"], transposed=True))[0]},
        plain_exact((), lambda t: {"y": t["s"].t() @ t["x"]}), low_rank._RANK_GRAD[family],
        estimate=lambda tile: tile_seconds(
            (tile[0], low_rank._rank_block(rank, tile[1]), *tile[2:]), columns, rank, rows, dtype.itemsize, low_rank._splits
        ),
    )  # fmt: skip


def _dy_inputs(rows: int, n: int, rank: int, dtype: torch.dtype) -> dict[str, tuple]:
    return {
        "dy": ((rows, n), dtype), "lora_b": ((n, rank), dtype, 0.1), "h": ((rows, rank), dtype),
        **_gate(rows, rank),
    }  # fmt: skip


def _dy_exact(rows: int) -> Callable[[Mapping[str, Tensor]], Tensors]:
    def exact(t: Mapping[str, Tensor]) -> Tensors:
        gate = _per_row(t, rows)
        gated = (t["h"] * gate).to(t["h"].dtype)
        d_s = t["dy"] @ t["lora_b"]
        return {"d_b": t["dy"].t() @ gated, "scaled": d_s * gate, "product": d_s * t["h"]}

    return exact


_DY_OUTPUTS = ("d_b", "scaled", "product")


def both(device: str, family: str, rows: int, n: int, rank: int, dtype: torch.dtype) -> Trial:
    def call(t: Tensors) -> Tensors:
        scaled, product = torch.empty_like(t["h"]), torch.empty_like(t["h"], dtype=torch.float32)
        parts = low_rank.both(t["dy"], t["lora_b"], t["gate"], None, t["h"], scaled=scaled, product=product)
        [d_b] = low_rank.summed(parts)
        return {"d_b": d_b, "scaled": scaled, "product": product}

    return _trial(
        low_rank.BOTH, family, (rows, n, rank), device, dtype, _dy_inputs(rows, n, rank, dtype), call,
        plain_exact((), _dy_exact(rows)), _by_rows(low_rank._BOTH[family], rank), _DY_OUTPUTS,
        estimate=lambda tile: both_seconds(tile, rows, n, rank),
    )  # fmt: skip


def _head(t: Mapping[str, Tensor]) -> tuple[Head, Rows]:
    reference = t.get("ref_hidden")
    head = Head(
        t["hidden"], t["weight"], None, reference, None if reference is None else t["weight"], None, None
    )
    return head, Rows(
        t["targets"], t["hidden"].new_ones(t["hidden"].shape[0], dtype=torch.float32), None, 1.0, -100
    )


def _head_inputs(rows: int, vocabulary: int, width: int, kind: str, dtype: torch.dtype) -> dict[str, tuple]:
    found = {
        "hidden": ((rows, width), dtype), "weight": ((vocabulary, width), dtype, width**-0.5), "targets": ((rows,), vocabulary),
    }  # fmt: skip
    return {**found, "ref_hidden": ((rows, width), dtype)} if kind == "pair" else found


def _head_trial(
    tunable, family, rows, vocabulary, width, device, dtype, call, exact, outputs, inputs
) -> Trial:
    operands, kind = family.split()
    return _trial(
        tunable, family, (vocabulary, width), device, dtype, inputs, call, exact, head_logits._TILES[operands][kind], outputs,
        estimate=lambda tile: tile_seconds(
            (tile[0], tile[1] * (2 if kind == "pair" else 1), *tile[2:]), rows, vocabulary * (2 if kind == "pair" else 1),
            width, dtype.itemsize,
        ),
        options={"rows": rows},
    )  # fmt: skip


def head_forward(
    device: str, family: str, rows: int, vocabulary: int, width: int, dtype: torch.dtype
) -> Trial:
    kind = family.split()[1]
    outputs = ("logprob", "entropy") if kind == "single" else ("logprob", "ref_logprob", "entropy", "kl")

    def call(t: Tensors) -> Tensors:
        found, _ = token_stats.linear_forward(*_head(t), frozenset(outputs), None)
        return {name: value for name, value in zip(clp_kernels.token_stats.OUTPUTS, found) if name in outputs}

    exact = formulas.in_row_chunks(formulas.token_statistics(outputs), (), vocabulary, shared="weight")
    inputs = _head_inputs(rows, vocabulary, width, kind, dtype)
    return _head_trial(
        head_logits.FORWARD, family, rows, vocabulary, width, device, dtype, call, exact, outputs, inputs
    )


def head_gradient(
    device: str, family: str, rows: int, vocabulary: int, width: int, dtype: torch.dtype
) -> Trial:
    """One block of d(loss)/d(logits): `rows` rows, the first chunk of the vocabulary, as the backward pass makes it."""
    kind = family.split()[1]
    name = "logprob" if kind == "single" else "kl"
    chunk = min(token_stats._chunk(vocabulary), vocabulary)
    inputs = {**_head_inputs(rows, vocabulary, width, kind, dtype), f"grad_{name}": ((rows,), torch.float32)}
    # SAVED rows of statistics are inputs of the kernel: made by its own forward pass, once for each set of inputs.
    kept: dict[int, Tensor] = {}

    def call(t: Tensors) -> Tensors:
        head, options = _head(t)
        key = t["hidden"].data_ptr()
        if key not in kept:
            saved = token_stats.linear_forward(head, options, frozenset((name,)), None)[1]
            kept[key] = (saved.contiguous(), coefficients({name: t[f"grad_{name}"]}, saved))
        out = t["hidden"].new_empty(rows, triton.cdiv(chunk, 16) * 16)[:, :chunk]
        logits = head_logits.HeadLogits(head, kind == "pair", head_logits.GRADIENT)
        logits.gradient(options, *kept[key], False, out, 0, 0)
        return {"d_logits": out}

    def exact(t: Tensors, dtype: torch.dtype) -> Tensors:
        wide = {n: v.to(dtype) if v.dtype.is_floating_point else v for n, v in t.items()}
        logits = (wide["hidden"] @ wide["weight"].t()).requires_grad_()
        reference = wide["ref_hidden"] @ wide["weight"].t() if kind == "pair" else None
        value = formulas.of_logits(logits, reference, t["targets"], (name,))[name]
        (gradient,) = torch.autograd.grad(value, logits, wide[f"grad_{name}"].to(value.dtype))
        return {"d_logits": gradient[:, :chunk].to(dtype)}

    return _head_trial(
        head_logits.GRADIENT,
        family,
        rows,
        vocabulary,
        width,
        device,
        dtype,
        call,
        exact,
        ("d_logits",),
        inputs,
    )


def product(device: str, family: str, rows: int, columns: int, depth: int, dtype: torch.dtype) -> Trial:
    """Of linear_logprob's backward pass: "tma" adds to d_hidden in float32, "tma across" makes d_weight."""
    across = family.endswith("across")
    inputs = {
        "x": ((depth, rows) if across else (rows, depth), dtype),
        "w": ((depth, columns), dtype, depth**-0.5),
    }

    def call(t: Tensors) -> Tensors:
        x = t["x"].t() if across else t["x"]
        # A fresh d_hidden, so that a call can be checked: zeroing it is a tenth of what the product moves.
        out = x.new_empty(rows, columns) if across else x.new_zeros(rows, columns, dtype=torch.float32)
        products.multiply(x, t["w"], out, add=not across)
        return {"y": out}

    with tuning.installed({}):
        default = products._described_tile(columns) if family.startswith("tma") else products._TILES[family]
    return _trial(
        products.PRODUCT, family, (columns, depth), device, dtype, inputs, call,
        plain_exact((), lambda t: {"y": (t["x"].t() if across else t["x"]) @ t["w"]}), default,
        estimate=lambda tile: tile_seconds(tile, rows, columns, depth, dtype.itemsize), options={"rows": rows},
    )  # fmt: skip


def mixed(device: str, family: str, rows: int, n: int, k: int, dtype: torch.dtype, models: int = 3) -> Trial:
    inputs = {
        "x": ((rows, k), dtype), "stack": ((models, n, k), dtype, k**-0.5), "blend": ((rows, models), torch.float32),
    }  # fmt: skip
    return _trial(
        interpolated_linear.MIXED, family, (rows, n, k), device, dtype, inputs,
        lambda t: {"y": interpolated_linear._launch_mixed(t["x"], t["stack"].mT, None, None, t["blend"], None)[0]},
        plain_exact((), formulas.interpolated_linear), _by_rows(interpolated_linear._TILES[family], rows),
        estimate=lambda tile: models * tile_seconds(tile, rows, n, k, dtype.itemsize), options={"models": models},
    )  # fmt: skip


def blend(device: str, models: int, elements: int, dtype: torch.dtype) -> Trial:
    """With so many elements that what the host prepares for a call takes no part of it."""
    inputs = {"stack": ((models, elements), dtype), "weights": ((models,), torch.float32)}

    def call(t: Tensors) -> Tensors:
        out = t["stack"].new_empty(elements)
        interpolation.blend(Blends([[t["stack"]]], t["weights"][None, None], [0], None, [out]))
        return {"y": out}

    truth = weight_space._interpolate(device, models, elements, dtype).exact
    return _trial(
        interpolation.BLEND, "plain", (models,), device, dtype, inputs, call, truth, interpolation._BLEND,
        options={"elements": elements},
    )  # fmt: skip


def sample(device: str, family: str, rows: int, vocabulary: int, dtype: torch.dtype) -> Trial:
    options = drawing.OPTIONS[1 if family == "whole" else 5]
    limits = [options.get(name, off) for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))]

    def call(t: Tensors) -> Tensors:
        made = [
            torch.empty(rows, dtype=kind, device=t["logits"].device) for kind in (torch.int64, torch.float32)
        ]
        seeds = torch.arange(rows, device=t["logits"].device)
        sampling.sample(t["logits"], seeds, options["temperature"], *limits, *made)
        return {"tokens": made[0], "logprob": made[1]}

    block = min(4096, max(16, triton.next_power_of_2(vocabulary)))
    default = (block, 8 if block >= 2048 else 4)
    judge = drawing.case(device, rows, vocabulary, dtype, options=options).judge
    return _trial(
        sampling.SAMPLE, family, (vocabulary,), device, dtype, {"logits": ((rows, vocabulary), dtype, 3.0)}, call, None,
        default, ("logprob",), options={"rows": rows}, judge=judge,
    )  # fmt: skip


def attention(device: str, heads: int, key_heads: int, dim: int, groups: int, dtype: torch.dtype) -> Trial:
    layout = PrefixLayout.from_lengths(
        [300, *[128] * 8] * groups, [p for g in range(groups) for p in (-1, *[9 * g] * 8)]
    )
    inputs = {"q": ((layout.tokens, heads, dim), dtype)}
    inputs |= {name: ((layout.tokens, key_heads, dim), dtype) for name in ("k", "v")}

    def exact(t: Mapping[str, Tensor]) -> Tensors:
        q, k, v = (t[name].transpose(0, 1)[None] for name in ("q", "k", "v"))
        mask = reference_attention.allowed(layout.starts, layout.parents, None).to(q.device)
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return {"y": out[0].transpose(0, 1)}

    @contextlib.contextmanager
    def forced(choice: tuple):
        # Each choice is a compilation of its own; past its limit dynamo would run the rest uncompiled.
        with tuning.force("attention", "any", choice), torch._dynamo.config.patch(recompile_limit=64):
            yield

    return _trial(
        prefix_attention.ATTENTION, "any", (dim,), device, dtype, inputs,
        lambda t: {"y": prefix_attention.attention(t["q"], t["k"], t["v"], layout, dim**-0.5, None, None)},
        plain_exact((), exact), prefix_attention._DEFAULT, forced=forced,
        options={"heads": heads, "key heads": key_heads, "tokens": layout.tokens},
    )  # fmt: skip


def _between(tunable, family, shape, device, dtype, inputs, call, exact, default, outputs, forced) -> Trial:
    return _trial(
        tunable, family, shape, device, dtype, inputs, call, plain_exact((), exact), default, outputs, forced,
        between_kernels=True,
    )  # fmt: skip


def multi_lora_product(
    device: str, family: str, rows: int, n: int, k: int, rank: int, dtype: torch.dtype
) -> Trial:
    def call(t: Tensors) -> Tensors:
        w, b = t["weight"].t(), t["lora_b"].t()
        _expect(base_product.family(t["x"], w, t["s"], b), family)
        return {"y": multi_lora._product(t["x"], w, t["s"], b, None)}

    default = strategy.product(rows, k, rank, dtype, 9, family)
    return _between(
        strategy.PRODUCT, family, (rows, n, k, rank), device, dtype, _layer(rows, n, k, rank, dtype), call, _layer_product,
        default, ("y",), lambda choice: strategy.force(product=choice),
    )  # fmt: skip


def multi_lora_dy(device: str, family: str, rows: int, n: int, rank: int, dtype: torch.dtype) -> Trial:
    def call(t: Tensors) -> Tensors:
        scaled, product = torch.empty_like(t["h"]), torch.empty_like(t["h"], dtype=torch.float32)
        d_b, gated = multi_lora._low_rank_gradients(
            t["dy"], t["lora_b"], t["gate"], None, t["h"], True, scaled, product
        )
        if gated is not None:
            d_b = low_rank.rank_grad(t["dy"], gated, transposed=False)
        [d_b] = low_rank.summed(d_b)
        return {"d_b": d_b, "scaled": scaled, "product": product}

    inputs = _dy_inputs(rows, n, rank, dtype)
    meta = ahead(inputs)
    with tuning.installed({}):
        cut = low_rank.pieces_of_both(meta["dy"], meta["lora_b"])
        default = strategy.dy(rank, cut is not None, *((0, 0) if cut is None else cut[1:]), rows, n, dtype)
    return _between(
        strategy.DY, family, (rows, n, rank), device, dtype, inputs, call, _dy_exact(rows), default, _DY_OUTPUTS,
        lambda choice: strategy.force(dy=choice),
    )  # fmt: skip


def multi_lora_merge(device: str, rows: int, n: int, k: int, rank: int, dtype: torch.dtype) -> Trial:
    inputs = {
        "x": ((rows, k), dtype), "weight": ((n, k), dtype, k**-0.5), "lora_a": ((rank, k), dtype, k**-0.5),
        "lora_b": ((n, rank), dtype, 0.1), "gate": ((1, rank), torch.float32),
    }  # fmt: skip
    way: list[str] = []

    def call(t: Tensors) -> Tensors:
        if way[-1] == "merged":
            return {"y": F.linear(t["x"], merged_weight(t["weight"], t["lora_a"], t["lora_b"], t["gate"][0]))}
        factors = (t["lora_a"], t["lora_b"], t["gate"], None)
        return {"y": multi_lora.forward(t["x"], t["weight"], None, *factors, keep_h=False)[0]}

    @contextlib.contextmanager
    def forced(choice: str):
        way.append(choice)
        try:
            yield
        finally:
            way.pop()

    pays = clp_kernels.multi_lora.merge_pays(rows, n, k, rank, clp_kernels.multi_lora._INTENSITY)
    return _between(
        strategy.MERGE, "shared gate", (rows, n, k, rank), device, dtype, inputs, call, formulas.multi_lora,
        "merged" if pays else "factored", ("y",), forced,
    )  # fmt: skip


def trials(device: str, sizes: str) -> list[Trial]:
    """In the order of measuring."""
    return (
        tiny(device)
        if sizes == "tiny"
        else [trial for tier in (first, second, third) for trial in tier(device)]
    )


def tiny(device: str) -> list[Trial]:
    """A rehearsal: every kernel of `first` and some of the others, on a CPU with Triton's interpreter."""
    half, single = torch.float16, torch.float32
    return [
        linear(device, "tma", 80, 48, 64, half, 16),
        linear(device, "half", 16, 48, 64, half, 16),
        skinny(device, "half", 48, 64, 16, half),
        rank_grad(device, "half", 48, 64, 16, half),
        both(device, "half", 48, 64, 16, half),
        head_forward(device, "plain single", 8, 160, 16, single),
        head_gradient(device, "plain pair", 8, 160, 16, single),
        product(device, "plain", 16, 32, 32, single),
        mixed(device, "half", 16, 32, 32, half),
        blend(device, 2, 4000, single),
        sample(device, "whole", 2, 300, single),
        multi_lora_product(device, "tma", 80, 48, 64, 16, half),
        multi_lora_dy(device, "half", 48, 64, 16, half),
        multi_lora_merge(device, 48, 32, 32, 16, single),
    ]


def _chunk_of(vocabulary: int) -> int:
    return token_stats._chunk(vocabulary)


def _block_of(rows: int, width: int) -> int:
    """The rows of one block of linear_logprob's backward pass."""
    return token_stats._row_block(rows, width, torch.device("meta"))


def first(device: str) -> list[Trial]:
    """The shapes of the targets in bench/core/targets.py, all kernels."""
    half, rows, vocabulary, width = torch.bfloat16, 8192, 131072, 4096
    found = [
        linear(device, family, rows, side, side, half)
        for side in (4096, 896)
        for family in ("tma", "tma across")
    ]
    found += [
        head_forward(device, "tma single", rows, vocabulary, width, half),
        head_forward(device, "tma pair", rows, vocabulary, width, half),
        head_gradient(device, "tma single", _block_of(rows, width), vocabulary, width, half),
        product(device, "tma", _block_of(rows, width), width, _chunk_of(vocabulary), half),
    ]
    for side in (4096, 896):
        found += [
            skinny(device, "half", rows, side, 48, half),
            rank_grad(device, "half", rows, side, 48, half),
            both(device, "half", rows, side, 48, half),
        ]
    found += [both(device, "half", rows, side, 16, half) for side in (4096, 896)]
    found.append(blend(device, 3, 400_000_000, half))
    for side in (4096, 896):
        found.append(multi_lora_product(device, "tma", rows, side, side, 48, half))
        found += [multi_lora_dy(device, "half", rows, side, rank, half) for rank in (48, 16)]
    return found


def second(device: str) -> list[Trial]:
    """The models' other layers and heads, other numbers of rows and ranks, decoding."""
    half, rows = torch.bfloat16, 8192
    small, large = MODELS["Qwen2.5-0.5B"], MODELS["Qwen2.5-7B"]
    wide = [(m.intermediate, m.hidden) for m in (small, large)]
    found = []
    for up, down in wide:
        found += [linear(device, "tma", rows, n, k, half) for n, k in ((up, down), (down, up))]
        found += [linear(device, "tma across", rows, n, k, half) for n, k in ((up, down), (down, up))]
    for few in (256, 2048):
        found += [linear(device, "tma", few, side, side, half) for side in (4096, 896)]
    found += [linear(device, "half", few, side, side, half) for few in (16, 64) for side in (4096, 896)]
    found += [skinny(device, "half", few, 4096, 48, half) for few in (16, 64, 2048)]
    found += [
        skinny(device, "half", rows, large.intermediate, 48, half),
        skinny(device, "half", rows, 4096, 192, half),
    ]
    found += [
        rank_grad(device, "half", rows, n, rank, half)
        for n, rank in ((large.intermediate, 48), (4096, 16), (4096, 192))
    ]
    found += [both(device, "half", rows, large.intermediate, rank, half) for rank in (16, 48)]
    for model in (small, large):
        found += [
            head_forward(device, f"tma {kind}", 2048, model.vocabulary, model.hidden, half)
            for kind in ("single", "pair")
        ]
        found.append(
            head_gradient(
                device,
                "tma pair",
                min(2048, _block_of(2048, model.hidden)),
                model.vocabulary,
                model.hidden,
                half,
            )
        )
    found.append(product(device, "tma", 2048, small.hidden, _chunk_of(small.vocabulary), half))
    found.append(product(device, "tma across", 8192, 4096, 8192, half))
    found += [mixed(device, "half", few, 4096, 4096, half) for few in (8, 64, 2048)]
    found += [
        blend(device, models, elements, half) for models, elements in ((2, 600_000_000), (8, 200_000_000))
    ]
    found += [sample(device, family, 64, large.vocabulary, half) for family in ("whole", "truncated")]
    layers = [(n, k) for up, down in wide for n, k in ((up, down), (down, up))] + [
        (2048, 2048),
        (3584, 3584),
        (14336, 4096),
    ]
    found += [multi_lora_product(device, "tma", rows, n, k, 48, half) for n, k in layers]
    found += [
        multi_lora_product(device, "tma", count, side, side, rank, half)
        for side in (4096, 896)
        for count, rank in ((2048, 48), (256, 48), (rows, 16), (rows, 192))
    ]
    found += [multi_lora_dy(device, "half", rows, large.intermediate, rank, half) for rank in (16, 48)]
    found += [multi_lora_dy(device, "half", 2048, 4096, rank, half) for rank in (16, 48)]
    found += [multi_lora_dy(device, "half", rows, 4096, 32, half)]
    return found + [
        multi_lora_merge(device, count, n, k, 48, half)
        for n, k in ((4096, 4096), (896, 896), wide[1])
        for count in (2048, 8192, 32768)
    ]


def third(device: str) -> list[Trial]:
    """What is rarer: float32, ranks that no descriptor takes, attention (which inductor compiles)."""
    half, single, rows = torch.bfloat16, torch.float32, 8192
    found = [
        linear(device, "half", rows, 4096, 4096, half, 27),
        linear(device, "plain", 2048, 1024, 1024, single),
    ]
    found += [
        skinny(device, "plain", 2048, 1024, 48, single),
        rank_grad(device, "plain", 2048, 1024, 48, single),
    ]
    found += [head_forward(device, f"plain {kind}", 1024, 32000, 512, single) for kind in ("single", "pair")]
    found += [head_gradient(device, "plain single", 1024, 32000, 512, single)]
    found += [product(device, "plain", 1024, 512, _chunk_of(32000), single)]
    found.append(multi_lora_product(device, "plain", 2048, 1024, 1024, 48, single))
    return found + [attention(device, *heads, 4, half) for heads in ((14, 2, 64), (28, 4, 128))]
