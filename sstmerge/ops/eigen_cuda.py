"""The drivers of generalized_eigh on a GPU: kernels through a launcher, and cuSOLVER and cuBLAS between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sstmerge.errors import BackendError
from sstmerge.ops.cores import SHARED_BYTES
from sstmerge.ops.cusolver import CuSolver, open_cusolver
from sstmerge.ops.launch import Argument, Grid, launcher
from sstmerge.reference import GeneralizedEigh

# Jacobi sweeps converge quadratically: six to ten are usual, and more than a few beyond that mean that none will do.
MAXIMAL_SWEEPS = 30

# XsyevBatched counts the elements of all its matrices in 32 bits. It was seen to refuse 32,768 tiny ones.
MOST_ELEMENTS = 2**31 - 1
MOST_PROBLEMS = 16384

_THREADS = 256
_WARP = 32


def jacobi_shared_bytes(n: int, dtype: torch.dtype) -> int:
    """Return the shared memory per problem of the Jacobi kernel, which works on an even size.

    Args:
        n: Size of the matrices.
        dtype: float32 or float64.

    Returns:
        Bytes.
    """
    even = n + n % 2
    return (2 * even * (even + 1) + 2 * even + 32) * dtype.itemsize


def jacobi_limit(dtype: torch.dtype) -> int:
    """Return the largest size that the Jacobi kernel takes: 110 in float32, 78 in float64.

    Args:
        dtype: float32 or float64.

    Returns:
        The size.
    """
    return max(n for n in range(2, 256, 2) if jacobi_shared_bytes(n, dtype) <= SHARED_BYTES)


def why_not(driver: str, n: int, dtype: torch.dtype) -> str:
    """Tell why a driver cannot solve problems of a size here.

    Args:
        driver: "jacobi", "batched" or "sygvd".
        n: Size of the matrices.
        dtype: float32 or float64.

    Returns:
        The reason; empty where it can.
    """
    if driver == "jacobi":
        limit = jacobi_limit(dtype)
        too_large = (
            f"driver 'jacobi' solves sizes up to {limit} in {dtype}, whose matrices fit into shared memory, not {n}"
        )
        return too_large if n > limit else ""
    if driver == "batched" and n * n > MOST_ELEMENTS:
        return f"driver 'batched' solves sizes up to {int(MOST_ELEMENTS**0.5)}, not {n}"
    try:
        solver = open_cusolver()
    except BackendError as error:
        return f"driver {driver!r} needs cuSOLVER: {error}"
    if driver == "batched" and not solver.has_syev_batched:
        return (
            f"driver 'batched' needs cusolverDnXsyevBatched, as from CUDA 12.6.2, and {solver.path} has none: "
            "update CUDA or take 'auto'"
        )
    return ""


def solve(backend: str, driver: str, a: Tensor, b: Tensor) -> GeneralizedEigh:
    """Solve a batch with a driver that `why_not` has nothing against.

    Args:
        backend: Name of a launcher.
        driver: "jacobi", "batched" or "sygvd".
        a: Shape (batch, n, n), with any strides; neither number is zero.
        b: Shape (batch, n, n).

    Returns:
        The solutions (batch, n), (batch, n, n), (batch,), contiguous.

    Raises:
        BackendError: A launch or a library call is refused.
    """
    batch, n = a.shape[:2]
    solution = GeneralizedEigh(
        torch.empty(batch, n, dtype=a.dtype, device=a.device),
        torch.empty(batch, n, n, dtype=a.dtype, device=a.device),
        torch.empty(batch, dtype=torch.int32, device=a.device),
    )
    calls = _Calls(backend, a)
    if driver == "jacobi":
        _solve_in_shared_memory(calls, a, b, solution)
        return solution
    most = batch if driver == "sygvd" else min(batch, MOST_PROBLEMS, MOST_ELEMENTS // (n * n))
    solver = _Solver(open_cusolver(), calls)
    workspace = _Workspace.allocate(most, n, a)
    steps = _solve_one_by_one if driver == "sygvd" else _solve_batched
    with calls.launcher.guard(a.device):
        for start in range(0, batch, most):
            part = slice(start, min(start + most, batch))
            chunk = GeneralizedEigh(solution.eigenvalues[part], solution.eigenvectors[part], solution.status[part])
            steps(calls, solver, workspace, a[part], b[part], chunk)
    return solution


class _Calls:
    """Launches of this op's kernels on one device, for one dtype."""

    def __init__(self, backend: str, like: Tensor) -> None:
        self.launcher = launcher(backend)
        self.device = like.device
        self.dtype = like.dtype

    def launch(
        self, module: str, kernel: str, grid: Grid, block: int, shared_bytes: int, arguments: list[Argument]
    ) -> None:
        name = f"{kernel}_{str(self.dtype).removeprefix('torch.')}"
        self.launcher.launch(module, name, grid, block, shared_bytes, self.device, arguments)

    def stage(self, kernel: str, grid: Grid, shared_elements: int, arguments: list[Argument]) -> None:
        self.launch("eigh_stages", kernel, grid, _THREADS, shared_elements * self.dtype.itemsize, arguments)


class _Solver:
    """Calls of cuSOLVER on one device and its current stream, for one dtype."""

    def __init__(self, solver: CuSolver, calls: _Calls) -> None:
        index = calls.device.index or 0
        self._solver = solver
        self._first = (solver.library, index, calls.launcher.stream(calls.device), calls.dtype == torch.float64)

    def call(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._solver.extension, f"cusolver_{function}")(*self._first, *arguments)
        except RuntimeError as error:
            raise BackendError(f"{self._solver.path}: {error}") from error


