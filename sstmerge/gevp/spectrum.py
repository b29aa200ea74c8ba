"""Solving F_gain v = λ F_cost v: one spectrum per pair of Fishers, whatever their structure.

λ is the safety efficiency of a direction, its gain per unit of cost. Vectors are normalised to VᵀF_costV = I, so the
coordinates c of a weight change in the eigenbasis give its gain Σ λ_i c_i² and its cost Σ c_i² directly, and λ has one
unit across all layers.

F_cost is regularised by a multiple of the identity, `damping` times its scale: the mean diagonal per layer, or for
`global`, whose F_cost has rank n at most, the mean nonzero eigenvalue; there the identity may give way to a
Kronecker-factored estimate of F_cost (`gevp/damping_metric.py`). For Kronecker pairs the factors are shifted by
√damping times their mean diagonals, which is the same multiple of F_cost's mean diagonal (factored Tikhonov; Martens &
Grosse 2015, https://arxiv.org/abs/1503.05671).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import Tensor

from sstmerge import batched_lu
from sstmerge.adapters import CoreSpace
from sstmerge.errors import FisherError, InputError, SolverError
from sstmerge.fisher import Fisher, KroneckerBasis, Structure
from sstmerge.fisher.distributed import Ranks
from sstmerge.gevp.damping_metric import DampingMetric, KroneckerMetric
from sstmerge.gevp.score_matrix import ENTRIES_PER_CHUNK, ScoreMatrix
from sstmerge.gevp.shared_solve import solve_batches
from sstmerge.ops import default_device, filter_cores

# Relative damping where the user gives none. `global` needs the most: its F_cost is zero outside the span of the samples,
# where any λ would be a guess. The experiments behind these values are in dev/LOG.md.
DEFAULT_DAMPING = {
    Structure.DIAGONAL: 1e-2,
    Structure.KFAC: 1e-3,
    Structure.EKFAC: 1e-2,
    Structure.BLOCK: 1e-2,
    Structure.GLOBAL: 1e-2,
}


class Spectrum(ABC):
    """Generalized eigenvalues and eigenvectors of a gain and a cost Fisher.

    Attributes:
        space: The core space.
        gain: F_gain.
        cost: F_cost.
        damping: Relative damping that was used.
        eigenvalues: λ of every direction, shape (m,), float64. Directions that are not listed (`global` lists those in the
            span of the gain samples only) have λ = 0.
        damping_metric: Metric K of the damping; the identity but for `global`.
    """

    damping_metric: DampingMetric = "identity"

    def __init__(self, gain: Fisher, cost: Fisher, damping: float, eigenvalues: Tensor) -> None:
        self.space: CoreSpace = gain.space
        self.gain = gain
        self.cost = cost
        self.damping = damping
        self.eigenvalues = eigenvalues.clamp_min_(0.0)  # every subclass hands over a new tensor

    @abstractmethod
    def coordinates(self, vector: Tensor) -> Tensor:
        """Return the coordinates VᵀF_cost φ of a vector φ (D,) in the eigenbasis, shape (m,), float64."""

    @abstractmethod
    def combine(self, coordinates: Tensor) -> Tensor:
        """Return Σ c_i v_i, shape (D,), for coordinates c of shape (m,)."""

    @abstractmethod
    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return Vᵀ g, the derivative along every direction of a function with gradient g (D,), shape (m,)."""

    @property
    def complete(self) -> bool:
        """Whether the listed directions span the whole space."""
        return len(self.eigenvalues) == self.space.size

    def apply_filter(
        self, vector: Tensor, weights: Tensor, rest: float = 0.0, *, coordinates: Tensor | None = None
    ) -> Tensor:
        """Multiply a vector's coordinates by weights: the F_cost-metric (never Euclidean) filter.

        Args:
            vector: φ, shape (D,).
            weights: Factor per direction, shape (m,).
            rest: Factor of the part of φ that lies in no listed direction.
            coordinates: What `coordinates` returned for this vector, if it is at hand, shape (m,).

        Returns:
            The filtered vector, shape (D,).
        """
        if bool((weights == rest).all()):
            # The identity (or zero) is applied as such, without the rounding of a change of basis.
            return rest * vector
        return self._filtered(vector, weights, rest, coordinates)

    def _filtered(self, vector: Tensor, weights: Tensor, rest: float, coordinates: Tensor | None) -> Tensor:
        if coordinates is None:
            coordinates = self.coordinates(vector)
        if rest == 0.0 or self.complete:
            return self.combine(weights * coordinates)
        return rest * vector + self.combine((weights - rest) * coordinates)


