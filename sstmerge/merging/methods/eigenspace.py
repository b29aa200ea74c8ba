"""Projecting on the top eigenvectors of one Fisher, over all layers together."""

from __future__ import annotations

import torch
from torch import Tensor

from sstmerge.errors import FisherError, InputError
from sstmerge.fisher import Fisher, Structure
from sstmerge.merging.methods.registry import CoreBatch

# Eigenvalues up to this share of the largest are rounding.
_RANK_TOLERANCE = 1e-12


class Eigenspace:
    """Eigenvectors of a Fisher of the structure `diagonal`, `kfac`, `block` or `global`.

    Core coordinates belong to orthonormal bases, so an eigenvector in them is one of the Fisher in the span of the adapters.

    Attributes:
        fisher: The Fisher F.
        values: Its eigenvalues: (D,) in the order of core coordinates, or falling, shape (n,), for `global`; float64.
    """

    def __init__(self, fisher: Fisher) -> None:
        self.fisher = fisher
        # Per group: (Q, P) for `kfac`, vectors of the blocks for `block`; for `global` A (n, n) of G Gᵀ = A Λ Aᵀ.
        self._vectors: list[tuple[Tensor, ...]] = []
        if fisher.structure is Structure.GLOBAL:
            scores = fisher.scores().double()
            values, vectors = torch.linalg.eigh(scores @ scores.mT)
            self.values: Tensor = values.flip(0)
            self._vectors.append((vectors.flip(1),))
        elif fisher.structure is Structure.DIAGONAL:
            self.values = fisher.diagonal()
        elif fisher.structure is Structure.KFAC:
            parts = []
            for X, D in fisher.kronecker_factors():
                (p, P), (q, Q) = torch.linalg.eigh(X), torch.linalg.eigh(D)
                parts.append(q[:, :, None] * p[:, None, :])
                self._vectors.append((Q, P))
            self.values = fisher.space.join(parts)
        elif fisher.structure is Structure.BLOCK:
            parts = []
            for group, block in zip(fisher.space.groups, fisher.blocks(), strict=True):
                values, vectors = torch.linalg.eigh(block)
                parts.append(values.unflatten(1, group.core_shape[1:]))
                self._vectors.append((vectors,))
            self.values = fisher.space.join(parts)
        else:
            raise FisherError(
                "The eigenvectors of an 'ekfac' Fisher are not known, since its basis is not orthogonal; collect it with "
                "the structure 'kfac', 'block', 'diagonal' or 'global'."
            )

    def project(self, directions: int, batch: CoreBatch, cores: Tensor) -> Tensor:
        """Return P c, the Euclidean projection on the eigenvectors with the largest eigenvalues.

        Args:
            directions: Number m of eigenvectors, over all layers together; equal eigenvalues are taken in order.
            batch: The layers of one group of F's space.
            cores: c in these layers, shape (L, R_o, R_i), float64: the weighted sum of all but the safety adapter.

        Returns:
            P c, shape (L, R_o, R_i), float64.

        Raises:
            InputError: F has fewer eigenvalues above zero.
        """
        floor = _RANK_TOLERANCE * self.values.max().clamp_min(torch.finfo(self.values.dtype).tiny)
        positive = int((self.values > floor).sum())
        if directions > positive:
            raise InputError(
                f"directions is {directions}, but the Fisher has only {positive} eigenvalues above zero; ask for at most "
                "that many."
            )
        if self.fisher.structure is Structure.GLOBAL:
            return self._project_global(directions, batch)
        flat = torch.zeros_like(self.values)
        flat[torch.argsort(self.values, descending=True, stable=True)[:directions]] = 1.0
        mask = self.fisher.space.split(flat)[batch.group]
        if self.fisher.structure is Structure.DIAGONAL:
            return mask * cores
        if self.fisher.structure is Structure.KFAC:
            Q, P = self._vectors[batch.group]
            projected: Tensor = Q @ (mask * (Q.mT @ cores @ P)) @ P.mT
            return projected
        (vectors,) = self._vectors[batch.group]
        coordinates = mask.flatten(1).unsqueeze(-1) * (vectors.mT @ cores.flatten(1).unsqueeze(-1))
        part: Tensor = (vectors @ coordinates).reshape(cores.shape)
        return part

    def _project_global(self, directions: int, batch: CoreBatch) -> Tensor:
        """With G Gᵀ = A Λ Aᵀ, the eigenvectors of GᵀG are Gᵀ a_i / √λ_i: P c = Σ_i Gᵀ a_i (a_iᵀ G c) / λ_i."""
        scores, space = self.fisher.scores().double(), self.fisher.space
        # The eigenvectors span all layers, so their product with the utility adapters needs all layers too.
        named = enumerate(zip(batch.adapters, batch.weights.tolist(), strict=True))
        utility = space.combination({name: weight for index, (name, weight) in named if index != batch.safety})
        chosen = self._vectors[0][0][:, :directions]
        weights = chosen @ ((chosen.mT @ (scores @ utility)) / self.values[:directions])
        return (weights[:, None, None, None] * space.split(scores)[batch.group]).sum(dim=0)
