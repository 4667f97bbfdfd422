"""Sampling as transformers' generate does it: logits processors, softmax, multinomial; the log-prob beside it."""

from __future__ import annotations

import torch

from bench.core.case import Case, Prepare, Tensors, differentiated
from bench.core.environment import why_not_importable

NAME = "transformers"
PACKAGE = "transformers"


def unavailable(device: str) -> str | None:
    return why_not_importable("transformers")


def sample_tokens(case: Case) -> dict[str, Prepare]:
    from transformers.generation import logits_process as processors

    o = case.options
    steps = [processors.TemperatureLogitsWarper(float(o["temperature"]))] if o["temperature"] != 1.0 else []
    if "top_k" in o:
        steps.append(processors.TopKLogitsWarper(o["top_k"]))
    if "top_p" in o:
        steps.append(processors.TopPLogitsWarper(o["top_p"]))
    if "min_p" in o:
        steps.append(processors.MinPLogitsWarper(o["min_p"]))

    def forward(t: Tensors) -> Tensors:
        scores = t["logits"].float()
        for step in steps:
            scores = step(None, scores)
        tokens = torch.multinomial(scores.softmax(-1), 1)
        # What a trainer keeps: the log-prob before truncation.
        log_p = (t["logits"].float() / o["temperature"]).log_softmax(-1)
        return {"tokens": tokens[:, 0], "logprob": log_p.gather(-1, tokens)[:, 0]}

    return {NAME: differentiated(forward)}
