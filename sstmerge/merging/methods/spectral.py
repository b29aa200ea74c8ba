"""Methods that look at singular values and vectors: TSV-Merge, Iso-C, Iso-CTS and Subspace Boosting, all on cores.

With orthonormal U and V the singular values of ΔW = U C Vᵀ are those of C and its singular vectors those of C, rotated; so
nothing here is an approximation. What differs from full matrices is the null space: a weight change from LoRA has at most
as many singular values as its rank, and the vectors of the others are arbitrary. They are left out here.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sstmerge.merging.methods.registry import CoreBatch, Method, Option
from sstmerge.merging.methods.sparse import KEPT_BY_TRIM, MAJORITY_SIGN, SCALE, TIES_PAPER, MajoritySign, core_ties

AverageOver = Literal["rank", "dimension"]

# Singular values up to this share of the largest are zero: float32 bases carry 1e-7 of rounding.
RANK_TOLERANCE = 1e-6


def tsv_m(batch: CoreBatch, *, scale: float) -> Tensor:
    """Concatenate the leading singular vectors of all tasks and decorrelate them (TSV-Merge).

    Gargiulo et al. 2025, https://arxiv.org/abs/2412.00081.

    Args:
        batch: The layers.
        scale: α.

    Returns:
        Merged cores, shape (L, R_o, R_i), float64.
    """
    tasks = len(batch.adapters)
    kept = max(1, min(batch.U.shape[1], batch.V.shape[1]) // tasks)
    left, values, right = _masked_svd(batch.cores, kept)
    values = batch.weights[:, None, None] * values
    decorrelated_left, decorrelated_right = _polar(_side_by_side(left)), _polar(_side_by_side(right))
    middle = _side_by_side(values[:, :, None, :])
    return scale * (decorrelated_left * middle) @ decorrelated_right.mT


def iso_c(batch: CoreBatch, *, average_over: AverageOver, scale: float) -> Tensor:
    """Give all singular values of the sum of the tasks their mean (Iso-C).

    Marczak et al. 2025, https://arxiv.org/abs/2502.04959.

    Args:
        batch: The layers.
        average_over: What the mean is taken over: the singular values that are not zero, or min(d_out, d_in).
        scale: α.

    Returns:
        Merged cores, shape (L, R_o, R_i), float64.
    """
    left, values, right = _masked_svd(_sum(batch))
    mean = _mean(values, min(batch.U.shape[1], batch.V.shape[1]) if average_over == "dimension" else None)
    return scale * mean[:, None, None] * left @ right.mT


def iso_cts(batch: CoreBatch, *, common_share: float, average_over: AverageOver, scale: float) -> Tensor:
    """Complete the leading directions of the sum with directions of single tasks, all with one singular value (Iso-CTS).

    Marczak et al. 2025, https://arxiv.org/abs/2502.04959.

    Args:
        batch: The layers.
        common_share: k / r, the share of directions that the sum of the tasks gives.
        average_over: What counts as the number r of directions: min(R_o, R_i) and a mean over those that are not zero, or
            min(d_out, d_in).
        scale: α.

    Returns:
        Merged cores, shape (L, R_o, R_i), float64.
    """
    tasks, _, rows, columns = batch.cores.shape
    dimension = min(batch.U.shape[1], batch.V.shape[1]) if average_over == "dimension" else min(rows, columns)
    # The rest has to fall into equal parts, one per task.
    per_task = round((dimension - int(common_share * dimension)) / tasks)
    common_count = max(dimension - per_task * tasks, 0)
    common = [part[..., :common_count] for part in _masked_svd(_sum(batch))]
    weighted = batch.weights[:, None, None, None] * batch.cores
    specific = weighted - common[0] @ (common[0].mT @ weighted)
    norms = torch.linalg.matrix_norm(weighted)
    left, values, right = _masked_svd(specific, per_task, relative_to=norms)
    U = _polar(torch.cat([common[0], _side_by_side(left)], dim=-1))
    V = _polar(torch.cat([common[2], _side_by_side(right)], dim=-1))
    values = torch.cat([common[1], _side_by_side(values[:, :, None, :])[:, 0]], dim=-1)
    mean = _mean(values, dimension if average_over == "dimension" else None)
    return scale * mean[:, None, None] * U @ V.mT


def subspace_boosting(batch: CoreBatch, *, cutoff: float, scale: float) -> Tensor:
    """Raise the small singular values of the sum of the tasks (Subspace Boosting on task arithmetic).

    Skorobogat et al. 2025, https://arxiv.org/abs/2506.16506.

    Args:
        batch: The layers.
        cutoff: β.
        scale: λ.

    Returns:
        Merged cores, shape (L, R_o, R_i), float64.
    """
    return scale * boost(_sum(batch), cutoff)


def subspace_boosting_ties(
    batch: CoreBatch, *, cutoff: float, density: float, majority_sign: MajoritySign, scale: float
) -> Tensor:
    """Raise the small singular values of what TIES makes of the cores.

    Args:
        batch: The layers.
        cutoff: β.
        density: Share of core entries that the trim keeps, layer by layer.
        majority_sign: As in `core_ties`.
        scale: λ.

    Returns:
        Merged cores, shape (L, R_o, R_i), float64.
    """
    return scale * boost(core_ties(batch, density=density, majority_sign=majority_sign, scale=1.0), cutoff)


def boost(cores: Tensor, cutoff: float) -> Tensor:
    """Raise singular values to σ_κ, κ the first with Σ_{i≤κ} σ_i >= β Σ σ_i.

    Args:
        cores: Shape (L, R_o, R_i).
        cutoff: β, in [0, 1].

    Returns:
        Cores, shape (L, R_o, R_i), float64.
    """
    left, values, right = _masked_svd(cores)
    reached = values.cumsum(-1) >= cutoff * values.sum(-1, keepdim=True) * (1 - 1e-12)
    smallest = values.gather(-1, reached.int().argmax(-1, keepdim=True))
    boosted = torch.where(values > 0, torch.maximum(values, smallest), 0.0)
    return (left * boosted[:, None, :]) @ right.mT


def _sum(batch: CoreBatch) -> Tensor:
    return torch.einsum("t,tlij->lij", batch.weights, batch.cores)


def _masked_svd(
    matrices: Tensor, kept: int | None = None, *, relative_to: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return left vectors (…, m, k), values (…, k) and right vectors (…, n, k), all zero where the value is.

    Args:
        matrices: Shape (…, m, n).
        kept: Number of leading values; all by default.
        relative_to: Size that a value is zero against, shape (…); the largest value by default.
    """
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    size = values[..., :1] if relative_to is None else relative_to[..., None]
    nonzero = (values > RANK_TOLERANCE * size) & (values > 0)
    values = values * nonzero
    left, right = left * nonzero[..., None, :], right.mT * nonzero[..., None, :]
    return left[..., :kept], values[..., :kept], right[..., :kept]


