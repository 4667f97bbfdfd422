"""Every op in plain torch: what the torch and torch.compile variants run, and in float64 the truth.

Written out here rather than taken from clp_kernels, so that the comparison does not rest on what is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.case import Tensors, gradients, widened
from bench.core.memory import LOGITS


def multi_lora(t: Mapping[str, Tensor]) -> Tensors:
    """x (S, L, K) or (rows, K); gate (S or 1, R), or (rows, R)."""
    gate = t["gate"][:, None] if t["x"].dim() == 3 else t["gate"]
    h = (F.linear(t["x"], t["lora_a"]) * gate).to(t["x"].dtype)
    return {"y": F.linear(t["x"], t["weight"]) + F.linear(h, t["lora_b"])}


def multi_lora_addmm(t: Mapping[str, Tensor]) -> Tensors:
    """The same with the second product added in the BLAS: torch's best form."""
    gate = t["gate"][:, None] if t["x"].dim() == 3 else t["gate"]
    h = (F.linear(t["x"], t["lora_a"]) * gate).to(t["x"].dtype)
    y = F.linear(t["x"], t["weight"]).reshape(-1, t["weight"].shape[0])
    y = torch.addmm(y, h.reshape(-1, h.shape[-1]), t["lora_b"].t())
    return {"y": y.reshape(*t["x"].shape[:-1], -1)}


def multi_lora_loop(ranks: tuple[int, ...]) -> Callable[[Mapping[str, Tensor]], Tensors]:
    """One adapter after the other, each scaled per row, as a LoRA layer with several active adapters does it."""

    def forward(t: Mapping[str, Tensor]) -> Tensors:
        gate = t["gate"][:, None] if t["x"].dim() == 3 else t["gate"]
        y, start = F.linear(t["x"], t["weight"]), 0
        for rank in ranks:
            a, b = t["lora_a"][start : start + rank], t["lora_b"][:, start : start + rank]
            y = y + (F.linear(F.linear(t["x"], a), b) * gate[..., start : start + 1]).to(y.dtype)
            start += rank
        return {"y": y}

    return forward


def of_logits(
    logits: Tensor, ref_logits: Tensor | None, targets: Tensor, outputs: tuple[str, ...]
) -> Tensors:
    """logprob, entropy, ref_logprob, kl (policy || reference) of (T, V) logits, in float32 or wider."""
    wide = logits if logits.dtype is torch.float64 else logits.float()
    log_p = wide.log_softmax(-1)
    found = {}
    if "logprob" in outputs:
        found["logprob"] = log_p.gather(-1, targets[:, None])[:, 0]
    if "entropy" in outputs:
        found["entropy"] = -(log_p.exp() * log_p).sum(-1)
    if ref_logits is not None:
        log_q = (ref_logits if ref_logits.dtype is torch.float64 else ref_logits.float()).log_softmax(-1)
        if "ref_logprob" in outputs:
            found["ref_logprob"] = log_q.gather(-1, targets[:, None])[:, 0]
        if "kl" in outputs:
            found["kl"] = (log_p.exp() * (log_p - log_q)).sum(-1)
    return found


def token_statistics(
    outputs: tuple[str, ...], softcap: float | None = None
) -> Callable[[Mapping[str, Tensor]], Tensors]:
    """With all the logits: hidden (T, H), weight (V, H), targets (T,), ref_hidden (T, H) where an output needs it."""

    def capped(logits: Tensor) -> Tensor:
        if softcap is None:
            return logits
        wide = logits if logits.dtype is torch.float64 else logits.float()
        return softcap * torch.tanh(wide / softcap)

    def forward(t: Mapping[str, Tensor]) -> Tensors:
        logits = capped(t["hidden"] @ t["weight"].t())
        reference = None
        if "ref_hidden" in t:
            reference = capped(t["ref_hidden"] @ t["weight"].detach().t())
        return of_logits(logits, reference, t["targets"], outputs)

    return forward


