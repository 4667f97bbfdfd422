"""What a decode step of a Llama-like decoder has between its matrix products, each one launch: norms with the residual before
them, rotary embeddings with the cache, attention over a prompt's keys and a row's own, the gated activation.

    add_norm        x += s norm_2(y);  n = norm_1(x)                             (or x = s embedding[token])
    rope_and_store  q = rope(norm(q));  keys[row, :, length] = rope(norm(k));  values[row, :, length] = v
    attend          softmax(cap(s q [K_prompt ; K_own]^T)) [V_prompt ; V_own]    K_prompt is read by all rows of its group
    gated           f(gate) * up
    record          what a row has drawn, its end, and what its next step reads

Sums, norms and softmax in float32, results rounded once. A step is bound by the bandwidth of its products: what is here moves
a few rows and the cache, and is a question of launches. `attend` cuts a row's keys into pieces where rows and key heads are
fewer than multiprocessors (one piece inside `batch_invariant()`), and adds the pieces up in a launch of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from clp_kernels.backends import interpreting, is_batch_invariant
from clp_kernels.decode_step import Completions
from clp_kernels.triton_kernels import launch
from clp_kernels.triton_kernels.aot import AotSpec, recorded
from clp_kernels.triton_kernels.launch import cdiv, power_of_2

_KEYS = 64  # at once, of heads of 256 bytes or fewer; of larger ones as many as share the memory of those
_HEADS = 16  # rows of the smallest matrix product
_PIECES = 8  # of a row's keys, at most


def unsupported(*, device: torch.device, dtype: torch.dtype, **call) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"the Triton kernels take CUDA or ROCm tensors, not {device.type}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the Triton kernels take float32, float16 and bfloat16, not {dtype}"
    return None


@triton.jit
def _normed(x, gain, columns, inside, H, eps):
    result = x
    if gain is not None:
        scale = tl.rsqrt(tl.sum(x * x, 0) / H + eps)
        result = x * scale * tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    return result


@triton.jit
def _add_norm(
    x,  # (rows, H), read unless tokens are given, and written
    y,  # (rows, H) or None
    tokens,  # (rows,) int64 or None
    embedding,  # (V, H) or None
    gain_y, gain_n,  # (H,) or None
    n,  # (rows, H) or None
    H, scale, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    if tokens is not None:
        token = tl.load(tokens + row)
        total = scale * tl.load(embedding + token * H + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        total = tl.load(x + row * H + columns, mask=inside, other=0.0).to(tl.float32)
        if y is not None:
            added = tl.load(y + row * H + columns, mask=inside, other=0.0).to(tl.float32)
            total += scale * _normed(added, gain_y, columns, inside, H, eps)
    rounded = total.to(x.dtype.element_ty)
    tl.store(x + row * H + columns, rounded, mask=inside)
    if n is not None:
        normed = _normed(rounded.to(tl.float32), gain_n, columns, inside, H, eps)
        tl.store(n + row * H + columns, normed.to(n.dtype.element_ty), mask=inside)


@triton.jit
def _rope_and_store(
    q,  # (rows, Hq, D), in place
    k, v,  # (rows, Hkv, D)
    keys, values,  # (rows, Hkv, room, D)
    lengths, prompt_lengths,  # (rows,), (prompts,) int64
    cos, sin,  # (positions, rotary)
    gain_q, gain_k,  # (D,) or None
    Hq, Hkv, room, group, eps, D: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row)
    position = tl.load(prompt_lengths + row // group) + length
    d = tl.arange(0, BLOCK)
    inside = d < D
    if head >= Hq + Hkv:
        mine = head - Hq - Hkv
        value = tl.load(v + (row * Hkv + mine) * D + d, mask=inside)
        tl.store(values + ((row * Hkv + mine) * room + length) * D + d, value, mask=inside)
    else:
        source = q + (row * Hq + head) * D
        to = source
        if head >= Hq:
            source = k + (row * Hkv + head - Hq) * D
            to = keys + ((row * Hkv + head - Hq) * room + length) * D
        # Each element, and the one of the other half that it is turned with.
        half: tl.constexpr = ROTARY // 2
        other = tl.where(d < half, d + half, d - half)
        turned = d < ROTARY
        x = tl.load(source + d, mask=inside, other=0.0).to(tl.float32)
        x_other = tl.load(source + other, mask=turned, other=0.0).to(tl.float32)
        if gain_q is not None:
            scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
            gain = gain_q
            if head >= Hq:
                gain = gain_k
            x = x * scale * tl.load(gain + d, mask=inside, other=0.0).to(tl.float32)
            x_other = x_other * scale * tl.load(gain + other, mask=turned, other=0.0).to(tl.float32)
        c = tl.load(cos + position * ROTARY + d, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + position * ROTARY + d, mask=turned, other=0.0).to(tl.float32)
        result = x * c + tl.where(d < half, -x_other, x_other) * s
        # Both halves have been read by the whole program before either is written.
        tl.debug_barrier()
        tl.store(to + d, result.to(q.dtype.element_ty), mask=inside)


@triton.jit
def _attend(
    q,  # (rows, Hq, D)
    prompt_keys, prompt_values,  # (prompts, Hkv, width, D)
    keys, values,  # (rows, Hkv, room, D)
    lengths, prompt_lengths,  # (rows,), (prompts,) int64: the own keys but the last, those of prompts
    out,  # (rows, Hq, D), or (pieces, rows, Hq, D) float32 where there are several
    tops, sums,  # (pieces, rows, Hq) float32, or None
    rows, Hkv, width, room, group, scale, softcap, window, pieces,
    SHARED: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, head, piece = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    prompt = row // group
    before, own = tl.load(prompt_lengths + prompt), tl.load(lengths + row) + 1
    now = before + own - 1
    h, d, n = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    heads, inside = h < SHARED, d < D
    Hq = Hkv * SHARED
    at = (row * Hq + head * SHARED + h[:, None]) * D + d[None, :]
    mask = heads[:, None] & inside[None, :]
    queries = tl.load(q + at, mask=mask, other=0.0)
    prompt_offset = (prompt * Hkv + head) * width * D
    own_offset = (row * Hkv + head) * room * D
    prompt_blocks = tl.cdiv(before, BLOCK_N)
    blocks = prompt_blocks + tl.cdiv(own, BLOCK_N)
    each = tl.cdiv(blocks, pieces)
    first = each * piece
    last = tl.minimum(first + each, blocks)
    top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for block in range(first, last):
        of_prompt = block < prompt_blocks
        start = tl.where(of_prompt, block, block - prompt_blocks) * BLOCK_N
        end = tl.where(of_prompt, before, own)
        position = tl.where(of_prompt, 0, before) + start + n
        seen = (start + n < end) & (position > now - window)
        key_base, value_base = keys + own_offset, values + own_offset
        if of_prompt:
            key_base, value_base = prompt_keys + prompt_offset, prompt_values + prompt_offset
        place = (start + n).to(tl.int64) * D
        loaded = (start + n < end)[:, None] & inside[None, :]
        key = tl.load(key_base + place[:, None] + d[None, :], mask=loaded, other=0.0)
        z = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
        if softcap is not None:
            z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)
        z = tl.where(seen[None, :], z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, 1))
        # Where nothing was seen yet, there is no top to take off.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        e = tl.exp(z - safe[:, None])
        shrink = tl.exp(top - safe)
        value = tl.load(value_base + place[:, None] + d[None, :], mask=loaded, other=0.0)
        total = total * shrink + tl.sum(e, 1)
        acc = acc * shrink[:, None] + tl.dot(e.to(value.dtype), value, input_precision="ieee")
        top = higher
    if tops is None:
        tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + piece.to(tl.int64) * rows * Hq * D + at, acc, mask=mask)
        state = piece.to(tl.int64) * rows * Hq + row * Hq + head * SHARED + h
        tl.store(tops + state, top, mask=heads)
        tl.store(sums + state, total, mask=heads)


@triton.jit
def _add_pieces(
    partial,  # (pieces, rows * Hq, D) float32
    tops, sums,  # (pieces, rows * Hq) float32
    out,  # (rows * Hq, D)
    count, D, PIECES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    p, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    there, inside = p < PIECES, d < D
    top = tl.load(tops + p * count + at, mask=there, other=float("-inf"))
    weight = tl.where(top == float("-inf"), 0.0, tl.exp(top - tl.max(top, 0)))
    total = tl.sum(weight * tl.load(sums + p * count + at, mask=there, other=0.0), 0)
    place = (p[:, None] * count + at) * D + d[None, :]
    acc = tl.load(partial + place, mask=there[:, None] & inside[None, :], other=0.0)
    result = tl.sum(acc * weight[:, None], 0) / total
    tl.store(out + at * D + d, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated(gate, up, out, size, SILU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < size, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < size, other=0.0).to(tl.float32)
    if SILU:
        f = g * tl.sigmoid(g)
    else:  # GELU by tanh, and 1 + tanh(z) = 2 sigmoid(2z)
        f = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    tl.store(out + at, (f * u).to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _record(
    drawn, logprob,  # (n,) int64, float32
    stop_ids,  # (stops,) int64
    rows,  # (n,) int64, or None: the first n
    tokens, logprobs, seeds,  # (rows, room)
    count, limit, last, seed, lengths,  # (rows,)
    n, stops, room, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    row = i
    if rows is not None:
        row = tl.load(rows + i, mask=inside, other=0)
    before, end = tl.load(count + row, mask=inside, other=0), tl.load(limit + row, mask=inside, other=0)
    runs = inside & (before < end)
    token = tl.load(drawn + i, mask=inside, other=0)
    ends = token < 0
    for stop in range(stops):
        ends = ends | (token == tl.load(stop_ids + stop))
    after = before + 1
    at = row * room + before
    tl.store(tokens + at, token, mask=runs)
    tl.store(logprobs + at, tl.load(logprob + i, mask=inside, other=0.0), mask=runs)
    tl.store(limit + row, after, mask=runs & ends)
    tl.store(last + row, tl.maximum(token, 0), mask=runs)
    tl.store(lengths + row, before, mask=runs)
    more = runs & (after < room)
    tl.store(seed + row, tl.load(seeds + at + 1, mask=more, other=0), mask=more)
    tl.store(count + row, after, mask=runs)


def embed(
    tokens: Tensor, embedding: Tensor, scale: float, gain: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(x, n), both (rows, H): the embeddings of tokens (rows,), scaled; normed, or the same where there is no gain."""
    x = embedding.new_empty((tokens.shape[0], embedding.shape[1]))
    return x, _launch_add_norm(x, None, tokens, embedding, None, gain, scale, eps)


