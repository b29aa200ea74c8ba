"""What every driver of generalized_eigh has to do, on any backend and device; scipy is the judge."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from sstmerge import ops
from sstmerge.ops import GeneralizedEigh, SolveStatus

# A matrix, the row, column and value of one element that is changed, and what becomes of the problem.
FAILURES = [
    ("b", 3, 3, -1.0, SolveStatus.NOT_POSITIVE_DEFINITE),
    ("b", 0, 0, 0.0, SolveStatus.NOT_POSITIVE_DEFINITE),
    ("b", 5, 2, 1e30, SolveStatus.NOT_POSITIVE_DEFINITE),
    ("a", 2, 1, float("nan"), SolveStatus.NON_FINITE_INPUT),
    ("b", 8, 8, float("inf"), SolveStatus.NON_FINITE_INPUT),
    ("a", 0, 0, 1e308, SolveStatus.NOT_CONVERGED),
]


def problems(batch: int, n: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """a of half rank, as a gain Fisher is, and a well-conditioned b; shapes (batch, n, n)."""
    generator = torch.Generator().manual_seed(seed)
    gain = torch.randn(batch, n, (n + 1) // 2, dtype=torch.float64, generator=generator)
    cost = torch.randn(batch, n, 3 * n, dtype=torch.float64, generator=generator)
    a = gain @ gain.mT / n
    b = cost @ cost.mT / (3 * n) + 0.1 * torch.eye(n, dtype=torch.float64)
    return a.to(dtype), b.to(dtype)


def scipy_eigenvalues(a: Tensor, b: Tensor) -> Tensor:
    """Eigenvalues (batch, n) in float64 of the problems as they are after rounding to their dtype."""
    pairs = zip(a.double().numpy(), b.double().numpy(), strict=True)
    rows = [scipy.linalg.eigh(x, y, eigvals_only=True) for x, y in pairs]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(a.shape[:-1], dtype=torch.float64)


def errors(a: Tensor, b: Tensor, solution: GeneralizedEigh) -> dict[str, float]:
    """Largest deviation in eigenvalues, in the equation and in the normalisation, in float64."""
    values, vectors = solution.eigenvalues.double().cpu(), solution.eigenvectors.double().cpu()
    a, b = a.double().cpu(), b.double().cpu()
    differences = {
        "eigenvalues": values - scipy_eigenvalues(a, b),
        "equation": a @ vectors - b @ vectors * values[..., None, :],
        "normalisation": vectors.mT @ b @ vectors - torch.eye(a.shape[-1], dtype=torch.float64),
    }
    return {name: float(difference.abs().max()) for name, difference in differences.items() if difference.numel()}


class Checks:
    """The checks of one driver on one backend.

    Args:
        backend: Name of the backend.
        driver: Name of the driver.
        device: Where the tensors are.
    """

    def __init__(self, backend: str, driver: str, device: str = "cpu") -> None:
        self.backend, self.driver, self.device = backend, driver, device

    def solve(self, a: Tensor, b: Tensor) -> GeneralizedEigh:
        found = ops.generalized_eigh(a.to(self.device), b.to(self.device), driver=self.driver, backend=self.backend)
        return GeneralizedEigh(found.eigenvalues.cpu(), found.eigenvectors.cpu(), found.status.cpu())

    def solves(self, a: Tensor, b: Tensor, *, scale: float = 1.0) -> None:
        """`scale`: of the eigenvalues; deviations are relative to it and to the largest eigenvalue."""
        n, epsilon = a.shape[-1], torch.finfo(a.dtype).eps
        before = a.clone(), b.clone()
        solution = self.solve(a, b)
        assert solution.status.tolist() == [SolveStatus.CONVERGED] * len(a)
        assert (solution.eigenvalues.diff(dim=-1) >= 0).all()
        assert torch.equal(a, before[0])
        assert torch.equal(b, before[1])
        for name, error in errors(a, b, solution).items():
            assert error <= (1 if name == "normalisation" else scale) * 20 * (n + 5) * epsilon, name

    def solves_difficult_problems(self, dtype: torch.dtype) -> None:
        _, b = problems(1, 7, dtype)
        a = torch.randn(1, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(dtype)
        self.solves(a + a.mT, b, scale=20)  # eigenvalues of both signs
        self.solves(torch.zeros_like(b), b)
        self.solves(b, b)  # seven eigenvalues of one
        identity = torch.eye(7, dtype=dtype)[None]
        self.solves(identity, identity)
        self.solves(torch.ones_like(b), identity, scale=7)  # rank one
        self.solves(torch.diag(10.0 ** -torch.arange(0, 28, 4, dtype=dtype))[None], identity)

    def keeps_its_accuracy_at_every_scale(self, dtype: torch.dtype) -> None:
        # By powers of two, which round nothing: 2^±100 is about 10^±30.
        a, b = problems(1, 6, dtype)
        plain = self.solve(a, b)
        for scale_a, scale_b in ((2.0**100, 1.0), (2.0**-100, 1.0), (2.0**100, 2.0**100), (2.0**-40, 2.0**-100)):
            scaled = self.solve(a * scale_a, b * scale_b)
            assert scaled.status.tolist() == [SolveStatus.CONVERGED]
            assert torch.equal(scaled.eigenvalues, plain.eigenvalues * (scale_a / scale_b))
            assert torch.equal(scaled.eigenvectors, plain.eigenvectors / scale_b**0.5)

    def flags_a_failure_and_leaves_its_neighbours_alone(
        self, matrix: str, row: int, column: int, value: float, status: SolveStatus
    ) -> None:
        a, b = problems(4, 9, torch.float64)
        if status == SolveStatus.NOT_CONVERGED:
            b *= 1e-3  # a / b overflows
        undisturbed = self.solve(a, b)
        {"a": a, "b": b}[matrix][1, row, column] = value
        solution = self.solve(a, b)
        assert solution.status.tolist() == [0, status, 0, 0]
        assert solution.eigenvalues[1].isnan().all()
        assert solution.eigenvectors[1].isnan().all()
        assert torch.equal(solution.eigenvalues[[0, 2, 3]], undisturbed.eigenvalues[[0, 2, 3]])
        assert torch.equal(solution.eigenvectors[[0, 2, 3]], undisturbed.eigenvectors[[0, 2, 3]])

    def reads_lower_triangles_at_any_strides(self) -> None:
        a, b = problems(3, 6, torch.float64)
        expected = self.solve(a, b)
        upper = torch.full((6, 6), torch.nan, dtype=torch.float64).triu(1)
        views = [
            (a + upper, b + upper),
            (a.mT.contiguous().mT, b),
            (a, b.repeat_interleave(2, dim=0)[::2]),
            (a.repeat_interleave(2, dim=2)[..., ::2], torch.cat([b, b], dim=-1)[..., :6]),
        ]
        for pair in views:
            found = self.solve(*pair)
            assert torch.equal(found.eigenvalues, expected.eigenvalues)
            assert torch.equal(found.eigenvectors, expected.eigenvectors)
        expanded, alone = self.solve(a, b[:1].expand(3, 6, 6)), self.solve(a[2], b[0])
        assert torch.equal(expanded.eigenvectors[2], alone.eigenvectors)
        assert alone.status.shape == ()