def in_row_chunks(forward, wanted: tuple[str, ...], vocabulary: int, shared: str | None = None):
    """`exact` for statistics of rows whose logits may not fit: LOGITS of them at a time.

    Every row is computed as `forward` does it, and the rows' results are put end to end. The gradient of the input `shared` by
    all rows (the head) is the sum over the chunks, in float32 or wider.
    """

    def exact(inputs: Tensors, dtype: torch.dtype) -> Tensors:
        rows = inputs["targets"].shape[0]
        # On a CPU, float64 goes faster in pieces that the C library can use again.
        on_cpu = inputs["targets"].device.type == "cpu" and dtype is torch.float64
        step = max(1, ((1 << 22) if on_cpu else LOGITS) // vocabulary)
        whole = widened({shared: inputs[shared]}, dtype) if shared else {}
        pieces: list[Tensors] = []
        total = None
        for start in range(0, rows, step):
            t = {name: v[start : start + step] for name, v in inputs.items() if name != shared}
            t = {**widened(t, dtype), **whole}
            leaves = [t[name].detach().requires_grad_() for name in wanted]
            t.update(zip(wanted, leaves))
            with torch.set_grad_enabled(bool(leaves)):
                outputs = forward(t)
            found = {name: value.detach() for name, value in outputs.items()}
            if leaves:
                found.update(gradients(wanted, outputs, t, leaves))
            if (gradient := found.pop(f"d_{shared}", None)) is not None:
                wide = gradient if dtype is torch.float64 else gradient.float()
                total = wide if total is None else total.add_(wide)
            pieces.append(found)
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        if total is not None:
            joined[f"d_{shared}"] = total.to(dtype)
        return joined

    return exact


def draw(logits: Tensor, temperature: float) -> Tensors:
    """One token a row, and its log-prob."""
    log_p = (logits.float() / temperature).log_softmax(-1)
    tokens = torch.multinomial(log_p.exp(), 1)
    return {"tokens": tokens[:, 0], "logprob": log_p.gather(-1, tokens)[:, 0]}


def draw_truncated(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> Tensors:
    """One token a row from what top_k, top_p and min_p leave; its log-prob without them."""
    scaled = logits.float() / temperature
    log_p = scaled.log_softmax(-1)
    values, order = scaled.sort(-1, descending=True)
    probabilities = values.softmax(-1)
    keep = torch.ones_like(values, dtype=torch.bool)
    if top_k is not None:
        keep[:, top_k:] = False
    if top_p is not None:
        inside = probabilities.where(keep, 0.0)
        inside = inside / inside.sum(-1, keepdim=True)
        keep &= inside.cumsum(-1) - inside < top_p
    if min_p is not None:
        keep &= probabilities >= min_p * probabilities[:, :1]
    place = torch.multinomial(probabilities.where(keep, 0.0), 1)
    tokens = order.gather(-1, place)
    return {"tokens": tokens[:, 0], "logprob": log_p.gather(-1, tokens)[:, 0]}


def interpolate(t: Mapping[str, Tensor]) -> Tensors:
    """sum_i weights_i stack_i"""
    return {"y": torch.tensordot(t["weights"].to(t["stack"].dtype), t["stack"], 1)}


def slerp(t: Mapping[str, Tensor], share: float) -> Tensors:
    """Along the great circle between the directions of a and b: (sin((1-t) w) a + sin(t w) b) / sin w, cos w = a.b / |a||b|."""
    a, b = t["a"], t["b"]
    wide = torch.promote_types(a.dtype, torch.float32)
    flat_a, flat_b = a.reshape(-1).to(wide), b.reshape(-1).to(wide)
    cosine = (flat_a @ flat_b) / (flat_a.norm() * flat_b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    left, right = torch.sin((1 - share) * angle) / angle.sin(), torch.sin(share * angle) / angle.sin()
    return {"y": (left * a + right * b).to(a.dtype)}


def interpolated_linear(t: Mapping[str, Tensor]) -> Tensors:
    """y = sum_i blend_i (x W_i^T): x (rows, K), stack (M, N, K), blend (rows, M)."""
    every = torch.einsum("rk,mnk->rmn", t["x"], t["stack"])
    return {"y": (every * t["blend"][..., None].to(every.dtype)).sum(1)}
