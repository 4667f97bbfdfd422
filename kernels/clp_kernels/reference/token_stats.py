"""linear_logprob and logits_logprob in plain torch, with the full logits: the specification. Gradients are torch's own.

float64 inputs stay float64; the statistics of any other dtype are float32. Rows whose target is ignore_index give zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels.token_stats import HeadLoRA, TokenStats


def unsupported(**call) -> str | None:
    return None


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


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
    z = _scaled(_wide(logits), inv_temperature, softcap, logit_scale)
    log_p = z.log_softmax(-1)
    log_q = None
    if ref_logits is not None:
        log_q = _scaled(_wide(ref_logits.detach()), inv_temperature, softcap, logit_scale).log_softmax(-1)
    ignored = None
    if targets is not None:
        ignored = targets == ignore_index
        column = targets.masked_fill(ignored, 0)[:, None]

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
    logits = _wide(hidden @ weight.t())
    if bias is not None:
        logits = logits + _wide(bias)
    if lora is not None:
        logits = logits + ((_wide(hidden) @ _wide(lora.a).t()) * _wide(lora.gate)) @ _wide(lora.b).t()
    ref_logits = None
    if ref_hidden is not None:
        ref_logits = _wide(ref_hidden.detach() @ ref_weight.detach().t())
        if ref_bias is not None:
            ref_logits = ref_logits + _wide(ref_bias.detach())
    return logits_logprob(
        logits, targets, ref_logits, inv_temperature, softcap, logit_scale, asked, ignore_index
    )
