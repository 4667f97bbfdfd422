"""multi_lora_linear on GPUs: which kernels make up a forward and a backward pass.

    forward     h = x A^T and s = h * gate in one launch (low_rank.skinny); y = x W^T + s B^T + bias (base_product)
    backward    dS = dY B, s = dS * gate, dS * h, and dB = dY^T (h * gate), reading dY once or twice; dX = dY W + s A;
                dA = s^T x; d_gate = dS * h summed over the rows of each gate row

`multi_lora_strategy` decides, by shape, whether the base product is a Triton kernel that takes the rank as more columns of
its contraction, or torch's with the low rank added in place; how often dY is read; and whether what dX does not need (dA,
d_gate, dB where dY is read twice) runs on a stream of its own beside it. No atomics: the same call gives the
same bits. Inside `batch_invariant()` y and dX of a row do not depend on the number of rows, operands of one layout
provided (rows that do not start on 16 bytes are served by another kernel than those that do).

Masks on rows, columns and contraction; addresses in 64 bits; strides are arguments, so operands may be transposed or cut
out of larger ones. The tiles compile for sm_80, sm_90, sm_100 and gfx942 (tests/kernels/test_aot.py). On devices in
`tuned.py` they, and the choices between kernels, are measured ones.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from clp_kernels.triton_kernels import base_product, launch, low_rank
from clp_kernels.triton_kernels import multi_lora_strategy as strategy
from clp_kernels.triton_kernels.aot import AotSpec, recorded, recorded_choices
from clp_kernels.triton_kernels.launch import unsupported as unsupported


def _product(x: Tensor, w: Tensor, s: Tensor | None, b: Tensor, bias: Tensor | None) -> Tensor:
    """x w + s b + bias for x (M, K), w (K, N), s (M, R) dense or None, b (R, N)."""
    if not x.shape[0]:
        return x.new_empty((0, w.shape[1]))
    family = base_product.family(x, w, s, b)
    if _product_way(family, x, w, s, b) == "fused":
        return base_product.linear(x, w, s, b, None if bias is None else bias.contiguous(), family)
    # The base first: where s is zero, y is the frozen layer's to the last bit.
    y = F.linear(x, w.t(), bias)
    return y if s is None else y.addmm_(s, b)


def _product_way(family: str, x: Tensor, w: Tensor, s: Tensor | None, b: Tensor) -> str:
    """Whether the product is "fused" or "blas"; family as base_product.family has it."""
    (rows, depth), columns = x.shape, w.shape[1]
    rank = 0 if s is None else b.shape[0]
    measured = strategy.PRODUCT.choice(family, x, rows, columns, depth, rank)
    return strategy.product(rows, depth, rank, x.dtype, launch.major(x.device), family, measured)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Beside:
    """A side stream for launches that need what the current stream had when this was made, and nothing later.

    The current stream waits for them in `join`, before anything that they read or wrote may be freed. Memory that is allocated
    inside belongs to the side stream, and is used there again after the next fork alone, which waits for the current stream. So
    the allocator needs no `record_stream`, and a CUDA graph can capture the fork and the join.
    """

    def __init__(self, device: torch.device, way: str):
        self._stream = _side_stream(device) if way == "side" else None
        if self._stream is not None:
            self._fork = torch.cuda.current_stream(device).record_event()

    def __call__(self) -> contextlib.AbstractContextManager:
        if self._stream is None:
            return contextlib.nullcontext()
        self._stream.wait_event(self._fork)
        return torch.cuda.stream(self._stream)

    def join(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    gate_index: Tensor | None,
    keep_h: bool = True,
) -> tuple[Tensor, Tensor]:
    """As reference.multi_lora.forward."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # not -1: K may be 0
    rows, rank = flat.shape[0], lora_a.shape[0]
    h = x.new_empty((rows, rank)) if keep_h else x.new_empty(0)
    w, b = weight.t(), lora_b.t()
    if not (rows and rank):
        y = _product(flat, w, None, b, bias)
    else:
        scaled = x.new_empty((rows, rank))
        index = None if gate_index is None else gate_index.reshape(-1).contiguous()
        gate = gate.contiguous()
        family = base_product.family(flat, w, scaled, b)
        blas = _product_way(family, flat, w, scaled, b) == "blas"
        # Only a base product by itself leaves something to run beside it.
        way = strategy.stream(rows, w.shape[1], flat.shape[1], x.dtype, x.is_cuda) if blas else "same"
        beside = _Beside(x.device, way)
        y = F.linear(flat, weight, bias) if blas else None
        with beside():
            low_rank.skinny(flat, lora_a, gate, index, raw=h if keep_h else None, scaled=scaled)
        beside.join()
        if blas:
            y.addmm_(scaled, b)
        else:
            y = base_product.linear(flat, w, scaled, b, None if bias is None else bias.contiguous(), family)
    return y.view(*x.shape[:-1], weight.shape[0]), h


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    gate_index: Tensor | None,
    h: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """As reference.multi_lora.backward. Gradients of weight and bias, which are rarely asked for, are torch's own."""
    (rows, rank), in_features = h.shape, lora_a.shape[1]
    lead, dy = dy.shape[:-1], dy.reshape(rows, dy.shape[-1])
    flat = None if x is None else x.reshape(rows, in_features)
    index = None if gate_index is None else gate_index.reshape(-1).contiguous()
    gate = gate.contiguous()
    need_x, need_weight, need_bias, need_a, need_b, need_gate = needs
    # Where each gate row serves one row, dS * h is its gradient.
    alone = gate_index is None and gate.shape[0] == rows
    scaled = product = gated = d_a = d_b = d_gate = None
    grads = []
    if rows and rank:
        scaled = torch.empty_like(h) if need_x or need_a else None
        product = torch.empty_like(h, dtype=gate.dtype if alone else torch.float32) if need_gate else None
        d_b, gated = _low_rank_gradients(dy, lora_b, gate, index, h, need_b, scaled, product)
    way = strategy.stream(*dy.shape, in_features, dy.dtype, dy.is_cuda) if need_x else "same"
    beside = _Beside(dy.device, way)
    # dX is launched first: what runs beside it fills the multiprocessors that its last tiles leave idle.
    if need_x:
        grads.append(_product(dy, weight, scaled, lora_a, None).view(*lead, in_features))
    if need_weight:
        grads.append(dy.t() @ flat)
    if need_bias:
        grads.append(dy.sum(0))
    if rows and rank:
        with beside():
            if gated is not None:
                d_b = low_rank.rank_grad(dy, gated, transposed=False)
            d_a = low_rank.rank_grad(flat, scaled, transposed=True) if need_a else None
            d_gate = low_rank.group_sum(product, gate, index) if need_gate and not alone else None
            d_a, d_b, d_gate = low_rank.summed(d_a, d_b, d_gate)
        beside.join()
        d_gate = product if alone else d_gate
    for need, grad, like in ((need_a, d_a, lora_a), (need_b, d_b, lora_b), (need_gate, d_gate, gate)):
        if need:
            zeros = grad is None  # no rows, or no rank
            grads.append(torch.zeros_like(like, memory_format=torch.contiguous_format) if zeros else grad)
    return grads