def _polar(vectors: Tensor) -> Tensor:
    """Return P Qᵀ of the singular value decomposition P D Qᵀ, without the part where D is zero; shape (…, m, k)."""
    left, _, right = _masked_svd(vectors)
    return left @ right.mT


def _side_by_side(parts: Tensor) -> Tensor:
    """Turn (T, L, m, k) into (L, m, T k)."""
    return torch.cat(list(parts), dim=-1)


def _mean(values: Tensor, count: int | None) -> Tensor:
    """Return the mean over `count` values, or over those that are not zero; shape (L,)."""
    number = values.count_nonzero(dim=-1).clamp_min(1) if count is None else count
    return values.sum(dim=-1) / number


_ISO = "https://arxiv.org/abs/2502.04959"
_BOOSTING = "https://arxiv.org/abs/2506.16506"
_AVERAGE_OVER = Option(
    "average_over",
    str,
    "rank",
    "What the mean singular value is taken over: the directions of the core (rank) or min(d_out, d_in) (dimension).",
    choices=("rank", "dimension"),
)
_CUTOFF = Option("cutoff", float, 0.01, "β, the share of Σ σ_i at the cutoff.", low=0.0, high=1.0)
_NULL_SPACE = "Directions outside the rank are left out: their singular vectors are arbitrary. "
_ISO_NOTE = (
    "The paper's mean is over all min(d_out, d_in) singular values and keeps Σ σ_i. A sum of LoRA adapters has few that are "
    "not zero: average_over=rank takes the mean over those, which keeps Σ σ_i and is the paper's for a matrix of full rank; "
    "average_over=dimension divides by min(d_out, d_in), which makes the result smaller by rank / dimension. "
)

