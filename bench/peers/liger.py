"""Liger: its chunked selective log-prob (plain torch, what its GRPO loss uses) and its fused linear cross-entropy (Triton).

The cross-entropy computes its gradient in the forward pass, for an upstream gradient that is the same for all tokens; with
one of its own for every token, as a policy gradient has, the check says what comes out.
"""

from __future__ import annotations

import functools

import torch

from bench.core.case import Case, Prepare, Prepared, Refused, Tensors, differentiated
from bench.core.environment import why_not_importable

NAME = "liger"
PACKAGE = "liger-kernel"


def unavailable(device: str) -> str | None:
    return why_not_importable("liger_kernel.chunked_loss.fused_linear_ppo")


def linear_logprob(case: Case) -> dict[str, Prepare]:
    if case.outputs != ("logprob",):
        raise Refused("gives the log-prob alone")
    if case.options.get("softcap") is not None:
        raise Refused("its chunked log-prob has no softcap")
    variants = {f"{NAME}, fused cross-entropy": _fused}
    from liger_kernel.chunked_loss import fused_linear_ppo

    function = getattr(fused_linear_ppo, "_ChunkedSelectiveLogProbFunction", None)
    if function is not None:
        chunk = fused_linear_ppo._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE

        def forward(t: Tensors) -> Tensors:
            return {"logprob": function.apply(t["hidden"], t["weight"], t["targets"], None, 1.0, chunk)}

        variants[f"{NAME}, chunked log-prob"] = differentiated(forward)
    return variants


def _fused(case: Case, inputs: Tensors) -> Prepared:
    if case.device != "cuda":
        raise Refused("needs CUDA (Triton kernels)")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = functools.partial(liger_fused_linear_cross_entropy, reduction="none")

    def forward(t: Tensors) -> Tensors:
        return {"logprob": -loss(t["hidden"], t["weight"], t["targets"]).to(torch.float32)}

    return differentiated(forward)(case, inputs)
