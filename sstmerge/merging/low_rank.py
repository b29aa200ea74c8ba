"""The singular value decomposition of a product, and of a weighted sum of products, of low rank, without forming it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Cholesky pivots of the unit rows of A below which the Gram matrix is too ill-conditioned to be divided by.
_SMALLEST_PIVOT = 1e-3


def compress(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition of B A.

    Args:
        B: Shape (..., m, k).
        A: Shape (..., k, n).

    Returns:
        U (..., m, k), σ (..., k), falling, and V (..., n, k), float64; k is at most min(m, n).
    """
    left, right = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().mT)
    U, values, V = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    return left.Q @ U, values, right.Q @ V.mT


def weighted_sum_svd(
    A: Sequence[Tensor], B: Sequence[Tensor], weights: Sequence[float], rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets of Σ_t w_t B_t A_t.

    With the stacks B = [w_t B_t] and A, and A Aᵀ = L Lᵀ, the eigenpairs of Lᵀ (BᵀB) L are the squared singular values σ² and
    vectors Y with u σ = B L y and vᵀ = yᵀ L⁻¹ A: two small Gram matrices, one Cholesky factor and one eigenproblem, in
    float64. Where the rows of A are nearly dependent, or the factors are float64 themselves, both stacks are orthogonalised
    instead (QR), and the SVD is that of the product of the triangles.

    Args:
        A: Factors that read the input, each (r_t, d_in).
        B: Factors that write the output, each (d_out, r_t).
        weights: One weight per adapter, scaling included.
        rank: Number k of triplets; at most Σ r_t, d_out and d_in.

    Returns:
        U (d_out, k), σ (k,), falling, and V (d_in, k), float64.
    """
    A_stack = torch.cat([factor.detach() for factor in A]).double()
    B_stack = torch.cat([factor.detach() for factor in B], dim=1).double()
    scale = torch.cat([A_stack.new_full((factor.shape[0],), weight) for factor, weight in zip(A, weights, strict=True)])
    # Unit rows of A: the conditioning then does not depend on how a rank-one term is split between its two factors.
    norms = A_stack.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    scale = scale * norms
    # A Cholesky factor needs independent rows.
    if A[0].dtype != torch.float64 and A_stack.shape[0] <= A_stack.shape[1]:
        lower, failed = torch.linalg.cholesky_ex((A_stack @ A_stack.mT) / norms / norms[:, None])
        if int(failed) == 0 and float(lower.diagonal().min()) > _SMALLEST_PIVOT:
            return _from_gram(A_stack, B_stack, norms, scale, lower, rank)
    left, values, right = compress(B_stack * scale, A_stack / norms[:, None])
    return left[:, :rank], values[:rank], right[:, :rank]


def _from_gram(
    A: Tensor, B: Tensor, norms: Tensor, scale: Tensor, lower: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose (B · scale)(A / norms) from the Cholesky factor of the Gram matrix of A / norms."""
    inner = lower.mT @ ((B.mT @ B) * scale * scale[:, None]) @ lower
    squares, vectors = torch.linalg.eigh(inner)
    squares, vectors = squares[-rank:].flip(0), vectors[:, -rank:].flip(1)
    values = squares.clamp_min(0).sqrt()
    right = A.mT @ (torch.linalg.solve_triangular(lower.mT, vectors, upper=True) / norms[:, None])
    left = B @ (scale[:, None] * (lower @ vectors))
    return left / torch.where(values > 0, values, 1.0), values, right