def _low_rank_gradients(
    dy: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    index: Tensor | None,
    h: Tensor,
    need_b: bool,
    scaled: Tensor | None,
    product: Tensor | None,
) -> tuple[low_rank.Parts | None, Tensor | None]:
    """Fills scaled = dS * gate and product = dS * h, where they are not None, with dS = dY B. Where dB is needed: (dB, None),
    or (None, h * gate) if it is left to do as dY^T (h * gate)."""
    need_s = scaled is not None or product is not None
    if need_b and need_s:
        cut = low_rank.pieces_of_both(dy, lora_b)
        pieces = (0, 0) if cut is None else cut[1:]
        measured = strategy.DY.choice(launch.family(dy, lora_b), dy, *dy.shape, lora_b.shape[1])
        how = strategy.dy(lora_b.shape[1], cut is not None, *pieces, *dy.shape, dy.dtype, measured)
        if how == "once":
            return low_rank.both(dy, lora_b, gate, index, h, scaled=scaled, product=product), None
    gated = torch.empty_like(h) if need_b else None
    if need_s:
        low_rank.skinny(dy, lora_b.t(), gate, index, h=h, scaled=scaled, gated=gated, product=product)
    elif need_b:
        low_rank.apply_gate(h[None], gate, index, scaled=gated)
    return None, gated