@dataclass(frozen=True)
class _Workspace:
    """What a chunk of problems needs besides the solution; torch keeps it until the stream has passed.

    Attributes:
        reduced: a, then L⁻¹ a L⁻ᵀ, then the eigenvectors; shape (batch, n, n), column-major.
        factor: b, then its Cholesky factor L; shape (batch, n, n), column-major.
        values: Eigenvalues of the scaled problems, shape (batch, n).
        pointers: Addresses of the matrices in `reduced`, then in `factor`; shape (2, batch), int64.
        exponents: Exponents of the scales of a and b, shape (batch, 2), int32.
        outcome: Status so far, shape (batch,), int32.
        info: What the library says of the factorisations, then of the eigenproblems; shape (2, batch), int32.
    """

    reduced: Tensor
    factor: Tensor
    values: Tensor
    pointers: Tensor
    exponents: Tensor
    outcome: Tensor
    info: Tensor

    @staticmethod
    def allocate(batch: int, n: int, like: Tensor) -> _Workspace:
        def empty(*shape: int, dtype: torch.dtype = like.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=like.device)

        return _Workspace(
            reduced=empty(batch, n, n),
            factor=empty(batch, n, n),
            values=empty(batch, n),
            pointers=empty(2, batch, dtype=torch.int64),
            exponents=empty(batch, 2, dtype=torch.int32),
            outcome=empty(batch, dtype=torch.int32),
            info=empty(2, batch, dtype=torch.int32),
        )


def _solve_in_shared_memory(calls: _Calls, a: Tensor, b: Tensor, solution: GeneralizedEigh) -> None:
    batch, n = a.shape[:2]
    # Few warps wait less for one another at the barriers, many have more of a large problem's work under way.
    threads = 64 if n <= 16 else 128 if n <= 32 else _THREADS
    written = [solution.eigenvalues, solution.eigenvectors, solution.status]
    arguments = [*_strided(a), *_strided(b), *written, np.int32(n), np.int32(MAXIMAL_SWEEPS)]
    shared_bytes = jacobi_shared_bytes(n, a.dtype)
    calls.launch("jacobi_eigh", "jacobi_eigh", (batch, 1, 1), threads, shared_bytes, arguments)


def _solve_one_by_one(
    calls: _Calls, solver: _Solver, workspace: _Workspace, a: Tensor, b: Tensor, solution: GeneralizedEigh
) -> None:
    batch, n = a.shape[:2]
    _prepare(calls, workspace, a, b)
    a_address, b_address, values = (x.data_ptr() for x in (workspace.reduced, workspace.factor, workspace.values))
    size = solver.call("sygvd_workspace", a_address, b_address, values, n)
    scratch = torch.empty(max(size, 1), dtype=a.dtype, device=a.device)
    info = workspace.info[1]
    solver.call("sygvd", a_address, b_address, values, scratch.data_ptr(), size, info.data_ptr(), n, batch)
    _finish(calls, workspace, solution, generalized=True)


def _solve_batched(
    calls: _Calls, solver: _Solver, workspace: _Workspace, a: Tensor, b: Tensor, solution: GeneralizedEigh
) -> None:
    batch, n = a.shape[:2]
    grid, size, outcome = (batch, 1, 1), np.int32(n), workspace.outcome
    matrices, factors = (row.data_ptr() for row in workspace.pointers)
    factor_info, eigen_info = workspace.info
    _prepare(calls, workspace, a, b)
    solver.call("potrf_batched", factors, factor_info.data_ptr(), n, batch)
    calls.stage("eigh_check_factor", grid, 0, [workspace.reduced, workspace.factor, factor_info, outcome, size])
    solver.call("trsm_batched", "forward", factors, matrices, n, batch)
    solver.call("trsm_batched", "from the right", factors, matrices, n, batch)
    calls.stage("eigh_check_reduced", grid, 0, [workspace.reduced, outcome, size])
    addresses = workspace.reduced.data_ptr(), workspace.values.data_ptr()
    device_bytes, host_bytes = solver.call("syev_batched_workspace", *addresses, n, batch)
    scratch = torch.empty(max(device_bytes, 1), dtype=torch.uint8, device=a.device)
    # Memory that is not pinned: CUDA reads and writes such memory only during the call, so it may go after it.
    host_scratch = torch.empty(max(host_bytes, 1), dtype=torch.uint8)
    scratches = scratch.data_ptr(), device_bytes, host_scratch.data_ptr(), host_bytes
    solver.call("syev_batched", *addresses, *scratches, eigen_info.data_ptr(), n, batch)
    solver.call("trsm_batched", "backward", factors, matrices, n, batch)
    _finish(calls, workspace, solution, generalized=False)


def _prepare(calls: _Calls, workspace: _Workspace, a: Tensor, b: Tensor) -> None:
    batch, n = a.shape[:2]
    matrices: list[Argument] = [*_strided(a), *_strided(b), workspace.reduced, workspace.factor]
    bookkeeping: list[Argument] = [*workspace.pointers, workspace.exponents, workspace.outcome, np.int32(n)]
    calls.stage("eigh_prepare", (batch, 1, 1), _WARP, [*matrices, *bookkeeping])


def _finish(calls: _Calls, workspace: _Workspace, solution: GeneralizedEigh, *, generalized: bool) -> None:
    batch, n = solution.eigenvalues.shape
    found: list[Argument] = [workspace.values, workspace.reduced, workspace.exponents, workspace.info[1]]
    written: list[Argument] = [solution.eigenvalues, solution.eigenvectors, solution.status, np.int32(n)]
    arguments = [*found, np.int32(generalized), workspace.outcome, *written]
    calls.stage("eigh_finish", (batch, -(-n // _WARP), 1), _WARP * (_WARP + 1), arguments)


def _strided(matrices: Tensor) -> list[Argument]:
    return [matrices, *(np.int64(stride) for stride in matrices.stride())]
