"""The loss of GRPO and its relatives from per-token log-probs, in plain torch, with the options of Liger's fused loss.

With l, l_old and l_ref the (B, T) log-probs of the policy, the sampler and the reference, m the mask and A the advantages (B,):

    r = exp(l - l_old), or with importance_sampling_level "sequence" exp(mean over m of l - l_old), (B, 1)

    grpo, bnpo, dr_grpo, dapo, luspo   f = -min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)
    cispo   f = -sg(min(r, epsilon_high)) A l                       sg: no gradient through it
    sapo    f = -A (4 / tau) sigmoid(tau (r - 1)),                  tau by the sign of A
    vespo   f = -sg(phi) A l,  log phi = lambda + k log w - lambda w, log w = sum over m of l - l_old (+ log vllm_is_ratio);
            k and lambda by the sign of A, logarithms clamped to [log 1e-8, 20] (per token to [-20, 20])

    f <- f * vllm_is_ratio (not vespo)
    f <- f + beta KL,  KL = exp(l_ref - l) - (l_ref - l) - 1, times r with use_bias_correction_kl

    grpo, sapo             mean over sequences of (sum m f / sum m)
    bnpo                   sum m f / sum m
    dr_grpo                sum m f / (B max_completion_length)
    dapo, cispo, vespo     sum m f / N,  N num_items_in_batch or sum m over all processes, per process
    luspo                  mean over all (padding too) of f times its sequence's sum m
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSSES = (*CLIPPED, "cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")
_LOWEST, _HIGHEST, _TOKEN = math.log(1e-8), 20.0, 20.0  # what vespo clamps logarithms to


@dataclass(frozen=True)
class GRPOObjective:
    """Options as the module's formulas name them. Raises ValueError for one that has no meaning."""

    loss_type: str = "dapo"
    beta: float = 0.04
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    importance_sampling_level: str = "token"
    max_completion_length: int | None = None
    use_bias_correction_kl: bool = False
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        def expect(fine: bool, name: str, expected: str) -> None:
            if not fine:
                raise ValueError(f"fused linear GRPO: {name} is {getattr(self, name)!r}; expected {expected}")

        sequence = self.importance_sampling_level == "sequence"
        expect(self.loss_type in LOSSES, "loss_type", f"one of {', '.join(LOSSES)}")
        expect(self.importance_sampling_level in LEVELS, "importance_sampling_level", " or ".join(LEVELS))
        expect(
            not (sequence and self.loss_type not in CLIPPED),
            "importance_sampling_level",
            f"token for {self.loss_type}",
        )
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            expect(getattr(self, name) > 0, name, "a positive number")
        expect(self.delta is None or self.delta > 0, "delta", "a positive number, or None for no bound")
        expect(self.loss_type != "dr_grpo" or self.max_completion_length is not None, "max_completion_length",
               "a number of tokens: dr_grpo divides by it")  # fmt: skip

    def __call__(
        self,
        logprob: Tensor,
        mask: Tensor,
        advantages: Tensor,
        *,
        old_logprob: Tensor | None = None,
        ref_logprob: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """-> the loss (), and without gradient its metrics (): the mean KL where beta is not 0, the share of clipped tokens.

        logprob (B, T) float32, mask (B, T), advantages (B,); old_logprob and ref_logprob (B, T), None: logprob's own values;
        vllm_is_ratio (B, T), (B, 1) or (B,).
        """
        advantages = advantages[:, None]
        old_logprob = logprob.detach() if old_logprob is None else old_logprob.float()
        ref_logprob = logprob.detach() if ref_logprob is None else ref_logprob.float()
        if vllm_is_ratio is not None and vllm_is_ratio.dim() == 1:
            vllm_is_ratio = vllm_is_ratio[:, None]
        log_ratio = logprob - old_logprob
        if self.importance_sampling_level == "sequence":
            ratio = ((log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp()
        else:
            ratio = log_ratio.exp()
        if self.loss_type == "vespo":
            phi = self._phi(log_ratio.detach(), mask, advantages, vllm_is_ratio)
            loss = -phi * advantages * logprob
        else:
            loss = self._surrogate(ratio, advantages, logprob)
            if vllm_is_ratio is not None:
                loss = loss * vllm_is_ratio
        tokens = mask.sum().clamp(min=1)
        metrics = []
        if self.beta != 0:
            difference = ref_logprob - logprob
            kl = difference.expm1() - difference
            kl = kl * ratio if self.use_bias_correction_kl else kl
            loss = loss + self.beta * kl
            metrics.append((kl.detach() * mask).sum() / tokens)
        metrics.append((self._clipped(ratio.detach(), advantages) * mask).sum() / tokens)
        return self._reduced(loss, mask, num_items_in_batch), tuple(metrics)

    def _surrogate(self, ratio: Tensor, advantages: Tensor, logprob: Tensor) -> Tensor:
        if self.loss_type == "cispo":
            return -ratio.detach().clamp(max=self.epsilon_high) * advantages * logprob
        if self.loss_type == "sapo":
            tau = _by_sign(advantages > 0, self.sapo_temperature_pos, self.sapo_temperature_neg)
            return -advantages * (4 / tau) * (tau * (ratio - 1)).sigmoid()
        bounded = ratio if self.delta is None else ratio.clamp(max=self.delta)
        within = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        return -torch.minimum(bounded * advantages, within * advantages)

    def _phi(
        self, log_ratio: Tensor, mask: Tensor, advantages: Tensor, vllm_is_ratio: Tensor | None
    ) -> Tensor:
        log_w = (log_ratio.clamp(-_TOKEN, _TOKEN) * mask).sum(1, keepdim=True)
        if vllm_is_ratio is not None:
            log_w = log_w + vllm_is_ratio.log().clamp(_LOWEST, _HIGHEST).sum(1, keepdim=True)
        log_w = log_w.clamp(_LOWEST, _HIGHEST)
        k = _by_sign(advantages >= 0, self.vespo_k_pos, self.vespo_k_neg)
        rate = _by_sign(advantages >= 0, self.vespo_lambda_pos, self.vespo_lambda_neg).clamp(min=1e-4)
        return (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def _clipped(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        if self.loss_type in ("sapo", "vespo"):
            return torch.zeros_like(ratio)
        if self.loss_type == "cispo":
            return ((ratio > self.epsilon_high) & (advantages > 0)).to(ratio.dtype)
        below = (ratio < 1 - self.epsilon_low) & (advantages < 0)
        return (below | ((ratio > 1 + self.epsilon_high) & (advantages > 0))).to(ratio.dtype)

    def _reduced(self, loss: Tensor, mask: Tensor, num_items_in_batch: float | Tensor | None) -> Tensor:
        lengths = mask.sum(1, keepdim=True)
        if self.loss_type == "luspo":
            return (loss * lengths).mean()
        total = loss * mask
        if self.loss_type in ("grpo", "sapo"):
            return (total.sum(1, keepdim=True) / lengths.clamp(min=1)).mean()
        if self.loss_type == "bnpo":
            return total.sum() / mask.sum().clamp(min=1)
        if self.loss_type == "dr_grpo":
            return total.sum() / (mask.shape[0] * self.max_completion_length)
        return total.sum() / _tokens_per_process(mask, num_items_in_batch)


def _by_sign(positive: Tensor, yes: float, no: float) -> Tensor:
    return torch.where(positive, yes, no)


def _tokens_per_process(mask: Tensor, num_items_in_batch: float | Tensor | None) -> Tensor:
    """num_items_in_batch, or the tokens of all processes' masks, over the number of processes; at least 1."""
    distributed = dist.is_available() and dist.is_initialized()
    if num_items_in_batch is not None:
        tokens = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
    else:
        tokens = mask.to(torch.float32).sum()
        if distributed:
            dist.all_reduce(tokens)
    return (tokens / (dist.get_world_size() if distributed else 1)).clamp(min=1)
