"""What a decode step of a Llama-like decoder has between its matrix products, one function for each launch.

    embed           x = s embedding[token];  n = norm(x)
    add_norm        x += s norm_2(y);  n = norm_1(x)
    rope_and_store  q = rope(norm(q));  keys[row, :, length] = rope(norm(k));  values[row, :, length] = v
    attend          softmax(cap(s q [K_prompt ; K_own]^T)) [V_prompt ; V_own]    K_prompt is read by all rows of its group
    gated           f(gate) * up

Triton serves them where it is there (on the CPU its interpreter, TRITON_INTERPRET=1), else plain torch. They write into
buffers that the caller keeps, have no gradients, and are no operators of torch.library: a step that calls them is captured in
a CUDA graph. Precision and launches: `clp_kernels.triton_kernels.decode_step`.
"""

from __future__ import annotations

import importlib

from torch import Tensor

from clp_kernels.backends import Implementation, forced_backend, interpreting, select

_TABLE = {
    "reference": "clp_kernels.reference.decode_step",
    "triton": "clp_kernels.triton_kernels.decode_step",
}


def _served(tensor: Tensor) -> Implementation:
    if interpreting() and forced_backend() is None:
        return importlib.import_module(_TABLE["triton"])
    return select("decode_step", _TABLE, tensor.device, dtype=tensor.dtype)


def embed(
    tokens: Tensor, embedding: Tensor, scale: float, gain: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(x, n), both (rows, H): the embeddings of tokens (rows,), scaled; normed, or the same where there is no gain."""
    return _served(embedding).embed(tokens, embedding, scale, gain, eps)


def add_norm(
    x: Tensor, y: Tensor, gain_y: Tensor | None, gain_n: Tensor | None, scale: float, eps: float
) -> Tensor:
    """x += scale * norm(y), in place, and returns norm(x), or x where there is no gain for it."""
    return _served(x).add_norm(x, y, gain_y, gain_n, scale, eps)


def rope_and_store(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, prompt_lengths: Tensor,
    cos: Tensor, sin: Tensor, gains: tuple[Tensor, Tensor] | None, group: int, eps: float,
) -> None:  # fmt: skip
    """q (rows, Hq, D) is turned in place; k, v (rows, Hkv, D) go to keys, values (rows, Hkv, room, D) at lengths (rows,).

    cos, sin (positions, rotary); gains of the norms of queries and keys, each (D,), or None.
    Row r belongs to prompt r // group.
    """
    _served(q).rope_and_store(q, k, v, keys, values, lengths, prompt_lengths, cos, sin, gains, group, eps)


def attend(
    q: Tensor, prompts: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], lengths: Tensor, prompt_lengths: Tensor,
    group: int, scale: float, softcap: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    """(rows, Hq, D) of q (rows, Hq, D): prompts' keys and values (prompts, Hkv, width, D), of which prompt_lengths are there;
    rows' own (rows, Hkv, room, D), of which lengths + 1. Row r belongs to prompt r // group. window: how many keys a query
    sees, itself included, None for all."""
    return _served(q).attend(q, prompts, own, lengths, prompt_lengths, group, scale, softcap, window)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """f(gate) * up, elementwise; activation: "silu" or "gelu_tanh"."""
    return _served(gate).gated(gate, up, activation)
