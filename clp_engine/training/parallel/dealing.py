"""Which process does which part of a step. Every process computes all shares from the same numbers, and takes its own."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


def deal(costs: Sequence[float], count: int) -> list[list[int]]:
    """Indices of `costs` in `count` shares whose sums are nearly equal, each share in the order of the indices.

    The dearest goes first, always to the share that is cheapest so far (longest processing time first). The dearest share is
    then at most 4/3 - 1/(3 count) of the best possible one (Graham, SIAM J. Applied Math. 17, 1969). Of equal costs and equal
    sums, lower indices and shares go first.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    open_: list[tuple[float, int, int]] = [(0.0, 0, rank) for rank in range(count)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        total, taken, rank = heapq.heappop(open_)
        shares[rank].append(index)
        heapq.heappush(open_, (total + costs[index], taken + 1, rank))
    return [sorted(share) for share in shares]


def deal_rows(costs: Sequence[float], count: int) -> list[list[int]]:
    """The same with as many indices in every share, one more or less: the rows of a share are decoded together, and the time of
    that depends on how many there are as much as on how long they are. Dealt from the dearest on, there and back again."""
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    shares: list[list[int]] = [[] for _ in range(count)]
    for place, index in enumerate(order):
        turn, seat = divmod(place, count)
        shares[seat if turn % 2 == 0 else count - 1 - seat].append(index)
    return [sorted(share) for share in shares]


@dataclass(frozen=True)
class Shares:
    """The prompts of a batch that each process computes.

    of_ranks: prompts by rank. rank: this process's. in_step: all processes run as many passes, as sharded weights need.
    """

    of_ranks: list[list[int]]
    rank: int
    in_step: bool = False

    @property
    def mine(self) -> list[int]:
        return self.of_ranks[self.rank]

    def within(self, start: int, stop: int) -> Shares:
        """Those of the prompts [start, stop) alone, counted from `start`."""
        cut = [[p - start for p in share if start <= p < stop] for share in self.of_ranks]
        return Shares(cut, self.rank, self.in_step)