class DiagonalSpectrum(Spectrum):
    """`diagonal`: every core entry is a direction."""

    def __init__(self, gain: Fisher, cost: Fisher, damping: float) -> None:
        damped = _damped_diagonal(cost, damping)
        super().__init__(gain, cost, damping, gain.diagonal() / damped)
        self._root = damped.sqrt()

    def coordinates(self, vector: Tensor) -> Tensor:  # noqa: D102 (inherited)
        return self._root * vector

    def combine(self, coordinates: Tensor) -> Tensor:  # noqa: D102 (inherited)
        return coordinates / self._root

    def pull_back(self, gradient: Tensor) -> Tensor:  # noqa: D102 (inherited)
        return gradient / self._root


class KroneckerSpectrum(Spectrum):
    """`kfac`: two small problems per layer, X_g p = α X_c p and D_g q = β D_c q; λ_ij = α_i β_j along q_j p_iᵀ.

    Attributes:
        basis: The directions, (P, Q) per group, which `ekfac` refits its eigenvalues in.
    """

    def __init__(self, gain: Fisher, cost: Fisher, damping: float, device: torch.device, ranks: Ranks) -> None:
        pairs, names = [], []
        for group, (X_g, D_g), (X_c, D_c) in zip(
            gain.space.groups, gain.kronecker_factors(), cost.kronecker_factors(), strict=True
        ):
            for side, F_g, F_c in (("input covariance", X_g, X_c), ("output-gradient covariance", D_g, D_c)):
                pairs.append((F_g, _damp(F_c, damping**0.5, group.names, side)))
                names.append([f"{name} ({side})" for name in group.names])
        solutions = solve_batches(pairs, names, device, ranks)
        self._metrics = [(X_c, D_c) for (_, X_c), (_, D_c) in zip(pairs[::2], pairs[1::2], strict=True)]
        inputs, outputs = solutions[::2], solutions[1::2]
        self.basis = KroneckerBasis(tuple(s.eigenvectors for s in inputs), tuple(s.eigenvectors for s in outputs))
        products = [
            beta.eigenvalues.clamp_min(0)[:, :, None] * alpha.eigenvalues.clamp_min(0)[:, None, :]
            for alpha, beta in zip(inputs, outputs, strict=True)
        ]
        super().__init__(gain, cost, damping, gain.space.join(products))

    def coordinates(self, vector: Tensor) -> Tensor:  # noqa: D102 (inherited)
        # From Pᵀ X_c P = I: P⁻¹ = Pᵀ X_c. The inverses themselves would take as much work, and memory that is first touched.
        parts = zip(self.space.split(vector), self.basis.P, self.basis.Q, self._metrics, strict=True)
        return self.space.join([Q.mT @ (D_c @ core @ X_c) @ P for core, P, Q, (X_c, D_c) in parts])

    def combine(self, coordinates: Tensor) -> Tensor:  # noqa: D102 (inherited)
        cores = zip(self.space.split(coordinates), self.basis.P, self.basis.Q, strict=True)
        return self.space.join([Q @ core @ P.mT for core, P, Q in cores])

    def pull_back(self, gradient: Tensor) -> Tensor:  # noqa: D102 (inherited)
        cores = zip(self.space.split(gradient), self.basis.P, self.basis.Q, strict=True)
        return self.space.join([Q.mT @ core @ P for core, P, Q in cores])

    def _filtered(self, vector: Tensor, weights: Tensor, rest: float, coordinates: Tensor | None) -> Tensor:
        # One kernel costs a GPU less than the launches of two products; a CPU saves the other four.
        if coordinates is not None and coordinates.device.type == "cpu":
            return self.combine(weights * coordinates)
        parts = zip(
            self.space.split(vector), self.basis.Q, self.basis.P, self._metrics, self.space.split(weights), strict=True
        )
        return self.space.join([filter_cores(core, Q, D_c, P, X_c, w) for core, Q, P, (X_c, D_c), w in parts])


