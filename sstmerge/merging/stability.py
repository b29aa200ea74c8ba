"""How far a merge depends on the sample: the same merge from each split half, and each half judged by the other."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from sstmerge.fisher import Fisher
from sstmerge.gevp import Spectrum, solve
from sstmerge.merging.selection import Selection, efficiency_order, shrinkage

# Directions that are compared; enough for every selection in practice, and cheap.
_COMPARED = 64


@dataclass(frozen=True)
class Stability:
    """Agreement of the split halves (even and odd sequences).

    Attributes:
        directions: Number k of directions compared, those of largest λ.
        subspace_overlap: ‖V₀ᵀ F_cost V₁‖² / k of the two halves' top-k subspaces; 1 if they are equal.
        chance_overlap: What unrelated subspaces of this size would give, k / D.
        held_out_gain: Share of the safety adapter's gain, measured on one half, that the directions of the other half
            keep; mean of both ways.
        held_out_cost: The same for the cost.
        in_sample_gain: Share of the gain that a half's directions keep on that half itself.
        held_out_kl: ½ Δᵀ F_cost Δ of a half's step, by the other half's F_cost, nats per token; mean of both ways. A
            projection's step is at scale 1, a filter's at the merge's. With few sequences this is the one to believe:
            directions are chosen where their own F_cost is small.
        in_sample_kl: The same by the half's own F_cost.
    """

    directions: int
    subspace_overlap: float
    chance_overlap: float
    held_out_gain: float
    held_out_cost: float
    in_sample_gain: float
    held_out_kl: float
    in_sample_kl: float

    def to_dict(self) -> dict[str, float]:
        """Return plain data for JSON."""
        return asdict(self)


def split_half_stability(
    whole: Spectrum, safety: Tensor, *, directions: int, filtered: Selection | None = None, scale: float = 1.0
) -> Stability:
    """Solve both halves apart and compare.

    A half's step is the projection on its directions; or, where the merge is a filter of every direction, that filter's.

    Args:
        whole: The solved pair.
        safety: The safety adapter in the spectrum's space, shape (D,).
        directions: Number of directions that the merge keeps; at most 64 of them are compared. Of a filter, those that keep
            half of the largest weight at least are compared instead.
        filtered: μ and exponent of the filter; None for a projection.
        scale: Factor of the filter's step.

    Returns:
        The comparison.
    """
    halves = [(whole.gain.half(h), whole.cost.half(h)) for h in (0, 1)]
    spectra = [solve(*half, damping=whole.damping) for half in halves]
    if filtered is not None:
        weights = _weights(whole, filtered)
        directions = int((weights > 0.5 * weights.max()).count_nonzero())
    count = max(1, min(directions, _COMPARED, *(len(s.eigenvalues) for s in spectra)))
    bases = [_top_vectors(spectrum, count) for spectrum in spectra]
    orthonormal = [_orthonormal(whole, basis) for basis in bases]
    overlap = float((orthonormal[0] @ orthonormal[1].mT).square().sum()) / count
    if filtered is None:
        changes = [
            basis.mT @ spectrum.coordinates(safety)[_top(spectrum, count)]
            for spectrum, basis in zip(spectra, bases, strict=True)
        ]
    else:
        changes = [spectrum.apply_filter(safety, _weights(spectrum, filtered)) for spectrum in spectra]
    held_out_gain = [_share(halves[1 - h][0], changes[h], safety) for h in (0, 1)]
    held_out_cost = [_share(halves[1 - h][1], changes[h], safety) for h in (0, 1)]
    in_sample = [_share(halves[h][0], changes[h], safety) for h in (0, 1)]
    held_out_kl = [scale**2 * halves[1 - h][1].quadratic(changes[h]) / 2 for h in (0, 1)]
    in_sample_kl = [scale**2 * halves[h][1].quadratic(changes[h]) / 2 for h in (0, 1)]
    return Stability(
        directions=count,
        subspace_overlap=overlap,
        chance_overlap=count / whole.space.size,
        held_out_gain=sum(held_out_gain) / 2,
        held_out_cost=sum(held_out_cost) / 2,
        in_sample_gain=sum(in_sample) / 2,
        held_out_kl=sum(held_out_kl) / 2,
        in_sample_kl=sum(in_sample_kl) / 2,
    )


def _weights(spectrum: Spectrum, filtered: Selection) -> Tensor:
    return shrinkage(spectrum.eigenvalues, filtered.mu or 0.0, filtered.exponent)


def _top(spectrum: Spectrum, count: int) -> Tensor:
    return efficiency_order(spectrum.eigenvalues)[:count]


def _top_vectors(spectrum: Spectrum, count: int) -> Tensor:
    """Return the eigenvectors of the largest λ as rows, shape (count, D)."""
    rows = []
    for index in _top(spectrum, count).tolist():
        unit = torch.zeros(len(spectrum.eigenvalues), dtype=torch.float64)
        unit[index] = 1.0
        rows.append(spectrum.combine(unit))
    return torch.stack(rows)


def _orthonormal(spectrum: Spectrum, vectors: Tensor) -> Tensor:
    """Return coordinates of an orthonormal basis of the rows' span, Euclidean in coordinates scaled by the cost.

    For spectra that list only part of the directions, plain Euclidean geometry is used, since there is no complete basis
    to express vectors in.
    """
    rows = torch.stack([spectrum.coordinates(v) for v in vectors]) if spectrum.complete else vectors
    basis: Tensor = torch.linalg.qr(rows.mT).Q.mT
    return basis


def _share(fisher: Fisher, change: Tensor, safety: Tensor) -> float:
    whole = fisher.quadratic(safety)
    return fisher.quadratic(change) / whole if whole > 0 else 0.0
