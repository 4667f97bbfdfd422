"""sample_tokens in plain torch: the specification. Masses are summed in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def unsupported(**call) -> str | None:
    return None


def uniforms_of(seeds: Tensor) -> Tensor:
    """splitmix64 of each seed, its upper 53 bits as a float64 in [0, 1)."""
    x = seeds + _int64(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _int64(0x94D049BB133111EB)
    return _shifted(x ^ _shifted(x, 31), 11).double() * 2.0**-53


def sample(
    logits: Tensor,
    draws: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    tokens: Tensor,
    logprob: Tensor,
) -> int | None:
    """Writes tokens and logprob, (rows,); returns the first row without a finite largest logit, or None.

    draws: float64 uniforms in [0, 1), or int64 seeds. The token of a bad row is -1 and its log-prob NaN; on a
    GPU they are not looked for.
    """
    rows, vocab = logits.shape
    if rows == 0:
        return None
    u = draws if draws.dtype.is_floating_point else uniforms_of(draws)
    z = logits if logits.dtype is torch.float64 else logits.float()
    largest = z.max(-1, keepdim=True).values
    bad = ~largest.isfinite()
    temperature, top_k, top_p, min_p = (_column(value, z) for value in (temperature, top_k, top_p, min_p))
    greedy = temperature <= 0
    temperature = temperature.where(~greedy, 1.0)
    scaled = (z - largest).double() / temperature
    weight = scaled.exp()

    descending = z.sort(-1, descending=True).values
    kth = descending.gather(-1, torch.where(top_k > 0, top_k, vocab).long().clamp(max=vocab) - 1)
    threshold = torch.where((top_k > 0) & (top_k < vocab), kth, -torch.inf)
    mass = (
        ((descending - largest).double() / temperature).exp().where(descending >= threshold, 0.0).cumsum(-1)
    )
    reached = (mass >= top_p * mass[:, -1:]).int().argmax(-1, keepdim=True)
    threshold = threshold.maximum(descending.gather(-1, reached).where(top_p < 1, -torch.inf))
    threshold = threshold.maximum(largest + temperature * min_p.log())

    cumulative = weight.where(z >= threshold, 0.0).cumsum(-1)
    total = cumulative[:, -1:]
    # The second condition is for a product u * total that rounds up to the total.
    drawn = (
        ((cumulative > u.double()[:, None] * total) | (cumulative >= total)).int().argmax(-1, keepdim=True)
    )
    token = torch.where(greedy, z.argmax(-1, keepdim=True), drawn)
    log_prob = scaled.gather(-1, token) - weight.sum(-1, keepdim=True).log()
    tokens.copy_(token.masked_fill(bad, -1)[:, 0])
    logprob.copy_(log_prob.masked_fill(bad, torch.nan)[:, 0])
    if logits.device.type == "cpu" and bad.any():
        return int(bad.int().argmax())
    return None


def _column(value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(like.device)[:, None]
    dtype = torch.float32 if isinstance(value, float) else torch.int64
    return torch.full((like.shape[0], 1), value, dtype=dtype, device=like.device)


def _int64(unsigned: int) -> int:
    return unsigned - (1 << 64) if unsigned >> 63 else unsigned


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