class EigenvalueCorrectedSpectrum(Spectrum):
    """`ekfac`: the directions of a Kronecker spectrum, with gains and costs measured along them."""

    def __init__(self, gain: Fisher, cost: Fisher, damping: float) -> None:
        self._basis = gain.kronecker_basis()
        other = cost.kronecker_basis()
        if any(not torch.equal(a, b) for a, b in zip(self._basis.P + self._basis.Q, other.P + other.Q, strict=True)):
            raise FisherError("The two EK-FAC Fishers were collected in different eigenbases; collect both in one.")
        damped = _damped_diagonal(cost, damping)
        super().__init__(gain, cost, damping, gain.diagonal() / damped)
        self._root = damped.sqrt()

    def coordinates(self, vector: Tensor) -> Tensor:  # noqa: D102 (inherited)
        cores = zip(self.space.split(vector), self._basis.P, self._basis.Q, strict=True)
        rotated = [batched_lu.solve(Q, batched_lu.solve(P, core.mT).mT) for core, P, Q in cores]
        return self._root * self.space.join(rotated)

    def combine(self, coordinates: Tensor) -> Tensor:  # noqa: D102 (inherited)
        cores = zip(self.space.split(coordinates / self._root), self._basis.P, self._basis.Q, strict=True)
        return self.space.join([Q @ core @ P.mT for core, P, Q in cores])

    def pull_back(self, gradient: Tensor) -> Tensor:  # noqa: D102 (inherited)
        cores = zip(self.space.split(gradient), self._basis.P, self._basis.Q, strict=True)
        return self.space.join([Q.mT @ core @ P for core, P, Q in cores]) / self._root


class BlockSpectrum(Spectrum):
    """`block`: one problem of size R_o R_i per layer."""

    def __init__(self, gain: Fisher, cost: Fisher, damping: float, device: torch.device, ranks: Ranks) -> None:
        self._vectors, self._duals, values = [], [], []
        for group, F_g, F_c in zip(gain.space.groups, gain.blocks(), cost.blocks(), strict=True):
            damped = _damp(F_c, damping, group.names, "block")
            (solution,) = solve_batches([(F_g, damped)], [[f"{name} (block)" for name in group.names]], device, ranks)
            self._vectors.append(solution.eigenvectors)
            self._duals.append(solution.eigenvectors.mT @ damped)
            values.append(solution.eigenvalues.unflatten(1, group.core_shape[1:]))
        super().__init__(gain, cost, damping, gain.space.join(values))

    def coordinates(self, vector: Tensor) -> Tensor:  # noqa: D102 (inherited)
        return self._multiply(self._duals, vector)

    def combine(self, coordinates: Tensor) -> Tensor:  # noqa: D102 (inherited)
        return self._multiply(self._vectors, coordinates)

    def pull_back(self, gradient: Tensor) -> Tensor:  # noqa: D102 (inherited)
        return self._multiply([vectors.mT for vectors in self._vectors], gradient)

    def _multiply(self, matrices: Sequence[Tensor], vector: Tensor) -> Tensor:
        parts = []
        for group, matrix, core in zip(self.space.groups, matrices, self.space.split(vector), strict=True):
            product = matrix @ core.flatten(1).unsqueeze(-1)
            parts.append(product.squeeze(-1).unflatten(1, group.core_shape[1:]))
        return self.space.join(parts)