METHODS: tuple[Method, ...] = (
    Method(
        name="tsv_m",
        title="TSV-Merge",
        function=tsv_m,
        acts_on="core",
        formula="w_t ΔW_t = U_t Σ_t V_tᵀ, its first min(d_out, d_in) / T values; Û = [U_1 … U_T] = P D Qᵀ, Û⊥ = P Qᵀ, "
        "V̂ alike; ΔW = α Û⊥ diag(Σ_1 … Σ_T) V̂⊥ᵀ",
        paper="https://arxiv.org/abs/2412.00081",
        options=(Option("scale", float, 1.0, "α, the factor of the merged weight change."),),
        note=_NULL_SPACE
        + "Where the vectors of the tasks are linearly dependent, the polar factor is the partial isometry.",
    ),
    Method(
        name="iso_c",
        title="Iso-C",
        function=iso_c,
        acts_on="core",
        formula="Σ_t w_t ΔW_t = U S Vᵀ; ΔW = α · mean(S) · U Vᵀ",
        paper=_ISO,
        options=(_AVERAGE_OVER, SCALE),
        note=_ISO_NOTE + _NULL_SPACE,
    ),
    Method(
        name="iso_cts",
        title="Iso-CTS",
        function=iso_cts,
        acts_on="core",
        formula="U_c S_c V_cᵀ = first k of r singular directions of Σ_t w_t ΔW_t; U_t S_t V_tᵀ = first (r − k) / T of "
        "(I − U_c U_cᵀ) w_t ΔW_t; ΔW = α · mean(S_c, S_1, …) · polar([U_c U_1 …]) polar([V_c V_1 …])ᵀ",
        paper=_ISO,
        options=(
            Option("common_share", float, 0.8, "k / r, the share of common directions.", low=0.0, high=1.0),
            _AVERAGE_OVER,
            SCALE,
        ),
        note="r is min(R_o, R_i), the size of the core, with average_over=rank, and min(d_out, d_in), as in the paper, with "
        "average_over=dimension; LoRA adapters whose ranks add up to less than k make the latter equal to Iso-C. "
        + _ISO_NOTE
        + _NULL_SPACE,
    ),
    Method(
        name="subspace_boosting",
        title="Subspace Boosting of task arithmetic",
        function=subspace_boosting,
        acts_on="core",
        formula="Σ_t w_t ΔW_t = U diag(σ) Vᵀ; κ = first with Σ_{i≤κ} σ_i >= β Σ_i σ_i; ΔW = λ U diag(max(σ_i, σ_κ)) Vᵀ",
        paper=_BOOSTING,
        options=(_CUTOFF, SCALE),
        note=_NULL_SPACE + "β = 1 leaves the sum as it is, β = 0 gives all directions the largest singular value.",
    ),
    Method(
        name="subspace_boosting_ties",
        title="Subspace Boosting of TIES in core space",
        function=subspace_boosting_ties,
        acts_on="core",
        formula="as subspace_boosting, with U diag(σ) Vᵀ = TIES of the cores",
        paper=_BOOSTING,
        options=(_CUTOFF, KEPT_BY_TRIM, MAJORITY_SIGN, SCALE),
        note=f"The paper boosts TIES ({TIES_PAPER}) of full matrices; this boosts core_ties, trimmed layer by layer. "
        + _NULL_SPACE,
    ),
)
