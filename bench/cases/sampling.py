"""sample_tokens: one token per row and its log-prob, plain and with top_k, top_p and min_p.

The tokens are random, so what is checked is the log-prob of the token that came out, and that truncation kept it.
"""

from __future__ import annotations

import torch

from bench.cases.models import MODELS, normal
from bench.core.case import Case, Tensors, Work

OPTIONS = (
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 50},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.95},
)


def cases(device: str, sizes: str) -> list[Case]:
    if sizes == "tiny":
        return [case(device, 4, 97, torch.float32, options=options) for options in (OPTIONS[0], OPTIONS[5])]
    rows = (32, 256) if sizes == "cpu" else (64, 256)
    vocabularies = (
        [4096, 32000] if sizes == "cpu" else [MODELS[m].vocabulary for m in ("Qwen2.5-0.5B", "Gemma-2-2B")]
    )
    dtype = torch.float32 if sizes == "cpu" else torch.bfloat16
    found = [case(device, rows[0], vocabularies[-1], dtype, options=options) for options in OPTIONS]
    others = [(r, v) for r in rows for v in vocabularies if (r, v) != (rows[0], vocabularies[-1])]
    return found + [case(device, r, v, dtype) for r, v in others]


def case(
    device: str, rows: int, vocabulary: int, dtype: torch.dtype, group: str = "sampling", options=OPTIONS[0]
) -> Case:
    temperature = options["temperature"]

    def make(generator: torch.Generator) -> Tensors:
        return {"logits": normal(rows, vocabulary, generator=generator, dtype=dtype, scale=3.0)}

    def judge(inputs: Tensors, outputs: Tensors) -> tuple[Tensors, Tensors]:
        """torch's and the exact log-prob of the tokens drawn; NaN for a token that should have been left out."""
        tokens = outputs["tokens"][:, None]
        exact = (inputs["logits"].double() / temperature).log_softmax(-1)
        plain = (inputs["logits"].float() / temperature).log_softmax(-1)
        kept = _kept(exact, options).gather(-1, tokens)
        truth = exact.gather(-1, tokens).masked_fill(~kept, torch.nan)
        return {"logprob": plain.gather(-1, tokens)[:, 0]}, {"logprob": truth[:, 0]}

    return Case(
        group=group,
        op="sample_tokens",
        title="sampling",
        shape={"T": rows, "V": vocabulary},
        dtype=dtype,
        device=device,
        make=make,
        exact=lambda inputs, dtype: {},
        work=Work(0.0, dtype.itemsize * rows * vocabulary, rows * vocabulary),
        outputs=("logprob",),
        options=options,
        judge=judge,
    )


def _kept(log_p: torch.Tensor, options) -> torch.Tensor:
    """What truncation may keep, a rounding's width of doubt included."""
    ordered = log_p.sort(-1, descending=True).values
    keep, doubt = torch.ones_like(log_p, dtype=torch.bool), 1e-5
    threshold = torch.full_like(log_p[:, :1], -torch.inf)
    if "top_k" in options:
        threshold = ordered[:, options["top_k"] - 1 : options["top_k"]]
    if "top_p" in options:
        mass = ordered.exp().where(ordered >= threshold, 0.0)
        before = mass.cumsum(-1) - mass
        inside = before < options["top_p"] * mass.sum(-1, keepdim=True) + doubt
        threshold = torch.maximum(threshold, ordered.where(inside, torch.inf).amin(-1, keepdim=True))
    if "min_p" in options:
        threshold = torch.maximum(threshold, ordered[:, :1] + torch.tensor(options["min_p"]).log().item())
    return keep & (log_p >= threshold - doubt)
