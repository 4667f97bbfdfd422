"""logits_logprob: the same statistics for stacks that hold the logits. Bound by reading them, and writing their gradient."""

from __future__ import annotations

import torch

from bench.cases import formulas
from bench.cases.models import MODELS, integers, normal
from bench.core.case import Case, Tensors, Work

MODES = (
    ("logprob+entropy, fwd+bwd", ("logprob", "entropy"), ("logits",)),
    ("logprob+entropy+kl, fwd+bwd", ("logprob", "entropy", "kl"), ("logits",)),
    ("logprob, fwd+bwd", ("logprob",), ("logits",)),
    ("logprob, scoring", ("logprob",), ()),
    ("logprob+ref_logprob+entropy+kl, scoring", ("logprob", "ref_logprob", "entropy", "kl"), ()),
)


def cases(device: str, sizes: str) -> list[Case]:
    if sizes == "tiny":
        return [_case(device, 24, 301, torch.float32, mode) for mode in MODES]
    if sizes == "cpu":
        found = [_case(device, 1024, 32000, torch.float32, mode) for mode in MODES]
        return found + [
            _case(device, 1024, 32000, torch.bfloat16, MODES[0]),
            _case(device, 1280, 4096, torch.float32, MODES[0]),
        ]
    vocabulary = MODELS["Qwen2.5-0.5B"].vocabulary
    found = [_case(device, 8192, vocabulary, torch.bfloat16, mode) for mode in MODES]
    found += [_case(device, 8192, MODELS["Gemma-2-2B"].vocabulary, torch.bfloat16, MODES[0])]
    return found + [_case(device, tokens, vocabulary, torch.bfloat16, MODES[0]) for tokens in (1937, 2048)]


def _case(device: str, rows: int, vocabulary: int, dtype: torch.dtype, mode) -> Case:
    title, outputs, wanted = mode
    reference = bool({"kl", "ref_logprob"} & set(outputs))

    def make(generator: torch.Generator) -> Tensors:
        logits = normal(rows, vocabulary, generator=generator, dtype=dtype, scale=2.0)
        inputs = {"logits": logits, "targets": integers(vocabulary, rows, generator)}
        if reference:
            noise = normal(rows, vocabulary, generator=generator, dtype=dtype, scale=0.1)
            inputs["ref_logits"] = logits + noise
        if wanted:
            for name in outputs:
                inputs[f"grad_{name}"] = normal(rows, generator=generator, dtype=torch.float32)
        return inputs

    elements = float(rows * vocabulary)
    reads = 2 if reference else 1
    # Forward reads the logits; backward reads them again, takes their exponentials again and writes their gradient.
    work = Work(0.0, dtype.itemsize * elements * reads, elements * reads)
    if wanted:
        work = Work(0.0, dtype.itemsize * elements * (2 * reads + 1), elements * (reads + 1))

    def forward(t: Tensors) -> Tensors:
        return formulas.of_logits(t["logits"], t.get("ref_logits"), t["targets"], outputs)

    return Case(
        group="logits_logprob",
        op="logits_logprob",
        title=title,
        shape={"T": rows, "V": vocabulary},
        dtype=dtype,
        device=device,
        make=make,
        exact=formulas.in_row_chunks(forward, wanted, vocabulary),
        work=work,
        outputs=outputs,
        wanted=wanted,
    )
