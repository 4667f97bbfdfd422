"""The operations of a Llama-like decode step between its matrix products, one function for each launch.

    embed           x = s embedding[token];  n = norm(x)
    add_norm        x += s norm_2(y);  n = norm_1(x)
    rope_and_store  q = rope(norm(q));  keys[row, :, length] = rope(norm(k));  values[row, :, length] = v
    attend          softmax(cap(s q [K_prompt ; K_own]^T)) [V_prompt ; V_own]    K_prompt is read by all rows of its group
    gated           f(gate) * up
    record          tokens[row, count] = the token drawn;  count += 1;  the row ends at a stop token or at its limit

Triton serves them if it is available (on the CPU as its interpreter, TRITON_INTERPRET=1), otherwise plain torch. The functions
write into the caller's buffers, have no gradients, and are no operators of torch.library, so that a CUDA graph can capture a
step that calls them. `clp_kernels.triton_kernels.decode_step` has the precision and the launches.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

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
    """(x, n), both (rows, H): the scaled embeddings of tokens (rows,), and their norm. Without a gain n is x."""
    return _served(embedding).embed(tokens, embedding, scale, gain, eps)


def add_norm(
    x: Tensor, y: Tensor, gain_y: Tensor | None, gain_n: Tensor | None, scale: float, eps: float
) -> Tensor:
    """x += scale * norm(y), in place. Returns norm(x), or x if the norm has no gain."""
    return _served(x).add_norm(x, y, gain_y, gain_n, scale, eps)


def rope_and_store(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, prompt_lengths: Tensor,
    cos: Tensor, sin: Tensor, gains: tuple[Tensor, Tensor] | None, group: int, eps: float,
) -> None:  # fmt: skip
    """Rotate q (rows, Hq, D) in place, and store k, v (rows, Hkv, D) in keys, values (rows, Hkv, room, D) at lengths (rows,).

    cos, sin (positions, rotary); gains of the norms of queries and keys, each (D,), or None.
    Row r belongs to prompt r // group.
    """
    _served(q).rope_and_store(q, k, v, keys, values, lengths, prompt_lengths, cos, sin, gains, group, eps)


def attend(
    q: Tensor, prompts: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], lengths: Tensor, prompt_lengths: Tensor,
    group: int, scale: float, softcap: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    """Attention (rows, Hq, D) of q (rows, Hq, D) over the prompt's keys and values and the row's own.

    The prompts' tensors are (prompts, Hkv, width, D), with prompt_lengths positions filled. The rows' own tensors are
    (rows, Hkv, room, D), with lengths + 1 positions filled. Row r belongs to prompt r // group.

    window: the number of keys that a query sees, itself included; None for all.
    """
    return _served(q).attend(q, prompts, own, lengths, prompt_lengths, group, scale, softcap, window)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """f(gate) * up, elementwise; activation: "silu" or "gelu_tanh"."""
    return _served(gate).gated(gate, up, activation)


@dataclass(frozen=True)
class Completions:
    """The tokens of rows that a step draws and reads by itself, at most `room` of each row. All are int64 but the log-probs.

    tokens, seeds (rows, room), logprobs (rows, room) float32: the tokens drawn, the seeds to draw them with, their log-probs.
    count, limit (rows,): how many were drawn, and how many may be. A row runs while count < limit <= room.
    last, seed, lengths (rows,): of the next step: the token that it reads, the seed that it draws with, and the tokens read
        before it.
    """

    tokens: Tensor
    logprobs: Tensor
    seeds: Tensor
    count: Tensor
    limit: Tensor
    last: Tensor
    seed: Tensor
    lengths: Tensor


def record(
    drawn: Tensor, logprob: Tensor, stop_ids: Tensor, into: Completions, rows: Tensor | None = None
) -> None:
    """Take the tokens drawn (n,) int64 and their log-probs (n,) float32 into the first n rows of `into`, or into `rows` (n,).

    For every row that runs, with c its count:
        tokens[c], logprobs[c] = drawn, logprob;   lengths = c;   last = max(drawn, 0);   count = c + 1
        seed = seeds[c + 1], if there is one
        limit = c + 1 if the token is one of stop_ids (k,), or negative (`sample_tokens` found no finite logit)
    Rows that do not run stay as they are.
    """
    _served(logprob).record(drawn, logprob, stop_ids, into, rows)