def aot_specs() -> Iterator[AotSpec]:
    """Every tile of the tables, for every dtype, with and without what may be missing, dY read once and twice."""

    def example(
        rows: int, dtype: torch.dtype, size: int, rank: int, gate_dtype: torch.dtype, groups: int, indexed: bool, needs: str,
        dy: str | None,
    ):  # fmt: skip
        def make(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        def call():
            x, weight, bias, a, b = (
                make(rows, size),
                make(size, size),
                make(size) if indexed else None,
                make(rank, size),
                make(size, rank),
            )
            gate, index = (
                make(groups, rank, dtype=gate_dtype),
                make(rows, dtype=torch.int64) if indexed else None,
            )
            if dy == "once" and low_rank.pieces_of_both(make(rows, size), b) is None:
                return  # dY is read twice there
            with strategy.force(product="fused", dy=dy):
                y, h = forward(x, weight, bias, a, b, gate, index, keep_h=bool(needs))
                if needs:
                    wanted = [name in needs for name in ("x", "", "", "a", "b", "g")]
                    backward(y, x, weight, a, b, gate, index, h, wanted)

        return call

    def matrix(kernel: str, constants) -> bool:
        # wgmma takes 64 rows at a time.
        rows = constants.get("BLOCK_N" if kernel == "_rank_grad" else "BLOCK_M", 0)
        return kernel in ("_skinny", "_linear", "_linear_described", "_both", "_rank_grad") and rows >= 64

    half, single = torch.bfloat16, torch.float32
    sizes = ((1024, 48), (1024, 16), (1024, 32), (1024, 88), (896, 48), (1937, 27), (1024, 27), (1024, 0))
    for target, dtype, rows, (size, rank), gate_dtype, groups, indexed, (needs, dy) in itertools.product(
        ("sm_80", "sm_90", "sm_100", "gfx942"), (half, torch.float16, single), (16, 64, 1024, 2048, 8192), sizes,
        (None, single), (4, 0), (True, False),
        (("", None), ("x a b g", "once"), ("x a b g", "twice"), ("x", None), ("b", None), ("g", None)),
    ):  # fmt: skip
        if rank == 0 and not (gate_dtype and groups and needs in ("", "x")):
            continue
        rows -= size == 1937
        call = example(rows, dtype, size, rank, gate_dtype or dtype, groups or rows, indexed, needs, dy)
        label = f"{str(dtype)[6:]} {rows} rows of {size}, rank {rank}, gradients {needs or 'none'} {dy or ''}"
        yield from recorded(label, call, (target,), matrix if dtype is not single else lambda *_: False)

    def chosen(rank: int, needs: str, dy: str | None):
        return lambda family, _: example(
            8192, single if family == "plain" else half, 1024, rank, single, 4, True, needs, dy
        )

    # A rank of 27 cannot be described, 96 takes the widest block of the rank, 32 is within most of BOTH's.
    for rank in (27, 96):
        yield from recorded_choices(base_product.LINEAR, chosen(rank, "x a b g", "twice"), matrix)
    for tunable in (low_rank.SKINNY, low_rank.RANK_GRAD):
        yield from recorded_choices(tunable, chosen(96, "x a b g", "twice"), matrix)
    for rank in (16, 32, 64):
        yield from recorded_choices(low_rank.BOTH, chosen(rank, "x a b g", "once"), matrix)
