"""How far experts share directions, by the higher-order generalized singular value decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from sstmerge.adapters import CoreSpace


def expert_similarity(space: CoreSpace) -> Tensor:
    """Return the similarity of every pair of adapters, between 0 (no shared input direction) and 1 (the same ones).

    The higher-order generalized singular value decomposition (Ponnapalli et al. 2011; Kempf, Goulart and Duncan 2021,
    https://arxiv.org/abs/2102.09822), by which Subspace Boosting compares experts (https://arxiv.org/abs/2506.16506),
    writes ΔW_i = U_i Σ_i Vᵀ with one V for all. With the QR decomposition of the stacked [ΔW_1; …; ΔW_T] = Q R, each ΔW_t of
    norm one, and G_i = Q_iᵀ Q_i, so that Σ_i G_i = I, its squared singular values σ²_ik = z_kᵀ G_i z_k are the shares that
    the experts have of direction k. The similarity is the cosine of these shares,

        S_ij = Σ_layers tr(G_i G_j) / √(Σ_layers tr(G_i²) · Σ_layers tr(G_j²)),

    which is Σ_k σ²_ik σ²_jk / √(Σ_k σ⁴_ik Σ_k σ⁴_jk) wherever one V for all exists exactly (the G_i commute). It needs no
    eigenvectors: the decomposition's own are arbitrary where experts share nothing.

    Args:
        space: The core space of the adapters. The sizes of the weight changes do not matter.

    Returns:
        Shape (T, T), float64, in the order of `space.adapters`; NaN for an adapter that changes nothing.
    """
    count = len(space.adapters)
    products = torch.zeros(count, count, dtype=torch.float64)
    vectors = torch.stack([space.core(adapter.name) for adapter in space.adapters])
    for cores in space.split(vectors):
        norms = torch.linalg.matrix_norm(cores)[..., None, None]
        scaled = cores / norms.where(norms > 0, 1.0)
        # The rows of all experts on top of each other, layer by layer: (L, T R_o, R_i).
        orthonormal = torch.linalg.qr(scaled.movedim(0, 1).flatten(1, 2)).Q
        blocks = orthonormal.unflatten(1, cores.shape[0:3:2])
        grams = torch.einsum("ltoi,ltoj->ltij", blocks, blocks)
        products += torch.einsum("lsij,ltij->st", grams, grams)
    own = products.diagonal().sqrt()
    return products / (own[:, None] * own[None, :])
