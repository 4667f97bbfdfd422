"""PrefixLayout: which tokens of a packed row are one sequence, and which sequence continues which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PrefixLayout:
    """N tokens in one row without padding, as S sequences. A sequence may continue another, as completions continue a prompt.

    starts   (S + 1,) int64: sequence s is tokens starts[s] to starts[s + 1]. From 0 to N, and never decreasing (a sequence may
             be empty)
    parents  (S,) int64: the sequence that s continues, or -1. A parent comes before s and has no parent itself. Several
             sequences may continue one, and need not be adjacent

    Both are given as lists, tuples or tensors, and are kept on the host, on whatever device the tokens are: reading a layout
    never waits for a device. Raises ValueError (values), TypeError (dtypes). All layers should share one layout.
    """

    starts: Tensor
    parents: Tensor
    tokens: int = field(init=False)  # N
    device_cache: dict = field(default_factory=dict, init=False, repr=False)  # derived by back-ends

    def __post_init__(self):
        starts, parents = _integers("starts", self.starts), _integers("parents", self.parents)
        if len(starts) != len(parents) + 1:
            raise ValueError(
                f"PrefixLayout: starts has {len(starts)} entries and parents {len(parents)}; expected one more start than "
                "parents: the last is the number of tokens"
            )
        if starts[0] != 0:
            raise ValueError(f"PrefixLayout: starts begins with {starts[0]}; expected 0, the first token")
        for s, (start, end) in enumerate(pairwise(starts)):
            if end < start:
                raise ValueError(
                    f"PrefixLayout: sequence {s} is tokens {start} to {end}; expected starts that never decrease: they are the "
                    "running sums of the lengths (PrefixLayout.from_lengths makes them)"
                )
        for s, parent in enumerate(parents):
            if not -1 <= parent < s:
                raise ValueError(
                    f"PrefixLayout: the parent of sequence {s} is {parent}; expected -1 or a sequence before it: put a prompt "
                    "before its completions"
                )
            if parent >= 0 and parents[parent] >= 0:
                raise ValueError(
                    f"PrefixLayout: the parent of sequence {s} is {parent}, which continues {parents[parent]} itself; expected "
                    "a sequence without a parent: join the two into one prompt"
                )
        object.__setattr__(self, "tokens", starts[-1])
        object.__setattr__(self, "starts", torch.tensor(starts, dtype=torch.int64, device="cpu"))
        object.__setattr__(self, "parents", torch.tensor(parents, dtype=torch.int64, device="cpu"))

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], parents: Sequence[int]) -> PrefixLayout:
        """The layout of consecutive sequences of these lengths."""
        return cls(list(accumulate(lengths, initial=0)), parents)

    @property
    def lengths(self) -> Tensor:
        """(S,) int64, on the host."""
        return self.starts.diff()

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """(N,) int64: each token's position in its sequence, counted through the parent. On the host, or on `device`."""
        return self._positions if device is None else self._positions.to(device, non_blocking=True)

    @cached_property
    def sequences(self) -> Tensor:
        """(N,) int64: the sequence of each token, on the host."""
        every = torch.arange(len(self.parents), device="cpu")
        return torch.repeat_interleave(every, self.lengths, output_size=self.tokens)

    @cached_property
    def _positions(self) -> Tensor:
        # A parent of -1 selects the 0 at the end.
        before = torch.cat([self.lengths, self.lengths.new_zeros(1)])[self.parents]
        return torch.arange(self.tokens, device="cpu") + (before - self.starts[:-1])[self.sequences]


def _integers(name: str, values: Sequence[int] | Tensor) -> list[int]:
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.dtype.is_floating_point or values.dtype is torch.bool:
            raise TypeError(
                f"PrefixLayout: {name} is {tuple(values.shape)} {values.dtype}; expected one dimension of integers"
            )
        return values.tolist()
    values = list(values)
    for value in values:
        if type(value) is not int:
            raise TypeError(f"PrefixLayout: {name} holds {value!r}; expected integers (or an integer tensor)")
    return values