def add_norm(
    x: Tensor, y: Tensor, gain_y: Tensor | None, gain_n: Tensor | None, scale: float, eps: float
) -> Tensor:
    """x += scale * norm(y), in place, and returns norm(x), or x where there is no gain for it."""
    return _launch_add_norm(x, y, None, None, gain_y, gain_n, scale, eps)


def _launch_add_norm(x, y, tokens, embedding, gain_y, gain_n, scale, eps) -> Tensor:
    (rows, width), block = x.shape, power_of_2(x.shape[1])
    n = None if gain_n is None else torch.empty_like(x)
    _add_norm[(rows,)](
        x, y, tokens, embedding, gain_y, gain_n, n, width, scale, eps, BLOCK=block, num_warps=min(max(block // 512, 1), 16)
    )  # fmt: skip
    return x if n is None else n


def rope_and_store(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, prompt_lengths: Tensor,
    cos: Tensor, sin: Tensor, gains: tuple[Tensor, Tensor] | None, group: int, eps: float,
) -> None:  # fmt: skip
    """q (rows, Hq, D) is turned in place; k, v (rows, Hkv, D) go to keys, values (rows, Hkv, room, D) at lengths (rows,)."""
    rows, heads, size = q.shape
    kv_heads, room = keys.shape[1], keys.shape[2]
    gain_q, gain_k = gains or (None, None)
    _rope_and_store[(rows, heads + 2 * kv_heads)](
        q, k, v, keys, values, lengths, prompt_lengths, cos, sin, gain_q, gain_k, heads, kv_heads, room, group, eps,
        D=size, ROTARY=cos.shape[1], BLOCK=power_of_2(size), num_warps=1,
    )  # fmt: skip


def pieces_of(rows: int, kv_heads: int, device: torch.device) -> int:
    """Into how many pieces `attend` cuts a row's keys: about two programs for each multiprocessor."""
    if is_batch_invariant():
        return 1
    return max(1, min(_PIECES, 2 * launch.multiprocessors(device) // (rows * kv_heads)))


def attend(
    q: Tensor, prompts: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], lengths: Tensor, prompt_lengths: Tensor,
    group: int, scale: float, softcap: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    """(rows, Hq, D) of q (rows, Hq, D): prompts' keys and values (prompts, Hkv, width, D), of which prompt_lengths are there;
    rows' own (rows, Hkv, room, D), of which lengths + 1. Row r belongs to prompt r // group. window: how many keys a query
    sees, itself included, None for all."""
    rows, heads, size = q.shape
    kv_heads, width = prompts[0].shape[1:3]
    shared, pieces = heads // kv_heads, pieces_of(rows, kv_heads, q.device)
    out, tops, sums = torch.empty_like(q), None, None
    partial = out
    if pieces > 1:
        partial = q.new_empty((pieces, rows, heads, size), dtype=torch.float32)
        tops, sums = (q.new_empty((pieces, rows, heads), dtype=torch.float32) for _ in range(2))
    block_d = power_of_2(size)
    _attend[(rows, kv_heads, pieces)](
        q, *prompts, *own, lengths, prompt_lengths, partial, tops, sums, rows, kv_heads, width, own[0].shape[2], group, scale,
        softcap, (1 << 62) if window is None else window, pieces, SHARED=shared, D=size,
        BLOCK_H=max(_HEADS, power_of_2(shared)), BLOCK_D=max(16, block_d),
        BLOCK_N=max(16, min(_KEYS, _KEYS * 256 // (block_d * q.element_size()))), num_warps=4, num_stages=2,
    )  # fmt: skip
    if pieces > 1:
        _add_pieces[(rows * heads,)](
            partial, tops, sums, out, rows * heads, size, PIECES=pieces, BLOCK_P=power_of_2(pieces),
            BLOCK_D=block_d, num_warps=1,
        )  # fmt: skip
    return out


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """f(gate) * up, elementwise; activation: "silu" or "gelu_tanh"."""
    out = torch.empty_like(gate)
    _gated[(cdiv(gate.numel(), 1024),)](
        gate, up, out, gate.numel(), SILU=activation == "silu", BLOCK=1024, num_warps=4
    )
    return out


def record(drawn: Tensor, logprob: Tensor, stop_ids: Tensor, into, rows: Tensor | None = None) -> None:
    """As clp_kernels.decode_step.record."""
    n = drawn.shape[0]
    _record[(cdiv(n, 128),)](
        drawn, logprob, stop_ids, rows, into.tokens, into.logprobs, into.seeds, into.count, into.limit, into.last, into.seed,
        into.lengths, n, stop_ids.shape[0], into.tokens.shape[1], BLOCK=128, num_warps=4,
    )  # fmt: skip


def aot_specs() -> Iterator[AotSpec]:
    """The sizes of models of 0.5 to 9 billion parameters, with everything that may be there and without."""

    def example(dtype, rows, hidden, heads, kv_heads, size, whole):
        def make(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        def call():
            group, prompts = 8, rows // 8
            gain = make(hidden) if whole else None
            tokens, lengths, before = (make(n, dtype=torch.int64) for n in (rows, rows, prompts))
            embed(tokens, make(1000, hidden), 1.0, gain, 1e-6)
            add_norm(make(rows, hidden), make(rows, hidden), gain, gain, 1.0, 1e-6)
            q, kv = make(rows, heads, size), [make(rows, kv_heads, size) for _ in range(2)]
            own = [make(rows, kv_heads, 128, size) for _ in range(2)]
            tables = [make(512, size) for _ in range(2)]
            gains = (make(size), make(size)) if whole else None
            rope_and_store(q, *kv, *own, lengths, before, *tables, gains, group, 1e-6)
            cached = [make(prompts, kv_heads, 256, size) for _ in range(2)]
            attend(
                q, cached, own, lengths, before, group, 0.1, 30.0 if whole else None, 64 if whole else None
            )
            room = [make(rows, 128, dtype=d) for d in (torch.int64, torch.float32, torch.int64)]
            into = Completions(*room, *(make(rows, dtype=torch.int64) for _ in range(5)))
            record(
                tokens,
                make(rows, dtype=torch.float32),
                make(2, dtype=torch.int64),
                into,
                tokens if whole else None,
            )
            for activation in ("silu", "gelu_tanh"):
                gated(make(rows, 4 * hidden), make(rows, 4 * hidden), activation)

        return call

    models = {"0.5b": (896, 14, 2, 64), "7b": (3584, 28, 4, 128), "gemma-2-2b": (2304, 8, 4, 256)}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name, sizes in models.items():
            for rows in (8, 512):
                for whole in (True, False):
                    label = f"{name} {str(dtype)[6:]} {rows} rows{' with all' * whole}"
                    generations = ("sm_80", "sm_90", "sm_100", "gfx942")
                    yield from recorded(label, example(dtype, rows, *sizes, whole), generations)
