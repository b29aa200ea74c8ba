"""The truncated SVD of a dense matrix by subspace iteration, deterministic, with a test that it has converged.

A Chebyshev filter of the Gram operator MᵀM damps everything below the smallest singular value of the block, so that the
block turns to the leading right singular vectors (Zhou, Saad, Tiago and Chelikowsky 2006,
https://doi.org/10.1016/j.jcp.2006.03.017). The block starts from a guess: where M is a pruned sum of low-rank weight
changes, their row space is a very good one. A block much larger than the rank pays: its last singular value is far below
the wanted ones, so that the filter needs a low degree.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RELATIVE_ERROR = 1e-6  # of the truncated matrix, in the Frobenius norm
_OVERSAMPLING = 8
_MOST_ROUNDS = 12
_HIGHEST_DEGREE = 12
# A filter must not amplify the largest direction so much that the smallest of the block drowns in its rounding.
_LARGEST_AMPLIFICATION = 1e4
_SEED = 0


def truncated_svd(matrix: Tensor, rank: int, guess: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets of a matrix.

    The iteration stops when the estimated error of the truncated matrix is below `RELATIVE_ERROR` of its norm, or when it
    has reached the rounding of the dtype (where a full SVD in that dtype is several times further off). If neither happens
    (no gap between what is kept and what is not, as with the noise of a very sparse DARE), the full SVD is computed.

    Args:
        matrix: M, shape (m, n), float32 or float64.
        rank: Number k of triplets.
        guess: Vectors that roughly span the leading right singular vectors, shape (n, g).

    Returns:
        U (m, k), σ (k,), falling, and V (n, k), float64; found in the dtype of M unless the full SVD was computed.
    """
    block = max(guess.shape[1], rank) + _OVERSAMPLING
    if 2 * block <= min(matrix.shape):
        found = _subspace_iteration(matrix, rank, _start(guess, block, matrix))
        if found is not None:
            left, values, right = (part.double() for part in found)
            return left, values, right
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank].mT


def _start(guess: Tensor, block: int, matrix: Tensor) -> Tensor:
    """Return the guess with random columns beside it, orthonormal, (n, block); from a generator of its own."""
    generator = torch.Generator().manual_seed(_SEED)
    missing = torch.randn(matrix.shape[1], block - guess.shape[1], generator=generator, dtype=torch.float64)
    columns = torch.cat([guess.to(matrix), missing.to(matrix)], dim=1)
    norms = columns.norm(dim=0)
    basis: Tensor = torch.linalg.qr(columns / torch.where(norms > 0, norms, 1.0)).Q
    return basis


def _subspace_iteration(matrix: Tensor, rank: int, right: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    for _ in range(_MOST_ROUNDS):
        image, values, right = _rayleigh_ritz(matrix, right)
        if not float(values[rank - 1]) > 0:
            return None  # fewer directions than asked for
        back = matrix.mT @ image
        if _has_converged(values, back, right, rank):
            return image[:, :rank] / values[:rank], values[:rank], right[:, :rank]
        right = torch.linalg.qr(_filter(matrix, right, back, values)).Q
    return None


def _rayleigh_ritz(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate a block so that its images are orthogonal; return images (m, q), their norms (q,), falling, and the block."""
    image = matrix @ right
    squares, rotation = torch.linalg.eigh((image.mT @ image).double())
    rotation = rotation.flip(1).to(matrix.dtype)
    values = squares.flip(0).clamp_min(0).sqrt().to(matrix.dtype)
    return image @ rotation, values, right @ rotation


def _has_converged(values: Tensor, back: Tensor, right: Tensor, rank: int) -> bool:
    """Bound the error of the truncated matrix from the residuals Mᵀu_i − σ_i v_i.

    A residual e_i leaves v_i at an angle of about e_i σ_i / (σ_i² − σ_q²) to the true one, σ_q being the smallest value of
    the block, and the truncated matrix off by 2 σ_i times that. Mixing of kept and dropped directions inside the block is
    of second order.

    Returns:
        Whether the bound is small enough.
    """
    kept = values[:rank].double()
    residuals = ((back[:, :rank] / values[:rank]) - right[:, :rank] * values[:rank]).double().norm(dim=0)
    gaps = (kept.square() - values[-1].double().square()) / kept
    boundary = float(kept[-1] - values[rank])
    if float(gaps.min()) <= 0 or boundary <= 0:
        return False
    first = float((2 * kept * residuals / gaps).norm())
    second = float(residuals.square().sum()) / boundary
    if first + second <= RELATIVE_ERROR * float(kept.norm()):
        return True
    rounding = 16 * torch.finfo(values.dtype).eps * float(kept[0])
    return float(residuals.max()) <= rounding


def _filter(matrix: Tensor, right: Tensor, back: Tensor, values: Tensor) -> Tensor:
    """Apply a Chebyshev polynomial of MᵀM that stays within ±1 below the smallest value of the block and grows above it."""
    bound = float(values[-1]) ** 2
    growth = math.acosh(max(2 * float(values[0]) ** 2 / max(bound, 1e-300) - 1, 1 + 1e-12))
    degree = min(_HIGHEST_DEGREE, max(1, int(math.acosh(_LARGEST_AMPLIFICATION) / growth)))
    if bound == 0 or degree == 1:
        return back
    previous, current = right, (2 / bound) * back - right
    for _ in range(degree - 1):
        applied = (2 / bound) * (matrix.mT @ (matrix @ current)) - current
        previous, current = current, 2 * applied - previous
    return current
