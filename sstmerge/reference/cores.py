"""The twin of `sstmerge.ops.filter_cores`."""

from __future__ import annotations

from torch import Tensor


def filter_cores(
    cores: Tensor,
    eigenvectors_out: Tensor,
    metric_out: Tensor,
    eigenvectors_in: Tensor,
    metric_in: Tensor,
    weights: Tensor,
) -> Tensor:
    """Compute `Q (w ∘ (Qᵀ D C X P)) Pᵀ`. See `sstmerge.ops.filter_cores`.

    Args:
        cores: C, shape (..., R_o, R_i).
        eigenvectors_out: Q, shape (..., R_o, R_o).
        metric_out: D, shape (..., R_o, R_o).
        eigenvectors_in: P, shape (..., R_i, R_i).
        metric_in: X, shape (..., R_i, R_i).
        weights: w, shape (..., R_o, R_i).

    Returns:
        The filtered cores, shape (..., R_o, R_i).
    """
    coordinates = (eigenvectors_out.mT @ metric_out) @ cores @ (metric_in @ eigenvectors_in)
    return eigenvectors_out @ (weights * coordinates) @ eigenvectors_in.mT
