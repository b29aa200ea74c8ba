"""The twin of `sstmerge.ops.generalized_eigh`, its status codes and its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from sstmerge.errors import InputError, SolverError

# Torch documents this name but leaves it out of the exports that type checkers see.
LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]


class SolveStatus(IntEnum):
    """What became of one generalized eigenproblem; the codes are those of `csrc/generalized_eigh.h`.

    Attributes:
        message: What happened, as the end of a sentence that begins with the problem's name.
        hint: How to get past it; empty for CONVERGED.
    """

    message: str
    hint: str

    CONVERGED = 0, "was solved", ""
    NOT_POSITIVE_DEFINITE = (
        1,
        "matrix b (the cost Fisher) is not positive definite",
        "raise the damping, or collect the cost Fisher from more benign sequences",
    )
    NOT_CONVERGED = (
        2,
        "the eigenvalue iteration did not converge or overflowed",
        "raise the damping, and check that a and b are of comparable size",
    )
    NON_FINITE_INPUT = (
        3,
        "matrix a or b holds NaN or infinity",
        "look for NaN in the adapters and for an overflow of the activations (bfloat16 instead of float16 helps)",
    )

    def __new__(cls, code: int, message: str, hint: str) -> SolveStatus:
        """Make a member of `code` that carries its words."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.message = message
        member.hint = hint
        return member


@dataclass(frozen=True)
class GeneralizedEigh:
    """Solutions of a batch of generalized eigenproblems `a v = λ b v`.

    Attributes:
        eigenvalues: λ in ascending order, shape (..., n), dtype of the matrices; NaN where the problem failed.
        eigenvectors: V with `Vᵀ b V = I` as columns, shape (..., n, n), dtype of the matrices; NaN where the problem
            failed.
        status: One `SolveStatus` code per problem, shape (...,), int32.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    status: Tensor

    def raise_on_failure(self, names: Sequence[str]) -> None:
        """Turn failed problems into an exception that says which, why and what to do.

        Args:
            names: One name per problem, in the order of `status.flatten()`.

        Raises:
            InputError: The number of names is not the number of problems.
            SolverError: At least one problem failed.
        """
        codes = self.status.flatten().tolist()
        if len(names) != len(codes):
            raise InputError(f"expected one name per problem: {len(codes)} problems, {len(names)} names")
        by_code = {int(status): status for status in SolveStatus}
        solved = zip(names, (by_code[code] for code in codes), strict=True)
        failures = [(name, status) for name, status in solved if status is not SolveStatus.CONVERGED]
        if not failures:
            return
        lines = [f"{name}: {status.message}" for name, status in failures]
        hints = dict.fromkeys(status.hint for _, status in failures)
        raise SolverError(
            f"{len(failures)} of {len(codes)} generalized eigenproblems could not be solved.\n  "
            + "\n  ".join(lines)
            + "\nTo fix it: "
            + "; ".join(hints)
            + "."
        )


@torch.no_grad()
def generalized_eigh(a: Tensor, b: Tensor) -> GeneralizedEigh:
    """Solve `a v = λ b v` by Cholesky, two triangular solves and a standard eigensolver.

    Only the lower triangles are read, as in `scipy.linalg.eigh(a, b, lower=True)`. See `sstmerge.ops.generalized_eigh`.

    Args:
        a: Symmetric matrices, shape (..., n, n), float32 or float64.
        b: Symmetric positive definite matrices, shape, dtype and device of `a`.

    Returns:
        Eigenvalues (..., n), eigenvectors (..., n, n) and status (...,).
    """
    batch_shape, n = a.shape[:-2], a.shape[-1]
    batch = batch_shape.numel()  # not -1, which has no answer for empty matrices
    a, b = a.reshape(batch, n, n).tril(), b.reshape(batch, n, n).tril()
    identity = torch.eye(n, dtype=a.dtype, device=a.device)
    finite = a.isfinite().all(-1).all(-1) & b.isfinite().all(-1).all(-1)
    a = a + a.tril(-1).mT

    # A problem that failed goes on as the identity, so that the batched routines after it can digest it.
    factor, info = torch.linalg.cholesky_ex(torch.where(finite[:, None, None], b, identity))
    definite = info == 0
    usable = finite & definite
    factor = torch.where(usable[:, None, None], factor, identity)
    a = torch.where(usable[:, None, None], a, identity)
    half_reduced = torch.linalg.solve_triangular(factor, a, upper=False)
    reduced = torch.linalg.solve_triangular(factor, half_reduced.mT, upper=False)
    bounded = reduced.isfinite().all(-1).all(-1)
    reduced = torch.where(bounded[:, None, None], reduced, identity)
    eigenvalues, rotation, converged = _eigh(reduced)
    eigenvectors = torch.linalg.solve_triangular(factor.mT, rotation, upper=True)
    converged &= bounded & eigenvalues.isfinite().all(-1)

    status = torch.full_like(info, SolveStatus.CONVERGED, dtype=torch.int32)
    status.masked_fill_(~converged, SolveStatus.NOT_CONVERGED)
    status.masked_fill_(~definite, SolveStatus.NOT_POSITIVE_DEFINITE)
    status.masked_fill_(~finite, SolveStatus.NON_FINITE_INPUT)
    failed = status != SolveStatus.CONVERGED
    eigenvalues = eigenvalues.masked_fill(failed[:, None], torch.nan)
    eigenvectors = eigenvectors.masked_fill(failed[:, None, None], torch.nan)
    return GeneralizedEigh(
        eigenvalues.reshape(*batch_shape, n), eigenvectors.reshape(*batch_shape, n, n), status.reshape(batch_shape)
    )


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return eigenvalues (batch, n), eigenvectors (batch, n, n) and whether each problem converged (batch,)."""
    converged = torch.ones(matrices.shape[0], dtype=torch.bool, device=matrices.device)
    try:
        eigenvalues, eigenvectors = torch.linalg.eigh(matrices)
    except LinAlgError:
        # Torch gives up on the whole batch when one problem does not converge: find out which one it was.
        eigenvalues = torch.full_like(matrices[..., 0], torch.nan)
        eigenvectors = torch.full_like(matrices, torch.nan)
        for problem, matrix in enumerate(matrices):
            try:
                eigenvalues[problem], eigenvectors[problem] = torch.linalg.eigh(matrix)
            except LinAlgError:
                converged[problem] = False
    return eigenvalues, eigenvectors, converged
