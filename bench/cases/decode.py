"""Decode steps: multi_lora_linear with a blend for each of a few rows, and sample_tokens over as many rows of logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from clp_kernels import expand_gate

from bench.cases import formulas, sampling
from bench.cases.models import MODELS, blends, normal
from bench.cases.multi_lora import layer_inputs
from bench.core.case import Case, Prepared, Tensors, Work, plain_exact

ROWS = (1, 8, 64, 256)


def cases(device: str, sizes: str) -> list[Case]:
    if sizes == "tiny":
        return [
            _linear(device, 2, 48, 32, torch.float32),
            sampling.case(device, 2, 97, torch.float32, "decode"),
        ]
    if sizes == "cpu":
        layers, vocabulary, dtype = [(1024, 1024), (256, 256)], 32000, torch.float32
    else:
        layers = [(4096, 4096), (896, 896), (4864, 896), (3584, 3584), (18944, 3584), (14336, 4096)]
        vocabulary, dtype = MODELS["Qwen2.5-7B"].vocabulary, torch.bfloat16
    linear = [_linear(device, rows, n, k, dtype) for n, k in layers for rows in ROWS]
    if sizes == "cpu":
        linear += [_linear(device, rows, *layers[0], torch.bfloat16) for rows in (1, 64)]
    return linear + [sampling.case(device, rows, vocabulary, dtype, "decode") for rows in ROWS]


def _linear(device: str, rows: int, n: int, k: int, dtype: torch.dtype) -> Case:
    ranks = (16, 16, 16)
    rank, size = sum(ranks), dtype.itemsize

    def make(generator: torch.Generator) -> Tensors:
        inputs = layer_inputs(n, k, ranks, dtype, generator)
        inputs["x"] = normal(rows, k, generator=generator, dtype=dtype)
        inputs["gate"] = expand_gate(
            blends("dirichlet", rows, len(ranks), generator), ranks, [1.0] * len(ranks)
        )
        return inputs

    return Case(
        group="decode",
        op="multi_lora_linear",
        title="multi-LoRA",
        shape={"T": rows, "N": n, "K": k},
        dtype=dtype,
        device=device,
        make=make,
        exact=plain_exact((), formulas.multi_lora),
        work=Work(
            2 * rows * k * n + 2 * rows * rank * (k + n),
            size * (n * k + rank * (n + k) + rows * (n + k)),
        ),
        options={"ranks": ranks, "blend": "dirichlet"},
        bare=lambda case, inputs: Prepared(lambda: F.linear(inputs["x"], inputs["weight"])),
        targets=("decode",) if rows <= 64 else (),
    )
