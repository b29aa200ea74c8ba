"""The best approximation of a given rank: of a dense matrix by block Krylov iteration, and of a product of factors."""

from __future__ import annotations

import torch
from torch import Tensor

# Wider than the rank by this many columns, so that the last wanted singular values converge as fast as the first.
_OVERSAMPLING = 8
# A block is appended until the residual of every wanted singular pair is below this share of the largest singular value;
# products in float32 cannot be told from exact ones below 1e-7 or so.
_RESIDUAL = 1e-6
_ROUNDING = 1e-7
# Stop there and take what has been found: matrices without a gap in their spectrum, where the wanted subspace is ambiguous
# and any of the candidates is as good an approximation as any other.
_LARGEST_BASIS = 40


def truncated_svd(matrix: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets of a dense matrix.

    Block Krylov iteration (Musco and Musco 2015, https://arxiv.org/abs/1504.05477): the products X (XᵀX)^i Ω of a random
    block Ω span a space that contains the leading singular vectors; it is kept orthonormal, and grows until they are in it.

    Args:
        matrix: X, shape (m, n), float32 or float64.
        rank: Number k of triplets, at most min(m, n).
        seed: Seed of Ω.

    Returns:
        U (m, k), σ (k,), falling, and V (n, k), float64. Values below the rounding of float32 are zero, and so are their
        columns of U.
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = truncated_svd(matrix.mT, rank, seed=seed)
        return right, values, left
    columns = matrix.shape[1]
    width = rank + _OVERSAMPLING
    if columns <= 4 * width:
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        return left[:, :rank], values[:rank], right.mT[:, :rank]
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(columns, width, generator=generator, dtype=torch.float64).to(matrix)
    basis = torch.linalg.qr(block).Q
    image = matrix @ basis
    while True:
        values, vectors = _leading(image, rank)
        U = image.double() @ vectors / values.where(values > 0, 1.0)
        V = basis.double() @ vectors
        # X V = U σ holds by construction; what may be missing is Xᵀ U = V σ.
        back = (matrix.mT @ U.to(matrix.dtype)).double()
        residual = torch.linalg.vector_norm(back - V * values, dim=0).max()
        if not residual > _RESIDUAL * values[0] or basis.shape[1] + width > min(columns, _LARGEST_BASIS * width):
            return U, values, V
        block = matrix.mT @ image[:, -width:]
        for _ in range(2):  # once leaves what rounding has let in
            block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
        basis = torch.cat([basis, block], dim=1)
        image = torch.cat([image, matrix @ block], dim=1)


def compress(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition of B A, without forming it.

    Args:
        B: Shape (..., m, k).
        A: Shape (..., k, n).

    Returns:
        U (..., m, k), σ (..., k), falling, and V (..., n, k), float64; k is at most min(m, n).
    """
    left, right = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().mT)
    U, values, V = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    return left.Q @ U, values, right.Q @ V.mT


def _leading(image: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading singular values and right singular vectors of a tall matrix.

    The Gram matrix halves the digits of small singular values, but those of the leading ones are kept. What is below the
    rounding of float32 is zero.
    """
    image = image.double()
    squared, vectors = torch.linalg.eigh(image.mT @ image)
    values = squared.flip(0)[:rank].clamp_min(0.0).sqrt()
    return torch.where(values > _ROUNDING * values[0], values, 0.0), vectors.flip(1)[:, :rank]
