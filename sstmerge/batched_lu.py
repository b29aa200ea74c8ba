"""What takes an LU factorisation of many matrices, safe from a race in torch.

On a CPU torch factorises the matrices of a batch in several threads, and MKL then starts threads of its own inside each:
after `torch.set_num_threads(2)`, `torch.linalg.inv` and `solve` of a batch of matrices from about n = 150 on give wrong
numbers or never return (https://github.com/pytorch/pytorch/issues/141358, /issues/142815; seen with torch 2.13). One matrix
at a time is safe, has all threads, and is as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inverse(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Invert a batch of matrices.

    Args:
        matrices: Shape (L, n, n).

    Returns:
        The inverses, shape (L, n, n), and for each matrix a number, shape (L,), int32, which is 0 unless it is singular;
        the inverse of a singular matrix is meaningless.
    """
    if matrices.device.type != "cpu":
        found: tuple[Tensor, Tensor] = torch.linalg.inv_ex(matrices)
        return found
    inverses = torch.empty_like(matrices, memory_format=torch.contiguous_format)
    info = torch.empty(len(matrices), dtype=torch.int32)
    for matrix, result, number in zip(matrices, inverses, info, strict=True):
        result[:], number[()] = torch.linalg.inv_ex(matrix)
    return inverses, info


def solve(matrices: Tensor, right: Tensor) -> Tensor:
    """Solve M_l X_l = B_l for every matrix of a batch.

    Args:
        matrices: M, shape (L, n, n).
        right: B, shape (L, n, k).

    Returns:
        X, shape (L, n, k).

    Raises:
        torch.linalg.LinAlgError: A matrix is singular.
    """
    if matrices.device.type != "cpu":
        solution: Tensor = torch.linalg.solve(matrices, right)
        return solution
    return torch.stack([torch.linalg.solve(matrix, column) for matrix, column in zip(matrices, right, strict=True)])
