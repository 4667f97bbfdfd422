"""Seeds from counters: (seed, stream, step, index) determines every draw, so that resuming needs no stored generator state."""

from __future__ import annotations

import enum

import torch


class Stream(enum.IntEnum):
    """The uses of a run's seed. The stream is the first counter after the seed, so that no two uses draw the same numbers.

    The number of a stream never changes, so that a resumed run draws what the uninterrupted run would have drawn.
    """

    SHUFFLE = 1  # order of the prompts of an epoch
    CONDITIONS = 2  # (w, kl) of a rollout's prompts
    TOKENS = 3  # completions of a rollout
    EVALUATION = 4  # conditions and completions of an evaluation
    VALUE_HEAD = 5  # initial weights of the value head
    GRADIENT_NOISE = 6  # seed of the batches that measure gradient noise


# splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), in wrapping int64 arithmetic.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def _logical_shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def derive(seed: int | torch.Tensor, *counters: int | torch.Tensor) -> torch.Tensor:
    """A well-mixed int64 for each combination of counters. Integers and int64 tensors broadcast together."""
    state = torch.as_tensor(seed, dtype=torch.int64)
    for counter in counters:
        counter = torch.as_tensor(counter, dtype=torch.int64)
        z = state * _MIX1 + (counter + 1) * _GOLDEN
        z = (z ^ _logical_shift(z, 30)) * _MIX1
        z = (z ^ _logical_shift(z, 27)) * _MIX2
        state = z ^ _logical_shift(z, 31)
    return state


def generator(seed: int, *counters: int) -> torch.Generator:
    """A CPU generator whose seed is the lower 63 bits of `derive(seed, *counters)`."""
    return torch.Generator().manual_seed(int(derive(seed, *counters)) & ((1 << 63) - 1))
