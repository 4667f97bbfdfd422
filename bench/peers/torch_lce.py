"""torch.nn.functional.linear_cross_entropy (torch 2.13), chunked as it chooses by itself."""

from __future__ import annotations

import torch

from bench.core.case import Case, Prepare, Refused, Tensors, differentiated

NAME = "torch linear_cross_entropy"
PACKAGE = "torch"


def unavailable(device: str) -> str | None:
    if hasattr(torch.nn.functional, "linear_cross_entropy") and hasattr(
        torch.nn, "LinearCrossEntropyOptions"
    ):
        return None
    return f"torch {torch.__version__} does not have it (2.13 does)"


def linear_logprob(case: Case) -> dict[str, Prepare]:
    if case.outputs != ("logprob",):
        raise Refused("gives the log-prob alone")
    if case.options.get("softcap") is not None:
        raise Refused("has no softcap")

    def forward(t: Tensors) -> Tensors:
        loss = torch.nn.functional.linear_cross_entropy(
            t["hidden"],
            t["weight"],
            t["targets"],
            reduction="none",
            options=torch.nn.LinearCrossEntropyOptions(),
        )
        return {"logprob": -loss.float()}

    return {NAME: differentiated(forward)}
