"""The two SVDs of the drop-in against NumPy's in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sstmerge.merging import truncated_svd as module
from sstmerge.merging.low_rank import weighted_sum_svd
from sstmerge.merging.truncated_svd import truncated_svd
from sstmerge.peft_drop_in.merging import quantile


def best(matrix, rank):
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return torch.from_numpy((left[:, :rank] * values[:rank]) @ right[:rank])


def error(triplets, expected):
    left, values, right = (part.double() for part in triplets)
    return float(((left * values) @ right.mT - expected).norm() / expected.norm())


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("rank", [1, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (5, 70), (70, 5)])
def test_the_sum_of_products(rank, dtype, shape):
    rank = min(rank, *shape)
    A = [draw(r, shape[1], seed=r, dtype=dtype) for r in (2, 3, 4)]
    B = [draw(shape[0], r, seed=10 + r, dtype=dtype) for r in (2, 3, 4)]
    weights = [1.0, -0.5, 3.0]
    dense = sum(w * b.double() @ a.double() for w, a, b in zip(weights, A, B, strict=True))
    left, values, right = weighted_sum_svd(A, B, weights, rank)
    assert error((left, values, right), best(dense, rank)) < 1e-12
    for basis in (left, right):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, -1.0 + 1e-4]])
def test_the_same_adapter_twice(weights):
    A, B = draw(4, 60, dtype=torch.float32), draw(50, 4, seed=1, dtype=torch.float32)
    expected = best(sum(weights) * B.double() @ A.double(), 4)
    assert error(weighted_sum_svd([A, A], [B, B], weights, 4), expected) < 1e-10


def test_an_adapter_that_cancels_itself():
    A, B = draw(4, 60, dtype=torch.float32), draw(50, 4, seed=1, dtype=torch.float32)
    left, values, right = weighted_sum_svd([A, A], [B, B], [1.0, -1.0], 4)
    assert float(((left * values) @ right.mT).abs().max()) < 1e-12


def test_adapters_that_change_nothing():
    A = draw(4, 60, dtype=torch.float32)
    left, values, right = weighted_sum_svd([A, torch.zeros_like(A)], [torch.zeros(50, 4)] * 2, [1.0, 1.0], 4)
    assert not bool(values.any())
    assert bool(torch.isfinite(left).all() and torch.isfinite(right).all())


def test_badly_scaled_factors():
    scale = torch.logspace(-12, 12, 4, dtype=torch.float64)
    A, B = draw(4, 60), draw(50, 4, seed=1)
    expected = best(B @ A, 4)
    triplets = weighted_sum_svd([(scale[:, None] * A).float()], [(B / scale).float()], [1.0], 4)
    assert error(triplets, expected) < 1e-6


def noisy(shape, signal, noise, seed=0):
    """Return rank-6 signal plus full-rank noise, and the row space of the signal."""
    left = torch.linalg.qr(draw(shape[0], 6, seed=seed)).Q
    right = torch.linalg.qr(draw(shape[1], 6, seed=seed + 1)).Q
    values = signal * torch.linspace(2, 1, 6, dtype=torch.float64)
    spread = draw(*shape, seed=seed + 2) / (shape[0] ** 0.5 + shape[1] ** 0.5)
    return (left * values) @ right.mT + noise * spread, right


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("shape", [(120, 200), (200, 120)])
def test_a_dense_matrix(dtype, noise, shape, monkeypatch):
    monkeypatch.setattr(torch.linalg, "svd", None)  # it must converge by itself
    matrix, rows = noisy(shape, 1.0, noise)
    for rank in (2, 6):
        assert error(truncated_svd(matrix.to(dtype), rank, rows), best(matrix.to(dtype), rank)) < 2e-6


def test_a_poor_guess_only_takes_longer(monkeypatch):
    matrix, _ = noisy((150, 200), 1.0, 0.5)
    monkeypatch.setattr(torch.linalg, "svd", None)
    assert error(truncated_svd(matrix, 6, draw(200, 8, seed=9)), best(matrix, 6)) < 2e-6


@pytest.mark.parametrize("seed", range(3))
def test_noise_without_a_gap_falls_back_on_the_full_svd(seed, monkeypatch):
    full, calls = torch.linalg.svd, []
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **o: calls.append(1) or full(*a, **o))
    monkeypatch.setattr(module, "_MOST_ROUNDS", 2)
    matrix = draw(150, 200, seed=seed)
    triplets = truncated_svd(matrix, 6, draw(200, 8, seed=50))
    assert calls
    assert error(triplets, best(matrix, 6)) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_noise_without_a_gap_is_right_all_the_same(seed):
    matrix = draw(150, 200, seed=seed)
    assert error(truncated_svd(matrix, 6, draw(200, 8, seed=50)), best(matrix, 6)) < 2e-6


def test_a_matrix_of_lower_rank_than_asked_for():
    matrix = draw(100, 2) @ draw(2, 120, seed=1)
    left, values, right = truncated_svd(matrix, 5, draw(120, 2))
    assert error((left, values, right), matrix) < 1e-10
    left, values, right = truncated_svd(torch.zeros(100, 120), 5, torch.zeros(120, 2))
    assert not bool(values.any())


def test_small_matrices_and_deterministic_results():
    matrix = draw(9, 12)
    assert error(truncated_svd(matrix, 3, draw(12, 3)), best(matrix, 3)) < 1e-12
    large, rows = noisy((120, 200), 1.0, 0.3)
    state = torch.get_rng_state()
    first, second = truncated_svd(large, 4, rows), truncated_svd(large, 4, rows)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


@pytest.mark.parametrize("share", [0.501, 0.75, 0.9, 1.0])
def test_the_quantile(share):
    values = draw(1001)
    assert quantile(values, share) == pytest.approx(float(torch.quantile(values, share)), rel=1e-12)
