"""The ops of interpolation.py on GPUs: one launch for a list of tensors (two for inner products), no atomics.

Tensors are cut into chunks, one program each. A table on the device has a row per tensor, with its number of elements, the
number of its first chunk and its addresses; `owner` has the row of every chunk: 4 bytes for every 16384 elements, so that a
program finds its tensor with one load and not by search. The table comes from the host without the host waiting for it: from
pinned memory or, while a CUDA graph is captured, as arguments of launches, which the graph keeps, where it would read
memory of the host again at every replay.

A program walks its chunk block by block: whole blocks without masks, in 16-byte accesses where all addresses allow it, and
what is left of the tensor under a mask. Of G blends, each reads its block of the stack again, from cache after the first.
The floor is (M + 1) x size bytes (M + G for G blends). On devices in `tuned.py` the blocks of `blend` are measured ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from clp_kernels.backends import interpreting
from clp_kernels.reference import interpolation as reference
from clp_kernels.tensor_lists import Blends, Pairs, Sparse, dense, on_device
from clp_kernels.triton_kernels.aot import AotSpec, recorded, recorded_choices
from clp_kernels.triton_kernels.launch import cdiv
from clp_kernels.triton_kernels.tuning import Tunable

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_CHUNK = 16384  # elements a program
_BLOCK = 2048  # elements at once: 16 a thread, two 16-byte loads of each 2-byte tensor
_WARPS = 4


class Blocks(NamedTuple):
    chunk: int
    block: int
    num_warps: int


_BLEND = Blocks(_CHUNK, _BLOCK, _WARPS)
BLEND = Tunable(
    "blend",
    ("models",),
    {
        "plain": (
            _BLEND,
            (8192, 2048, 4),
            (32768, 2048, 4),
            (16384, 1024, 4),
            (16384, 4096, 8),
            (65536, 4096, 8),
        )
    },
    Blocks._make,
)
_SUMS = 1024  # partial sums at once


def unsupported(*, device: torch.device, dtype: torch.dtype, other: torch.dtype, **call) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"the Triton kernels take CUDA or ROCm tensors, not {device.type}"
    if dtype not in _TYPES or other not in _TYPES:
        return f"the Triton kernels take float32, float16 and bfloat16, not {dtype if dtype not in _TYPES else other}"
    return None


@triton.jit
def _address(entry, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a table's entry, as a pointer."""
    pointer = tl.load(entry).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _blend_block(
    row, weight, blend, at, mask, size, base_scale, M: tl.constexpr, BASE: tl.constexpr, MERGE: tl.constexpr,
    TYPE: tl.constexpr, OUT_TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one blend; weight points to the blend's M weights, at are its elements."""
    whole = tl.zeros((BLOCK,), tl.float32)
    above = tl.zeros((BLOCK,), tl.float32)
    below = tl.zeros((BLOCK,), tl.float32)
    weight_above = tl.zeros((BLOCK,), tl.float32)
    weight_below = tl.zeros((BLOCK,), tl.float32)
    for m in tl.static_range(M):
        w = tl.load(weight + m)
        v = w * tl.load(_address(row + 5 + m, TYPE, ALIGNED) + at, mask=mask).to(tl.float32)
        whole += v
        if MERGE != "sum":
            above += tl.where(v > 0, v, 0.0)
            below += tl.where(v < 0, v, 0.0)
            weight_above += tl.where(v > 0, tl.abs(w), 0.0)
            weight_below += tl.where(v < 0, tl.abs(w), 0.0)
    result = whole
    if MERGE != "sum":
        # A NaN is on neither side, but in the whole sum.
        result = tl.where(whole > 0, above, below)
        if MERGE == "consensus_mean":
            weight_taken = tl.where(whole > 0, weight_above, weight_below)
            result = result / tl.where(weight_taken > 0, weight_taken, 1.0)
        result = tl.where((whole > 0) | (whole < 0), result, whole * 0.0)
    if BASE:
        base = tl.load(_address(row + 3, OUT_TYPE, ALIGNED) + at, mask=mask).to(tl.float32)
        result += base_scale * base
    out = _address(row + 4, OUT_TYPE, ALIGNED) + blend * size
    if ALIGNED:
        out = tl.multiple_of(out, 16)
    tl.store(out + at, result.to(OUT_TYPE), mask=mask)


@triton.jit
def _blend(
    table,  # (items, 5 + M): elements, first chunk, row of weights, base, out, the addresses of the stack
    owner,  # (chunks,) int32: the item of each
    weights,  # (rows, G, M) float32
    G, base_scale,
    M: tl.constexpr, BASE: tl.constexpr, MERGE: tl.constexpr, TYPE: tl.constexpr, OUT_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    row = table + tl.load(owner + chunk).to(tl.int64) * (5 + M)
    size = tl.load(row)
    first = (chunk - tl.load(row + 1)) * CHUNK
    last = tl.minimum(first + CHUNK, size)
    weight = weights + tl.load(row + 2) * G * M
    whole = first + (last - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        at = start + tl.arange(0, BLOCK)
        for g in range(G):
            blend = tl.full((), g, tl.int64)
            _blend_block(
                row,
                weight + g * M,
                blend,
                at,
                None,
                size,
                base_scale,
                M,
                BASE,
                MERGE,
                TYPE,
                OUT_TYPE,
                ALIGNED,
                BLOCK,
            )
    if whole < last:
        at = whole + tl.arange(0, BLOCK)
        for g in range(G):
            blend = tl.full((), g, tl.int64)
            _blend_block(
                row, weight + g * M, blend, at, at < last, size, base_scale, M, BASE, MERGE, TYPE, OUT_TYPE,
                ALIGNED, BLOCK,
            )  # fmt: skip


@triton.jit
def _inner_products(
    table,  # (items, 2 + L + R): elements, first chunk, addresses
    owner,  # (chunks,) int32
    partial,  # (chunks, L * R) float32
    L: tl.constexpr, R: tl.constexpr, LEFT_TYPE: tl.constexpr, RIGHT_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, pair = tl.program_id(0), tl.program_id(1)
    row = table + tl.load(owner + chunk).to(tl.int64) * (2 + L + R)
    size = tl.load(row)
    first = (chunk - tl.load(row + 1)) * CHUNK
    last = tl.minimum(first + CHUNK, size)
    left = _address(row + 2 + pair // R, LEFT_TYPE, ALIGNED)
    right = _address(row + 2 + L + pair % R, RIGHT_TYPE, ALIGNED)
    sums = tl.zeros((BLOCK,), tl.float32)
    whole = first + (last - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(left + at).to(tl.float32) * tl.load(right + at).to(tl.float32)
    if whole < last:
        at = whole + tl.arange(0, BLOCK)
        mask = at < last
        x = tl.load(left + at, mask=mask, other=0.0).to(tl.float32)
        sums += x * tl.load(right + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(partial + chunk.to(tl.int64) * (L * R) + pair, tl.sum(sums, 0))


@triton.jit
def _add_up(
    table,  # as _inner_products has it
    partial,  # (chunks, pairs) float32
    out,  # (items, pairs) float64
    pairs, WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    item, pair = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = table + item * WIDTH
    chunks = (tl.load(row) + CHUNK - 1) // CHUNK
    mine = partial + tl.load(row + 1) * pairs + pair
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, chunks, BLOCK):
        c = start + tl.arange(0, BLOCK).to(tl.int64)
        sums += tl.load(mine + c * pairs, mask=c < chunks, other=0.0).to(tl.float64)
    tl.store(out + item * pairs + pair, tl.sum(sums, 0))


@triton.jit
def _hash(state, place):
    """The 53 upper bits of the place-th output of SplitMix64 started at state."""
    x = state.to(tl.uint64) + (place + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return (x ^ (x >> 31)) >> 11


@triton.jit
def _sparse_block(source, out, at, mask, state, kept, threshold, scale, TYPE: tl.constexpr):
    x = tl.load(source + at, mask=mask).to(tl.float32)
    if threshold is None:
        drop = _hash(state, at) >= kept.to(tl.uint64)
    else:
        drop = tl.abs(x) < threshold
    tl.store(out + at, tl.where(drop, 0.0, x * scale).to(TYPE), mask=mask)


@triton.jit
def _sparsify(
    table,  # (items, 5): elements, first chunk, from, out, state of the hash
    owner,  # (chunks,) int32
    thresholds,  # (items,) float32, or None: a random mask
    kept, scale,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    item = tl.load(owner + chunk).to(tl.int64)
    row = table + item * 5
    size = tl.load(row)
    first = (chunk - tl.load(row + 1)) * CHUNK
    last = tl.minimum(first + CHUNK, size)
    source, out = _address(row + 2, TYPE, ALIGNED), _address(row + 3, TYPE, ALIGNED)
    state = tl.load(row + 4)
    kept = tl.full((), kept, tl.int64)
    threshold = None
    if thresholds is not None:
        threshold = tl.load(thresholds + item)
    whole = first + (last - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        _sparse_block(source, out, start + tl.arange(0, BLOCK), None, state, kept, threshold, scale, TYPE)
    if whole < last:
        at = whole + tl.arange(0, BLOCK)
        _sparse_block(source, out, at, at < last, state, kept, threshold, scale, TYPE)


@triton.jit
def _own(
    table,  # (items, WIDTH): elements, first chunk, ...
    owner,  # (chunks,) int32
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    row = table + item.to(tl.int64) * WIDTH
    chunks = (tl.load(row) + CHUNK - 1) // CHUNK
    mine = owner + tl.load(row + 1)
    for start in range(0, chunks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(mine + at, item, mask=at < chunks)


# One compilation for all numbers, whatever their size and whatever divides them.
@triton.jit(do_not_specialize=["at", "size", "a", "b", "c", "d", "e", "f", "g", "h"])
def _write(
    table,  # (size,) int64
    at: tl.int64, size: tl.int64,
    a: tl.int64, b: tl.int64, c: tl.int64, d: tl.int64, e: tl.int64, f: tl.int64, g: tl.int64, h: tl.int64,
):  # fmt: skip
    """Eight numbers, the arguments of the launch, to table[at : at + 8], as far as it goes."""
    here = table + at
    tl.store(here, a)
    tl.store(here + 1, b, mask=at + 1 < size)
    tl.store(here + 2, c, mask=at + 2 < size)
    tl.store(here + 3, d, mask=at + 3 < size)
    tl.store(here + 4, e, mask=at + 4 < size)
    tl.store(here + 5, f, mask=at + 5 < size)
    tl.store(here + 6, g, mask=at + 6 < size)
    tl.store(here + 7, h, mask=at + 7 < size)


def _chunks(sizes: Sequence[int], chunk: int = _CHUNK) -> list[int]:
    """The number of the first chunk of each item, and of all chunks."""
    return [0, *itertools.accumulate(cdiv(size, chunk) for size in sizes)]


def _table(rows: list[list[int]], device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _written(rows, device)
    return on_device(rows, torch.int64, device)


def _written(rows: list[list[int]], device: torch.device) -> Tensor:
    table = torch.empty((len(rows), len(rows[0])), dtype=torch.int64, device=device)
    values = [value for row in rows for value in row]
    for at in range(0, len(values), 8):
        eight = values[at : at + 8]
        _write[(1,)](table, at, len(values), *eight, *[0] * (8 - len(eight)), num_warps=1)
    return table


def _owner(table: Tensor, chunks: int, chunk: int = _CHUNK) -> Tensor:
    """(chunks,) int32: the item of each chunk."""
    owner = torch.empty(chunks, dtype=torch.int32, device=table.device)
    _own[(table.shape[0],)](table, owner, WIDTH=table.shape[1], CHUNK=chunk, BLOCK=_SUMS, num_warps=_WARPS)
    return owner


def _aligned(addresses: Sequence[int]) -> bool:
    return not any(address % 16 for address in addresses)


def blend(call: Blends) -> None:
    device = call.outs[0].device
    weights = call.weights.to(torch.float32).contiguous()
    _, blends, models = weights.shape
    alive: list[Tensor] = []
    sizes = [out.numel() // blends for out in call.outs]
    blocks = BLEND.choice("plain", call.stacks[0][0], models) or _BLEND
    firsts = _chunks(sizes, blocks.chunk)
    rows, addresses = [], []
    for p, (parts, out) in enumerate(zip(call.stacks, call.outs)):
        base = dense([call.bases[p][None]], alive)[0] if call.bases is not None else 0
        found = [base, out.data_ptr(), *dense(parts, alive)]
        addresses += found
        rows.append([sizes[p], firsts[p], call.rows[p], *found])
    # With several blends, all but the first start `elements` behind the address of out.
    aligned = _aligned(addresses) and (blends == 1 or not any(size % 16 for size in sizes))
    table = _table(rows, device)
    _blend[(firsts[-1],)](
        table,
        _owner(table, firsts[-1], blocks.chunk),
        weights,
        blends,
        float(call.base_scale),
        M=models,
        BASE=call.bases is not None,
        MERGE=call.merge,
        TYPE=_TYPES[call.stacks[0][0].dtype],
        OUT_TYPE=_TYPES[call.outs[0].dtype],
        ALIGNED=aligned,
        CHUNK=blocks.chunk,
        BLOCK=blocks.block,
        num_warps=blocks.num_warps,
    )


def inner_products(call: Pairs) -> Tensor:
    """As reference.interpolation.inner_products."""
    device = call.left[0][0].device
    left, right = call.counts()
    alive: list[Tensor] = []
    sizes = [parts[0][0].numel() for parts in call.left]
    firsts = _chunks(sizes)
    rows, addresses = [], []
    for p, (a, b) in enumerate(zip(call.left, call.right)):
        found = [*dense(a, alive), *dense(b, alive)]
        addresses += found
        rows.append([sizes[p], firsts[p], *found])
    pairs, chunks = left * right, firsts[-1]
    partial = torch.empty((chunks, pairs), dtype=torch.float32, device=device)
    out = torch.empty((len(sizes), left, right), dtype=torch.float64, device=device)
    table = _table(rows, device)
    _inner_products[(chunks, pairs)](
        table,
        _owner(table, chunks),
        partial,
        L=left,
        R=right,
        LEFT_TYPE=_TYPES[call.left[0][0].dtype],
        RIGHT_TYPE=_TYPES[call.right[0][0].dtype],
        ALIGNED=_aligned(addresses),
        CHUNK=_CHUNK,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    _add_up[(len(sizes), pairs)](
        table, partial, out, pairs, WIDTH=2 + left + right, CHUNK=_CHUNK, BLOCK=_SUMS, num_warps=_WARPS
    )
    return out


def thresholds(tensors: Sequence[Tensor], kept: Sequence[int]) -> Tensor:
    """As reference.interpolation.thresholds: torch's selection, on the device."""
    return reference.thresholds(tensors, kept)


def sparsify(call: Sparse) -> None:
    device = call.outs[0].device
    alive: list[Tensor] = []
    sizes = [out.numel() for out in call.outs]
    firsts = _chunks(sizes)
    rows, addresses = [], []
    for p, (tensor, out) in enumerate(zip(call.tensors, call.outs)):
        found = [dense([tensor[None]], alive)[0], out.data_ptr()]
        addresses += found
        rows.append([sizes[p], firsts[p], *found, call.states[p] if call.states is not None else 0])
    table = _table(rows, device)
    _sparsify[(firsts[-1],)](
        table,
        _owner(table, firsts[-1]),
        call.thresholds,
        call.kept,
        float(call.scale),
        TYPE=_TYPES[call.outs[0].dtype],
        ALIGNED=_aligned(addresses),
        CHUNK=_CHUNK,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )


def aot_specs() -> Iterator[AotSpec]:
    """Every dtype and merge for sm_90, the commonest for all generations."""
    generations = ("sm_80", "sm_90", "sm_100", "gfx942")

    def make(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def blends(dtype, out_dtype, models=3, count=1, base=False, merge="sum"):
        def call():
            items = range(2)
            weights = make(1, count, models, dtype=torch.float32)
            stacks = [[make(models, 64, 64, dtype=dtype)] for _ in items]
            bases = [make(64, 64, dtype=out_dtype) for _ in items] if base else None
            blend(
                Blends(
                    stacks,
                    weights,
                    [0, 0],
                    bases,
                    [make(count, 64, 64, dtype=out_dtype) for _ in items],
                    1.0,
                    merge,
                )
            )

        return call

    def pairs(dtype):
        def call():
            sides = [[make(2, 64, 64, dtype=dtype)]]
            inner_products(Pairs(sides, sides))

        return call

    def sparse(dtype, random):
        def call():
            tensor = make(64, 64, dtype=dtype)
            states, thresholds = ([1 << 40], None) if random else (None, make(1, dtype=torch.float32))
            sparsify(Sparse([tensor], [tensor], 1.5, states, 1 << 52, thresholds))

        return call

    half, single = torch.bfloat16, torch.float32
    yield from recorded(
        "a table in a graph", lambda: _written([[1, 16, 1 << 40]], torch.device("meta")), generations
    )
    yield from recorded("blend bfloat16", blends(half, half, base=True), generations)
    yield from recorded("blend float32, 4 blends", blends(single, single, count=4), generations)
    yield from recorded("blend 16 of bfloat16", blends(half, half, models=16, count=4), generations)
    yield from recorded("float32 average of bfloat16", blends(half, single, models=1, base=True), generations)
    for merge in ("consensus", "consensus_mean"):
        yield from recorded(f"{merge} bfloat16", blends(half, half, base=True, merge=merge), generations)
    for dtype in (half, single):
        yield from recorded(f"inner products {dtype}", pairs(dtype), generations)
        yield from recorded(f"random mask {dtype}", sparse(dtype, True), generations)
        yield from recorded(f"magnitude mask {dtype}", sparse(dtype, False), generations)
        for models in (2, 16):
            yield from recorded_choices(
                BLEND, lambda *_, d=dtype, m=models: blends(d, d, m, 4, True, "consensus_mean")
            )
