"""The twin of `sstmerge.ops.project_accumulate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor
from torch.nn import functional

# Rows whose outer products are summed at a time, which bounds the memory of their copies in float64.
_ROWS = 16384

# Columns of bfloat16 that products on a CPU (oneDNN's for AMX) read at a time.
_COLUMNS = 32


@overload
def project_accumulate(
    x: Tensor, bases: Tensor, *, covariances: Tensor | None = None, weights: Tensor | None = None
) -> Tensor: ...
@overload
def project_accumulate(
    x: Tensor,
    bases: Sequence[Tensor],
    *,
    covariances: Sequence[Tensor | None] | None = None,
    weights: Tensor | None = None,
) -> list[Tensor]: ...
def project_accumulate(
    x: Tensor,
    bases: Tensor | Sequence[Tensor],
    *,
    covariances: Tensor | Sequence[Tensor | None] | None = None,
    weights: Tensor | None = None,
) -> Tensor | list[Tensor]:
    """Project rows and add up their outer products. See `sstmerge.ops.project_accumulate`.

    Args:
        x: Rows, shape (N, d), float32, bfloat16, float16, or float64, which only the twin takes.
        bases: Basis, shape (d, R), or several, (d, R_k), dtype of `x`.
        covariances: What Σ w x̃x̃ᵀ is added to, shape (R, R), float64, one per basis.
        weights: w, shape (N,).

    Returns:
        The projections x̃, shape (N, R), or one (N, R_k) per basis, float32 (float64 for float64).
    """
    if isinstance(bases, Tensor):
        return _project_accumulate(x, [bases], [covariances] if isinstance(covariances, Tensor) else None, weights)[0]
    several = None if covariances is None or isinstance(covariances, Tensor) else covariances
    return _project_accumulate(x, bases, several, weights)


@torch.no_grad()
def _project_accumulate(
    x: Tensor, bases: Sequence[Tensor], covariances: Sequence[Tensor | None] | None, weights: Tensor | None
) -> list[Tensor]:
    basis = bases[0] if len(bases) == 1 else torch.cat(list(bases), dim=1)
    projections = list(_project(x, basis).split([basis.shape[1] for basis in bases], dim=1))
    for projection, covariance in zip(projections, covariances or [None] * len(bases), strict=True):
        if covariance is not None:
            add_outer_products(covariance, projection, weights)
    return projections


def _project(x: Tensor, basis: Tensor) -> Tensor:
    if x.dtype not in {torch.bfloat16, torch.float16}:
        return x @ basis
    if x.is_cuda:
        return torch.mm(x, basis, out_dtype=torch.float32)
    if x.dtype == torch.float16:
        return x.float() @ basis.float()  # its range might not hold the result
    # On a CPU bfloat16 is multiplied as it is, which is an order of magnitude faster, and rounds the result to it. The
    # product reads blocks of columns, also beyond the last one, where NaN times zero would come from another row.
    missing = -x.shape[1] % _COLUMNS
    if missing:
        x, basis = functional.pad(x, (0, missing)), functional.pad(basis, (0, 0, 0, missing))
    return (x @ basis).float()


def add_outer_products(covariance: Tensor, rows: Tensor, weights: Tensor | None) -> None:
    """Add Σ w y yᵀ over the rows y, formed in float64, to a matrix.

    Args:
        covariance: The matrix, shape (R, R), float64.
        rows: The rows, shape (N, R).
        weights: w, shape (N,), at least 0; None for 1. Rows of weight 0 may hold anything.
    """
    for first in range(0, len(rows), _ROWS):
        scaled = rows[first : first + _ROWS].double()
        if weights is not None:
            weight = weights[first : first + _ROWS, None].double()
            scaled = torch.where(weight == 0, 0.0, scaled * weight.sqrt())
        covariance += scaled.mT @ scaled
