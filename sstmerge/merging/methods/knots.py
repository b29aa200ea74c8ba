"""KnOTS: TIES and DARE-TIES on weight changes that were brought into one left basis.

[ΔW_1 … ΔW_T] = U S [V_1ᵀ … V_Tᵀ]. With ΔW_t = U₀ C_t V₀ᵀ and an orthonormal V₀ this is the singular value decomposition
P S [Q_1ᵀ … Q_Tᵀ] of the small [C_1 … C_T], with U = U₀ P and V_t = V₀ Q_t. The matrices S V_tᵀ (R x d_in) that belong to the
tasks are merged entry by entry; nothing of size d_out x d_in is formed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sstmerge.merging.methods.registry import CoreBatch, LowRank, Method
from sstmerge.merging.methods.sparse import (
    KEPT_AFTER_DARE,
    KEPT_BY_DARE,
    KEPT_BY_TRIM,
    MAJORITY_SIGN,
    SCALE,
    SEED,
    TRIM_OVER,
    MajoritySign,
    basis_signs,
    drop_at_random,
    merge_by_ties,
)
from sstmerge.merging.methods.spectral import RANK_TOLERANCE
from sstmerge.merging.methods.trimming import Thresholds, TrimOver, prepare_ties

_PAPER = "https://arxiv.org/abs/2410.19735"


def aligned_tasks(batch: CoreBatch) -> tuple[Tensor, Tensor]:
    """Return the common left basis and the matrix of every task in it.

    Args:
        batch: The layers.

    Returns:
        U, shape (L, d_out, R), its columns with a positive sum, and S V_tᵀ, shape (T, L, R, d_in), zero where S is;
        float64.
    """
    tasks, _, _, columns = batch.cores.shape
    left, values, right = torch.linalg.svd(torch.cat(list(batch.cores), dim=-1), full_matrices=False)
    values = torch.where(values > RANK_TOLERANCE * values[:, :1], values, 0.0)
    basis = batch.U.double() @ left
    signs = basis_signs(basis)
    scaled = ((signs * values)[:, :, None] * right).unflatten(-1, (tasks, columns)).movedim(2, 0)
    # Rounding must not make a task of an adapter that lacks a layer.
    scaled = scaled * batch.cores.flatten(2).any(dim=2)[:, :, None, None]
    return basis * signs[:, None, :], scaled @ batch.V.double().mT


def knots_ties(
    batch: CoreBatch,
    *,
    density: float,
    majority_sign: MajoritySign,
    scale: float,
    trim_over: TrimOver = "tensor",
    thresholds: Thresholds | None = None,
) -> LowRank:
    """Apply TIES to the aligned tasks (Stoica et al. 2025, https://arxiv.org/abs/2410.19735).

    Args:
        batch: The layers.
        density: Share of entries that the trim keeps.
        majority_sign: Whether the sum of the entries elects the sign, or their number.
        scale: λ.
        trim_over: Whether entries compete within the layer or within the whole adapter.
        thresholds: Smallest magnitude that the trim keeps, by adapter, where they compete within the whole adapter.

    Returns:
        B = U (L, d_out, R) and A = the merged S Vᵀ (L, R, d_in), float64.
    """
    basis, tasks = aligned_tasks(batch)
    merged = merge_by_ties(tasks, batch.weights, batch.adapters, density, majority_sign, thresholds)
    return LowRank(B=basis, A=scale * merged)


def knots_dare_ties(
    batch: CoreBatch, *, density: float, trim_density: float, majority_sign: MajoritySign, scale: float, seed: int
) -> LowRank:
    """Apply DARE and then TIES to the aligned tasks (Stoica et al. 2025, https://arxiv.org/abs/2410.19735).

    Args:
        batch: The layers.
        density: Probability that DARE keeps an entry.
        trim_density: Share of entries that the trim keeps, layer by layer.
        majority_sign: Whether the sum of the entries elects the sign, or their number.
        scale: λ.
        seed: Seed of the masks.

    Returns:
        B = U (L, d_out, R) and A = the merged S Vᵀ (L, R, d_in), float64.
    """
    basis, tasks = aligned_tasks(batch)
    dropped = drop_at_random(tasks, batch.adapters, batch.names, density, seed)
    merged = merge_by_ties(dropped, batch.weights, batch.adapters, trim_density, majority_sign)
    return LowRank(B=basis, A=scale * merged)


def _aligned_entries(batch: Any) -> Tensor:
    return aligned_tasks(batch)[1]


_NOTE = (
    "Singular values up to 1e-6 of the largest are dropped (the authors' code: up to 1e-5). The result is no matrix of the "
    "core space, but its rank is at most that of the adapters together. "
)

METHODS: tuple[Method, ...] = (
    Method(
        name="knots_ties",
        title="KnOTS-TIES",
        function=knots_ties,
        acts_on="core",
        formula="[ΔW_1 … ΔW_T] = U S [V_1ᵀ … V_Tᵀ]; ΔW = U · TIES(S V_1ᵀ, …, S V_Tᵀ)",
        paper=_PAPER,
        options=(KEPT_BY_TRIM, TRIM_OVER, MAJORITY_SIGN, SCALE),
        note=_NOTE + "Weights multiply what is averaged and have no vote on the sign.",
        prepare=prepare_ties(_aligned_entries),
    ),
    Method(
        name="knots_dare_ties",
        title="KnOTS-DARE-TIES",
        function=knots_dare_ties,
        acts_on="core",
        formula="[ΔW_1 … ΔW_T] = U S [V_1ᵀ … V_Tᵀ]; ΔW = U · TIES(m_t ∘ S V_tᵀ / (1 − p)), m_t ~ Bernoulli(1 − p)",
        paper=_PAPER,
        options=(KEPT_BY_DARE, KEPT_AFTER_DARE, MAJORITY_SIGN, SCALE, SEED),
        note=_NOTE + "Masks depend on the seed and the names of adapter and layer alone.",
    ),
)
