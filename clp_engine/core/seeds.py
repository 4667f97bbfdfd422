"""Seeds from counters: any draw can be made again from (seed, step, what, index), so resuming needs no stored stream."""

from __future__ import annotations

import torch

# splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), in wrapping int64 arithmetic.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def _logical_shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def derive(seed: int | torch.Tensor, *counters: int | torch.Tensor) -> torch.Tensor:
    """A well-mixed int64 for each combination of the counters; integers and int64 tensors broadcast together."""
    state = torch.as_tensor(seed, dtype=torch.int64)
    for counter in counters:
        counter = torch.as_tensor(counter, dtype=torch.int64)
        z = state * _MIX1 + (counter + 1) * _GOLDEN
        z = (z ^ _logical_shift(z, 30)) * _MIX1
        z = (z ^ _logical_shift(z, 27)) * _MIX2
        state = z ^ _logical_shift(z, 31)
    return state


def generator(seed: int, *counters: int) -> torch.Generator:
    """A CPU generator seeded by `derive`."""
    return torch.Generator().manual_seed(int(derive(seed, *counters)) & ((1 << 63) - 1))
