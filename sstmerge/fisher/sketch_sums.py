"""Low-rank sketches of sums of outer products, linear in the data.

Of S = Σ v vᵀ (d, d), which is too large to keep, only Y = S Ω (d, s) and the diagonal are summed, with a fixed test
matrix Ω (d, s) of random signs. From them the Nyström approximation (Tropp et al. 2017,
https://arxiv.org/abs/1706.05736)

    Ŝ = Y (ΩᵀY)⁺ Yᵀ = F Fᵀ,    0 ⪯ Ŝ ⪯ S,    Ŝ Ω = Y

is found afterwards. Sums over batches, shards and resumed runs are sums of Y; and since Ŝ Ω = Y, the factor F itself can
be added to another one. Where s ≥ d, Ω is the identity and nothing is approximated.

A mean score Σ δ xᵀ (d_out, d_in) has a sketch on either side, G Ω and GᵀΨ, and G ≈ (G Ω)(Ψᵀ G Ω)⁺(Gᵀ Ψ)ᵀ (Tropp et al.
2017, https://arxiv.org/abs/1609.00048), with half as many columns in Ω as in Ψ, so that the middle is well conditioned.
"""

from __future__ import annotations

import hashlib

import numpy
import torch
from torch import Tensor

# Eigenvalues of ΩᵀY below this many roundings of the largest are rounding themselves.
_ROUNDINGS = 16.0


