"""Solving Σ_t D_t M X_t = Σ_t D_t C_t X_t for M: a sum of Kronecker products, which is itself none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sstmerge.errors import SolverError

# Relative residual at which conjugate gradients stop, and steps after which they give up.
TOLERANCE = 1e-10
STEPS = 2000


@dataclass(frozen=True)
class KroneckerSum:
    """The operator M ↦ Σ_t D_t M X_t of a batch of layers.

    Attributes:
        X: Input factors, shape (T, L, R_i, R_i), float64, positive semidefinite.
        D: Output factors, shape (T, L, R_o, R_o), float64, positive semidefinite.
    """

    X: Tensor
    D: Tensor

    def __call__(self, cores: Tensor) -> Tensor:
        """Apply the operator.

        Args:
            cores: M, shape (L, R_o, R_i), or one per term, (T, L, R_o, R_i).

        Returns:
            Shape (L, R_o, R_i).
        """
        return (self.D @ cores @ self.X).sum(dim=0)


def solve_kronecker_sum(system: KroneckerSum, cores: Tensor, names: Sequence[str]) -> Tensor:
    """Solve Σ_t D_t M X_t = Σ_t D_t C_t X_t by conjugate gradients, preconditioned by (Σ_t D_t) ⊗ (Σ_t X_t).

    The preconditioner is the exact inverse where all terms are multiples of one Kronecker product.

    Args:
        system: The operator.
        cores: C_t, shape (T, L, R_o, R_i), float64.
        names: Names of the layers, for messages.

    Returns:
        M, shape (L, R_o, R_i), float64; relative residual at most `TOLERANCE` in every layer.

    Raises:
        SolverError: The operator is singular, or the residual does not get there.
    """
    X, D = _factor(system.X, names), _factor(system.D, names)
    right = system(cores)
    target = TOLERANCE * right.flatten(1).norm(dim=1)
    solution = _precondition(right, X, D)
    residual = right - system(solution)
    direction = torch.zeros_like(residual)
    previous = torch.ones(len(residual), dtype=residual.dtype)
    # The state of the layers that are not done, and their positions: some take ten times the steps of others.
    open_layers = torch.arange(len(residual))
    finished = solution.clone()
    for _ in range(STEPS):
        active = residual.flatten(1).norm(dim=1) > target
        if not bool(active.all()):
            finished[open_layers] = solution
            if not bool(active.any()):
                return finished
            open_layers, X, D, target = open_layers[active], X[active], D[active], target[active]
            system = KroneckerSum(system.X[:, active], system.D[:, active])
            solution, residual = solution[active], residual[active]
            direction, previous = direction[active], previous[active]
        lifted = _precondition(residual, X, D)
        energy = _inner(lifted, residual)
        direction = lifted + (energy / previous)[:, None, None] * direction
        image = system(direction)
        step = energy / _inner(direction, image)
        solution = solution + step[:, None, None] * direction
        residual = residual - step[:, None, None] * image
        previous = energy
    worst = int((residual.flatten(1).norm(dim=1) / target.clamp_min(torch.finfo(target.dtype).tiny)).argmax())
    name = names[int(open_layers[worst])]
    raise SolverError(
        f"Conjugate gradients did not solve the Fisher average of layer '{name}' in {STEPS} steps: its Fishers are "
        "too badly conditioned. Raise the damping."
    )


def _precondition(residual: Tensor, X: Tensor, D: Tensor) -> Tensor:
    """Apply ((Σ_t D_t) ⊗ (Σ_t X_t))⁻¹, of which X and D are the Cholesky factors."""
    left = torch.cholesky_solve(residual, D)
    lifted: Tensor = torch.cholesky_solve(left.mT, X).mT
    return lifted


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(1, 2))


def _factor(terms: Tensor, names: Sequence[str]) -> Tensor:
    """Return the Cholesky factors of Σ_t terms_t, (L, n, n)."""
    total = terms.sum(dim=0)
    factor, info = torch.linalg.cholesky_ex(total)
    if bool((info != 0).any()):
        name = names[int((info != 0).nonzero()[0])]
        raise SolverError(
            f"The Kronecker factors of layer '{name}' are singular together: the data never reach some of its directions. "
            "Raise the damping, or collect more data."
        )
    result: Tensor = factor
    return result
