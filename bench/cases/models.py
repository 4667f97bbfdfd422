"""Shapes that the cases are taken from, and random inputs with a model's statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Model:
    hidden: int
    intermediate: int
    vocabulary: int
    softcap: float | None = None


MODELS = {
    "Qwen2.5-0.5B": Model(896, 4864, 151936),
    "Llama-3.2-1B": Model(2048, 8192, 128256),
    "Gemma-2-2B": Model(2304, 9216, 256000, softcap=30.0),
    "Qwen2.5-7B": Model(3584, 18944, 152064),
    "Llama-3.1-8B": Model(4096, 14336, 128256),
    "T5-large": Model(1024, 4096, 32128),
}


def sequences(tokens: int) -> tuple[int, int]:
    """(sequences, tokens of each): about 256 tokens each, whatever divides."""
    for length in (256, 149, 64, 32, 16):
        if tokens % length == 0 and tokens > length:
            return tokens // length, length
    return tokens, 1


def normal(*shape: int, generator: torch.Generator, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=generator.device)
    return out.normal_(0, scale, generator=generator)


def integers(high: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(high, (count,), generator=generator, device=generator.device)


def blends(kind: str, rows: int, adapters: int, generator: torch.Generator) -> Tensor:
    """(rows, adapters), or (1, adapters) for "shared": one-hot, shared, dirichlet (uniform on the simplex), half-reference."""
    drawn = torch.empty(1 if kind == "shared" else rows, adapters, device=generator.device)
    drawn.exponential_(generator=generator)
    blend = drawn / drawn.sum(-1, keepdim=True)
    if kind == "one-hot":
        return torch.nn.functional.one_hot(blend.argmax(-1), adapters).float()
    if kind == "half-reference":
        blend[::2] = 0  # these rows are the frozen model
    return blend