class RandomSigns:
    """The test matrices of a sketch: entries ±1, bits of SHAKE-256, equal on every machine and in every version.

    The columns of a smaller rank are the first columns of a larger one.
    """

    def __init__(self, rank: int, seed: int) -> None:
        self.rank = rank
        self.seed = seed
        self._made: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def columns(self, size: int, rank: int | None = None) -> int:
        """Return the number of columns for vectors of a size: the rank, or the size itself where that is no larger."""
        return min(size, self.rank if rank is None else rank)

    def matrix(self, like: Tensor, rank: int | None = None) -> Tensor | None:
        """Return Ω (d, s) for rows like (…, d), on their device and in their dtype; None stands for the identity."""
        size, columns = like.shape[-1], self.columns(like.shape[-1], rank)
        if columns == size:
            return None
        key = (size, columns, like.device, like.dtype)
        if key not in self._made:
            rows = [self._signs(size, column) for column in range(columns)]
            signs = torch.from_numpy(numpy.stack(rows, axis=1))
            self._made[key] = signs.to(like.device, like.dtype)
        return self._made[key]

    def _signs(self, size: int, column: int) -> numpy.ndarray:
        digest = hashlib.shake_256(f"sstmerge sketch {self.seed} {size} {column}".encode()).digest(-(-size // 8))
        bits = numpy.unpackbits(numpy.frombuffer(digest, dtype=numpy.uint8))[:size]
        signs: numpy.ndarray = 2 * bits.astype(numpy.int8) - 1
        return signs


class MomentSums:
    """The sketch of a second moment while data pass, per split half.

    Attributes:
        product: Y = S Ω, shape (2, d, s).
        diagonal: The diagonal of S, shape (2, d), float64.
    """

    def __init__(self, size: int, signs: RandomSigns, dtype: torch.dtype, device: torch.device) -> None:
        self.signs = signs
        self.product = torch.zeros(2, size, signs.columns(size), dtype=dtype, device=device)
        self.diagonal = torch.zeros(2, size, dtype=torch.float64, device=device)

    def add(self, half: int, rows: Tensor, copies: int = 1) -> Tensor:
        """Add `copies` times Σ v vᵀ over rows v (n, d); return the rows times Ω, shape (n, s)."""
        tested = multiply(rows, self.signs.matrix(rows))
        self.product[half] += copies * (rows.mT @ tested)
        self.diagonal[half] += copies * rows.square().sum(dim=0).double()
        return tested


class ScoreSums:
    """The sketch of a sum of scores G = Σ δ xᵀ (d_out, d_in) while data pass.

    Attributes:
        left: G Ω, shape (d_out, q).
        right: Gᵀ Ψ, shape (d_in, s).
    """

    def __init__(self, outputs: int, inputs: int, signs: RandomSigns, dtype: torch.dtype, device: torch.device) -> None:
        self.signs = signs
        self.left = torch.zeros(outputs, signs.columns(inputs, score_rank(signs.rank)), dtype=dtype, device=device)
        self.right = torch.zeros(inputs, signs.columns(outputs), dtype=dtype, device=device)

    def add(self, delta: Tensor, tested_delta: Tensor, x: Tensor) -> None:
        """Add Σ δ xᵀ over rows δ (n, d_out) and x (n, d_in), given δ Ψ (n, s)."""
        self.left += delta.mT @ multiply(x, self.signs.matrix(x, score_rank(self.signs.rank)))
        self.right += x.mT @ tested_delta


def score_rank(rank: int) -> int:
    """Return the number of columns of the test matrix on the input side of scores."""
    return max(1, rank // 2)


def multiply(rows: Tensor, matrix: Tensor | None) -> Tensor:
    """Return rows (…, d) times a matrix (d, s), None being the identity."""
    return rows if matrix is None else rows @ matrix


def nystrom_factor(product: Tensor, signs: RandomSigns) -> Tensor:
    """Return F (…, d, s) with F Fᵀ = Y (ΩᵀY)⁺ Yᵀ, in Y's dtype; the arithmetic is float64.

    Args:
        product: Y = S Ω, shape (…, d, s).
        signs: Where Ω comes from.

    Returns:
        The factor, columns by falling eigenvalue of ΩᵀY; zero where that is rounding.
    """
    exact = product.double()
    tested = _tested(exact.mT, signs).mT  # ΩᵀY
    values, vectors = torch.linalg.eigh((tested + tested.mT) / 2)
    values, vectors = values.flip(-1), vectors.flip(-1)
    smallest = _ROUNDINGS * torch.finfo(product.dtype).eps * values[..., :1].clamp_min(torch.finfo(torch.float64).tiny)
    inverse = torch.where(values > smallest, values.clamp_min(smallest).rsqrt(), 0.0)
    factor: Tensor = (exact @ vectors) * inverse[..., None, :]
    return factor.to(product.dtype)


def product_of(factor: Tensor, signs: RandomSigns) -> Tensor:
    """Return Y = F Fᵀ Ω (…, d, s) of a factor (…, d, s), float64; the inverse of `nystrom_factor`."""
    exact = factor.double()
    return exact @ _tested(exact.mT, signs)


def residual_of(factor: Tensor, diagonal: Tensor) -> Tensor:
    """Return what F Fᵀ (…, d, d) lacks of the diagonal of S (…, d): at least zero, but for rounding; float64."""
    return (diagonal - row_squares(factor)).clamp_min(0.0)


def row_squares(factor: Tensor) -> Tensor:
    """Return the diagonal of F Fᵀ, shape (…, d), float64."""
    return factor.double().square().sum(dim=-1)


def score_core(left: Tensor, signs: RandomSigns) -> Tensor:
    """Return K (q, s) with G ≈ (G Ω) K (Gᵀ Ψ)ᵀ, in G's dtype.

    Args:
        left: G Ω, shape (d_out, q).
        signs: Where Ψ comes from.

    Returns:
        (Ψᵀ G Ω)⁺.
    """
    middle = _tested(left.double().mT, signs).mT  # Ψᵀ G Ω (s, q)
    # By the eigenvalues of the Gram matrix, a tenth of the time of singular values; squares of float32 fit into float64.
    values, vectors = torch.linalg.eigh(middle.mT @ middle)
    smallest = max((_ROUNDINGS * torch.finfo(left.dtype).eps) ** 2, _ROUNDINGS * torch.finfo(torch.float64).eps)
    kept = values > smallest * values[-1:].clamp_min(torch.finfo(torch.float64).tiny)
    inverse = torch.where(kept, 1.0 / values.where(kept, torch.ones_like(values)), 0.0)
    core: Tensor = (vectors * inverse) @ (vectors.mT @ middle.mT)
    return core.to(left.dtype)


def _tested(rows: Tensor, signs: RandomSigns) -> Tensor:
    """Return rows (…, d) times Ω."""
    return multiply(rows, signs.matrix(rows))
