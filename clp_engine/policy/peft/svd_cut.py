"""The best approximation of a low-rank delta by one of lower rank, without forming the delta.

    B A = Q_b (R_b R_a^T) Q_a^T,    B = Q_b R_b,  A^T = Q_a R_a

The singular values of B A (N, K) are those of the (R, R) matrix in the middle. The cost is two QR decompositions and an SVD of
R rows, O((N + K) R^2) instead of O(N K min(N, K)). All is in float64: the part cut off may be much smaller than the part kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cut:
    """b @ a, with a (r, K) and b (N, r) in float32.

    lost, size: squared Frobenius norms of the part cut off and of the whole.
    """

    a: torch.Tensor
    b: torch.Tensor
    lost: float
    size: float


def cut_product(a: torch.Tensor, b: torch.Tensor, rank: int | None) -> Cut:
    """Cut b @ a, with a (R, K) and b (N, R), to at most `rank` products. Unchanged for R <= rank, or with rank None."""
    exact = Cut(a.float(), b.float(), 0.0, 0.0)
    a, b = a.double(), b.double()
    if rank is None or a.shape[0] <= rank:
        size = ((b.t() @ b) * (a @ a.t())).sum().clamp_min(0).item()  # tr(B^T B A A^T)
        return Cut(exact.a, exact.b, 0.0, size)
    (left, r_b), (right, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.t())
    u, s, v = torch.linalg.svd(r_b @ r_a.t())
    return _kept(left @ u, s, v @ right.t(), rank)


def cut_matrix(delta: torch.Tensor, rank: int) -> Cut:
    """Cut a matrix (N, K) without factors to `rank` products."""
    u, s, v = torch.linalg.svd(delta.float(), full_matrices=False)
    return _kept(u, s, v, rank)


def _kept(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, rank: int) -> Cut:
    squares = s.double().square()
    a, b = v[:rank].float().contiguous(), (u[:, :rank] * s[:rank]).float().contiguous()
    return Cut(a, b, squares[rank:].sum().item(), squares.sum().item())
