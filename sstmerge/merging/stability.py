"""How far a merge depends on the sample: the same merge from each split half, and each half judged by the other."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from sstmerge.fisher import Fisher
from sstmerge.gevp import Spectrum, solve
from sstmerge.merging.selection import efficiency_order, most_efficient, shrinkage

# Directions that are compared; enough for every selection in practice, and cheap.
_COMPARED = 64


@dataclass(frozen=True)
class Stability:
    """Agreement of the split halves (even and odd sequences).

    Attributes:
        directions: Number k of directions compared, those of largest λ.
        subspace_overlap: ‖V₀ᵀ F_cost V₁‖² / k of the two halves' top-k subspaces; 1 if they are equal.
        chance_overlap: What unrelated subspaces of this size would give, k / D.
        held_out_gain: Share of the source's gain, measured on one half, that the other half's step keeps; mean of both ways.
        held_out_cost: The same for the cost.
        in_sample_gain: Share of the gain that a half's step keeps on that half itself.
        held_out_kl: ½ Δᵀ F_cost Δ of a half's step Δ, at the merge's scale, by the other half's F_cost, nats per token;
            mean of both ways. Of `global` this is the one to believe, whose directions are chosen where their own F_cost is
            small. What other structures leave out (`MergeReport.predicted_kl`), both halves leave out.
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
    whole: Spectrum,
    source: Tensor,
    *,
    kept: int,
    mu: float = 0.0,
    exponent: float = 1.0,
    rest: float = 0.0,
    scale: float = 1.0,
) -> Stability:
    """Solve both halves apart and compare.

    A half's step is what the merge would be with that half alone: as many directions of largest λ, under the same filter,
    at the same scale.

    Args:
        whole: The solved pair.
        source: What the merge filters, in the spectrum's space: the safety adapter, for `joint` less the utility adapter,
            shape (D,).
        kept: Number of directions that have a part in the merge. Of a projection at most the first 64 are compared as
            subspaces; of a filter those that keep half of the largest weight at least, at most 64, too.
        mu: Shrinkage μ of the filter; 0 for a projection.
        exponent: Exponent of the filter.
        rest: Factor of the part of the source that lies in no listed direction.
        scale: Factor of the step.

    Returns:
        The comparison.
    """
    halves = [(whole.gain.half(h), whole.cost.half(h)) for h in (0, 1)]
    spectra = [solve(*half, damping=whole.damping, damping_metric=whole.damping_metric) for half in halves]
    weights = _weights(whole, kept, mu, exponent)
    strongest = int((weights > 0.5 * weights.max()).count_nonzero())
    count = max(1, min(strongest, _COMPARED, *(len(s.eigenvalues) for s in spectra)))
    orthonormal = [_orthonormal(whole, _top_vectors(spectrum, count)) for spectrum in spectra]
    overlap = float((orthonormal[0] @ orthonormal[1].mT).square().sum()) / count
    changes = [spectrum.apply_filter(source, _weights(spectrum, kept, mu, exponent), rest) for spectrum in spectra]
    held_out_gain = [_share(halves[1 - h][0], changes[h], source) for h in (0, 1)]
    held_out_cost = [_share(halves[1 - h][1], changes[h], source) for h in (0, 1)]
    in_sample = [_share(halves[h][0], changes[h], source) for h in (0, 1)]
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


def _weights(spectrum: Spectrum, kept: int, mu: float, exponent: float) -> Tensor:
    """Return the weight of every direction (m,): the filter's for the `kept` of largest λ, 0 for the others."""
    eigenvalues = spectrum.eigenvalues
    return most_efficient(eigenvalues, min(kept, len(eigenvalues))) * shrinkage(eigenvalues, mu, exponent)


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


def _share(fisher: Fisher, change: Tensor, source: Tensor) -> float:
    whole = fisher.quadratic(source)
    return fisher.quadratic(change) / whole if whole > 0 else 0.0
