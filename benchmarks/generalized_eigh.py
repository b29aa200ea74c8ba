"""Batched generalized eigenproblems: ours, a loop over scipy, and torch, on the same problems in one run.

    OPENBLAS_NUM_THREADS=1 pytest benchmarks/generalized_eigh.py --benchmark-group-by=group --benchmark-columns=min,median

Every timed call's result is checked against scipy in float64 afterwards. Compare within one run only: the ratios are
the result, and the number of threads is part of the name (set it with OMP_NUM_THREADS). OPENBLAS_NUM_THREADS=1 is the
fair setting for scipy: with more, its threads wait for each other inside every small problem.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from sstmerge.ops import GeneralizedEigh, generalized_eigh

# Batch × n: two adapters of rank 16 and 32 on a 7B model (448 = 2 sides × 32 layers × 7 modules), and larger stacks.
SHAPES = [(448, 32), (448, 64), (64, 128), (16, 320)]


@cache
def problems(batch: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw a of half rank and well-conditioned b, as Fishers of two adapters are; shapes (batch, n, n)."""
    generator = torch.Generator().manual_seed(0)
    gain = torch.randn(batch, n, n // 2, dtype=torch.float64, generator=generator)
    cost = torch.randn(batch, n, 3 * n, dtype=torch.float64, generator=generator)
    a = gain @ gain.mT / n
    b = cost @ cost.mT / (3 * n) + 0.1 * torch.eye(n, dtype=torch.float64)
    return a.to(dtype), b.to(dtype)


@cache
def exact_eigenvalues(batch: int, n: int, dtype: torch.dtype) -> np.ndarray:
    a, b = (matrices.double().numpy() for matrices in problems(batch, n, dtype))
    return np.stack([scipy.linalg.eigh(x, y, eigvals_only=True) for x, y in zip(a, b, strict=True)])


def scipy_loop(a: Tensor, b: Tensor) -> GeneralizedEigh:
    pairs = zip(a.numpy(), b.numpy(), strict=True)
    values, vectors = zip(*(scipy.linalg.eigh(x, y, driver="gvd", check_finite=False) for x, y in pairs), strict=True)
    status = torch.zeros(len(values), dtype=torch.int32)
    return GeneralizedEigh(torch.from_numpy(np.stack(values)), torch.from_numpy(np.stack(vectors)), status)


SOLVERS: dict[str, Callable[[Tensor, Tensor], GeneralizedEigh]] = {
    "sstmerge": lambda a, b: generalized_eigh(a, b, backend="cpu_compiled"),
    "scipy loop": scipy_loop,
    "torch": lambda a, b: generalized_eigh(a, b, backend="reference"),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("batch", "n"), SHAPES)
def test_generalized_eigh(benchmark, batch, n, dtype, solver):
    a, b = problems(batch, n, dtype)
    exact = exact_eigenvalues(batch, n, dtype)
    benchmark.group = f"{batch} x {n} {dtype}, {torch.get_num_threads()} threads"
    benchmark.extra_info |= {"torch": torch.__version__, "scipy": scipy.__version__}

    solution = benchmark.pedantic(SOLVERS[solver], args=(a, b), rounds=7, warmup_rounds=1)

    error = np.abs(solution.eigenvalues.double().numpy() - exact).max() / exact.max()
    assert error < 100 * torch.finfo(dtype).eps
    assert not solution.status.any()
