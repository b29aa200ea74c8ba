"""Batched symmetric-definite generalized eigenproblems."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sstmerge import reference
from sstmerge.errors import BackendError, InputError
from sstmerge.ops.backends import BackendName, choose_backend
from sstmerge.ops.extension import load_extension
from sstmerge.ops.validation import as_tensor, check_tensor
from sstmerge.reference import GeneralizedEigh

DriverName = Literal["auto", "sygvd", "cholesky"]

# The one driver that each backend has for generalized_eigh: LAPACK's generalized solver, or Cholesky, two triangular
# solves and a standard eigensolver.
_DRIVERS = {"cpu_compiled": "sygvd", "reference": "cholesky"}


def generalized_eigh(
    a: Tensor,
    b: Tensor,
    *,
    driver: DriverName = "auto",
    backend: BackendName = "auto",
    num_threads: int | None = None,
) -> GeneralizedEigh:
    """Solve the symmetric-definite generalized eigenproblems `a v = λ b v` of a batch.

    Like `scipy.linalg.eigh(a, b, lower=True)` of every problem: ascending λ, eigenvectors as columns with `Vᵀ b V = I`,
    and only the lower triangles of `a` and `b` are read. A problem that cannot be solved gets NaN and a status; it does
    not disturb the others. The arguments are not modified, and no gradient flows through. On the compiled backend the
    bits of a solution depend neither on `num_threads` nor on the rest of the batch.

    Args:
        a: Symmetric matrices, shape (..., n, n), float32 or float64; any strides.
        b: Symmetric positive definite matrices; shape, dtype and device of `a`.
        driver: "sygvd" (compiled backend), "cholesky" (reference), or "auto" for the one that the backend has.
        backend: A name that `backends` lists; "auto" takes the compiled one for CPU tensors where it is available, and
            the reference otherwise.
        num_threads: Threads over the batch in the compiled backend; the default is `torch.get_num_threads()`.

    Returns:
        Eigenvalues (..., n), eigenvectors (..., n, n) and int32 status (...,), on the device of `a`. Call
        `raise_on_failure` on it, or look at the status.

    Raises:
        InputError: Shapes, dtypes or devices do not fit, `num_threads` is not positive, or a name is unknown.
        BackendError: The backend or driver asked for is not available; the message says why and what to do.
    """
    a, b = as_tensor("a", a), as_tensor("b", b)
    _check_matrices(a, b)
    if num_threads is None:
        num_threads = torch.get_num_threads()
    if num_threads < 1:
        raise InputError(f"num_threads must be at least 1, not {num_threads}")
    if driver not in {"auto", *_DRIVERS.values()}:
        raise InputError(f"unknown driver {driver!r}: choose auto, {' or '.join(_DRIVERS.values())}")
    if backend == "auto" and driver != "auto":
        backend = "cpu_compiled" if driver == "sygvd" else "reference"
    chosen = choose_backend("generalized_eigh", backend, a.device)
    if driver not in {"auto", _DRIVERS[chosen]}:
        raise BackendError(
            f"backend {chosen!r} has no driver {driver!r} for generalized_eigh: take {_DRIVERS[chosen]!r} or 'auto'"
        )
    if chosen == "cpu_compiled":
        return _compiled_generalized_eigh(a, b, num_threads)
    return reference.generalized_eigh(a, b)


def _check_matrices(a: Tensor, b: Tensor) -> None:
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise InputError(f"a must hold square matrices, shape (..., n, n), not {tuple(a.shape)}")
    check_tensor("a", a, tuple(a.shape), "a", a)
    check_tensor("b", b, tuple(a.shape), "a", a)


def _compiled_generalized_eigh(a: Tensor, b: Tensor, num_threads: int) -> GeneralizedEigh:
    extension, words = load_extension()
    if extension is None:
        raise BackendError(f"backend 'cpu_compiled' is not available: {words}")
    batch_shape, n = a.shape[:-2], a.shape[-1]
    a, b = _with_contiguous_rows(a), _with_contiguous_rows(b)
    batch = a.shape[0]
    eigenvalues = torch.empty(batch, n, dtype=a.dtype)
    eigenvectors = torch.empty(batch, n, n, dtype=a.dtype)
    status = torch.zeros(batch, dtype=torch.int32)
    solve = extension.generalized_eigh_float64 if a.dtype == torch.float64 else extension.generalized_eigh_float32
    solve(
        a.data_ptr(),
        a.stride(0),
        a.stride(1),
        b.data_ptr(),
        b.stride(0),
        b.stride(1),
        eigenvalues.data_ptr(),
        eigenvectors.data_ptr(),
        status.data_ptr(),
        batch,
        n,
        num_threads,
    )
    return GeneralizedEigh(
        eigenvalues.reshape(*batch_shape, n), eigenvectors.reshape(*batch_shape, n, n), status.reshape(batch_shape)
    )


def _with_contiguous_rows(matrices: Tensor) -> Tensor:
    """Return the matrices as (batch, n, n) with neighbouring elements in a row, copied only where they are not."""
    n = matrices.shape[-1]
    matrices = matrices.reshape(matrices.shape[:-2].numel(), n, n)
    return matrices if matrices.stride(-1) == 1 else matrices.contiguous()
