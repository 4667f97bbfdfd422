"""A product of factors is cut as its matrix would be, and what is lost is what the SVD of the matrix says."""

import pytest
import torch

from clp_engine.policy.peft.svd_cut import cut_matrix, cut_product


def factors(rank=7, rows=31, columns=19):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) for shape in ((rank, columns), (rows, rank)))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_factors_alone_give_the_best_approximation_and_its_error(rank):
    a, b = factors()
    u, s, v = torch.linalg.svd((b @ a).double())
    best = u[:, :rank] * s[:rank] @ v[:rank]
    cut = cut_product(a, b, rank)
    assert cut.a.shape == (rank, 19) and cut.b.shape == (31, rank)
    torch.testing.assert_close((cut.b @ cut.a).double(), best, rtol=1e-4, atol=1e-4)
    assert cut.lost == pytest.approx(s[rank:].square().sum().item())
    assert cut.size == pytest.approx((b @ a).square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("rank", [7, 100, None])
def test_nothing_is_lost_at_the_product_s_own_rank_and_the_factors_stay(rank):
    a, b = factors()
    cut = cut_product(a, b, rank)
    assert torch.equal(cut.a, a) and torch.equal(cut.b, b) and cut.lost == 0
    assert cut.size == pytest.approx((b @ a).square().sum().item(), rel=1e-5)


def test_more_factors_than_the_matrix_has_columns_are_cut_too():
    a, b = factors(rank=40)
    cut = cut_product(a, b, 19)
    torch.testing.assert_close(cut.b @ cut.a, b @ a, rtol=1e-4, atol=1e-4)
    assert cut.lost / cut.size < 1e-20


def test_a_matrix_without_factors_is_cut_to_the_same():
    a, b = factors()
    cut, expected = cut_matrix(b @ a, 3), cut_product(a, b, 3)
    torch.testing.assert_close(cut.b @ cut.a, expected.b @ expected.a, rtol=1e-4, atol=1e-4)
    assert (cut.lost / cut.size) == pytest.approx(expected.lost / expected.size, rel=1e-4)


def test_the_whole_matrix_is_never_formed(monkeypatch):
    """Of 20,000 x 20,000 numbers it would take 3 GB."""
    seen = []
    original = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **k: seen.append(m.shape) or original(m, **k))
    a, b = factors(rank=3, rows=20_000, columns=20_000)
    cut_product(a, b, 2)
    assert seen == [(3, 3)]
