"""KnOTS against NumPy on full matrices, and the similarity of experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_cases import (
    LAYERS,
    dense,
    elected_mean,
    largest_difference,
    merged,
    positive_sums,
    random_adapter,
    three_adapters,
    trimmed,
)

from sstmerge.adapters import Adapter, CoreSpace, LoraFactors
from sstmerge.merging.methods import expert_similarity

WEIGHTS = [1.0, 0.5, 2.0]


def aligned(path, adapters):
    """Return U and the S V_t of KnOTS, from the singular value decomposition of [ΔW_1 … ΔW_T]."""
    deltas = [dense(adapter)[path] for adapter in adapters]
    left, values, _ = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    kept = values > 1e-5
    basis = positive_sums(left[:, kept])
    return basis, np.split(basis.T @ np.concatenate(deltas, axis=1), len(adapters), axis=1)


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
def test_knots_ties(majority_sign):
    expected = {}
    for path in LAYERS:
        basis, tasks = aligned(path, three_adapters())
        expected[path] = 0.6 * basis @ elected_mean([trimmed(t, 0.3) for t in tasks], WEIGHTS, majority_sign)
    options = {"density": 0.3, "trim_over": "tensor", "scale": 0.6, "majority_sign": majority_sign}
    assert largest_difference(merged(three_adapters(), "knots_ties", WEIGHTS, options=options), expected) < 1e-5


def test_knots_ties_trims_the_whole_adapter():
    adapters = three_adapters()[:2]  # both have all layers
    bases, tasks = {}, [{}, {}]
    for path in LAYERS:
        bases[path], (tasks[0][path], tasks[1][path]) = aligned(path, adapters)
    expected = {}
    for task in tasks:
        everything = np.sort(np.abs(np.concatenate([part.ravel() for part in task.values()])))[::-1]
        threshold = everything[round(0.3 * everything.size) - 1] * (1 - 1e-6)
        for path, part in task.items():
            task[path] = np.where(np.abs(part) >= threshold, part, 0.0)
    expected = {p: bases[p] @ elected_mean([task[p] for task in tasks], WEIGHTS[:2]) for p in LAYERS}
    result = merged(adapters, "knots_ties", WEIGHTS[:2], options={"density": 0.3, "trim_over": "model"})
    assert largest_difference(result, expected) < 1e-5


def test_knots_dare_ties_without_dropping_is_knots_ties():
    options = {"density": 1.0, "trim_density": 0.3, "scale": 0.7}
    result = merged(three_adapters(), "knots_dare_ties", WEIGHTS, options=options)
    expected = {"density": 0.3, "trim_over": "tensor", "scale": 0.7}
    assert largest_difference(result, merged(three_adapters(), "knots_ties", WEIGHTS, options=expected)) < 1e-6


def test_knots_dare_drops_entries_of_the_aligned_tasks():
    adapter = random_adapter("math", 4, seed=1)
    result = merged([adapter], "knots_dare_ties", options={"density": 0.6}, seed=2)
    for path in LAYERS:
        basis, (task,) = aligned(path, [adapter])
        found = basis.T @ result[path]
        kept = np.abs(found) > 1e-4
        np.testing.assert_allclose(found, kept * task / 0.6, atol=1e-4)
        assert 0.45 < kept.mean() < 0.75
    assert largest_difference(merged([adapter], "knots_dare_ties", options={"density": 0.6}, seed=3), result) > 0.3


def test_the_rank_is_at_most_that_of_the_adapters_together():
    result = merged(three_adapters(), "knots_ties", WEIGHTS)
    assert np.linalg.matrix_rank(result["layers.0.q_proj"], tol=1e-5) <= 9


def dense_similarity(adapters):
    """QR of the stacked, normalised weight changes; cosine of the Gram matrices of its blocks."""
    products = np.zeros((len(adapters), len(adapters)))
    for path in LAYERS:
        deltas = [dense(adapter)[path] for adapter in adapters]
        deltas = [delta / max(np.linalg.norm(delta), 1e-300) for delta in deltas]
        stack = np.concatenate(deltas)
        left, values, _ = np.linalg.svd(stack, full_matrices=False)  # any orthonormal basis of the columns will do
        blocks = np.split(left[:, values > 1e-8], len(adapters))
        grams = [block.T @ block for block in blocks]
        products += [[np.trace(g @ h) for g in grams] for h in grams]
    own = np.sqrt(np.diag(products))
    return products / np.outer(own, own)


def test_similarity_equals_the_dense_one():
    similarity = expert_similarity(CoreSpace.of(three_adapters())).numpy()
    np.testing.assert_allclose(similarity, dense_similarity(three_adapters()), atol=1e-5)
    np.testing.assert_allclose(np.diag(similarity), 1.0)


def test_similarity_of_equal_scaled_and_unrelated_adapters():
    one = random_adapter("one", 3, seed=1)
    scaled = Adapter("scaled", {p: LoraFactors(f.A, f.B, -5 * f.scaling) for p, f in one.layers.items()})
    # Rows that are orthogonal to those of the first.
    unrelated = {}
    for path, factors in random_adapter("other", 2, seed=2).layers.items():
        basis = torch.linalg.qr(one.layers[path].A.mT).Q
        unrelated[path] = LoraFactors(factors.A - factors.A @ basis @ basis.mT, factors.B, 1.0)
    similarity = expert_similarity(CoreSpace.of([one, scaled, Adapter("other", unrelated)]))
    expected = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(similarity, expected, atol=1e-6, rtol=0)


def test_similarity_is_the_cosine_of_squared_singular_values_where_one_basis_serves_all():
    generator = torch.Generator().manual_seed(0)
    V = torch.linalg.qr(torch.randn(40, 4, generator=generator, dtype=torch.float64)).Q
    sizes = torch.tensor([[1.0, 2, 0, 3], [2, 1, 1, 0.5]], dtype=torch.float64)
    adapters = []
    for name, sigma in zip(("one", "two"), sizes, strict=True):
        U = torch.linalg.qr(torch.randn(24, 4, generator=generator, dtype=torch.float64)).Q
        adapters.append(Adapter(name, {"layers.0.q_proj": LoraFactors(A=sigma[:, None] * V.mT, B=U, scaling=1.0)}))
    scaled = (sizes / sizes.norm(dim=1, keepdim=True)).square()
    shares = scaled / scaled.sum(dim=0)
    cosine = shares[0] @ shares[1] / (shares[0].norm() * shares[1].norm())
    torch.testing.assert_close(expert_similarity(CoreSpace.of(adapters))[0, 1], cosine, atol=1e-6, rtol=0)