class GlobalSpectrum(Spectrum):
    """`global`: all layers together, in the span of the samples; nothing of size D x D is formed.

    With score matrices G_c (n_c, D) and G_g (n_g, D) and the metric K of the damping, M = G_cᵀG_c + ε K has the inverse
    (K⁻¹ − K⁻¹ G_cᵀ T G_c K⁻¹) / ε with T = (ε I + G_c K⁻¹ G_cᵀ)⁻¹ (Woodbury). The whitened gain scores H = G_g M^{-1/2} have
    the Gram matrix H Hᵀ = (G_g K⁻¹ G_gᵀ − G_g K⁻¹ G_cᵀ T G_c K⁻¹ G_gᵀ) / ε = A Λ Aᵀ, of size n_g, and
    v_i = M⁻¹ G_gᵀ a_i / √λ_i.
    """

    def __init__(self, gain: Fisher, cost: Fisher, damping: float, metric: DampingMetric) -> None:
        self._G_g, self._G_c = ScoreMatrix(gain), ScoreMatrix(cost)
        self.damping_metric = metric
        self._metric = KroneckerMetric.of(cost, ENTRIES_PER_CHUNK) if metric == "kronecker" else None
        K_cc, K_cg, K_gg = self._G_c.grams(self._G_g, self._metric)
        shift: float = damping * float(K_cc.trace()) / len(K_cc)
        if not shift > 0:
            raise SolverError(
                "The global cost matrix is zero or its damping is: F_cost has rank n at most, so it needs damping > 0 "
                "and benign sequences with nonzero scores."
            )
        identity = torch.eye(len(K_cc), dtype=torch.float64, device=K_cc.device)
        factor, info = torch.linalg.cholesky_ex(K_cc + shift * identity)
        if int(info) != 0:
            raise SolverError(
                f"The global cost matrix with damping {damping:g} is not positive definite in float64 (condition number "
                f"about {float(K_cc.diagonal().max()) / shift:.1e}); raise the damping."
            )
        solved = torch.cholesky_solve(K_cg, factor)  # T G_c G_gᵀ (n_c, n_g)
        whitened = (K_gg - K_cg.mT @ solved) / shift
        values, vectors = torch.linalg.eigh((whitened + whitened.mT) / 2)
        values, vectors = values.flip(0), vectors.flip(1)
        # Directions below the rounding of H Hᵀ are no directions: at most n_g, fewer if gain scores repeat.
        kept = values > 1e-10 * values[0].clamp_min(torch.finfo(torch.float64).tiny)
        super().__init__(gain, cost, damping, values[kept])
        scaled = vectors[:, kept] / values[kept].sqrt()
        self._gain_coefficients = scaled  # v = K⁻¹ (G_gᵀ α + G_cᵀ β) / shift, α (n_g, m)
        self._cost_coefficients = -solved @ scaled  # β (n_c, m)
        self._shift = shift

    def coordinates(self, vector: Tensor) -> Tensor:  # noqa: D102 (inherited)
        # v_iᵀ M φ = a_iᵀ G_g φ / √λ_i, because M v_i = G_gᵀ a_i / √λ_i.
        coordinates: Tensor = self._gain_coefficients.mT @ self._G_g.times(vector)
        return coordinates

    def combine(self, coordinates: Tensor) -> Tensor:  # noqa: D102 (inherited)
        gain = self._G_g.transposed_times(self._gain_coefficients @ coordinates)
        cost = self._G_c.transposed_times(self._cost_coefficients @ coordinates)
        return self._inverse(gain + cost) / self._shift

    def pull_back(self, gradient: Tensor) -> Tensor:  # noqa: D102 (inherited)
        gradient = self._inverse(gradient)
        gain = self._gain_coefficients.mT @ self._G_g.times(gradient)
        cost = self._cost_coefficients.mT @ self._G_c.times(gradient)
        slopes: Tensor = (gain + cost) / self._shift
        return slopes

    def _inverse(self, vector: Tensor) -> Tensor:
        return vector if self._metric is None else self._metric.inverse(vector.double(), self.cost)


# Those that solve no batch of eigenproblems.
_DIRECT: dict[Structure, Callable[[Fisher, Fisher, float], Spectrum]] = {
    Structure.DIAGONAL: DiagonalSpectrum,
    Structure.EKFAC: EigenvalueCorrectedSpectrum,
}


