"""Batched symmetric-definite generalized eigenproblems."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from sstmerge import reference
from sstmerge.errors import BackendError, InputError, SolverError
from sstmerge.ops import driver_table, eigen_cuda
from sstmerge.ops.backends import BackendName, choose_backend
from sstmerge.ops.extension import load_extension
from sstmerge.ops.launch import LAUNCHERS
from sstmerge.ops.validation import as_tensor, check_tensor
from sstmerge.reference import GeneralizedEigh

# Entries, 8 MiB in float64, from which on a batch is not copied beside others.
_LARGE_BATCH = 2**20

DriverName = Literal["auto", "sygvd", "batched", "jacobi", "cholesky"]


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
    not disturb the others. The arguments are not modified, and no gradient flows through. On the compiled CPU backend
    and with the driver "jacobi", the bits of a solution depend on nothing but its own problem.

    The drivers:

    * "jacobi" (GPU): one launch, one block per problem, everything in shared memory; sizes up to 110 in float32 and 78
      in float64. It can be captured in a CUDA graph.
    * "batched" (GPU): cuSOLVER's and cuBLAS's batched Cholesky, triangular and symmetric eigensolvers. It needs CUDA
      12.6.2 or newer; whether it can be captured is up to cuSOLVER.
    * "sygvd": LAPACK's generalized solver on a CPU, with threads over the batch; cuSOLVER's on a GPU, which has none
      for batches and solves one problem after another.
    * "cholesky" (reference): torch's batched functions, on any device.

    On a GPU nothing of this waits for the device, except what cuSOLVER may do inside "sygvd"; the status stays on the
    device, and everything is put on torch's current stream. "auto" takes the fastest driver by `driver_table.json`,
    measured or assumed, and "sygvd" for more than one problem only where "batched" is missing and the problems are too
    large for "jacobi".

    Args:
        a: Symmetric matrices, shape (..., n, n), float32 or float64; any strides.
        b: Symmetric positive definite matrices; shape, dtype and device of `a`.
        driver: One of the above, or "auto".
        backend: A name that `backends` lists; "auto" takes one for the device of `a` that has the driver: on a GPU the
            compiled kernels, then cupy's, on a CPU the compiled code, and where none is available the reference.
        num_threads: Threads over the batch in the compiled CPU backend; the default is `torch.get_num_threads()`.

    Returns:
        Eigenvalues (..., n), eigenvectors (..., n, n) and int32 status (...,), on the device of `a`. Call
        `raise_on_failure` on it, or look at the status.

    Raises:
        InputError: Shapes, dtypes or devices do not fit, `num_threads` is not positive, or a name is unknown.
        BackendError: The backend or driver asked for is not available, or is not made for this size; the message says
            why and what to do.
    """
    a, b = as_tensor("a", a), as_tensor("b", b)
    _check_matrices(a, b)
    if num_threads is None:
        num_threads = torch.get_num_threads()
    if num_threads < 1:
        raise InputError(f"num_threads must be at least 1, not {num_threads}")
    if driver not in get_args(DriverName):
        raise InputError(f"unknown driver {driver!r}: choose {', '.join(get_args(DriverName))}")
    chosen = _choose_backend(driver, backend, a.device)
    batch_shape, n = a.shape[:-2], a.shape[-1]
    if chosen == "reference":
        return reference.generalized_eigh(a, b)
    batch = batch_shape.numel()  # not -1, which has no answer for empty matrices
    a, b = a.reshape(batch, n, n), b.reshape(batch, n, n)
    if chosen == "cpu_compiled":
        solution = _compiled_generalized_eigh(a, b, num_threads)
    elif batch == 0 or n == 0:
        solution = GeneralizedEigh(a.new_empty(batch, n), a.new_empty(batch, n, n), _converged(batch, a.device))
    else:
        solution = eigen_cuda.solve(chosen, _choose_driver(driver, a), a, b)
    return GeneralizedEigh(
        solution.eigenvalues.reshape(*batch_shape, n),
        solution.eigenvectors.reshape(*batch_shape, n, n),
        solution.status.reshape(batch_shape),
    )


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Solve the symmetric eigenproblems of a batch: `generalized_eigh` with the identity.

    On a CPU that is several times as fast as `torch.linalg.eigh`, which solves one problem after another. On a GPU it waits
    for the device, to know that all problems were solved.

    Args:
        matrices: Symmetric matrices, shape (..., n, n), float32 or float64; only the lower triangles are read.

    Returns:
        Ascending eigenvalues (..., n) and orthonormal eigenvectors as columns (..., n, n).

    Raises:
        InputError: The shape or dtype does not fit.
        SolverError: A matrix is not finite, or its iteration did not converge.
    """
    matrices = as_tensor("matrices", matrices)
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise InputError(f"matrices must have the shape (..., n, n), not {tuple(matrices.shape)}")
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    solution = generalized_eigh(matrices, identity.expand(matrices.shape))
    failed = int(solution.status.count_nonzero())
    if failed:
        raise SolverError(
            f"{failed} of {solution.status.numel()} symmetric eigenproblems of size {matrices.shape[-1]} could not be "
            "solved: the matrices hold NaN or infinity, or numbers so large that they overflow; look for such values in the "
            "adapters."
        )
    return solution.eigenvalues, solution.eigenvectors


def generalized_eigh_mixed(
    problems: Sequence[tuple[Tensor, Tensor]],
    *,
    driver: DriverName = "auto",
    backend: BackendName = "auto",
    num_threads: int | None = None,
) -> list[GeneralizedEigh]:
    """Solve problems of several sizes with one call of `generalized_eigh` per size, dtype and device.

    On a CPU a batch of large matrices is solved where it lies: copying it into one with others takes longer than a call.

    Args:
        problems: Pairs of `a` and `b`, each of them one problem or a batch, shape (..., n, n).
        driver: As in `generalized_eigh`.
        backend: As in `generalized_eigh`.
        num_threads: As in `generalized_eigh`.

    Returns:
        One solution per pair, in the order and with the leading dimensions of the pairs.

    Raises:
        InputError: As in `generalized_eigh`; the message gives the position of the pair.
        BackendError: As in `generalized_eigh`.
    """
    pairs = []
    groups: dict[tuple[int, torch.dtype, torch.device, int | None], list[int]] = {}
    for position, (a, b) in enumerate(problems):
        try:
            pair = as_tensor("a", a), as_tensor("b", b)
            _check_matrices(*pair)
        except InputError as error:
            raise InputError(f"problem {position}: {error}") from error
        pairs.append(pair)
        a = pair[0]
        alone = position if a.device.type == "cpu" and a.numel() >= _LARGE_BATCH else None
        groups.setdefault((a.shape[-1], a.dtype, a.device, alone), []).append(position)
    solutions: dict[int, GeneralizedEigh] = {}
    for (n, *_), positions in groups.items():
        shapes = [pairs[position][0].shape[:-2] for position in positions]
        counts = [shape.numel() for shape in shapes]
        members = zip(positions, counts, strict=True)
        flat = [[matrices.reshape(count, n, n) for matrices in pairs[position]] for position, count in members]
        a, b = (side[0] if len(side) == 1 else torch.cat(side) for side in zip(*flat, strict=True))
        together = generalized_eigh(a, b, driver=driver, backend=backend, num_threads=num_threads)
        parts = zip(*(field.split(counts) for field in _fields(together)), strict=True)
        for position, shape, (eigenvalues, eigenvectors, status) in zip(positions, shapes, parts, strict=True):
            solutions[position] = GeneralizedEigh(
                eigenvalues.reshape(*shape, n), eigenvectors.reshape(*shape, n, n), status.reshape(shape)
            )
    return [solutions[position] for position in range(len(pairs))]


def available_drivers(backend: str, n: int = 1, dtype: torch.dtype = torch.float64) -> tuple[str, ...]:
    """Return the drivers with which a backend can solve problems here.

    Args:
        backend: Name of an available backend.
        n: Size of the problems.
        dtype: Their dtype.

    Returns:
        Names of drivers, without "auto".
    """
    if backend in LAUNCHERS:
        return tuple(driver for driver in driver_table.DRIVERS if not eigen_cuda.why_not(driver, n, dtype))
    return _drivers(backend)


def _drivers(backend: str) -> tuple[str, ...]:
    """Return the drivers that belong to a backend, be they available or not."""
    if backend in LAUNCHERS:
        return driver_table.DRIVERS
    return ("sygvd",) if backend == "cpu_compiled" else ("cholesky",)


def _choose_backend(driver: str, backend: str, device: torch.device) -> str:
    if backend == "auto" and driver == "cholesky":
        backend = "reference"
    chosen = choose_backend("generalized_eigh", backend, device)
    if backend == "auto" and chosen == "reference" and driver not in {"auto", "cholesky"}:
        # Nothing else is there: asking for it by name tells why.
        chosen = choose_backend("generalized_eigh", "cpu_compiled" if device.type == "cpu" else "cuda_compiled", device)
    if driver not in {"auto", *_drivers(chosen)}:
        raise BackendError(
            f"backend {chosen!r} has no driver {driver!r} for generalized_eigh: "
            f"take {', '.join(map(repr, _drivers(chosen)))} or 'auto'"
        )
    return chosen


def _choose_driver(driver: str, a: Tensor) -> str:
    """Return the driver for a batch on a GPU; raises BackendError where there is none."""
    batch, n = a.shape[:2]
    if driver != "auto":
        reason = eigen_cuda.why_not(driver, n, a.dtype)
        if reason:
            raise BackendError(reason)
        return driver
    name = _device_name(a.device)
    order = driver_table.fastest_first(name, str(a.dtype).removeprefix("torch."), n, batch)
    if batch > 1:  # one after another, they lose to a single CPU core
        order = (*(candidate for candidate in order if candidate != "sygvd"), "sygvd")
    reasons = []
    for candidate in order:
        reason = eigen_cuda.why_not(candidate, n, a.dtype)
        if not reason:
            return candidate
        reasons.append(reason)
    raise BackendError(
        f"no driver on {name} can solve problems of size {n}: {'; '.join(reasons)}. "
        "With backend='reference' torch's own functions do it."
    )


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _fields(solution: GeneralizedEigh) -> tuple[Tensor, Tensor, Tensor]:
    return solution.eigenvalues, solution.eigenvectors, solution.status


def _converged(batch: int, device: torch.device) -> Tensor:
    return torch.zeros(batch, dtype=torch.int32, device=device)


def _check_matrices(a: Tensor, b: Tensor) -> None:
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise InputError(f"a must hold square matrices, shape (..., n, n), not {tuple(a.shape)}")
    check_tensor("a", a, tuple(a.shape), "a", a)
    check_tensor("b", b, tuple(a.shape), "a", a)


def _compiled_generalized_eigh(a: Tensor, b: Tensor, num_threads: int) -> GeneralizedEigh:
    extension, words = load_extension()
    if extension is None:
        raise BackendError(f"backend 'cpu_compiled' is not available: {words}")
    a, b = _with_contiguous_rows(a), _with_contiguous_rows(b)
    batch, n = a.shape[:2]
    eigenvalues = torch.empty(batch, n, dtype=a.dtype)
    eigenvectors = torch.empty(batch, n, n, dtype=a.dtype)
    status = _converged(batch, a.device)
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
    return GeneralizedEigh(eigenvalues, eigenvectors, status)


def _with_contiguous_rows(matrices: Tensor) -> Tensor:
    """Return matrices (batch, n, n) with neighbouring elements in a row, copied only where they are not."""
    return matrices if matrices.stride(-1) == 1 else matrices.contiguous()
