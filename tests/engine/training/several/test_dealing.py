"""Shares of the work: everything once, and nearly as much for everyone."""

import pytest
from hypothesis import given, settings, strategies

from clp_engine.training.parallel.dealing import Shares, deal, deal_rows

COSTS = strategies.lists(strategies.integers(0, 1000), max_size=40)


@pytest.mark.parametrize("dealing", [deal, deal_rows])
@given(COSTS, strategies.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_everything_is_dealt_once_in_order(dealing, costs, count):
    shares = dealing(costs, count)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    assert len(shares) == count and all(share == sorted(share) for share in shares)
    assert shares == dealing(costs, count)


@given(COSTS, strategies.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_no_share_is_much_dearer_than_it_must_be(costs, count):
    """Graham's bound, with the mean and the dearest item as a lower bound of the best."""
    dearest = max(sum(costs[i] for i in share) for share in deal(costs, count))
    # The best may lie above the lower bound; a list schedule never exceeds mean + item.
    assert dearest <= sum(costs) / count + max(costs, default=0)


@given(COSTS, strategies.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_rows_are_dealt_evenly(costs, count):
    sizes = [len(share) for share in deal_rows(costs, count)]
    assert max(sizes) - min(sizes) <= 1


def test_a_part_of_shares_counts_from_its_own_start():
    shares = Shares([[0, 3, 5], [1, 2, 4]], rank=1)
    assert shares.within(2, 5) == Shares([[1], [0, 2]], rank=1) and shares.mine == [1, 2, 4]
