"""Projections of activations or gradients on a layer's bases, and their second moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from sstmerge import reference
from sstmerge.errors import InputError
from sstmerge.ops.backends import BackendName, choose_backend
from sstmerge.ops.project_kernels import launch_projection
from sstmerge.ops.validation import as_tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@overload
def project_accumulate(
    x: Tensor,
    bases: Tensor,
    *,
    covariances: Tensor | None = None,
    weights: Tensor | None = None,
    backend: BackendName = "auto",
) -> Tensor: ...
@overload
def project_accumulate(
    x: Tensor,
    bases: Sequence[Tensor],
    *,
    covariances: Sequence[Tensor | None] | None = None,
    weights: Tensor | None = None,
    backend: BackendName = "auto",
) -> list[Tensor]: ...
def project_accumulate(
    x: Tensor,
    bases: Tensor | Sequence[Tensor],
    *,
    covariances: Tensor | Sequence[Tensor | None] | None = None,
    weights: Tensor | None = None,
    backend: BackendName = "auto",
) -> Tensor | list[Tensor]:
    """Project rows on bases, x̃ = Vᵀx, and add Σ w x̃x̃ᵀ to covariances, in one pass over the rows.

    Precision: kernels sum products in float32. Their covariances in half precision with at most 64 columns in all are
    accurate to about 1e-5 of the largest element, all others are formed in float64 from the float32 projections. The
    reference multiplies bfloat16 on a CPU in bfloat16, so that every projection is rounded to 8 bits there; covariances
    are formed in float64 everywhere. The same arguments on the same device give the same bits.

    Args:
        x: Rows, shape (N, d), float32, bfloat16 or float16; unit stride in the last dimension, any in the first.
        bases: Basis V, shape (d, R), dtype of `x`; or several, (d, R_k), whose projections share one pass over `x`. Round a
            basis to the dtype of `x` once, and use the rounded one everywhere.
        covariances: What is added to, in place: a contiguous float64 tensor, shape (R, R); for several bases one per basis
            or None. None for no covariance at all.
        weights: w, shape (N,), float32, at least 0; None for 1. A mask is weights of 0 and 1. Rows of weight 0 may hold
            anything. A negative weight is refused on a CPU; kernels, which do not wait for the device, make the
            covariance NaN.
        backend: A name that `backends` lists; "auto" takes the kernels on a GPU, and the reference elsewhere.

    Returns:
        The projections without their weights, shape (N, R), float32; for several bases a list of them. They may be
        views with a row stride above R.

    Raises:
        InputError: Shapes, dtypes, strides or devices do not fit, a weight is seen to be negative, or the backend's name is
            unknown.
        BackendError: The backend asked for is not available or lacks this op.
    """
    rows = _rows(x)
    single = not isinstance(bases, (list, tuple))
    names = ["bases"] if single else [f"bases[{i}]" for i in range(len(bases))]
    if not names:
        raise InputError("bases is empty: give at least one basis")
    checked = [_basis(name, basis, rows) for name, basis in zip(names, [bases] if single else bases, strict=True)]
    targets = _covariances([covariances] if single else covariances, checked, single)
    row_weights = None if weights is None else _weights(weights, rows)
    chosen = choose_backend("project_accumulate", backend, rows.device)
    if chosen == "reference":
        projections = reference.project_accumulate(rows, checked, covariances=targets, weights=row_weights)
    else:
        projections = launch_projection(chosen, rows, checked, targets, row_weights)
    return projections[0] if single else projections


def _rows(x: Tensor) -> Tensor:
    rows = as_tensor("x", x)
    if rows.ndim != 2:
        raise InputError(f"x must have the shape (N, d), not {tuple(rows.shape)}: flatten it with .reshape(-1, d)")
    if rows.dtype not in DTYPES:
        raise InputError(f"x must be float32, bfloat16 or float16, not {rows.dtype}")
    if min(rows.shape) > 0 and rows.shape[1] > 1 and rows.stride(1) != 1:
        raise InputError(f"x must have unit stride in its last dimension, not {rows.stride(1)}: call .contiguous()")
    return rows


def _basis(name: str, value: Tensor, x: Tensor) -> Tensor:
    basis = as_tensor(name, value)
    if basis.ndim != 2 or basis.shape[0] != x.shape[1]:
        raise InputError(f"{name} must have the shape ({x.shape[1]}, R), not {tuple(basis.shape)}")
    if basis.dtype != x.dtype:
        raise InputError(
            f"{name} must have the dtype of x, {x.dtype}, not {basis.dtype}: round the basis once, and use the rounded one "
            "everywhere"
        )
    _check_device(name, basis, x)
    return basis


def _covariances(values: object, bases: list[Tensor], single: bool) -> list[Tensor | None]:
    """Return one covariance or None per basis."""
    if values is None:
        return [None] * len(bases)
    if not isinstance(values, (list, tuple)) or len(values) != len(bases):
        found = f"{len(values)}" if isinstance(values, (list, tuple)) else type(values).__name__
        raise InputError(f"covariances must be a list of {len(bases)} tensors or Nones, one per basis, not {found}")
    checked: list[Tensor | None] = []
    for i, (value, basis) in enumerate(zip(values, bases, strict=True)):
        name = "covariances" if single else f"covariances[{i}]"
        checked.append(None if value is None else _covariance(name, value, basis))
    return checked


def _covariance(name: str, value: Tensor, basis: Tensor) -> Tensor:
    covariance = as_tensor(name, value)
    size = basis.shape[1]
    if tuple(covariance.shape) != (size, size):
        raise InputError(f"{name} must have the shape {(size, size)}, not {tuple(covariance.shape)}")
    if covariance.dtype != torch.float64:
        raise InputError(f"{name} must be float64, not {covariance.dtype}: sums of many rows need the digits")
    if not covariance.is_contiguous():
        raise InputError(f"{name} must be contiguous, but has the strides {covariance.stride()}")
    _check_device(name, covariance, basis)
    return covariance


def _weights(value: Tensor, x: Tensor) -> Tensor:
    weights = as_tensor("weights", value)
    if tuple(weights.shape) != (len(x),):
        raise InputError(f"weights must have the shape ({len(x)},), one per row of x, not {tuple(weights.shape)}")
    if weights.dtype != torch.float32:
        raise InputError(f"weights must be float32, not {weights.dtype}: convert them with .float()")
    _check_device("weights", weights, x)
    if weights.device.type == "cpu" and bool((weights < 0).any()):
        raise InputError(f"weights must be at least 0, but the smallest is {float(weights.min()):g}")
    return weights


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise InputError(f"{name} is on {tensor.device}, but x is on {x.device}: move one of them")
