"""prefix_attention in plain torch with a dense (N, N) mask, forward and backward: the specification.

z = scale * q k^T      u = softcap * tanh(z / softcap), or z      p = exp(u - lse), 0 where masked      out = p v
dv = p^T d_out         du = p * (d_out v^T - sum_d d_out * out)   dz = du * (1 - (u / softcap)^2)
dq = scale * dz k      dk = scale * dz^T q                        summed over the query heads that share a key head for dk, dv

All of it in float32 or wider.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unsupported(**call) -> str | None:
    return None


def allowed(starts: Tensor, parents: Tensor, window: int | None) -> Tensor:
    """(N, N) bool: whether query i attends to key j."""
    lengths = starts.diff()
    sequence = torch.repeat_interleave(torch.arange(len(parents), device=starts.device), lengths)
    token = torch.arange(len(sequence), device=starts.device)
    parent = parents[sequence]
    mask = (sequence[:, None] == sequence) & (token[:, None] >= token) | (parent[:, None] == sequence)
    if window is not None:
        before = torch.where(parent >= 0, lengths[parent.clamp_min(0)], 0)  # tokens of the parent
        position = token - starts[sequence] + before
        mask &= position > position[:, None] - window
    return mask


def _scores(q, k, mask, scale, softcap) -> Tensor:
    """u (Hkv, Hq / Hkv, N, N), -inf where masked, of q (Hkv, Hq / Hkv, N, D) and k (Hkv, 1, N, D)."""
    z = scale * (q @ k.mT)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z.masked_fill_(~mask, -torch.inf)


def _by_key_head(tensor: Tensor, kv_heads: int) -> Tensor:
    """(N, H, D) as (Hkv, H / Hkv, N, D), float32 or wider."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.to(wide).unflatten(1, (kv_heads, tensor.shape[1] // kv_heads)).movedim(0, 2)


def _by_token(tensor: Tensor, like: Tensor) -> Tensor:
    """_by_key_head undone, in the dtype of `like`."""
    return tensor.movedim(2, 0).flatten(1, 2).to(like.dtype).contiguous()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    parents: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """(out (N, Hq, D), lse (N, Hq), the log of the sum of exponentials of each row's scores)."""
    mask = allowed(starts, parents, window).to(q.device)
    queries, keys, values = (_by_key_head(tensor, k.shape[1]) for tensor in (q, k, v))
    scores = _scores(queries, keys, mask, scale, softcap)
    lse = scores.logsumexp(-1, keepdim=True)
    out = scores.softmax(-1) @ values
    return _by_token(out, q), lse.movedim(2, 0).flatten(1).contiguous()


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    parents: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that `needs` asks for, of (q, k, v), in this order."""
    need_q, need_k, need_v = needs
    mask = allowed(starts, parents, window).to(q.device)
    queries, keys, values, d_rows = (_by_key_head(tensor, k.shape[1]) for tensor in (q, k, v, d_out))
    scores = _scores(queries, keys, mask, scale, softcap)
    p = torch.exp(scores - _by_key_head(lse[..., None], k.shape[1]))
    delta = (d_rows * _by_key_head(out, k.shape[1])).sum(-1, keepdim=True)
    dz = p * (d_rows @ values.mT - delta)
    if softcap is not None:
        dz = dz * (1 - (scores.masked_fill(~mask, 0) / softcap) ** 2)
    grads = []
    if need_q:
        grads.append(_by_token(scale * (dz @ keys), q))
    if need_k:
        grads.append(_by_token(scale * (dz.mT @ queries).sum(1, keepdim=True), k))
    if need_v:
        grads.append(_by_token((p.mT @ d_rows).sum(1, keepdim=True), v))
    return grads
