"""What a decode step has between its products, in plain torch: see `clp_kernels.decode_step`.

In float64 it is exact; in 16 bits norms and softmax are in float32, as transformers has them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unsupported(**call) -> str | None:
    return None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _normed(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return x if gain is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def embed(
    tokens: Tensor, embedding: Tensor, scale: float, gain: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    x = (scale * _wide(embedding[tokens])).to(embedding.dtype)
    return x, x if gain is None else _normed(_wide(x), gain, eps).to(x.dtype)


def add_norm(
    x: Tensor, y: Tensor, gain_y: Tensor | None, gain_n: Tensor | None, scale: float, eps: float
) -> Tensor:
    x.copy_(_wide(x) + scale * _normed(_wide(y), gain_y, eps))
    return x if gain_n is None else _normed(_wide(x), gain_n, eps).to(x.dtype)


def rope_and_store(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, prompt_lengths: Tensor,
    cos: Tensor, sin: Tensor, gains: tuple[Tensor, Tensor] | None, group: int, eps: float,
) -> None:  # fmt: skip
    position = prompt_lengths[torch.arange(len(q), device=q.device) // group] + lengths
    c, s = (_wide(table[position]).unsqueeze(1) for table in (cos, sin))
    rotary = cos.shape[1]

    def turned(x: Tensor, gain: Tensor | None) -> Tensor:
        x = _normed(_wide(x), gain, eps)
        part = x[..., :rotary]
        other = torch.cat([-part[..., rotary // 2 :], part[..., : rotary // 2]], -1)
        return torch.cat([part * c + other * s, x[..., rotary:]], -1)

    gain_q, gain_k = gains or (None, None)
    rows = torch.arange(len(q), device=q.device)
    q.copy_(turned(q, gain_q))
    keys[rows, :, lengths] = turned(k, gain_k).to(keys.dtype)
    values[rows, :, lengths] = v


def attend(
    q: Tensor, prompts: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], lengths: Tensor, prompt_lengths: Tensor,
    group: int, scale: float, softcap: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    rows, heads, _ = q.shape
    prompt = torch.arange(rows, device=q.device) // group
    before, width = prompt_lengths[prompt], prompts[0].shape[2]
    first, second = torch.arange(width, device=q.device), torch.arange(own[0].shape[2], device=q.device)
    there = torch.cat([first < before[:, None], second <= lengths[:, None]], 1)
    position = torch.cat([first.expand(rows, -1), before[:, None] + second], 1)
    seen = there if window is None else there & (position > (before + lengths)[:, None] - window)

    def every(of_prompt: Tensor, mine: Tensor) -> Tensor:
        both = torch.cat([_wide(of_prompt[prompt]), _wide(mine)], 2)
        # What is not there is not read: it may be anything.
        both = both.masked_fill(~there[:, None, :, None], 0.0)
        return both.repeat_interleave(heads // both.shape[1], 1)

    keys, values = (every(*pair) for pair in zip(prompts, own))
    z = scale * (_wide(q).unsqueeze(2) @ keys.mT).squeeze(2)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    shares = z.masked_fill(~seen[:, None], -torch.inf).softmax(-1).to(q.dtype)
    return (_wide(shares).unsqueeze(2) @ values).squeeze(2).to(q.dtype)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    function = F.silu if activation == "silu" else lambda x: F.gelu(x, approximate="tanh")
    return (function(_wide(gate)) * _wide(up)).to(gate.dtype)


def record(drawn: Tensor, logprob: Tensor, stop_ids: Tensor, into, rows: Tensor | None = None) -> None:
    rows = torch.arange(len(drawn), device=drawn.device) if rows is None else rows
    count, limit, last_place = into.count[rows], into.limit[rows], into.tokens.shape[1] - 1
    runs = count < limit
    at, after = count.clamp(max=last_place), count + runs
    ends = (drawn.unsqueeze(1) == stop_ids).any(1) | (drawn < 0)
    for buffer, new in ((into.tokens, drawn), (into.logprobs, logprob)):
        buffer[rows, at] = torch.where(runs, new, buffer[rows, at])
    into.limit[rows] = torch.where(runs & ends, after, limit)
    into.last[rows] = torch.where(runs, drawn.clamp_min(0), into.last[rows])
    into.lengths[rows] = torch.where(runs, count, into.lengths[rows])
    next_seed = into.seeds[rows, after.clamp(max=last_place)]
    into.seed[rows] = torch.where(runs & (after <= last_place), next_seed, into.seed[rows])
    into.count[rows] = after
