"""The truncated singular value decomposition from a poor guess, and that of a product, against NumPy's full one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sstmerge.merging.low_rank import compress
from sstmerge.merging.truncated_svd import truncated_svd


def matrix_with(values: torch.Tensor, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, len(values), generator=generator)).Q for n in (rows, columns))
    return left * values @ right.mT


def guess(columns: int, count: int = 12) -> torch.Tensor:
    return torch.randn(columns, count, generator=torch.Generator().manual_seed(9))


def best(matrix: torch.Tensor, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


SPECTRA = {
    "a gap": torch.cat([torch.linspace(5, 3, 12), torch.linspace(1, 0.5, 188)]),
    "slow decay": torch.arange(1, 201) ** -0.5,
    "small against the first": torch.cat([torch.tensor([100.0]), torch.linspace(1, 0.8, 11), torch.full((188,), 0.3)]),
}


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
@pytest.mark.parametrize("shape", [(400, 250), (250, 400)])
def test_it_is_the_best_approximation(spectrum, shape):
    matrix = matrix_with(spectrum, *shape)
    left, values, right = truncated_svd(matrix, 12, guess(matrix.shape[1]))
    found = (left * values @ right.mT).numpy()
    expected = best(matrix, 12)
    assert np.linalg.norm(found - expected) < 3e-6 * np.linalg.norm(expected)
    torch.testing.assert_close(values, spectrum[:12].double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left.mT @ left, torch.eye(12, dtype=torch.float64), atol=1e-5, rtol=0)


def test_a_flat_spectrum_ends_and_is_as_good_as_any_approximation():
    matrix = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    left, values, right = truncated_svd(matrix, 12, guess(matrix.shape[1]))
    lost = np.linalg.norm(matrix.numpy() - (left * values @ right.mT).numpy())
    assert lost < (1 + 1e-6) * np.linalg.norm(matrix.numpy() - best(matrix, 12))


def test_a_matrix_of_lower_rank_or_of_zeros():
    matrix = matrix_with(torch.tensor([3.0, 2.0, 1.0]), 300, 250)
    left, values, right = truncated_svd(matrix, 12, guess(matrix.shape[1]))
    assert torch.isfinite(left).all()
    assert float(values[3:].max()) < 1e-5
    np.testing.assert_allclose((left * values @ right.mT).numpy(), matrix.numpy(), atol=1e-6)
    assert not any(part.isnan().any() for part in truncated_svd(torch.zeros(300, 250), 12, guess(250)))


def test_compress_decomposes_a_product():
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(2, 30, 4, generator=generator), torch.randn(2, 4, 20, generator=generator)
    left, values, right = compress(B, A)
    torch.testing.assert_close((left * values[:, None, :]) @ right.mT, (B @ A).double(), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(values[0], np.linalg.svd((B[0] @ A[0]).numpy())[1][:4], rtol=1e-5)
    torch.testing.assert_close(left.mT @ left, torch.eye(4, dtype=torch.float64).expand(2, 4, 4), atol=1e-6, rtol=0)
