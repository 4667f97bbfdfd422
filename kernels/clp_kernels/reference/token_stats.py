"""linear_logprob and logits_logprob in plain torch, with the full logits: the specification. Gradients are torch's own.

float64 inputs stay float64; products and statistics of any other dtype are float32. Rows whose target is ignore_index give
zeros, and pass gradients of zero, whatever they hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels.token_stats import Head, HeadLoRA, Rows, Sums, TokenStats


def unsupported(**call) -> str | None:
    return None


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _without_ignored(tensor: Tensor, ignored: Tensor | None) -> Tensor:
    """tensor (T, ...) with zeros for the ignored rows, which may hold NaN: 0 * NaN would be a gradient of NaN."""
    return tensor if ignored is None else tensor.masked_fill(ignored[:, None], 0)


def _scaled(logits: Tensor, inv_temperature: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z * inv_temperature.to(z.dtype)[:, None]


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q); a column with p = 0 adds nothing, to the gradient either."""
    masked = log_p == -torch.inf
    log_p, log_q = log_p.masked_fill(masked, 0), log_q.masked_fill(masked, 0)
    return (log_p.exp() * (log_p - log_q)).masked_fill(masked, 0).sum(-1)


def logits_logprob(
    logits: Tensor,
    targets: Tensor | None,
    ref_logits: Tensor | None,
    inv_temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
    asked: frozenset[str],
    ignore_index: int,
) -> TokenStats:
    """logits, ref_logits (T, V); targets, inv_temperature (T,)."""
    ignored = None
    if targets is not None:
        ignored = targets == ignore_index
        column = targets.masked_fill(ignored, 0)[:, None]

    def scaled(logits: Tensor) -> Tensor:
        return _scaled(_wide(_without_ignored(logits, ignored)), inv_temperature, softcap, logit_scale)

    z = scaled(logits)
    log_p = z.log_softmax(-1)
    log_q = None if ref_logits is None else scaled(ref_logits.detach()).log_softmax(-1)

    def entropy() -> Tensor:
        masked = log_p == -torch.inf
        safe = log_p.masked_fill(masked, 0)
        return -(safe.exp() * safe).masked_fill(masked, 0).sum(-1)

    formulas = {
        "logprob": lambda: log_p.gather(1, column)[:, 0],
        "entropy": entropy,
        "ref_logprob": lambda: log_q.gather(1, column)[:, 0],
        "kl": lambda: _divergence(log_p, log_q),
        "reverse_kl": lambda: _divergence(log_q, log_p),
        "lse": lambda: z.logsumexp(-1),
        "top1": lambda: z.detach().argmax(-1),
    }
    outputs = {name: formulas[name]() for name in asked}
    if ignored is not None:
        outputs = {name: value.masked_fill(ignored, 0) for name, value in outputs.items()}
    return TokenStats(**outputs)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    lora: HeadLoRA | None,
    targets: Tensor | None,
    inv_temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
    asked: frozenset[str],
    ignore_index: int,
) -> TokenStats:
    """hidden (T, H), weight (V, H); the rest as in logits_logprob."""
    ignored = None if targets is None else targets == ignore_index
    head = Head(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, lora)
    logits, ref_logits = _logits(head, ignored)
    return logits_logprob(
        logits, targets, ref_logits, inv_temperature, softcap, logit_scale, asked, ignore_index
    )


def _logits(head: Head, ignored: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The policy's and the reference's logits (T, V), before scale, softcap and temperature."""
    hidden = _wide(_without_ignored(head.hidden, ignored))
    logits = hidden @ _wide(head.weight).t()
    if head.bias is not None:
        logits = logits + _wide(head.bias)
    if head.lora is not None:
        a, b, gate = map(_wide, head.lora)
        logits = logits + ((hidden @ a.t()) * _without_ignored(gate, ignored)) @ b.t()
    ref_logits = None
    if head.ref_hidden is not None:
        ref_hidden = _without_ignored(head.ref_hidden.detach(), ignored)
        ref_logits = _wide(ref_hidden) @ _wide(head.ref_weight.detach()).t()
        if head.ref_bias is not None:
            ref_logits = ref_logits + _wide(head.ref_bias.detach())
    return logits, ref_logits


def linear_sums(head: Head, rows: Rows) -> tuple[Sums, Tensor]:
    """`Sums` of one shard of a vocabulary and the column of its largest z, (T,) each; the sums differentiable, m a constant.

    A shard may be empty: m = -inf, sums of 0, and a column of 0.
    """

    def maximum(z: Tensor) -> Tensor:
        return z.detach().amax(-1) if z.shape[1] else z.new_full((z.shape[0],), -torch.inf)

    def exponential(z: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """e^(z - m), z - m, and where z = -inf, which adds nothing, to the gradient either."""
        shifted = z - m.masked_fill(m.isinf(), 0)[:, None]
        return shifted.exp(), shifted, z == -torch.inf

    def total(value: Tensor, masked: Tensor) -> Tensor:
        return value.masked_fill(masked, 0).sum(-1)

    logits, ref_logits = _logits(head, None if rows.targets is None else rows.targets == rows.ignore_index)
    z_p = _scaled(logits, rows.inv_temperature, rows.softcap, rows.logit_scale)
    m_p = maximum(z_p)
    e, shifted, masked = exponential(z_p, m_p)
    is_target = torch.zeros_like(z_p, dtype=torch.bool)
    if rows.targets is not None:
        is_target = torch.arange(z_p.shape[1], device=z_p.device) == rows.targets[:, None]
    sums = Sums(
        m_p=m_p,
        s_p=e.sum(-1),
        a_p=total(e * shifted.masked_fill(masked, 0), masked),
        d_p=torch.zeros_like(m_p),
        m_q=None,
        s_q=None,
        d_q=None,
        t_p=total(z_p, ~is_target),
        t_q=None,
    )
    if ref_logits is not None:
        z_q = _scaled(ref_logits, rows.inv_temperature, rows.softcap, rows.logit_scale)
        m_q = maximum(z_q)
        f, _, ref_masked = exponential(z_q, m_q)
        sums = sums._replace(
            d_p=total(e * (z_p.masked_fill(masked, 0) - z_q.masked_fill(masked, 0)), masked),
            m_q=m_q,
            s_q=f.sum(-1),
            d_q=total(f * (z_q.masked_fill(ref_masked, 0) - z_p.masked_fill(ref_masked, 0)), ref_masked),
            t_q=total(z_q, ~is_target),
        )
    top1 = z_p.detach().argmax(-1) if z_p.shape[1] else torch.zeros_like(m_p, dtype=torch.int64)
    return sums, top1