def solve(
    gain: Fisher,
    cost: Fisher,
    *,
    damping: float | None = None,
    damping_metric: DampingMetric = "identity",
    device: torch.device | str | None = None,
    ranks: Ranks | None = None,
) -> Spectrum:
    """Solve F_gain v = λ (F_cost + damping · scale · K) v; K is the identity but for `global`.

    Args:
        gain: F_gain, from harmful prompts with refusals.
        cost: F_cost, from benign prompts; of the same structure, for the same adapters.
        damping: Relative damping; `DEFAULT_DAMPING` of the structure by default.
        damping_metric: K of `global`: "identity", or "kronecker", estimated from the cost's own scores.
        device: Where the eigenproblems of `kfac` and `block` are solved; by default a GPU where there is one. The spectrum
            itself lives where the Fishers do.
        ranks: Processes that share the eigenproblems of `kfac` and `block`; all must call this function with the same
            Fishers, and all get the spectrum. This process alone by default.

    Returns:
        The spectrum.

    Raises:
        FisherError: If the two are of different structures or spaces, or hold no response token.
        InputError: If the damping is negative or not finite, or the structure has no such metric.
    """
    if gain.structure is not cost.structure:
        raise FisherError(
            f"The gain Fisher is '{gain.structure}' but the cost Fisher '{cost.structure}'; collect both with the same "
            "structure."
        )
    for role, fisher in (("gain", gain), ("cost", cost)):
        if fisher.tokens <= 0:
            raise FisherError(f"The {role} Fisher has seen no response token; collect it from more data.")
    cost = cost.in_space(gain.space)
    damping = DEFAULT_DAMPING[gain.structure] if damping is None else damping
    if not 0.0 <= damping < float("inf"):
        raise InputError(f"damping must be a finite number >= 0, but is {damping}.")
    if damping_metric not in get_args(DampingMetric):
        raise InputError(f"damping_metric must be one of {get_args(DampingMetric)}, but is {damping_metric!r}.")
    if damping_metric != "identity" and gain.structure is not Structure.GLOBAL:
        raise InputError(
            f"damping_metric='{damping_metric}' is of 'global' alone, but the Fishers are '{gain.structure}'."
        )
    if gain.structure in (Structure.KFAC, Structure.BLOCK):
        chosen = torch.device(device or default_device())
        kind = KroneckerSpectrum if gain.structure is Structure.KFAC else BlockSpectrum
        return kind(gain, cost, damping, chosen, ranks or Ranks())
    if gain.structure is Structure.GLOBAL:
        return GlobalSpectrum(gain, cost, damping, damping_metric)
    return _DIRECT[gain.structure](gain, cost, damping)


def _damp(matrices: Tensor, damping: float, names: Sequence[str], what: str) -> Tensor:
    """Add damping · mean diagonal to a batch of matrices (L, n, n)."""
    scale = matrices.diagonal(dim1=1, dim2=2).mean(dim=1)
    if bool((scale <= 0).any()):
        name = names[int((scale <= 0).nonzero()[0])]
        raise SolverError(
            f"The benign {what} of layer '{name}' is zero: the benign data never reach this layer, so no cost can be "
            "measured there. Leave the layer out, or add benign data that use it."
        )
    damped = matrices.clone()
    damped.diagonal(dim1=1, dim2=2).add_((damping * scale)[:, None])
    return damped


def _damped_diagonal(cost: Fisher, damping: float) -> Tensor:
    diagonal = cost.diagonal()
    sizes = torch.cat([torch.full((g.core_shape[0],), g.core_shape[1] * g.core_shape[2]) for g in cost.space.groups])
    sizes = sizes.to(diagonal.device)
    scale = cost.space.layer_sums(diagonal) / sizes
    damped = diagonal + damping * scale.repeat_interleave(sizes)
    if bool((damped <= 0).any()):
        layer = int(torch.repeat_interleave(sizes)[int((damped <= 0).nonzero()[0])])
        raise SolverError(
            f"The benign Fisher has zero entries in layer '{cost.space.layer_names[layer]}', and damping {damping:g} "
            "does not lift them: raise the damping or add benign data."
        )
    return damped
